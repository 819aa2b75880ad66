"""`hpo doctor`: services, versions, invariants, orphans and stale caches; what it finds it can repair.

Safe on a running study: what changed within the last lease is not judged, and every remedy is one that workers use.
"""

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path

from mlflow.entities import Experiment
from mlflow.store.artifact.artifact_repo import ArtifactRepository

from data_pipeline.npz import load_npz
from hpo.errors import ServiceError, StudyConflict
from hpo.files import sha256_of
from hpo.operations import invariants
from hpo.operations.connection import Connection, connect
from hpo.operations.invariants import Seen
from hpo.queue import ENDED, Job, Queue, State, StudyRow
from hpo.recording.reconciler import Reconciler
from hpo.scores import champion, evidence, ranking
from hpo.services import serving
from hpo.settings import Settings
from hpo.text import counted
from hpo.tracking import artifacts, data_sets, experiments, latency, logged_models, registry
from hpo.tracking.client import Tracker
from hpo.tracking.foreign import STORE
from hpo.tracking.logged_models import Listed
from hpo.worker.work_folder import sweep

YOUNG = 3600.0  # seconds: what is younger may still be in the making
# Seconds since cached data or features were last used: workers of other databases share the folder.
UNUSED = 7 * 86400.0


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be."""

    kind: str  # versions, I1 to I4, dead, paused, files, orphan, cache
    what: str  # what was expected and found, and where
    todo: str  # what --fix does, or the user should
    remedy: Callable[[], object] | None = None  # what --fix calls


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """What `doctor` came to."""

    findings: list[Finding]  # what is not as it should be, after the repairs
    repaired: int
    failures: list[str]  # one message for each repair that failed
    latency: float  # milliseconds that the MLflow server takes for a small request, beside the network's

    @property
    def verdict_on_latency(self) -> str:
        """Whether the MLflow server answers late, and what helps."""
        return latency.verdict(self.latency)

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is left that is not as it should be."""
        return not self.findings


def doctor(study: str | None = None, *, fix: bool = False) -> Checkup:
    """Check services, versions and one study or everything; with `fix` repair what can be repaired."""
    repaired, failures = 0, []
    with connect() as connection:
        findings = list(examine(connection, study=study))
        if fix:
            for finding in findings:
                try:
                    if finding.remedy is not None:
                        finding.remedy()
                        repaired += 1
                except Exception as error:  # the other findings can still be repaired; this one is found again below
                    failures.append(f"{finding.kind}: {finding.what}: could not be repaired: {error}")
            findings = list(examine(connection, study=study))
        late = latency.latency(connection.services.tracking_uri)
    return Checkup(findings=findings, repaired=repaired, failures=failures, latency=late)


def examine(connection: Connection, *, study: str | None = None) -> Iterator[Finding]:
    """Look at everything, or at one study. Raise ServiceError, DatabaseLost or TrackingUnavailable."""
    queue, tracker, settings = connection.queue, connection.tracker, connection.settings
    yield from _versions(queue, tracker)
    rows = queue.studies()
    owned = {experiment.experiment_id for experiment in experiments.owned(tracker, queue.database_id())}
    for row in rows if study is None else [queue.study(study)]:
        if not row.facts.planned:
            continue  # it is being planned, or its planner died: the next `hpo run` goes on
        if row.paused is not None:
            todo = "when the cause is gone, `hpo run` with the same options ends the pause"
            yield Finding("paused", f"{row.name} is paused: {row.paused}", todo)
        if row.deleting:
            todo = f"`hpo delete --study {row.name}` deletes the rest"
            yield Finding("orphan", f"the study {row.name} is half deleted", todo)
        elif row.facts.experiment_id in owned:
            yield from _study(connection.reconciler(row), settings)
        else:
            yield _experiment_gone(row)
    if study is None:
        yield from _experiments_without_study(queue, tracker, rows)
        yield from _caches(settings.home, rows)


def _versions(queue: Queue, tracker: Tracker) -> Iterator[Finding]:
    served, ours = tracker.version(), metadata.version("mlflow")
    if served.split(".")[:2] != ours.split(".")[:2]:
        yield Finding(
            "versions",
            f"the server at {tracker.uri} runs MLflow {served}, installed here is {ours}",
            f"install mlflow {served} here, or {ours} there (back up its database first)",
        )
    version = queue.server_version()
    if version < 12:
        yield Finding("versions", f"expected Postgres 12 or newer, found {version}", "use a newer Postgres")


def _experiment_gone(row: StudyRow) -> Finding:
    number = row.facts.experiment_id
    return Finding(
        "orphan",
        f"{row.name}: its MLflow experiment (id {number}) is deleted or gone",
        f"restore it (`mlflow experiments restore --experiment-id {number}`) or `hpo delete --study {row.name}`",
    )


def _study(reconciler: Reconciler, settings: Settings) -> Iterator[Finding]:
    """Violated invariants, and what belongs to no job."""
    tracker, experiment = reconciler.tracker, reconciler.study.facts.experiment_id
    deleted = set(tracker.runs(experiment, kind="trial", deleted=True, keep=lambda run: run.info.run_id))
    seen = invariants.Seen(reconciler, grace=settings.lease)
    for violation in invariants.violations(seen):
        remedy: Callable[[], object] | None = None
        todo = "see docs/explanation/reliability.md; `hpo delete` removes the study"
        if violation.job is not None and violation.job.kind == "closing":
            todo = "let the study close again when all its trials have ended; `hpo run` trains them"
            remedy = partial(reconciler.queue.close_again, reconciler.study.name)
        elif violation.job is not None:
            todo, remedy = (
                "show it again in Optuna and MLflow",
                partial(_show, reconciler, violation.job, deleted, settings),
            )
        elif violation.election:
            todo = "set aliases and tags as the database says"
            remedy = partial(champion.settle, reconciler.queue, reconciler.tracker, reconciler.study)
        elif violation.rule == "I4":
            todo = "do not use these files; take the alias off in MLflow, then `hpo promote` elects the next sound one"
        yield Finding(violation.rule, f"{violation.study}: {violation.what}", todo, remedy)
    if seen.is_deleted:
        return
    jobs = {job.key: job for job in seen.jobs if job.kind == "trial"}
    yield from _dead(reconciler, list(jobs.values()))
    yield from _runs(seen, jobs)
    yield from _models(seen, jobs)
    yield from _checkpoints(seen, jobs, settings)
    yield from _files(seen, jobs, settings)
    yield from _data_set(reconciler, settings)


def _dead(reconciler: Reconciler, jobs: list[Job]) -> Iterator[Finding]:
    """Dead trials of a closed study, which is the poorer for them."""
    name = reconciler.study.name
    dead = [job for job in jobs if job.state == State.DEAD]
    if dead and reconciler.queue.closing_state(name) == State.DONE:
        counts = Counter(job.reason for job in dead)
        yield Finding(
            "dead",
            f"{name} is closed, but {counted(len(dead), 'trial', 'are', of=len(jobs))} dead: "
            + "; ".join(f"{reason} ({count})" for reason, count in counts.most_common(3)),
            f"correct the cause, then `hpo run --study {name} --retry` trains them again",
        )


def _show(reconciler: Reconciler, job: Job, deleted: set[str], settings: Settings) -> None:
    if job.run_id in deleted:
        reconciler.tracker.restore_run(str(job.run_id))
    reconciler.queue.show_again(job)
    reconciler.reconcile(lease=settings.lease, older_than=0)


def _runs(seen: Seen, jobs: dict[str, Job]) -> Iterator[Finding]:
    study, tracker = seen.reconciler.study.name, seen.reconciler.tracker
    for run in (run for runs in seen.runs.values() for run in runs):
        job = jobs.get(run.key)
        # Of two that were made at once for a trial one goes before its job is reconciled.
        if job is None or (job.run_id is not None and job.run_id != run.run_id and job.mirrored):
            yield Finding(
                "orphan",
                f"{study}: the MLflow run {run.run_id} ({run.key or 'no key'}) belongs to no trial",
                "delete the run",
                partial(tracker.delete_run, run.run_id),
            )


def _models(seen: Seen, jobs: dict[str, Job]) -> Iterator[Finding]:
    """Models that are no trial's result. A trial that is not over may be uploading one right now, and those of earlier
    attempts go before the record of one that is over is complete."""
    results = {job.result.model_id for job in jobs.values() if job.state == State.DONE and job.result}
    study = seen.reconciler.study.name
    for model in seen.models:
        job = jobs.get(model.key.rpartition("/")[0])
        if not model.key.startswith(f"{study}/"):
            continue  # somebody's own
        if model.model_id in results or (job is not None and not (job.state in ENDED and job.mirrored)):
            continue
        state = "" if model.is_ready else "unfinished "
        yield Finding(
            "orphan",
            f"{study}: the {state}model {model.model_id} is no trial's result",
            "delete the model and its files",
            partial(_delete_model, seen.reconciler, model, job),
        )


def _stored(tracker: Tracker, uri: str, settings: Settings) -> ArtifactRepository:
    """Return the files below an artifact URI; those of the embedded server can be listed without a request each."""
    if folder := serving.store_folder(settings):
        uri = uri.replace(STORE, f"{folder.as_uri()}/", 1)
    return tracker.repository(uri)


def _checkpoints(seen: Seen, jobs: dict[str, Job], settings: Settings) -> Iterator[Finding]:
    tracker, runs = seen.reconciler.tracker, {run.run_id: run for runs in seen.runs.values() for run in runs}
    for job in jobs.values():
        if job.state not in (State.DONE, State.DIVERGED, State.PRUNED) or job.run_id not in runs or not job.mirrored:
            continue  # a dead one may be tried again from there; of others they go before its job is reconciled
        if left := artifacts.entries(_stored(tracker, runs[job.run_id].artifact_uri, settings), "checkpoints"):
            yield Finding(
                "orphan",
                f"{job.title} is {job.state}, but keeps {counted(len(left), 'checkpoint')}",
                "delete them",
                partial(tracker.delete_artifact, job.run_id, "checkpoints"),
            )


def _files(seen: Seen, jobs: dict[str, Job], settings: Settings) -> Iterator[Finding]:
    """Recorded models whose files are not all there; those with an alias were checked to the last byte already."""
    tracker, locations = seen.reconciler.tracker, {model.model_id: model.artifact_location for model in seen.models}
    versions = {
        version.run_id: (name, version)
        for name in champion.names(seen.reconciler.study)
        for version in registry.versions(tracker, name)
    }
    for job in jobs.values():
        name, version = versions.get(str(job.run_id), ("", None))
        if job.state != State.DONE or job.result is None or (version is not None and version.aliases):
            continue
        uri = locations.get(job.result.model_id)
        stored = artifacts.paths(_stored(tracker, uri, settings)) if uri is not None else set()
        if missing := sorted(job.result.files.keys() - stored):
            registered = f"{name} version {version.number}, " if version is not None else ""
            yield Finding(
                "files",
                f"{registered}the model {job.result.model_id} of {job.title} lacks "
                f"{', '.join(missing)} in the artifact store",
                "restore the files from a backup" + (", or delete the version in MLflow" if registered else ""),
            )


def _data_set(reconciler: Reconciler, settings: Settings) -> Iterator[Finding]:
    """The data set at the study's run, without which other machines cannot train, and what its winners predicted."""
    row = reconciler.study
    with tempfile.TemporaryDirectory() as folder:
        try:
            dataset = load_npz(data_sets.download(reconciler.tracker, row.name, row.facts, Path(folder)))
        except ServiceError as error:
            here = data_sets.copy_here(settings.home, row.facts.data, row.specification.image_size)
            yield Finding(
                "files",
                str(error).partition(" `hpo doctor")[0].rstrip("."),
                "put it there again from this machine" if here else "restore it from a backup",
                partial(_upload_data, reconciler, here) if here else None,
            )
            return
    parts = dataset.split
    for close in reconciler.queue.jobs(row.name):
        if close.kind != "closing" or close.state != State.DONE or close.closing is None:
            continue
        for entry in close.closing.groups:
            try:
                evidence.predictions(reconciler.tracker, row, entry, dataset, parts)
            except StudyConflict as error:
                yield Finding(
                    "files",
                    str(error).partition(" `hpo doctor")[0].rstrip("."),
                    "let the recorded model predict it again",
                    partial(_predict_again, reconciler, entry.number, settings),
                )


def _upload_data(reconciler: Reconciler, file: Path) -> None:
    """Put a sound copy of the data set at the study's run again."""
    row = reconciler.study
    data_sets.upload(reconciler.tracker, row.facts.study_run_id, file)
    reconciler.queue.amend_facts(row.name, {"data": replace(row.facts.data, sha256=sha256_of(file)).to_json()})


def _predict_again(reconciler: Reconciler, number: int, settings: Settings) -> None:
    """Score a winner's recorded model as its closing did, and put what it predicts at the study's run."""
    from hpo.worker import protocol, scoring

    jobs = reconciler.queue.jobs(reconciler.study.name)
    best = next(job for job in ranking.ranked(jobs) if job.number == number)
    job = ranking.network(jobs, best) or best
    data = data_sets.fetch(settings.home, reconciler.tracker, reconciler.study.name, reconciler.study.facts)
    with tempfile.TemporaryDirectory() as folder:
        model, table = Path(folder, "model"), Path(folder, f"trial-{number}.csv")
        assert job.result is not None
        registry.download_model(
            reconciler.tracker, model_id=job.result.model_id, folder=model, expected_sha256=job.result.files
        )
        request = protocol.Score(
            folder=model,
            data=data,
            predictions=table,
            errors=table.with_suffix(".npz"),
            folds=ranking.folds_of(job),
        )
        scored = scoring.score(request, lambda message: None, threading.Event())
        ranking.check_same(scored.model, job)
        reconciler.tracker.upload(reconciler.study.facts.study_run_id, table, "predictions")


def _experiments_without_study(queue: Queue, tracker: Tracker, rows: list[StudyRow]) -> Iterator[Finding]:
    planned = {row.facts.experiment_id for row in rows} | {row.name for row in rows}
    for experiment in experiments.owned(tracker, queue.database_id()):
        if experiment.experiment_id in planned or experiment.name in planned:  # by name: it is being planned
            continue
        if time.time() - (experiment.creation_time or 0) / 1000 > YOUNG:
            yield Finding(
                "orphan",
                f"the MLflow experiment '{experiment.name}' (id {experiment.experiment_id}) belongs to no study",
                "delete it and its files",
                partial(_delete_experiment, queue, tracker, experiment),
            )


def _caches(home: Path, rows: list[StudyRow]) -> Iterator[Finding]:
    """What dead workers left, data sets no study uses any more, other cached files that no training used for long;
    studies of other databases may share the folder."""
    for folder in sorted((home / "work").glob("*")):
        if sweep(folder, remove=False):
            yield Finding("cache", f"{folder} was left by a worker that died", "remove it", partial(sweep, folder))
    used = {data_sets.cached(home, row.facts.data.digest, row.facts.data.sha256).name for row in rows}
    kinds = ("data", "features", "weights", "start", "code")
    for file in sorted(file for kind in kinds for file in (home / "cache" / kind).glob("*")):
        try:
            status = file.stat()
        except FileNotFoundError:
            continue  # a trainer's that is done with it
        if file.name not in used and time.time() - status.st_mtime > UNUSED:
            size = f" ({status.st_size / 1e6:.1f} MB)" if file.is_file() else ""
            yield Finding(
                "cache",
                f"{file}{size} " + ("belongs to no study" if file.parent.name == "data" else "is not used any more"),
                "remove it",
                partial(data_sets.discard, file, unused=UNUSED),
            )


def _delete_model(reconciler: Reconciler, model: Listed, seen: Job | None) -> None:
    """Delete the model unless its trial is tried again, or has taken it as its result, since we looked."""
    job = reconciler.queue.job(seen.id) if seen is not None else None
    if job is None or (job.state in ENDED and (job.result is None or job.result.model_id != model.model_id)):
        logged_models.delete(reconciler.tracker, model)


def _delete_experiment(queue: Queue, tracker: Tracker, experiment: Experiment) -> None:
    """Delete the experiment unless it was planned into since we looked."""
    with queue.plan_lock(experiment.name):
        if experiment.name not in {row.name for row in queue.studies()}:
            experiments.delete(tracker, experiment.experiment_id)
