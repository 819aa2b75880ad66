"""Connections to the services that the settings name, while they run.

MLflow and Optuna are imported when a command first asks for them: that takes longer than most commands.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from hpo import settings
from hpo.errors import ServiceError
from hpo.queue import DatabaseLost, Queue, StudyRow
from hpo.services import serving
from hpo.services.serving import Services
from hpo.settings import Settings

if TYPE_CHECKING:
    import optuna

    from hpo.recording.reconciler import Reconciler
    from hpo.tracking.client import Tracker


@dataclass(frozen=True)
class Connection:
    """Settings, running services, and the queue in their database."""

    settings: Settings
    services: Services
    queue: Queue

    @cached_property
    def tracker(self) -> "Tracker":
        """Client of the MLflow server."""
        from hpo.tracking.client import Tracker

        return Tracker(self.services.tracking_uri)

    @cached_property
    def store(self) -> "optuna.storages.RDBStorage":
        """Optuna's tables."""
        from hpo.search import sampling

        return sampling.storage(self.services.database_url)

    @property
    def tracker_if_up(self) -> "Tracker | None":
        """MLflow, or None if the embedded server does not answer: another program may listen at its port."""
        return self.tracker if serving.running(self.settings) else None

    def reconciler(self, row: StudyRow) -> "Reconciler":
        """Return what brings Optuna and MLflow in line with a study's rows."""
        from hpo.recording.reconciler import Reconciler

        return Reconciler(self.queue, self.tracker, self.store, row)

    def record(self, row: StudyRow) -> bool:
        """Record a study's changes in Optuna and MLflow at once; false if they are away: a worker does it later."""
        if self.tracker_if_up is None:
            return False
        from hpo.tracking.errors import TrackingUnavailable

        try:
            self.reconciler(row).reconcile(lease=self.settings.lease, older_than=0, expire=False)
        except (TrackingUnavailable, DatabaseLost):
            return False
        return True


@contextmanager
def connect(*, mlflow: bool = True) -> Iterator[Connection]:
    """Give a connection to the services that run; without `mlflow` the database is enough.

    Raise ServiceError if the services do not run, DatabaseLost if the database does not answer.
    """
    chosen = settings.read()
    services = serving.running(chosen, mlflow=mlflow)
    if services is None and serving.hangs(chosen):
        raise ServiceError(mlflow_away(chosen) if mlflow and serving.running(chosen, mlflow=False) else hangs(chosen))
    if services is None:
        raise ServiceError(
            f"The services of {chosen.home} are not running. `hpo up` starts them. (Is HPO_HOME the one you mean?)"
        )
    with opened(chosen, services) as connection:
        yield connection


@contextmanager
def opened(chosen: Settings, services: Services) -> Iterator[Connection]:
    """Give a connection to these services, and make the queue's tables if there are none."""
    connection = Connection(chosen, services, Queue(services.database_url))
    try:
        connection.queue.install()
        yield connection
    finally:
        connection.queue.close()
        if "store" in vars(connection):  # it was used
            connection.store.remove_session()
            connection.store.engine.dispose()


def hangs(chosen: Settings) -> str:
    """Return the message for an embedded Postgres that lives but does not answer."""
    return (
        f"The Postgres of {chosen.home} (HPO_HOME) lives but does not answer: it starts, or was stopped (SIGSTOP), or "
        f"hangs. Try again; then `hpo down` and `hpo up`. Its log: {chosen.home}/logs/postgres.log"
    )


def mlflow_away(chosen: Settings) -> str:
    """Return the message for an embedded MLflow server that does not answer."""
    return (
        f"The MLflow server of {chosen.home} (HPO_HOME) does not answer, its Postgres does. `hpo up` starts it if it "
        f"has ended; if it hangs, `hpo down` and then `hpo up`. Its log: {chosen.home}/logs/mlflow.log"
    )
