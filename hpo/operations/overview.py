"""What was planned, trained and promoted, as records and frames."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hpo import settings
from hpo.errors import ServiceError
from hpo.operations.connection import connect, hangs, mlflow_away
from hpo.queue import Job, Queue, State, StudyCounts, StudyRow
from hpo.report import pareto
from hpo.report.progress import Progress
from hpo.report.results import in_order, rows
from hpo.services import serving
from hpo.services.serving import Services
from hpo.settings import Settings

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, kw_only=True)
class StudySummary:
    """A planned study in short."""

    name: str
    state: str  # planned, running, interrupted, stopped, paused, closed or half deleted
    trials: int
    done: int
    failed: int
    pruned: int
    cancelled: int
    best_val_nmse: float | None
    data: str  # name of the data set
    identity: str
    experiment_id: str  # in MLflow
    priority: int  # the pool claims trials of the highest one first


class Status:
    """The services and the studies in their database; `refresh` looks again."""

    def __init__(self, chosen: Settings, services: Services) -> None:
        self._settings, self._queue = chosen, Queue(services.database_url)
        self._progress: dict[tuple[str, float], Progress] = {}  # kept: a rate needs two looks
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
                    progress = self._progress.setdefault((row.name, row.created_at), Progress(self._queue, row))
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
    elif row.stopped:
        state = "stopped"
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
        priority=row.priority,
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


def results(study: str) -> "pandas.DataFrame":
    """Return the finished trials of a study, best configuration first, one row each.

    Columns: `number`, `config`, `point.NAME` for each parameter of the search, `best_val_nmse`, `best_val_r2` and other
    scores, `seconds` of training, `run_id` and so on. MSE is in the label's unit squared. Raise NotFound.
    """
    import pandas

    return pandas.DataFrame(rows(*jobs(study)))


def trial_frame(study: str) -> "pandas.DataFrame":
    """Return a row for each trial of a study, the best configuration first: parameters, state and validation scores.

    Columns are number, repeat, state, the parameters by their names, `best_val_nmse`, `best_val_r2`, `best_epoch`,
    `epochs`, `seconds`, `reason` and `run_id`. Scores are NaN of a trial that has not been trained to its end. A
    parameter of one of these names is `point.NAME`. Sizes that objectives or bounds name follow, and with several
    objectives `pareto`: whether the configuration is on the front. Raise NotFound.
    """
    import pandas

    row, listed = jobs(study, brief=True)
    space, sizes = list(row.specification.space), pareto.values(row, listed)
    ordered = in_order(row, listed, "score")
    return pandas.DataFrame([_trial(job, space) | sizes.get(job.number, {}) for job in ordered])


def _trial(job: Job, space: Sequence[str]) -> dict[str, Any]:
    result = job.result if job.state == State.DONE else None
    point = job.spec.point if job.spec else {}
    scores = {
        "best_val_nmse": result.best_val_nmse if result else math.nan,
        "best_val_r2": result.validation.r2 if result else math.nan,
        "best_epoch": result.best_epoch if result else None,
    }
    facts = {
        "epochs": job.epochs,
        "seconds": result.seconds if result else math.nan,
        "reason": job.reason,
        "run_id": job.run_id,
    }
    first = {"number": job.number, "repeat": job.repeat, "state": job.state.label}
    taken = first | scores | facts
    parameters = {f"point.{name}" if name in taken else name: point.get(name) for name in space}
    return first | parameters | scores | facts
