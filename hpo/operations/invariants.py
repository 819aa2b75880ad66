"""What holds of every study whatever happened to its workers: what tests, chaos runs and `hpo doctor` check.

I1  Each planned trial has exactly one recorded result, or is dead or cancelled with its reason and has none; Optuna
    and MLflow show the same. No trial is left to be trained when its study closes.
I2  Nothing recorded is lost: curves have no gap and no doubled step, here and in MLflow.
I3  No trial of Optuna and no run of MLflow is RUNNING without a live lease.
I4  Every alias leads to a version whose files have the recorded hashes, load, and predict; @champion and the studies'
    aliases are where an election from the rows puts them, and the versions' tags say the rows' scores.
"""

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from mlflow.entities import Run
from optuna.trial import TrialState

from hpo.queue import ENDED, Attempt, Job, State, StudyRow, is_exhausted
from hpo.recording.reconciler import RUN_STATUS, Reconciler
from hpo.scores import champion
from hpo.search import sampling
from hpo.study import Study
from hpo.tracking import logged_models, registry
from hpo.tracking.client import KEY, OWNER, curves
from hpo.tracking.foreign import MOST_RUNS

Curve = list[tuple[int, dict[str, float]]]  # (epoch, metrics)
log = logging.getLogger("hpo")

MOST_EPOCHS = 10_000  # of the curves that are read at a time


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One thing that does not hold."""

    rule: str  # I1 to I4
    study: str
    what: str  # what was expected and found, and where
    job: Job | None = None  # whose picture in Optuna or MLflow is wrong; or the closing that came too early
    election: bool = False  # whether aliases or tags are not what the rows say


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownRun:
    """A trial's run as MLflow shows it."""

    run_id: str
    key: str  # of the job
    status: str
    score: float | None  # best_val_nmse
    artifact_uri: str


class Seen:
    """A study in the queue and as Optuna and MLflow show it, read once."""

    def __init__(self, reconciler: Reconciler, *, grace: float = 0.0) -> None:
        """What changed in the last `grace` seconds, or while we look, is not to be judged."""
        self.reconciler, queue, name = reconciler, reconciler.queue, reconciler.study.name
        self.jobs = queue.jobs(name)
        self.late = {job.id for job in queue.unmirrored(name, older_than=grace)}
        self.abandoned = set(queue.expired(name, lease=grace))
        self.attempts = queue.attempts(name)
        self.repeats: dict[int, list[Job]] = {}  # by number
        for job in self.jobs:
            if not job.is_refit:
                self.repeats.setdefault(job.number, []).append(job)
        self.trials: Mapping[int, tuple[TrialState, list[float]]] | None = None  # None: Optuna has no such study
        with suppress(KeyError):
            self.trials = sampling.outcomes(reconciler.store, name)
        experiment = reconciler.study.facts.experiment_id
        self.runs: dict[str, list[ShownRun]] = {}  # by key
        for run in reconciler.tracker.runs(experiment, kind="trial", keep=_shown):
            self.runs.setdefault(run.key, []).append(run)
        self.models = logged_models.of_experiment(reconciler.tracker, experiment)
        self.finished: dict[str, list[str]] = {}  # by run: ids of finished models
        for model in self.models:
            if model.is_ready:
                self.finished.setdefault(model.run_id, []).append(model.model_id)
        self.after = queue.marks(name)

    @property
    def is_deleted(self) -> bool:
        """Whether the study was deleted while we looked."""
        return any(job.id not in self.after for job in self.jobs)

    def is_same(self, job: Job) -> bool:
        """Return whether a job did not change while we looked."""
        return (job.state, job.fence, job.mirrored, job.run_id) == self.after[job.id]

    def pages(self) -> Iterator[list[Job]]:
        """Yield the jobs, as many at a time as their curves are read at once."""
        page, epochs = list[Job](), 0
        for job in self.jobs:
            if page and (len(page) == MOST_RUNS or epochs + job.epochs > MOST_EPOCHS):
                yield page
                page, epochs = [], 0
            page.append(job)
            epochs += job.epochs
        yield page


def _shown(run: Run) -> ShownRun:
    return ShownRun(
        run_id=run.info.run_id,
        key=run.data.tags.get(KEY, ""),
        status=run.info.status,
        score=run.data.metrics.get("best_val_nmse"),
        artifact_uri=run.info.artifact_uri,
    )


def check(reconciler: Reconciler, *, grace: float = 0.0, models: bool = True) -> list[Violation]:
    """All violations of one study. With `models` every aliased version is downloaded, loaded and made to predict.

    On a running study give a `grace` in seconds: what changed more recently, or while we looked, is not judged.
    """
    return violations(Seen(reconciler, grace=grace), models=models)


def violations(seen: Seen, *, models: bool = True) -> list[Violation]:
    """All violations of a study that was looked at."""
    reconciler = seen.reconciler
    if seen.trials is None:
        return [_violation(reconciler, "I1", "Optuna has no such study: somebody deleted it there")]
    if seen.is_deleted:
        return []
    broken = [_violation(reconciler, "I1", what) for what in _planned(reconciler, seen.jobs, seen.trials)]
    broken += [_violation(reconciler, "I1", what, job) for job, what in _closed_early(reconciler.study, seen.jobs)]
    for page in seen.pages():
        curves = _Curves(reconciler, [job for job in page if _is_judged(job, seen)])
        for job in page:
            if job.id in seen.abandoned and seen.is_same(job):
                broken.append(_violation(reconciler, "I3", "is running, but its worker's lease ran out", job))
            elif job.id in seen.late and job.state == seen.after[job.id][0]:
                broken.append(
                    _violation(reconciler, "I1", "Optuna and MLflow do not show its state or its curve yet", job)
                )
            elif _is_judged(job, seen):
                broken += _trial(reconciler, job, seen, seen.trials, curves)
    if models:
        broken += [_violation(reconciler, "I4", what) for what in _aliases(reconciler)]
        faults = champion.faults(reconciler.queue, reconciler.tracker, reconciler.study)
        broken += [replace(_violation(reconciler, "I4", what), election=True) for what in faults]
    return broken


def _is_judged(job: Job, seen: Seen) -> bool:
    """Return whether Optuna and MLflow are to show a trial as its row says."""
    return job.kind == "trial" and job.mirrored and seen.is_same(job)


class _Curves:
    """The curves of a page of trials, in the queue and in MLflow."""

    def __init__(self, reconciler: Reconciler, jobs: list[Job]) -> None:
        self.stored = reconciler.queue.curves_of([job.id for job in jobs])
        runs = [job.run_id for job in jobs if job.state != State.RUNNING and job.run_id and self.stored[job.id]]
        self.shown = {metric: curves(reconciler.tracker, runs, metric) for metric in ("train/nmse", "val/nmse")}


def _violation(reconciler: Reconciler, rule: str, what: str, job: Job | None = None) -> Violation:
    where = f"{job.title}: " if job is not None else ""
    return Violation(rule=rule, study=reconciler.study.name, what=where + what, job=job)


def _planned(reconciler: Reconciler, jobs: list[Job], trials: Collection[int]) -> Iterator[str]:
    best = reconciler.study.facts.best_of  # of fewer points than were asked for, if no more were trained to their end
    planned = reconciler.study.specification.trials if best is None else len(best)
    numbers = sorted({job.number for job in jobs if job.kind == "trial"})
    if numbers != list(range(planned)):
        yield f"expected the {planned} planned trials in the queue, found {len(numbers)}"
    if sorted(trials) != numbers:
        yield f"expected {len(numbers)} trials in Optuna, found {len(trials)}"
    if sum(job.kind == "closing" for job in jobs) != 1:
        yield "expected one closing in the queue"
    points = [repr(job.spec.point) for job in jobs if job.spec is not None and job.config is not None]
    if len(set(points)) != len({job.number for job in jobs if job.config is not None}):
        yield "a point of the grid is planned twice"


def _closed_early(study: StudyRow, jobs: list[Job]) -> Iterator[tuple[Job, str]]:
    left = study.still_to_train(jobs)
    for closing in jobs:
        planning = closing.state == State.RUNNING and all(job.is_refit for job in left)  # it plans them, and then waits
        if closing.kind == "closing" and closing.state != State.WAITING and left and not planning:
            yield closing, f"is {closing.state}, but {left[0].title} is {left[0].state}"


def _trial(
    reconciler: Reconciler,
    job: Job,
    seen: Seen,
    trials: Mapping[int, tuple[TrialState, list[float]]],
    curves: _Curves,
) -> Iterator[Violation]:
    curve = curves.stored[job.id]
    for rule, what in (
        *(("I1", what) for what in _result(job, seen.attempts.get(job.id, []))),
        *_optuna(reconciler.study.specification, seen.repeats[job.number], trials.get(job.number)),
        *_mlflow(job, seen),
        *(("I2", what) for what in _shown_curve(job, curve, curves.shown)),
    ):
        yield _violation(reconciler, rule, what, job)
    for what in _curve(job, curve):  # showing it again repairs none of this
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


def _optuna(
    planned: Study, repeats: list[Job], trial: tuple[TrialState, list[float]] | None
) -> Iterator[tuple[str, str]]:
    unfilled = repeats[0].spec is None and any(job.state not in ENDED for job in repeats)
    if trial is None or unfilled or not all(job.mirrored for job in repeats):
        return
    state, values = sampling.objective_values(planned, repeats)
    expected = sampling.STATES[state]
    seen_state, seen_values = trial
    if seen_state != expected:
        rule = "I3" if seen_state == TrialState.RUNNING else "I1"
        yield rule, f"expected {expected.name} in Optuna, found {seen_state.name}"
    elif state == State.DONE and seen_values != values:
        expected_text, seen_text = (", ".join(map(str, numbers)) for numbers in (values, seen_values))
        yield "I1", f"expected the value {expected_text} in Optuna, found {seen_text}"


def _mlflow(job: Job, seen: Seen) -> Iterator[tuple[str, str]]:
    runs = seen.runs.get(job.key, [])
    if job.run_id is None:
        if job.state == State.DONE:
            yield "I1", "is done without an MLflow run"
        return
    if [run.run_id for run in runs] != [job.run_id]:
        yield "I1", f"expected the one MLflow run {job.run_id}, found {[run.run_id for run in runs] or 'none'}"
        return
    status, expected = runs[0].status, RUN_STATUS[job.state]
    if status != expected:
        yield ("I3" if status == "RUNNING" else "I1"), f"expected {expected} in MLflow, found {status}"
    if job.state == State.DONE and job.result:
        if seen.finished.get(job.run_id, []) != [job.result.model_id]:
            yield "I1", f"expected the one model {job.result.model_id}, found {seen.finished.get(job.run_id, [])}"
        if runs[0].score != job.result.best_val_nmse:
            yield "I1", f"expected best_val_nmse {job.result.best_val_nmse} in MLflow, found {runs[0].score}"


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


def _shown_curve(
    job: Job, curve: Curve, displayed: Mapping[str, Mapping[str, list[tuple[int, float]]]]
) -> Iterator[str]:
    for metric, points in displayed.items():
        if job.run_id is not None and job.run_id in points:
            expected = [(number, values[metric]) for number, values in curve if values.get(metric) is not None]
            if points[job.run_id] != expected:
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
                message = f"{name} version {version.number} (@{', @'.join(version.aliases)}): {fault}"
                if not fault.startswith(champion.NOT_CHECKED):
                    yield message
                else:
                    log.warning("%s", message)
