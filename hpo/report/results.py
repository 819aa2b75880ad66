"""The result of a study: its tables on the terminal and as files at the study's run, and what to do next.

Everything comes from the database.
"""

import json
import shlex
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from hpo.errors import SettingsError
from hpo.machine import now_ms
from hpo.queue import Job, Queue, State, StudyRow, finite
from hpo.queue.closing_result import ClosingResult
from hpo.report import learning, pareto, promotion, tables, versions, words
from hpo.report.tables import Column, Row, Table
from hpo.report.words import BASELINES, SCORES, label, number, rmse, score_columns, score_values, spread_text
from hpo.scores import learning_curve, ranking
from hpo.study import SIZES, provenance, sizing
from hpo.study.objectives import NOT_TRAINED
from hpo.text import counted, in_brackets, near_miss, point_text

if TYPE_CHECKING:
    from hpo.tracking.client import Tracker

TOP = 10  # rows of the table of the best configurations
SORTS: dict[str, Callable[[Job], Any]] = {  # orders of trials, beside "score" and the parameters
    "number": lambda job: job.number,
    "state": lambda job: list(State).index(job.state),
    "epochs": lambda job: -job.epochs,
    "changed": lambda job: -job.changed_at,
}
T = TypeVar("T")


def show_result(
    console: Console, study: StudyRow, jobs: list[Job], links: dict[str, str], *, program: str, image: str
) -> None:
    """Print the result of a study whose trials have ended: the ten best configurations, the winner by target, what
    was promoted and why, and the next commands."""
    close = next((job for job in jobs if job.kind == "closing"), None)
    ended = close.closing if close is not None else None
    for table in _result_tables(study, jobs, ended):
        tables.print_table(console, table)
    curve = learning_curve.of_study(study, jobs)
    lines = learning.lines(curve) if curve is not None else []
    lines += pareto.lines(study, jobs)
    lines += [f"ALARM: {alarm}" for alarm in (ended.alarms or () if ended else ())]
    lines += promotion.sentences(study.name, ended, close, is_forced=_is_forced(study, jobs, ended))
    if ended is not None and ended.winner is None:
        lines += fruitless(study.name, jobs)
    elif ended is not None:
        lines += _pruned(ended, jobs)
        lines += _failures(ended)
    if ended is not None and ended.budget is not None:
        lines.append(promotion.budget(study.name, ended.budget))
    console.print("\n".join(["", *lines, ""]), soft_wrap=not console.is_terminal)
    console.print("\n".join(next_steps(study, ended, links, program, image)), soft_wrap=True)


def _is_forced(study: StudyRow, jobs: list[Job], ended: ClosingResult | None) -> bool:
    """Return whether `hpo promote --force` was said of the version that a study registered."""
    winner, forced = ended.winner if ended else None, study.facts.forced or ()
    return winner is not None and any(job.number == winner.number and job.run_id in forced for job in jobs)


def _pruned(ended: ClosingResult, jobs: Sequence[Job]) -> list[str]:
    """Return how many trials a pruner ended, and how many were too large to be trained."""
    reasons = [job.reason or "" for job in jobs if job.state == State.PRUNED]
    too_large = sum(reason.startswith(NOT_TRAINED) for reason in reasons)
    early = ended.pruned - too_large
    lines = [f"{counted(early, 'trial', 'were')} ended early by the pruner; curves are kept."] if early else []
    beyond = f"{counted(too_large, 'trial', 'were')} not trained: their networks are beyond the bounds (`hpo trials`)."
    return lines + [beyond] * bool(too_large)


def _failures(ended: ClosingResult) -> list[str]:
    """Return a sentence for each reason why trials ended without a network."""
    numbers: dict[tuple[str, str | None], list[int]] = {}
    for failed in ended.failed:
        numbers.setdefault((failed.state, failed.reason), []).append(failed.number)
    return [
        f"Trial {own[0]} is {state}: {reason}."
        if len(own) == 1
        else f"{len(own)} trials are {state} ({', '.join(map(str, dict.fromkeys(own)))}): {reason}."
        for (state, reason), own in numbers.items()
    ]


def _result_tables(study: StudyRow, jobs: list[Job], ended: ClosingResult | None) -> list[Table]:
    curve = learning_curve.of_study(study, jobs)
    more = [*filter(None, [pareto.table(study, jobs)]), *([learning.table(curve)] if curve is not None else [])]
    if ended is None or ended.winner is None:
        return [top_table(study, jobs), *more]
    in_unit = [in_unit_table(ended)] if ended.winner.test.in_unit else []
    return [top_table(study, jobs), winner_table(study, ended), *in_unit, *versions.of_test(ended), *more]


def fruitless(study: str, jobs: list[Job]) -> list[str]:
    """Return sentences on a study that closed without a finished trial: how many ended how and why, and what helps."""
    trials = [job for job in jobs if job.kind == "trial"]
    counts = Counter((job.state, job.reason or "no reason is known") for job in trials)
    lines = [f"{count} of {len(trials)} {state}: {reason}." for (state, reason), count in counts.most_common(TOP)]
    lines += [f"… and {len(counts) - TOP} other reasons: `hpo trials` lists them."] if len(counts) > TOP else []
    remedies = {
        State.DEAD: f"Once that is put right, `hpo run --study {study} --retry` trains the dead ones again.",
        State.DIVERGED: "Those that diverged would do so again: change the study, perhaps to a lower learning rate.",
        State.CANCELLED: "`hpo cancel --undo` brings a cancelled one back.",
    }
    return lines + [remedy for state, remedy in remedies.items() if any(job.state == state for job in trials)]


def top_table(study: StudyRow, jobs: list[Job]) -> Table:
    """Return the best configurations beside the baseline predictors, with scores on the validation split."""
    ranked, repeats = ranking.ranked(jobs), ranking.repeats(jobs)
    planned = len({job.number for job in jobs if job.kind == "trial"})
    title = f"{study.name}: best {counted(min(TOP, len(ranked)), 'trial', of=planned)}, scores on the validation split"
    plan, near = study.specification, "≈: within the spread of the first"
    if plan.folds:
        title += f"; each in {plan.folds} folds, means over them, NMSE ± standard deviation; {near}"
    elif plan.repeats > 1:
        title += (
            f"; each {plan.repeats} times, NMSE as mean ± standard deviation, the others of the best repeat; {near}"
        )
    listed: list[Row] = []
    for job in ranked[:TOP]:
        assert job.result is not None and job.spec is not None
        result = ranking.result_of(repeats[job.number])
        values = score_values(result.validation) | {"NMSE": result.best_val_nmse, "MSE": result.best_val_mse}
        values |= {"config": number(job), "point": label(job.spec)}
        values |= {"best epoch": result.best_epoch, "seconds": round(result.seconds)}
        if plan.trainings > 1:
            best = None if job is ranked[0] else ranking.spread(repeats[ranked[0].number])
            values["NMSE"] = spread_text(ranking.spread(repeats[job.number]), best)
            if lacks := ranking.incomplete([other for other in jobs if other.number == job.number]):
                values["point"] += f"\n{lacks}"
        listed.append(Row(values=values))
    baselines = [
        Row(values=score_values(predictor.validation) | {"point": BASELINES[name]}, style="dim")
        for name, predictor in study.facts.predictors.items()
    ]
    columns = [
        Column(name="config", text=tables.cell_text),
        Column(name="point", left=True),
        *score_columns(study.facts.data.unit),
        Column(name="best epoch", text=tables.cell_text, spare=True),
        Column(name="seconds", text=tables.cell_text, spare=True),
    ]
    return Table(title=title, columns=columns, rows=among_baselines(study, jobs, listed, baselines))


def among_baselines(study: StudyRow, jobs: list[Job], listed: Sequence[T], baselines: Sequence[T]) -> list[T]:
    """Return the best configurations and the baseline predictors in one order; configurations of which a repeat
    diverged come last."""
    unstable = ranking.diverged(jobs)
    places = [(job.number in unstable, score) for job, score in ranking.points(jobs)[: len(listed)]]
    places += [(False, predictor.validation.nmse or 0.0) for predictor in study.facts.predictors.values()]
    entries = sorted(zip(places, [*listed, *baselines], strict=True), key=lambda entry: entry[0])
    return [entry for _, entry in entries]


def winner_table(study: StudyRow, ended: ClosingResult) -> Table:
    """Return the winner's scores on the test split, by target, beside the baseline predictors."""
    winner = ended.winner
    assert winner is not None and ended.predictors is not None
    bare = "not pretrained" if winner.weights == "not pretrained" else ""
    roots, mean = rmse(winner.test)
    columns: dict[str, list[float | None]] = {  # by target, and the mean
        f"RMSE {study.facts.data.unit}": [*roots, mean],
        "NRMSE": [*winner.test.per_target["nrmse"], winner.test.nrmse],
        "R²": [*winner.test.per_target["r2"], winner.test.r2],
    }
    columns |= {head: [*scores.per_target["r2"], scores.r2] for head, scores in words.baselines_r2(ended).items()}
    if (counts := winner.test.per_target.get("n")) is not None:
        columns["labels"] = [*counts, None]
    names = [*study.facts.data.target_names, "mean"]
    rows = [
        Row(
            values={"target": name} | {head: values[index] for head, values in columns.items()},
            rule=index == len(names) - 1,
        )
        for index, name in enumerate(names)
    ]
    which = f"config {number(winner)}{in_brackets(point_text(winner.point), bare)}"
    cells = counted(study.facts.data.sizes[2], "cell")
    return Table(
        title=f"{which} on the test split, {words.openings(ended)}, {cells}",
        columns=[Column(name="target", left=True), *(Column(name=head) for head in columns)],
        rows=rows,
    )


def in_unit_table(ended: ClosingResult) -> Table:
    """Return the winner's scores on the test split of the targets with a transform, without it."""
    assert ended.winner is not None and ended.predictors is not None
    tested, rows = words.baselines_r2(ended), []
    for name, scores in ended.winner.test.in_unit.items():
        values = {"target": name, "RMSE": scores["rmse"], "NRMSE": scores["nrmse"], "R²": scores["r2"]}
        values |= {head: test.in_unit[name]["r2"] if test.in_unit else None for head, test in tested.items()}
        rows.append(Row(values=values))
    columns = [Column(name="target", left=True), *(Column(name=head) for head in list(rows[0].values)[1:])]
    return Table(title="The same with the transform undone, in the unit of the labels", columns=columns, rows=rows)


def trials_table(study: StudyRow, jobs: list[Job], *, sort: str = "score", top: int | None = None) -> Table:
    """Return the first `top` trials of a study: best first, those without a score last, or in the order of `sort`."""
    trials, sizes = in_order(study, jobs, sort), pareto.values(study, jobs)
    measures = sizing.measures(study.specification)
    bare = any(job.spec and provenance(job.spec.model) == "not pretrained" for job in trials)
    rows = []
    for job in trials[:top]:
        values = {f"point.{name}": value for name, value in (job.spec.point if job.spec else {}).items()}
        values |= {key: getattr(job, key) for key in ("number", "config", "attempt", "epochs", "reason")}
        values[study.specification.part] = "refit" if job.is_refit else job.repeat
        values["state"] = job.state.label
        result = job.result if job.state == State.DONE else None
        values |= {"NMSE": result.best_val_nmse if result else "", "R²": result.validation.r2 if result else ""}
        values |= sizes.get(job.number, {})
        rows.append(Row(values=values))
    keys = ["number"] + [study.specification.part] * (study.specification.trainings > 1)
    keys += ["config"] * any(job.config not in (None, job.number) for job in trials)
    title = f"Trials of {study.name}" + (", not pretrained" if bare else "") + ", scores on the validation split"
    return Table(
        title=title + (f": {len(rows)} of {len(trials)}" if len(rows) < len(trials) else ""),
        columns=[
            *(Column(name=key, text=tables.cell_text) for key in keys),
            *(Column(name=f"point.{name}", label=name, text=_in_short) for name in study.specification.space),
            Column(name="NMSE"),
            Column(name="R²"),
            *(Column(name=name, label=SIZES[name], text=tables.cell_text) for name in measures),
            *([Column(name="pareto", left=True, text=_front)] if len(study.specification.objectives) > 1 else []),
            Column(name="state", left=True),
            *([Column(name="attempt", spare=True)] if any(job.attempt > 1 for job in trials) else []),
            Column(name="epochs", spare=True),
            *(
                [Column(name="reason", left=True, cuts=True, text=tables.cell_text)]
                if any(job.reason for job in trials)
                else []
            ),
        ],
        rows=rows,
    )


def _front(is_on_front: bool | None) -> str:
    return pareto.ON_FRONT if is_on_front else ""


def _in_short(value: Any) -> str:
    """Return a parameter's value with at most four digits; nothing for None."""
    return tables.cell_text(float(f"{value:.4g}") if isinstance(value, float) else value)


def in_order(study: StudyRow, jobs: list[Job], sort: str) -> list[Job]:
    """Return the trials in the order of `sort`. Raise SettingsError if there is no such order."""
    trials = sorted((job for job in jobs if job.kind == "trial"), key=lambda job: (job.number, job.repeat))
    keys = ["score", *SORTS, *(name for name in study.specification.space)]
    if sort not in keys:
        raise SettingsError(f"--sort: expected one of {', '.join(keys)}, found '{sort}'.{near_miss(sort, keys)}")
    if sort == "score":
        repeats = ranking.repeats(trials)
        ranked = ranking.ranked(trials)
        best = [job for first in ranked for job in sorted(repeats[first.number], key=ranking.nmse)]
        if study.specification.folds:
            best = [*filter(None, (ranking.network(trials, job) for job in ranked)), *best]
        places = {job.id: place for place, job in enumerate(best)}
        states = list(State)
        return sorted(trials, key=lambda job: (places.get(job.id, len(places)), states.index(job.state)))
    if sort in SORTS:
        return sorted(trials, key=SORTS[sort])
    return sorted(trials, key=lambda job: _of_parameter(job, sort))


def _of_parameter(job: Job, name: str) -> tuple[bool, bool, Any]:
    """Return what orders trials by a parameter: numbers before texts, and trials without a value last."""
    value = job.spec.point.get(name) if job.spec else None
    return value is None, isinstance(value, str), 0 if value is None else value


def studies_table(summaries: list[dict[str, Any]]) -> Table:
    """Return the table of `hpo studies`; the summaries have its heads as keys, and `best_val_nmse`."""
    heads = ("name", "state", "trials", "done", "failed", "best val NMSE", "data")
    rows = [
        Row(values=summary | {"best val NMSE": "" if (nmse := summary["best_val_nmse"]) is None else nmse})
        for summary in summaries
    ]
    columns = [Column(name=head, left=head in ("name", "state", "data")) for head in heads]
    return Table(title="Studies", columns=columns, rows=rows)


def next_steps(
    study: StudyRow, ended: ClosingResult | None, links: dict[str, str], program: str, image: str
) -> list[str]:
    """Return commands that run as they stand; `image` is one of the data set's."""
    lines = ["Go on with:"]
    lines += [f"  {name + ':':10}{link}" for name, link in links.items()]
    if ended is not None and ended.winner is not None and ended.winner.version is not None:
        folder, which = "model/", f"--study {study.name}"
        if promotion.is_champion(ended):
            folder, which = "champion/", "--alias champion"
        lines.append(f"  {program} download {which} {folder}")
        lines += [f"  {program} predict {folder} {shlex.quote(image)}"] if image else []
    lines += [f"  {program} report --study {study.name} -o report/"] if ended is not None else []
    return [*lines, f"  {program} down"]


def rows(study: StudyRow, jobs: list[Job]) -> list[dict[str, Any]]:
    """Return finished trials, best configuration first, one flat dictionary each; MSE in the label's unit squared."""
    listed, sizes = [], pareto.values(study, jobs)
    repeats = ranking.repeats(jobs)
    for job in (job for best in ranking.ranked(jobs) for job in repeats[best.number]):
        assert job.result is not None and job.spec is not None
        result = job.result
        listed.append(
            {
                "number": job.number,
                "repeat": job.repeat,
                "config": job.config,
                **{f"point.{name}": value for name, value in job.spec.point.items()},
                "parameters": job.spec.parameters,
                **sizes.get(job.number, {}),
                "weights": provenance(job.spec.model),
                "best_val_nmse": result.best_val_nmse,
                "best_val_mse": result.best_val_mse,
                "best_val_r2": result.validation.r2,
                "best_val_nrmse": result.validation.nrmse,
                "best_epoch": result.best_epoch,
                "last_val_nmse": result.last_val_nmse,
                "last_val_mse": result.last_val_mse,
                "seconds": result.seconds,
                "run_id": job.run_id,
            }
        )
    return listed


def log_study(queue: Queue, tracker: "Tracker", study: StudyRow, ended: ClosingResult) -> None:
    """Attach the tables to the study's run, set its summary and end it. Idempotent."""
    import pandas

    jobs, run_id, now = queue.jobs(study.name), study.facts.study_run_id, now_ms()
    files = {
        "trials.csv": tables.csv(pandas.DataFrame(rows(study, jobs))),
        "result.json": json.dumps(finite(ended.to_json()), indent=2, allow_nan=False),
        "result.txt": tables.text(*_result_tables(study, jobs, ended)),
    }
    if (curve := learning_curve.of_study(study, jobs)) is not None:
        files |= learning.files(curve)
        tracker.log_summary(run_id, learning.metrics(curve), timestamp_ms=now)
    attach(tracker, [run_id], files | dict(pareto.files(study, jobs)))
    winner = ended.winner
    if winner is not None:
        names = list(SCORES)[:4]
        scores = {f"test_{name}": getattr(winner.test, name) for name in names}
        best = {f"best_val_{name}": getattr(winner.validation, name) for name in names}
        tracker.log_summary(run_id, scores | best, timestamp_ms=now)
        tags = {
            "hpo.winner": winner.number,
            "hpo.verdict": winner.verdict,
            "hpo.gain": " ".join(promotion.gains(winner)),
            "hpo.point": point_text(winner.point),
            "hpo.alarms": " ".join(ended.alarms or ()),
            "hpo.test_openings": ended.openings or 1,
        }
        tracker.set_tags(run_id, tags)
    if ended.budget is not None or ended.openings != 1:  # also to take away what an earlier closing said
        tracker.set_tags(run_id, {"hpo.budget": promotion.budget(study.name, ended.budget) if ended.budget else ""})
    tracker.set_status(run_id, "FINISHED", end_ms=now)


def attach(tracker: "Tracker", run_ids: Sequence[str], files: Mapping[str, str]) -> None:
    """Upload files, given by name and text, to the folder `tables` of runs."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            path = Path(folder, name)
            path.write_text(text, encoding="utf-8")
            for run_id in run_ids:
                tracker.upload(run_id, path, "tables")
