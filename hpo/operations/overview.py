"""What was planned, trained and promoted, as records and frames."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas

from hpo import settings
from hpo.errors import ModelError, NotFound, ServiceError
from hpo.operations.connection import connect, hangs, mlflow_away
from hpo.queue import Job, Queue, State, StudyCounts, StudyRow
from hpo.queue.closing_result import ClosingResult
from hpo.report import comparison, document, sections
from hpo.report.comparison import Comparison
from hpo.report.progress import Progress
from hpo.report.results import rows
from hpo.scores import champion, evidence
from hpo.services import serving
from hpo.services.serving import Services
from hpo.settings import Settings
from hpo.study import alias
from hpo.text import counted


@dataclass(frozen=True, kw_only=True)
class StudySummary:
    """A planned study in short."""

    name: str
    state: str  # planned, running, interrupted, paused, closed or half deleted
    trials: int
    done: int
    failed: int
    pruned: int
    cancelled: int
    best_val_nmse: float | None
    data: str  # name of the data set
    identity: str
    experiment_id: str  # in MLflow


class Status:
    """The services and the studies in their database; `refresh` looks again."""

    def __init__(self, chosen: Settings, services: Services) -> None:
        self._settings, self._queue = chosen, Queue(services.database_url)
        self._progress: dict[str, Progress] = {}  # kept: a rate needs two looks
        self._queue.install()
        self.refresh()

    def refresh(self) -> None:
        """Read everything again. Raise DatabaseLost if the database does not answer."""
        self.studies: list[StudySummary] = []
        self.open: list[Progress] = []  # of studies that are not closed
        try:
            rows, counts = self._queue.studies(), self._queue.counts()
            for row in rows:
                own = counts.get(row.name, StudyCounts())
                self.studies.append(_summary(row, own))
                if own.closing is None or not own.closing.ended:
                    progress = self._progress.setdefault(row.name, Progress(self._queue, row))
                    progress.refresh()
                    self.open.append(progress)
        finally:
            self._queue.close()  # until the next look
        services = serving.running(self._settings)
        self.tracking_uri = services.tracking_uri if services else None  # None: MLflow does not answer

    @property
    def closed(self) -> int:
        """Number of closed studies."""
        return len(self.studies) - len(self.open)

    @property
    def trouble(self) -> str | None:
        """A message, if the embedded MLflow server does not answer."""
        return None if self.tracking_uri else mlflow_away(self._settings)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return {
            "services": {"tracking_uri": self.tracking_uri},
            "studies": [asdict(study) for study in self.studies],
            "open": [progress.as_dict() for progress in self.open],
        }


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """What a closed study promoted."""

    result: ClosingResult  # of the closing, with the champion of now
    alias: str  # of the study's best version
    is_alias_set: bool  # by this call: it was missing


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report that was written."""

    page: Path  # HTML
    others: list[Path]  # report.md, and the files in tables/ and figures/
    summary: list[str]
    alarms: list[str]


def status() -> Status | None:
    """Return the state of services and studies, or None if the services do not run.

    Raise ServiceError if the embedded Postgres lives but does not answer.
    """
    chosen = settings.read()
    services = serving.running(chosen, mlflow=False)
    if services is None and serving.hangs(chosen):
        raise ServiceError(hangs(chosen))
    return None if services is None else Status(chosen, services)


def studies() -> list[StudySummary]:
    """Return the planned studies, oldest first."""
    with connect(mlflow=False) as connection:
        rows, counts = connection.queue.studies(), connection.queue.counts()
        return [_summary(row, counts.get(row.name, StudyCounts())) for row in rows]


def _summary(row: StudyRow, counts: StudyCounts) -> StudySummary:
    state = "planned"
    if row.deleting:
        state = "half deleted"
    elif row.paused is not None:
        state = "paused"
    elif counts.closing == State.DONE:
        state = "closed"
    elif counts.is_alive:
        state = "running"
    elif counts.has_begun:
        state = "interrupted"
    return StudySummary(
        name=row.name,
        state=state,
        trials=sum(counts.states.values()),
        done=counts.states.get(State.DONE, 0),
        failed=sum(count for state, count in counts.states.items() if state.failed),
        pruned=counts.states.get(State.PRUNED, 0),
        cancelled=counts.states.get(State.CANCELLED, 0),
        best_val_nmse=counts.best_val_nmse,
        data=row.facts.data.name,
        identity=row.identity,
        experiment_id=row.facts.experiment_id,
    )


def jobs(study: str, *, brief: bool = False) -> tuple[StudyRow, list[Job]]:
    """Return a study and its jobs (trials, repeats and the closing) as the queue has them. Raise NotFound.

    With `brief` results come without the hashes of their files and without the scores by target.
    """
    with connect(mlflow=False) as connection:
        queue = connection.queue
        row = queue.study(study)
        return row, queue.jobs(row.name, brief=brief)


def trials(study: str) -> list[Job]:
    """Return all trials of a study, in the order of their numbers. Raise NotFound if there is no such study."""
    return [job for job in jobs(study)[1] if job.kind == "trial"]


def results(study: str) -> pandas.DataFrame:
    """Return the finished trials of a study, best configuration first, one row each.

    Columns: `number`, `config`, `point.NAME` for each parameter of the search, `best_val_nmse`, `best_val_r2` and other
    scores, `seconds` of training, `run_id` and so on. MSE is in the label's unit squared. Raise NotFound.
    """
    return pandas.DataFrame(rows(jobs(study)[1]))


def compare(*names: str) -> Comparison:
    """Put studies, trials, MLflow runs and registered versions side by side.

    A name is a study (its best trial), a trial (`grid/22`), a run id, or a version (`MODEL@champion`, `@champion`).
    Raise NotFound if one stands for nothing.
    """
    with connect(mlflow=False) as connection:
        return comparison.compare(connection.queue, connection.tracker_if_up, names)


def promote(study: str) -> Promotion:
    """Return what a closed study promoted, and set its alias again if it is missing.

    Raise NotFound if the study is not closed, ModelError if its version is damaged.
    """
    with connect() as connection:
        row = connection.queue.study(study)
        closing = closed(row, connection.queue.jobs(row.name))
        outcome = champion.settle(connection.queue, connection.tracker, row)
    name, result = alias(row.name), closing.closing or ClosingResult()
    if fault := outcome.refused.get(name):
        version = result.winner.version if result.winner is not None else None
        raise ModelError(f"{result.model_name} version {version} is not promoted again: {fault}")
    elected = replace(result, election=outcome.elected)
    return Promotion(result=elected, alias=name, is_alias_set=name in outcome.moved)


def closed(row: StudyRow, jobs: list[Job]) -> Job:
    """Return the closing of a closed study. Raise NotFound for another one, saying what it waits for."""
    closing = next((job for job in jobs if job.kind == "closing"), None)
    if closing is None:
        raise NotFound(f"{row.name} is not planned to its end: `hpo run --study {row.name}` goes on with it.")
    if closing.state == State.DEAD:
        raise NotFound(f"Closing {row.name} failed: {closing.reason}. `hpo run --study {row.name}` tries it again.")
    if closing.closing is None:
        left = sum(job.state in (State.WAITING, State.RUNNING) for job in jobs if job.kind == "trial")
        raise NotFound(
            f"The study {row.name} is not closed: {counted(left, 'trial', 'are')} still to be trained. Closing "
            f"promotes its best model; `hpo run` or `hpo worker --study {row.name}` finishes it."
        )
    return closing


def report(folder: Path, studies: Sequence[str] = ()) -> Report:
    """Write the report of closed studies into a folder, and attach it to their runs.

    Without `studies`: all closed studies on the data of the newest one. Raise NotFound, StudyConflict or ReportError.
    """
    with connect() as connection:
        tracker = connection.tracker
        gathered = evidence.gather(connection.queue, tracker, studies)
        contents = sections.build(gathered)
        page, *others = document.write(contents, folder)
        for study in gathered.closed:
            for path in (page, *others):
                target = Path("report") / path.relative_to(folder).parent
                tracker.upload(study.row.facts.study_run_id, path, target.as_posix())
        return Report(page=page, others=others, summary=contents.summary, alarms=contents.alarms)
