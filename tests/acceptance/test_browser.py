"""What a user sees behind the links that `hpo run` prints, in a real browser (Debian's chromium)."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import browser
import cells
import pytest
from PIL import Image
from places import ROOT
from selenium.webdriver.common.by import By
from shell import Shell, fresh_database

from hpo.queue.closing_result import ClosingResult
from hpo.study.records import StudyFacts
from hpo.tracking.client import Tracker

pytestmark = [pytest.mark.apt, pytest.mark.acceptance]

PAGES = ("list", "charts", "compare")
EPOCHS = 5
PARAMS = ("config", "filters", "learning_rate")
HEAD = ("tags.`hpo.rank`", "metrics.`best_val_nmse`", "metrics.`best_val_r2`", "metrics.`test_nmse`")
CUT = ("metrics.`best_val_r2`", "metrics.`test_nmse`")  # of these the page hides the last digits
SCORES = ("best_val_nmse", "best_val_mse", "best_val_r2", "best_val_nrmse", "best_epoch", "train_seconds")


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A sequence of two studies that has run to its end: `single`, of one point, and `pages`, of four."""

    links: dict[str, str]  # of pages, and of the comparison
    trials: list[dict]  # of pages, best first
    curves: dict[str, dict]  # by run
    facts: StudyFacts
    result: ClosingResult  # of its closing
    model: str  # id of the best trial's
    uri: str
    report: Path  # folder of the report of both

    def run(self, run_id: str, path: str = "") -> str:
        return f"{self.uri}/#/experiments/{self.facts.experiment_id}/runs/{run_id}{path}"


@pytest.fixture(scope="module")
def ran(services, tmp_path_factory) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp("browser")
    data = cells.make(folder / "cells")
    cells.study(folder, "pages", data=data, epochs=EPOCHS, rates="[1e-2, 1e-3]")  # they beat the mean
    named = folder / "pages.toml"
    named.write_text(named.read_text().replace("Four points for a test.", "Four points for a test by @jane."))
    single = cells.study(folder, "single", data=data, epochs=EPOCHS, rates="[1e-2]")
    single.write_text(single.read_text().replace("[2, 4]", "[2]"))
    (folder / "both.toml").write_text('sequence = ["single.toml", "pages.toml"]')
    with fresh_database(services) as url, closing(Shell(folder / "home", url, services.tracking_uri)) as shell:
        output = shell.hpo("run", "--study", folder / "both.toml", "--trainers", 1)
        shell.hpo("report", "-o", folder / "report")
        (close,) = [job for job in shell.queue.jobs("pages") if job.kind == "closing"]
        jobs = shell.trials("pages")
        (best,) = [job for job in jobs if job.number == close.closing.winner.number]
        yield Ran(
            links={page: re.findall(rf"{page}:\s+(\S+)", output)[-1] for page in PAGES},
            trials=sorted(shell.json("trials", "--study", "pages"), key=lambda trial: trial["value"]),
            curves={job.run_id: dict(shell.queue.curve(job.id)) for job in jobs},
            facts=shell.queue.study("pages").facts,
            result=close.closing,
            model=best.result.model_id,
            uri=services.tracking_uri,
            report=folder / "report",
        )


@pytest.fixture
def driver() -> Iterator[browser.Chrome]:
    with browser.chromium() as made:
        yield made


def shows(driver, url: str, *words: str) -> str:
    """Open a page and wait until all of these stand on it; return its text."""
    driver.get("about:blank")  # else only the part behind # changes, and the page before is still there
    driver.get(url)
    browser.until(driver, lambda: all(word in browser.text(driver) for word in words), f"{words}")
    return browser.text(driver)


def test_the_links_show_the_trials_best_first_with_their_curves(ran):
    assert len(ran.trials) == 4
    with browser.chromium() as driver:
        names = check_list(driver, ran.links["list"], ran.trials)
    assert names[0].startswith("pages/") and re.fullmatch(r"pages/\d f\d lr(0\.01|1e-3)", names[0])
    with browser.chromium() as driver:
        expected = {name: ran.curves[trial["run_id"]] for name, trial in zip(names, ran.trials, strict=True)}
        check_charts(driver, ran.links["charts"], expected)


def test_parameters_are_seen_without_a_click_as_scatter_and_parallel_coordinates(driver, ran):
    browser.resize(driver, (1500, 1155))
    driver.get(ran.links["charts"])
    titles = ("Parallel Coordinates", "best_epoch vs. best_val_nmse")
    browser.until(driver, lambda: set(titles) <= set(browser.cards(driver)), "both charts")
    browser.settle(driver)
    text = browser.text(driver)
    for name in ("filters", "learning_rate", "best_val_nmse"):
        assert name in text[text.index(titles[0]) :], "an axis"
    places = browser.cards(driver)
    assert all(places[title][1] < 1155 for title in titles), "without scrolling"


def test_a_link_compares_the_studies_of_a_sequence(driver, ran):
    driver.get(ran.links["compare"])
    rows = browser.until(driver, lambda: len(found := browser.rows(driver)) == 7 and found, "seven rows")
    names = [row["attributes.`Run Name`"]["text"].splitlines()[-1] for row in rows]
    assert {name.partition("/")[0] for name in names} == {"single", "pages"}
    assert sum("predictor" in name for name in names) == 2, "each baseline predictor once"
    values = [float(row["metrics.`best_val_nmse`"]["text"]) for row in rows]
    assert values == sorted(values)
    for column in ("model.family", "filters"):
        assert {row[f"params.`{column}`"]["text"] for row in rows} - {"-"}


def test_a_trials_page_shows_data_set_model_registered_version_and_plots(driver, ran):
    best, winner = ran.trials[0], ran.result.winner
    data = f"{ran.facts.data.name} ({ran.facts.data.digest[:36]})"
    text = shows(driver, ran.run(best["run_id"]), "Logged models (1)", data, f"v{winner.version}")
    assert ran.facts.model_name in text[text.index("Logged models (1)") :]
    assert f"pages-{best['config']}" in text, "the model has the trial's name"
    params = Tracker(ran.uri).client.get_run(best["run_id"]).data.params
    assert params["filters"] and params["model.kernel_size"] and "model.filters" not in params
    driver.find_element(By.LINK_TEXT, "parity").click()
    driver.switch_to.window(browser.until(driver, lambda: driver.window_handles[1:], "a tab of its own")[0])
    assert browser.until(driver, lambda: browser.pictures(driver), "the plot, one click away")[0][0] >= 700
    for trial in ran.trials:
        for name in ("loss", "parity"):
            shows(driver, ran.run(trial["run_id"], f"/artifacts/plots/{name}.png"), f"plots/{name}.png")
            sizes = browser.until(driver, lambda: browser.pictures(driver), "the picture")
            assert sizes[0][0] >= 700
    text = shows(driver, ran.run(best["run_id"], "/artifacts/plots/parity-test.png"), "parity-test.png")


def test_a_model_shows_its_signature(driver, ran):
    experiment, model = ran.facts.experiment_id, ran.model
    shows(driver, f"{ran.uri}/#/experiments/{experiment}/models/{model}/artifacts", "MLmodel")
    driver.find_element(By.XPATH, "//*[text()='MLmodel']").click()
    text = browser.until(driver, lambda: "signature:" in (found := browser.text(driver)) and found, "the signature")
    assert '"shape": [-1, 1, 16, 16]' in " ".join(text.split())


def test_the_studys_run_carries_its_description_and_tables(driver, ran):
    run = ran.facts.study_run_id
    shows(driver, ran.run(run), "Four points for a test by @jane.", "data set tiny (60 cells, 42/9/9")
    assert not strangers(driver)
    shows(driver, ran.run(run, "/artifacts/tables/result.txt"), "pages: best 4 of 4 trials", "volume fraction, cubic")
    shows(driver, ran.run(run, "/artifacts/tables/comparison.txt"), "Comparison: the best of each", "single f2")


def test_the_registered_models_page_explains_each_version(driver, ran):
    name, winner = ran.facts.model_name, ran.result.winner
    text = shows(driver, f"{ran.uri}/#/models/{name}", "Models trained on tiny", "validation NMSE")
    assert "compete for @champion" in text and not strangers(driver)
    table = text[text.index("validation NMSE verdict aliases") :]
    for study in ("single", "pages"):
        assert re.search(
            rf"\d {study}/\d f\d lr(0\.01|1e-3) 0\.\d+ (good|below|not distinguishable) .*@{study}", table
        ), table
    version = f"{ran.uri}/#/models/{name}/versions/{winner.version}"
    text = shows(driver, version, "this model", "mean of the training labels", "Inputs (1)")
    assert "of the study pages (filters = " in text


# The tables that end beyond the page, and the cells whose text is wider than they are.
TOO_WIDE = """
const page = document.documentElement.clientWidth + 1;
const tables = [...document.querySelectorAll('table')].filter(each => each.getBoundingClientRect().right > page);
const cells = [...document.querySelectorAll('th, td')].filter(each => each.scrollWidth > each.clientWidth + 1);
return [...tables, ...cells].map(each => each.innerText.slice(0, 80));
"""


def test_a_report_begins_with_the_result_and_cuts_no_column_on_screen_or_in_print(ran):
    with browser.chromium(size=(1440, 900)) as driver:
        driver.get((ran.report / "report.html").as_uri())
        text = browser.text(driver)
        title, first = [line for line in text.splitlines() if line][:2]
        assert title == "single, pages on tiny" and first.startswith("Selected: ")
        assert "Selected models on the test split" in text and "Claims" not in text, "the studies state none"
        assert driver.execute_script(TOO_WIDE) == []
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        browser.resize(driver, (718, 1050))  # pixels of a sheet of A4 without its margins
        assert driver.execute_script(TOO_WIDE) == []


@pytest.mark.long
def test_the_pictures_of_the_documentation_are_made_from_links(ran, tmp_path):
    parity = ran.run(ran.trials[0]["run_id"], "/artifacts/plots/parity.png")
    pages = {"list": ran.links["list"], "parameters": ran.links["charts"], "parity": parity}  # one of each kind
    words = [f"{name}={url}" for name, url in pages.items()]
    subprocess.run([sys.executable, ROOT / "docs/screenshots.py", *words, "-o", tmp_path], check=True)
    for page in pages:
        with Image.open(tmp_path / f"{page}.png") as picture:
            assert page == "parameters" or picture.width == browser.SIZE[0]
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 100, "more than an empty page"


def check_list(driver, link: str, trials: list[dict]) -> list[str]:
    """Look at the list as on a first visit, then at all of it; return the names of the trials' runs, best first."""
    driver.get(link)
    rows = browser.until(driver, lambda: len(found := browser.rows(driver)) == 6 and found, "six rows in the list")
    for row in rows:
        for column in ("attributes.`Run Name`", *HEAD, "params.`filters`"):
            assert row[column]["inside"], f"{column} is seen beside MLflow's Assistant as well"
            assert row[column]["whole"] or column in ("attributes.`Run Name`", *CUT)
    ranks = [row[HEAD[0]]["text"] for row in rows if row["params.`filters`"]["text"] != "-"]
    assert ranks == [str(rank) for rank in range(1, len(trials) + 1)]
    assert [row[HEAD[3]]["text"] != "-" for row in rows if row[HEAD[0]]["text"] == "1"] == [True], "the winner's test"

    browser.close_assistant(driver)
    columns = [*HEAD, "params.`filters`", "params.`learning_rate`"]
    rows = browser.until(driver, lambda: with_columns(driver, columns), f"the columns {columns}")
    assert all(row[column]["inside"] for row in rows for column in columns), "without scrolling"
    browser.resize(driver, (2400, 900))  # the page makes no cells for columns that are out of sight
    columns = [*(f"metrics.`{name}`" for name in SCORES), *(f"params.`{name}`" for name in PARAMS)]
    rows = browser.until(driver, lambda: with_columns(driver, columns), f"the columns {columns}")
    assert len(rows) == 6
    values = [float(row["metrics.`best_val_nmse`"]["text"]) for row in rows]
    assert values == sorted(values), "the trivial predictors stand at their place among the trials"
    assert all(row[column]["inside"] and (row[column]["whole"] or column in CUT) for row in rows for column in columns)
    listed = [row for row in rows if row["params.`filters`"]["text"] != "-"]
    for row, trial in zip(listed, trials, strict=True):
        shown = {column: row[column]["text"] for column in columns}
        assert float(shown["metrics.`best_val_nmse`"]) == trial["value"]
        assert shown["params.`config`"] == str(trial["config"])
        assert shown["params.`filters`"] == str(trial["params"]["filters"])
        assert float(shown["params.`learning_rate`"]) == trial["params"]["learning_rate"]
        assert all(float(text) == float(text) for text in shown.values()), "a number in each"
    return [row["attributes.`Run Name`"]["text"].splitlines()[-1] for row in listed]


def strangers(driver) -> list[str]:
    """Names with an at sign that the page has turned into links."""
    return [link.text for link in driver.find_elements(By.TAG_NAME, "a") if link.text.startswith("@")]


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
