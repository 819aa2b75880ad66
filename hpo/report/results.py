"""The result of a study as tables: on the terminal, and as files at the study's run. Built from the database alone."""

import json
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pandas
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from hpo.machine import now_ms
from hpo.queue import Job, StudyRow, finite
from hpo.recording.reconciler import Mirror
from hpo.scores import ranking
from hpo.study import provenance
from hpo.text import for_csv, number_text, point_text, score_text, visible
from hpo.tracking.client import Tracker

TOP = 10
SCORES = ("nmse", "mse", "r2", "nrmse")
NAMES = {"mean": "mean of the training labels", "volume fraction": "volume fraction, cubic"}


def rows(jobs: list[Job]) -> list[dict[str, Any]]:
    """Finished trials, best point first, one flat dict each; MSE in the label's unit squared, seconds of training."""
    found = []
    points = ranking.repeats(jobs)
    for job in (each for best in ranking.ranked(jobs) for each in points[best.number]):
        assert job.result is not None and job.spec is not None
        result = job.result
        found.append(
            {
                "number": job.number,
                "repeat": job.repeat,
                "config": job.config,
                **{f"point.{name}": value for name, value in job.spec["point"].items()},
                "parameters": job.spec["parameters"],
                "weights": provenance(job.spec["model"]),
                "best_val_nmse": result["best_val_nmse"],
                "best_val_mse": result["best_val_mse"],
                "best_val_r2": result["validation"]["r2"],
                "best_val_nrmse": result["validation"]["nrmse"],
                "best_epoch": result["best_epoch"],
                "last_val_nmse": result["last_val_nmse"],
                "last_val_mse": result["last_val_mse"],
                "seconds": result["seconds"],
                "run_id": job.run_id,
            }
        )
    return found


def show_result(
    console: Console, study: StudyRow, jobs: list[Job], links: dict[str, str], *, program: str, image: str
) -> None:
    """Print what a finished study shows: the ten best beside the trivial predictors, the winner by component, what
    was promoted and why, and what to do next."""
    close = next((job for job in jobs if job.kind == "closing"), None)
    ended = close.result if close is not None and close.result is not None else {}
    print_table(console, top_table(study, jobs))
    if ended.get("winner") is not None:
        print_table(console, winner_table(study, ended))
    lines = [f"ALARM: {alarm}" for alarm in ended.get("alarms", [])] + promotion(study, ended, close)
    if ended and ended.get("winner") is None:
        lines += fruitless(jobs)
    else:
        if ended.get("pruned"):
            lines.append(f"{ended['pruned']} trials were ended early by the pruner; their curves are kept.")
        lines += [
            f"Trial {failed['number']} is {failed['state']}: {failed['reason']}." for failed in ended.get("failed", [])
        ]
    console.print("\n".join(["", *lines, "", *next_steps(study, ended, links, program, image)]), soft_wrap=True)


def fruitless(jobs: list[Job]) -> list[str]:
    """Of a study that closed without a finished trial: how many ended how and why, and what can be done."""
    trials = [job for job in jobs if job.kind == "trial"]
    counts = Counter((job.state, job.reason or "no reason is known") for job in trials)
    lines = [f"{number} of {len(trials)} {state}: {reason}." for (state, reason), number in counts.most_common(TOP)]
    lines += [f"… and {len(counts) - TOP} other reasons: `hpo trials` lists them."] if len(counts) > TOP else []
    remedies = {
        "dead": "Once that is put right, the same command with --retry trains the dead ones again.",
        "diverged": "Those that diverged would do so again: change the study, to a lower learning rate, say.",
        "cancelled": "`hpo cancel --undo` brings a cancelled one back.",
    }
    return lines + [remedy for state, remedy in remedies.items() if any(job.state == state for job in trials)]


def top_table(study: StudyRow, jobs: list[Job]) -> Table:
    unit = study.facts["data"]["unit"]
    done, points = ranking.ranked(jobs), ranking.repeats(jobs)
    planned = len({job.number for job in jobs if job.kind == "trial"})
    title = f"{study.name}: best {min(TOP, len(done))} of {planned} trials, scores on the validation split"
    if again := study.spec.get("repeats", 1) > 1:
        title += (
            f"; each {study.spec['repeats']} times, NMSE as mean ± standard deviation, the others of the best repeat; "
            "≈: within the spread of the first"
        )
    table = Table(title=title, title_justify="left")
    for name in ("config", "point", "NMSE", f"MSE {unit}²", "R²", "NRMSE", "best epoch", "seconds"):
        point = name == "point"
        table.add_column(name, justify="left" if point else "right", overflow="fold" if point else "ellipsis")
    unstable = ranking.diverged(jobs)
    entries: list[tuple[bool, float, list[str]]] = []
    for job in done[:TOP]:
        assert job.result is not None and job.spec is not None
        found, scores = job.result, job.result["validation"]
        cells = [
            str(job.number if job.config is None else job.config),
            label(job.spec),
            *score_cells(found["best_val_nmse"], found["best_val_mse"], scores["r2"], scores["nrmse"]),
            str(found["best_epoch"]),
            f"{found['seconds']:.0f}",
        ]
        mean, deviation = ranking.spread(points[job.number])
        if again:
            best = None if job is done[0] else ranking.spread(points[done[0].number])
            cells[2] = spread_text(mean, deviation, best)
            if lacks := ranking.incomplete([other for other in jobs if other.number == job.number]):
                cells[1] += f"\n{lacks}"
        entries.append((job.number in unstable, mean, cells))
    for name, found in study.facts["predictors"].items():
        scores = found["validation"]
        cells = ["", NAMES[name], *score_cells(scores["nmse"], scores["mse"], scores["r2"], scores["nrmse"]), "", ""]
        entries.append((False, scores["nmse"], cells))
    for *_, cells in sorted(entries, key=lambda entry: entry[:2]):
        table.add_row(*cells, style="dim" if not cells[0] else None)
    return table


def label(spec: dict[str, Any]) -> str:
    """A point in few letters, and that its backbone is not pretrained."""
    bare = " (not pretrained)" if provenance(spec["model"]) == "not pretrained" else ""
    return point_text(spec["point"]) + bare


def spread_text(mean: float, deviation: float | None, best: tuple[float, float | None] | None = None) -> str:
    """Such as `0.0651 ± 0.0012 ≈`: the sign says that it differs from the best by no more than the spread."""
    text = score_text(mean) + (f" ± {deviation:.2g}" if deviation is not None else "")
    return text + (" ≈" if best is not None and within_spread((mean, deviation), best) else "")


def within_spread(point: tuple[float, float | None], best: tuple[float, float | None]) -> bool:
    """Whether a point's mean differs from the best one's by no more than their standard deviations together."""
    return point[0] - best[0] <= ((point[1] or 0.0) ** 2 + (best[1] or 0.0) ** 2) ** 0.5


def comparable(closed: list[tuple[StudyRow, dict[str, Any]]]) -> list[list[tuple[StudyRow, dict[str, Any]]]]:
    """Those that are on one data set and split, where there are several: scores on others cannot be compared."""
    groups: dict[tuple[str, str], list[tuple[StudyRow, dict[str, Any]]]] = {}
    for row, ended in closed:
        groups.setdefault((row.facts["data"]["digest"], row.facts["data"]["split"]), []).append((row, ended))
    return [group for group in groups.values() if len(group) > 1]


def comparison(closed: list[tuple[StudyRow, dict[str, Any]]]) -> Table:
    """The winners of several studies on one data set beside the trivial predictors, on validation and test split, best
    first. `closed` pairs each study with the result of its closing."""
    study = closed[0][0]
    table = Table(title="Comparison: the best of each, selected on the validation split", title_justify="left")
    for name in (
        "model",
        "weights",
        "parameters",
        "split",
        "NMSE",
        f"MSE {study.facts['data']['unit']}²",
        "R²",
        "NRMSE",
    ):
        left = name in ("model", "weights", "split")
        table.add_column(name, justify="left" if left else "right", overflow="fold" if name == "model" else "ellipsis")
    for name, point, found in _compared(closed):
        words = [f"{name} {point}".strip(), "", ""]
        if name:
            words[0] += "" if found["verdict"] == "good" else f"\n  {found['verdict']}"
            words[1:] = [found["weights"] or "from scratch", f"{found['parameters']:,}"]
        parts = [found["validation"], found["test"]]
        scores = zip(*(score_cells(p["nmse"], p["mse"], p["r2"], p["nrmse"]) for p in parts), strict=True)
        nmse, *others = map("\n".join, scores)
        spread = _spread(found)
        split = "validation\ntest" + ("\nvalidation, repeats" if spread else "")
        table.add_row(*words, split, f"{nmse}\n{spread}".strip(), *others, style=None if name else "dim")
    return table


def _spread(found: dict[str, Any]) -> str:
    """Of a point that was trained several times, below its best repeat's score: `mean 0.0651 ± 0.0012`."""
    lacks = f" ({found['incomplete']})" if found.get("incomplete") else ""
    if found.get("point_deviation") is None:
        return lacks.strip()
    return f"mean {spread_text(found['point_nmse'], found['point_deviation'])}{lacks}"


def comparison_rows(closed: list[tuple[StudyRow, dict[str, Any]]]) -> list[dict[str, Any]]:
    """What `comparison` shows, one flat dict a row; MSE in the label's unit squared."""
    return [
        {"study": name, "point": point}
        | {key: found.get(key) for key in ("weights", "parameters", "verdict", "version")}
        | {"validation_nmse_mean": found.get("point_nmse"), "validation_nmse_deviation": found.get("point_deviation")}
        | {f"{part}_{score}": found[part][score] for part in ("validation", "test") for score in SCORES}
        for name, point, found in _compared(closed)
    ]


def _compared(closed: list[tuple[StudyRow, dict[str, Any]]]) -> list[tuple[str, str, dict[str, Any]]]:
    """Study, point and scores of each winner, and of each trivial predictor, which has no study; best first."""
    predictors: dict[str, Any] = next((ended["predictors"] for _, ended in closed if "predictors" in ended), {})
    entries = [
        (row.name, point_text(group["point"]), group) for row, ended in closed for group in ended.get("groups", [])
    ]
    entries += [("", NAMES[name], found) for name, found in predictors.items()]

    def order(entry: tuple[str, str, dict[str, Any]]) -> tuple[bool, float]:
        found = entry[2]
        return found.get("unstable", False), found.get("point_nmse", found["validation"]["nmse"])

    return sorted(entries, key=order)


def log_comparison(tracker: Tracker, closed: list[tuple[StudyRow, dict[str, Any]]]) -> str:
    """Attach the comparison to the run of each of its studies; return the link to all their trials. Idempotent."""
    with tempfile.TemporaryDirectory() as folder:
        table, text = Path(folder, "comparison.csv"), Path(folder, "comparison.txt")
        for_csv(pandas.DataFrame(comparison_rows(closed))).to_csv(table, index=False)
        with text.open("w", encoding="utf-8") as file:
            print_table(console(file=file), comparison(closed))
        for study, _ in closed:
            for path in (table, text):
                tracker.upload(study.facts["study_run_id"], path, "tables")
    searched = dict.fromkeys(name for study, _ in closed for name, _ in study.spec["space"])
    return tracker.comparison_link([study.facts["experiment_id"] for study, _ in closed], ["model.family", *searched])


def winner_table(study: StudyRow, ended: dict[str, Any]) -> Table:
    """The winner on the test split, by component, beside the trivial predictors."""
    winner, unit = ended["winner"], study.facts["data"]["unit"]
    number = winner["number"] if winner["config"] is None else winner["config"]
    bare = ", not pretrained" if winner.get("weights") == "not pretrained" else ""
    table = Table(
        title=f"config {number} ({point_text(winner['point'])}{bare}) on the test split, opened once, "
        f"{study.facts['data']['sizes'][2]} cells",
        title_justify="left",
    )
    table.add_column("component")
    for name in (f"RMSE {unit}", "NRMSE", "R²", "R² volume fraction", "R² mean predictor"):
        table.add_column(name, justify="right")
    test, errors = winner["test"], [mse**0.5 for mse in winner["test"]["per_target"]["mse"]]
    cubic, mean = (ended["predictors"][name]["test"] for name in ("volume fraction", "mean"))
    for index, name in enumerate(study.facts["data"]["target_names"]):
        table.add_row(
            name,
            f"{errors[index]:.4g}",
            score_text(test["per_target"]["nrmse"][index], ".4f"),
            score_text(test["per_target"]["r2"][index], ".4f"),
            score_text(cubic["per_target"]["r2"][index], ".4f"),
            score_text(mean["per_target"]["r2"][index], ".4f"),
        )
    table.add_section()
    means = (score_text(value, ".4f") for value in (test["nrmse"], test["r2"], cubic["r2"], mean["r2"]))
    table.add_row("mean", f"{sum(errors) / len(errors):.4g}", *means)
    return table


def promotion(study: StudyRow, ended: dict[str, Any], close: Job | None) -> list[str]:
    """What was promoted and why, in sentences."""
    if not ended:
        state = "not closed yet" if close is None or close.state != "dead" else f"closing failed: {close.reason}"
        return [f"Nothing promoted: {state}."]
    winner, name = ended.get("winner"), ended.get("model_name", "")
    if winner is None:
        return [f"Nothing promoted: {ended['reason']}."]
    number = winner["number"] if winner["config"] is None else winner["config"]
    if winner["version"] is None:
        return [f"Nothing promoted: config {number} is the best, but {ended['reason']}."]
    lines = [f"Promoted: config {number} as {name} version {winner['version']}; {ended['reason']} (validation NMSE)."]
    if ended["champion"] is None:
        return [
            *lines,
            "No version stands for election as @champion: were they deleted in MLflow, or are they damaged?",
        ]
    own = ended["champion_nmse"]
    point = ended.get("champion_point_nmse", own)
    where = f"{ended['champion_model']} " if ended.get("champion_model", name) != name else ""
    stays = f"@champion stays {where}version {ended['champion']}, of the study {ended['champion_study']}:"
    if ended["champion"] == winner["version"] and not where:
        mean = "" if point == own else ", the mean of its point's repeats"
        lines.append(
            f"@champion is this version: the lowest validation NMSE ({point:.4g}{mean}) of all studies on this data."
        )
    elif point == winner.get("point_nmse"):
        lines.append(f"{stays} it is of the same point, and its own validation NMSE {own:.4g} is lower.")
    else:
        lines.append(f"{stays} its validation NMSE {point:.4g} is lower.")
    if winner.get("weights") == "not pretrained":
        lines.append("Note: its backbone is not pretrained; the version is tagged so.")
    if winner["verdict"] == "below volume fraction":
        lines.append("Note: the volume fraction alone predicts better than this model; the version is tagged so.")
    return lines


def next_steps(study: StudyRow, ended: dict[str, Any], links: dict[str, str], program: str, image: str) -> list[str]:
    """Commands that run as they stand; `image` is one of the data set's."""
    lines = ["Go on with:"]
    lines += [f"  {name + ':':10}{link}" for name, link in links.items()]
    if ended.get("champion"):
        lines += [
            f"  {program} download --alias champion champion/",
            f"  {program} predict champion/ {shlex.quote(image)}",
        ]
    lines += [f"  {program} report --study {study.name} -o report/"] if ended else []
    return [*lines, f"  {program} down"]


def score_cells(nmse: float, mse: float, r2: float | None, nrmse: float | None) -> tuple[str, str, str, str]:
    small = nmse is not None and nmse < 1e-3
    return score_text(nmse, ".3e" if small else ".5f"), score_text(mse), score_text(r2, ".4f"), score_text(nrmse, ".4f")


def log_study(shown: Mirror, ended: dict[str, Any]) -> None:
    """Attach the tables to the study's run, set its summary and end it. Idempotent."""
    study, now = shown.study, now_ms()
    jobs, run_id = shown.queue.jobs(study.name), study.facts["study_run_id"]
    with tempfile.TemporaryDirectory() as folder:
        table, raw, text = Path(folder, "trials.csv"), Path(folder, "result.json"), Path(folder, "result.txt")
        for_csv(pandas.DataFrame(rows(jobs))).to_csv(table, index=False)
        raw.write_text(json.dumps(finite(ended), indent=2, allow_nan=False), encoding="utf-8")
        with text.open("w", encoding="utf-8") as file:
            print_table(console(file=file), top_table(study, jobs))
            if ended.get("winner") is not None:
                print_table(console(file=file), winner_table(study, ended))
        for path in (table, raw, text):
            shown.tracker.upload(run_id, path, "tables")
    winner = ended.get("winner")
    if winner is not None:
        scores = {f"test_{name}": winner["test"][name] for name in ("nmse", "mse", "r2", "nrmse")}
        best = {f"best_val_{name}": winner["validation"][name] for name in ("nmse", "mse", "r2", "nrmse")}
        shown.tracker.log_summary(run_id, scores | best, timestamp_ms=now)
        shown.tracker.set_tags(
            run_id,
            {
                "hpo.winner": winner["number"],
                "hpo.verdict": winner["verdict"],
                "hpo.point": point_text(winner["point"]),
                "hpo.alarms": " ".join(ended["alarms"]),
            },
        )
    shown.tracker.set_status(run_id, "FINISHED", end_ms=now)


def trials_table(study: StudyRow, jobs: list[Job]) -> Table:
    """All trials of a study, in the order of their numbers."""
    bare = any(job.spec and provenance(job.spec["model"]) == "not pretrained" for job in jobs)
    table = Table(title=f"Trials of {study.name}" + (", not pretrained" if bare else ""), title_justify="left")
    names = [name for name, _ in study.spec["space"]]
    again = ["repeat"] if study.spec.get("repeats", 1) > 1 else []
    for name in ("number", *again, "config", *names, "state", "attempt", "epochs", "best val NMSE", "reason"):
        left = name in ("state", "reason")
        table.add_column(name, justify="left" if left else "right", overflow="fold" if name == "reason" else "ellipsis")
    for job in jobs:
        if job.kind != "trial":
            continue
        point = (job.spec or {}).get("point", {})
        value = f"{job.result['best_val_nmse']:.5g}" if job.state == "done" and job.result else ""
        table.add_row(
            str(job.number),
            *([str(job.repeat)] if again else []),
            "" if job.config is None else str(job.config),
            *(number_text(point[name]) if name in point else "" for name in names),
            job.state,
            str(job.attempt),
            str(job.epochs),
            value,
            job.reason or "",
        )
    return table


def print_table(console: Console, table: Table) -> None:
    """On a terminal only columns that fold are made narrower (`| less -S`), in a pipe or file none."""
    for column in table.columns:
        if column.overflow != "fold":
            widths = [console.measure(cell).maximum for cell in column.cells]
            column.min_width = max([*widths, console.measure(column.header).minimum])
    width, measured = console.width, console.measure(table, options=console.options.update(width=100_000))
    try:
        console.width = max(width, measured.minimum if console.is_terminal else measured.maximum)
        console.print(table)
    finally:
        console.width = width


def console(*, file: IO[str] | None = None) -> Console:
    """The terminal; a pipe or file gets 120 columns."""
    file = file or getattr(sys.stdout, "plain", None)
    made = Plain(file=file)
    return made if made.is_terminal else Plain(file=file, width=120)


class Plain(Console):
    """Prints texts as they are: there is no markup in them, and nothing that commands the terminal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)
