"""The winners of several studies on one data set in one table, as a sequence prints it at its end."""

import tempfile
from pathlib import Path
from typing import Any

import pandas

from hpo.queue import StudyRow
from hpo.queue.closing_result import ClosingResult
from hpo.report import tables
from hpo.report.tables import Column, Row, Table
from hpo.report.words import BASELINES, SCORES, score_columns, score_values, spread_text
from hpo.text import point_text
from hpo.tracking import experiments
from hpo.tracking.client import Tracker

Closed = tuple[StudyRow, ClosingResult]  # a study and the result of its closing


def comparable(closed: list[Closed]) -> list[list[Closed]]:
    """Return groups of two studies or more on one data set and split: scores on others cannot be compared."""
    groups: dict[tuple[str, str], list[Closed]] = {}
    for row, ended in closed:
        groups.setdefault((row.facts.data.digest, row.facts.data.split), []).append((row, ended))
    return [group for group in groups.values() if len(group) > 1]


def winners_table(closed: list[Closed]) -> Table:
    """Return the winners beside the baseline predictors, best first: a row for each split, and one for repeats."""
    rows = []
    for study, point, entry in _ranked(closed):
        head = {"model": f"{study} {point}".strip()}
        below = ""
        if study:
            head |= {"weights": entry["weights"] or "from scratch", "parameters": f"{entry['parameters']:,}"}
            below = "" if entry["verdict"] == "good" else f"  {entry['verdict']}"
        style = "" if study else "dim"
        rows.append(Row(values=head | {"split": "validation"} | score_values(entry["validation"]), style=style))
        rows.append(Row(values={"model": below, "split": "test"} | score_values(entry["test"]), style=style))
        if spread := _spread(entry):
            blank = dict.fromkeys(("MSE", "R²", "NRMSE"), "")
            rows.append(Row(values={"split": "validation, repeats", "NMSE": spread} | blank, style=style))
    words = [
        Column(name=name, left=True, text=tables.cell_text, folds=name == "model") for name in ("model", "weights")
    ]
    numbers = [Column(name="parameters", text=tables.cell_text), Column(name="split", left=True)]
    scores = score_columns(closed[0][0].facts.data.unit)
    title = "Comparison: the best of each, selected on the validation split"
    return Table(title=title, columns=[*words, *numbers, *scores], rows=rows)


def _spread(entry: dict[str, Any]) -> str:
    """Return `mean 0.0651 ± 0.0012` of a configuration that was trained several times, and which repeats it lacks."""
    lacks = f" ({entry['incomplete']})" if entry.get("incomplete") else ""
    if entry.get("point_deviation") is None:
        return lacks.strip()
    return f"mean {spread_text((entry['point_nmse'], entry['point_deviation']))}{lacks}"


def records(closed: list[Closed]) -> list[dict[str, Any]]:
    """Return the same as one flat dictionary a model, for files; MSE in the label's unit squared."""
    return [
        {"study": name, "point": point}
        | {key: entry.get(key) for key in ("weights", "parameters", "verdict", "version")}
        | {"validation_nmse_mean": entry.get("point_nmse"), "validation_nmse_deviation": entry.get("point_deviation")}
        | {f"{part}_{score}": entry[part][score] for part in ("validation", "test") for score in SCORES}
        for name, point, entry in _ranked(closed)
    ]


def _ranked(closed: list[Closed]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return study, configuration and scores of each winner, and of each baseline predictor, which has no study; best
    first, and those of which a repeat diverged last."""
    predictors = next((ended.predictors for _, ended in closed if ended.predictors is not None), {})
    entries = [(row.name, point_text(group.point), group.to_json()) for row, ended in closed for group in ended.groups]
    entries += [("", BASELINES[name], scores.to_json()) for name, scores in predictors.items()]

    def order(entry: tuple[str, str, dict[str, Any]]) -> tuple[bool, float]:
        scores = entry[2]
        mean = scores.get("point_nmse")
        return scores.get("unstable", False), scores["validation"]["nmse"] if mean is None else mean

    return sorted(entries, key=order)


def log_winners(tracker: Tracker, closed: list[Closed]) -> str:
    """Attach the table to the run of each of its studies; return the link to all their trials. Idempotent."""
    with tempfile.TemporaryDirectory() as folder:
        full, text = Path(folder, "comparison.csv"), Path(folder, "comparison.txt")
        full.write_text(tables.csv(pandas.DataFrame(records(closed))), encoding="utf-8")
        with text.open("w", encoding="utf-8") as file:
            tables.print_table(tables.console(file=file), winners_table(closed))
        for study, _ in closed:
            for path in (full, text):
                tracker.upload(study.facts.study_run_id, path, "tables")
    searched = dict.fromkeys(name for study, _ in closed for name, _ in study.spec["space"])
    return experiments.comparison_link(tracker, [study.facts for study, _ in closed], ["model.family", *searched])
