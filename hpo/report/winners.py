"""The winners of several studies on one data set in one table, as a sequence prints it at its end."""

from typing import TYPE_CHECKING, Any

from hpo.queue import StudyRow
from hpo.queue.closing_result import ClosingEntry, ClosingResult
from hpo.report import results, tables
from hpo.report.tables import Column, Row, Table
from hpo.report.words import BASELINES, SCORES, score_columns, score_values, spread_text
from hpo.study.records import SplitScores
from hpo.text import point_text

if TYPE_CHECKING:
    from hpo.tracking.client import Tracker

Closed = tuple[StudyRow, ClosingResult]  # a study and the result of its closing
Ranked = tuple[str, str, ClosingEntry | SplitScores]  # study ("" of a baseline predictor), configuration, scores


def comparable(closed: list[Closed]) -> list[list[Closed]]:
    """Return groups of two studies or more on one data set and split: scores on others cannot be compared."""
    groups: dict[tuple[str, str], list[Closed]] = {}
    for row, ended in closed:
        groups.setdefault((row.facts.data.digest, row.facts.data.split), []).append((row, ended))
    return [group for group in groups.values() if len(group) > 1]


def winners_table(closed: list[Closed]) -> Table:
    """Return the winners beside the baseline predictors, best first: a row for each split, and one for repeats."""
    rows, parts = [], {row.name: f"{row.specification.part}s" for row, _ in closed}
    for study, point, entry in _ranked(closed):
        first: dict[str, Any] = {"model": f"{study} {point}".strip(), "weights": "", "parameters": ""}
        second, spread = dict.fromkeys(first, ""), ""
        if isinstance(entry, ClosingEntry):
            first |= {"weights": entry.weights or "from scratch", "parameters": entry.parameters}
            second["model"] = "" if entry.verdict == "good" else f"  {entry.verdict}"
            spread = _spread(entry)
        lines = [first | {"split": "validation"} | score_values(entry.validation)]
        if entry.test is not None:
            lines.append(second | {"split": "test"} | score_values(entry.test))
        if spread:
            blank = dict.fromkeys((*first, *SCORES.values()), "")
            lines.append(blank | {"split": f"validation, {parts[study]}", "NMSE": spread})
        rows += [Row(values=line, style="" if study else "dim") for line in lines]
    columns = [
        Column(name=name, left=name != "parameters", spare=name in ("weights", "parameters"))
        for name in ("model", "weights", "parameters", "split")
    ]
    title = "Comparison: the best of each, selected on the validation split"
    return Table(title=title, columns=[*columns, *score_columns(closed[0][0].facts.data.unit)], rows=rows)


def _spread(entry: ClosingEntry) -> str:
    """Return `mean 0.0651 ± 0.0012` of a configuration that was trained several times, and which repeats it lacks."""
    lacks = f" ({entry.incomplete})" if entry.incomplete else ""
    if entry.point_nmse is None or entry.point_deviation is None:
        return lacks.strip()
    return f"mean {spread_text((entry.point_nmse, entry.point_deviation))}{lacks}"


def records(closed: list[Closed]) -> list[dict[str, Any]]:
    """Return the same as one flat dictionary a model, for files; MSE in the label's unit squared."""
    own = {key: key for key in ("weights", "parameters", "verdict", "version")}
    own |= {"validation_nmse_mean": "point_nmse", "validation_nmse_deviation": "point_deviation"}
    scores = list(SCORES)[:4]
    return [
        {"study": name, "point": point}
        | {key: getattr(entry, attribute, None) for key, attribute in own.items()}
        | {
            f"{part}_{score}": getattr(getattr(entry, part), score)
            for part in ("validation", "test")
            for score in scores
        }
        for name, point, entry in _ranked(closed)
    ]


def _ranked(closed: list[Closed]) -> list[Ranked]:
    """Return the winners and the baseline predictors, best first, and those of which a repeat diverged last."""
    predictors = next((ended.predictors for _, ended in closed if ended.predictors is not None), {})
    entries: list[Ranked] = [
        (row.name, point_text(entry.point), entry) for row, ended in closed for entry in ended.groups
    ]
    entries += [("", BASELINES[name], scores) for name, scores in predictors.items()]

    def order(ranked: Ranked) -> tuple[bool, float]:
        entry = ranked[2]
        mean = getattr(entry, "point_nmse", None)
        return getattr(entry, "unstable", False), entry.validation.nmse or 0.0 if mean is None else mean

    return sorted(entries, key=order)


def log_winners(tracker: "Tracker", closed: list[Closed]) -> str:
    """Attach the table to the run of each of its studies; return the link to all their trials. Idempotent."""
    import pandas

    from hpo.tracking import experiments

    files = {
        "comparison.csv": tables.csv(pandas.DataFrame(records(closed))),
        "comparison.txt": tables.text(winners_table(closed)),
    }
    results.attach(tracker, [study.facts.study_run_id for study, _ in closed], files)
    searched = dict.fromkeys(name for study, _ in closed for name in study.specification.space)
    return experiments.comparison_link(tracker, [study.facts for study, _ in closed], ["model.family", *searched])
