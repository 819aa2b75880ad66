"""What holds of every study whatever happened to its workers: what tests, chaos runs and `hpo doctor` check.

I1  Each planned point has exactly one recorded result, or is dead or cancelled with its reason and has none; Optuna
    and MLflow show the same. No trial is left to be trained when its study closes.
I2  Nothing recorded is lost: curves have no gap and no doubled step, here and in MLflow.
I3  No trial of Optuna and no run of MLflow is RUNNING without a live lease.
I4  Every alias leads to a version whose files have the recorded hashes, load, and predict; @champion and the studies'
    aliases are where an election from the rows puts them, and the versions' tags say the rows' scores.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlflow.entities import LoggedModelStatus
from optuna.trial import TrialState

from hpo.queue import ENDED, Attempt, Job, State, is_exhausted
from hpo.recording.reconciler import RUN_STATUS, Reconciler
from hpo.scores import champion
from hpo.search import sampling
from hpo.tracking import logged_models, registry
from hpo.tracking.client import KEY, OWNER

Curve = list[tuple[int, dict[str, float]]]  # (epoch, metrics)


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One thing that does not hold."""

    rule: str  # I1 to I4
    study: str
    what: str  # what was expected and found, and where
    job: Job | None = None  # whose picture in Optuna or MLflow is wrong; or the closing that came too early
    election: bool = False  # whether aliases or tags are not what the rows say


def check(reconciler: Reconciler, *, grace: float = 0.0, models: bool = True) -> list[Violation]:
    """All violations of one study. With `models` every aliased version is downloaded, loaded and made to predict.

    On a running study give a `grace` in seconds: what changed more recently, or while we looked, is not judged.
    """
    before = reconciler.queue.jobs(reconciler.study.name)
    late = {job.id for job in reconciler.queue.unmirrored(reconciler.study.name, older_than=grace)}
    abandoned = set(reconciler.queue.expired(reconciler.study.name, lease=grace))
    try:
        seen = _Seen(reconciler, before)
    except KeyError:
        return [_violation(reconciler, "I1", "Optuna has no such study: somebody deleted it there")]
    after = {job.id: job for job in reconciler.queue.jobs(reconciler.study.name)}
    if any(job.id not in after for job in before):
        return []  # the study was deleted meanwhile
    found = [_violation(reconciler, "I1", what) for what in _planned(reconciler, before, seen)]
    found += [_violation(reconciler, "I1", what, job) for job, what in _closed_early(before)]
    for job in before:
        if job.id in abandoned and _same(job, after[job.id]):
            found.append(_violation(reconciler, "I3", "is running, but its worker's lease ran out", job))
        elif job.id in late and job.state == after[job.id].state:
            found.append(_violation(reconciler, "I1", "Optuna and MLflow do not show its state or its curve yet", job))
        elif job.kind == "trial" and job.mirrored and _same(job, after[job.id]):
            found += _trial(reconciler, job, seen)
    if models:
        found += [_violation(reconciler, "I4", what) for what in _aliases(reconciler)]
        faults = champion.faults(reconciler.queue, reconciler.tracker, reconciler.study)
        found += [replace(_violation(reconciler, "I4", what), election=True) for what in faults]
    return found


class _Seen:
    """A study as Optuna and MLflow show it, read once."""

    def __init__(self, reconciler: Reconciler, jobs: list[Job]) -> None:
        self.attempts = reconciler.queue.attempts(reconciler.study.name)
        self.repeats: dict[int, list[Job]] = {}  # by number
        for job in jobs:
            if not job.is_refit:
                self.repeats.setdefault(job.number, []).append(job)
        experiment = reconciler.study.facts.experiment_id
        self.trials = sampling.outcomes(reconciler.store, reconciler.study.name)
        self.runs: dict[str, list[Any]] = {}
        for run in reconciler.tracker.runs(experiment, kind="trial"):
            self.runs.setdefault(run.data.tags.get(KEY, ""), []).append(run)
        self.models: dict[str, list[str]] = {}  # by run: ids of finished models
        for model in logged_models.of_experiment(reconciler.tracker, experiment):
            if model.status == LoggedModelStatus.READY:
                self.models.setdefault(model.source_run_id or "", []).append(model.model_id)


def _violation(reconciler: Reconciler, rule: str, what: str, job: Job | None = None) -> Violation:
    where = f"{job.title}: " if job is not None else ""
    return Violation(rule=rule, study=reconciler.study.name, what=where + what, job=job)


def _same(job: Job, later: Job) -> bool:
    return (job.state, job.fence, job.mirrored, job.run_id) == (later.state, later.fence, later.mirrored, later.run_id)


def _planned(reconciler: Reconciler, jobs: list[Job], seen: _Seen) -> Iterator[str]:
    best = reconciler.study.facts.best_of  # of fewer points than were asked for, if no more were trained to their end
    planned = reconciler.study.specification.trials if best is None else len(best)
    numbers = sorted({job.number for job in jobs if job.kind == "trial"})
    if numbers != list(range(planned)):
        yield f"expected the {planned} planned points in the queue, found {len(numbers)}"
    if sorted(seen.trials) != numbers:
        yield f"expected {len(numbers)} trials in Optuna, found {len(seen.trials)}"
    if sum(job.kind == "closing" for job in jobs) != 1:
        yield "expected one closing in the queue"
    points = [repr(job.spec.point) for job in jobs if job.spec is not None and job.config is not None]
    if len(set(points)) != len({job.number for job in jobs if job.config is not None}):
        yield "a point of the grid is planned twice"


def _closed_early(jobs: list[Job]) -> Iterator[tuple[Job, str]]:
    left = [job for job in jobs if job.kind == "trial" and job.state in (State.WAITING, State.RUNNING)]
    for closing in jobs:
        planning = closing.state == State.RUNNING and all(job.is_refit for job in left)  # it plans them, and then waits
        if closing.kind == "closing" and closing.state != State.WAITING and left and not planning:
            yield closing, f"is {closing.state}, but {left[0].title} is {left[0].state}"


def _trial(reconciler: Reconciler, job: Job, seen: _Seen) -> Iterator[Violation]:
    curve = reconciler.queue.curve(job.id)
    for rule, what in (
        *(("I1", what) for what in _result(job, seen.attempts.get(job.id, []))),
        *_optuna(seen.repeats[job.number], seen.trials.get(job.number)),
        *_mlflow(job, seen),
        *(("I2", what) for what in _shown_curve(reconciler, job, curve)),
    ):
        yield _violation(reconciler, rule, what, job)
    for what in _curve(job, curve):  # showing it again mends none of this
        yield _violation(reconciler, "I2", f"{job.title}: {what}")


def _result(job: Job, attempts: Sequence[Attempt]) -> Iterator[str]:
    if job.state == State.DONE:
        value = job.result.best_val_nmse if job.result else None
        if value is None or not math.isfinite(value):
            yield f"is done, but its result is {value}"
    elif job.state in ENDED and not job.reason:
        yield f"is {job.state} without a reason"
    elif job.state == State.CANCELLED and job.result is not None:
        yield "is cancelled, but has a result"
    if job.state == State.DEAD and not is_exhausted(attempts):
        yield f"is dead, though its {len(attempts)} attempts reach no limit"


def _optuna(repeats: list[Job], trial: tuple[TrialState, float | None] | None) -> Iterator[tuple[str, str]]:
    unfilled = repeats[0].spec is None and any(job.state not in ENDED for job in repeats)
    if trial is None or unfilled or not all(job.mirrored for job in repeats):
        return
    state, value = sampling.together(repeats)
    expected = sampling.STATES[state]
    seen_state, seen_value = trial
    if seen_state != expected:
        rule = "I3" if seen_state == TrialState.RUNNING else "I1"
        yield rule, f"expected {expected.name} in Optuna, found {seen_state.name}"
    elif state == State.DONE and seen_value != value:
        yield "I1", f"expected the value {value} in Optuna, found {seen_value}"


def _mlflow(job: Job, seen: _Seen) -> Iterator[tuple[str, str]]:
    runs = seen.runs.get(job.key, [])
    if job.run_id is None:
        if job.state == State.DONE:
            yield "I1", "is done without an MLflow run"
        return
    if [run.info.run_id for run in runs] != [job.run_id]:
        yield "I1", f"expected the one MLflow run {job.run_id}, found {[run.info.run_id for run in runs] or 'none'}"
        return
    status, expected = runs[0].info.status, RUN_STATUS[job.state]
    if status != expected:
        yield ("I3" if status == "RUNNING" else "I1"), f"expected {expected} in MLflow, found {status}"
    if job.state == State.DONE and job.result:
        if seen.models.get(job.run_id, []) != [job.result.model_id]:
            yield "I1", f"expected the one model {job.result.model_id}, found {seen.models.get(job.run_id, [])}"
        found = runs[0].data.metrics.get("best_val_nmse")
        if found != job.result.best_val_nmse:
            yield "I1", f"expected best_val_nmse {job.result.best_val_nmse} in MLflow, found {found}"


def _curve(job: Job, curve: Curve) -> Iterator[str]:
    numbers = [number for number, _ in curve]
    if numbers != list(range(1, len(numbers) + 1)):
        yield f"expected epochs 1 to {len(numbers)} without a gap, found {numbers}"
    if job.state == State.DONE and job.result:
        if len(numbers) != job.result.epochs:
            yield f"expected {job.result.epochs} epochs, found {len(numbers)}"
        elif not job.is_refit and min(values["val/nmse"] for _, values in curve) != job.result.best_val_nmse:
            yield "its result is not the lowest value of its curve"
    if job.checkpoint is not None and job.checkpoint.epoch > len(numbers):
        yield f"its checkpoint is of epoch {job.checkpoint.epoch}, its curve ends at {len(numbers)}"


def _shown_curve(reconciler: Reconciler, job: Job, curve: Curve) -> Iterator[str]:
    if job.state != State.RUNNING and job.run_id is not None and curve:
        for metric in ("train/nmse", "val/nmse"):
            expected = [(number, values[metric]) for number, values in curve if values.get(metric) is not None]
            if reconciler.tracker.curve(job.run_id, metric) != expected:
                yield f"its curve {metric} in MLflow differs from the recorded one"


def _aliases(reconciler: Reconciler) -> Iterator[str]:
    """The study's versions with an alias that nobody should use."""
    owner = reconciler.queue.database_id()
    for name in champion.names(reconciler.study):
        for version in registry.versions(reconciler.tracker, name):
            job = reconciler.queue.by_run(version.run_id)
            if version.tags.get(OWNER) != owner or (job is not None and job.study != reconciler.study.name):
                continue  # of another database on this server, or looked at with its own study
            if version.aliases and (fault := champion.unsound(reconciler.queue, reconciler.tracker, name, version)):
                yield f"{name} version {version.number} (@{', @'.join(version.aliases)}): {fault}"
