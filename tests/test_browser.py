"""What a user sees behind the two links that `hpo run` prints, in a real browser (Debian's chromium)."""

import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import browser
import cells
import pytest
from PIL import Image
from shell import Shell

pytestmark = [pytest.mark.apt, pytest.mark.acceptance]

PAGES = ("list", "charts")
ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 5
PARAMS = ("config", "filters", "learning_rate")
SCORES = ("best_val_nmse", "best_val_mse", "best_val_r2", "best_val_nrmse", "best_epoch", "train_seconds")


def test_the_links_show_the_trials_best_first_with_their_curves(database_url, tracking_uri, tmp_path):
    data = cells.make(tmp_path / "cells")
    study = cells.study(tmp_path, tmp_path.parent.name, data=data, epochs=EPOCHS)  # a name of this session
    with closing(Shell(tmp_path / "home", database_url, tracking_uri)) as shell:
        output = shell.hpo("run", "--study", study)
        trials = sorted(shell.json("trials", "--study", study.stem), key=lambda trial: trial["value"])
        curves = {job.run_id: dict(shell.queue.curve(job.id)) for job in shell.trials(study.stem)}
    assert len(trials) == 4
    links = [re.search(rf"{page}:\s+(\S+)", output)[1] for page in PAGES]
    with browser.chromium() as driver:
        names = check_list(driver, links[0], trials)
    with browser.chromium() as driver:
        expected = {name: curves[trial["run_id"]] for name, trial in zip(names, trials, strict=True)}
        check_charts(driver, links[1], expected)

    subprocess.run([sys.executable, ROOT / "docs/screenshots.py", *links, "-o", tmp_path], check=True)
    for page in PAGES:
        with Image.open(tmp_path / f"{page}.png") as picture:
            assert picture.width == browser.SIZE[0]
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 100, "more than an empty page"


def check_list(driver, link: str, trials: list[dict]) -> list[str]:
    """Look at the list as on a first visit, then at all of it; return the names of the trials' runs, best first."""
    driver.get(link)
    rows = browser.until(driver, lambda: len(found := browser.rows(driver)) == 6 and found, "six rows in the list")
    for row in rows:
        for column in ("metrics.`best_val_nmse`", "params.`config`", "params.`filters`"):
            assert row[column]["inside"] and row[column]["whole"], "seen beside MLflow's Assistant as well"

    browser.close_assistant(driver)
    browser.resize(driver, (2400, 900))  # the page makes no cells for columns that are out of sight
    columns = [*(f"metrics.`{name}`" for name in SCORES), *(f"params.`{name}`" for name in PARAMS)]
    rows = browser.until(driver, lambda: with_columns(driver, columns), f"the columns {columns}")
    assert len(rows) == 6
    values = [float(row["metrics.`best_val_nmse`"]["text"]) for row in rows]
    assert values == sorted(values), "the trivial predictors stand at their place among the trials"
    cut = [row for row in rows if not all(row[column]["inside"] and row[column]["whole"] for column in columns)]
    assert not cut
    listed = [row for row in rows if row["params.`filters`"]["text"] != "-"]
    for row, trial in zip(listed, trials, strict=True):
        shown = {column: row[column]["text"] for column in columns}
        assert float(shown["metrics.`best_val_nmse`"]) == trial["value"]
        assert shown["params.`config`"] == str(trial["config"])
        assert shown["params.`filters`"] == str(trial["params"]["filters"])
        assert float(shown["params.`learning_rate`"]) == trial["params"]["learning_rate"]
        assert all(float(text) == float(text) for text in shown.values()), "a number in each"
    return [row["attributes.`Run Name`"]["text"].splitlines()[-1] for row in listed]


def with_columns(driver, columns: list[str]) -> list[dict]:
    """The rows of the list once each has these columns; none before."""
    rows = browser.rows(driver)
    return rows if all(set(columns) <= set(row) for row in rows) else []


def check_charts(driver, link: str, expected: dict[str, dict]) -> None:
    """Both curves of each run in `expected` are drawn, on logarithmic axes, with the values that were recorded."""
    driver.get(link)
    browser.until(driver, lambda: drawn(driver, "train/nmse", 2 * len(expected)), "the curves")
    browser.settle(driver)
    for key in ("val/nmse", "train/nmse"):
        (chart,) = drawn(driver, key, 2 * len(expected))
        assert chart["scale"] == "log"
        assert {curve["run"] for curve in chart["curves"]} == set(expected)
        assert len(chart["curves"]) == 2 * len(expected), "each as it is smoothed, and pale as it is"
        for curve in chart["curves"]:
            recorded = expected[curve["run"]]
            assert curve["steps"] == list(range(1, EPOCHS + 1))
            assert curve["values"] == [recorded[step][key] for step in curve["steps"]], "not smoothed"


def drawn(driver, title: str, count: int) -> list[dict]:
    """The charts of this title once they show so many lines; none before."""
    return [chart for chart in browser.charts(driver) if chart["title"] == title and chart["drawn"] >= count]
