"""The services that the settings name: start them, stop them, and connect to them while they run."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import optuna

from hpo import settings
from hpo.errors import ServiceError
from hpo.queue import DatabaseLost, Queue, StudyRow
from hpo.recording.reconciler import Reconciler
from hpo.search import sampling
from hpo.services import serving
from hpo.services.serving import Services, export_lines
from hpo.settings import Settings
from hpo.tracking.client import Tracker
from hpo.tracking.errors import TrackingUnavailable

__all__ = ["Connection", "connect", "down", "export_lines", "mlflow_away", "opened", "up"]

log = logging.getLogger("hpo.api")


def up(*, listen: str | None = None, say: Callable[[str], object] = log.info) -> tuple[Services, bool]:
    """Start the embedded services unless they run; return where they are, and whether something was started.

    `listen` is the IPv4 address of this machine to serve other machines at; None leaves it as it is. `say` gets a line
    for each step that takes time. Raise ServiceError if a service cannot be started.
    """
    return serving.up(settings.read(), listen=listen, report=say)


def down() -> bool:
    """Stop the embedded services; return whether any ran."""
    return serving.down(settings.read())


@dataclass(frozen=True)
class Connection:
    """Settings, running services, and the queue in their database."""

    settings: Settings
    services: Services
    queue: Queue

    @cached_property
    def tracker(self) -> Tracker:
        """Client of the MLflow server."""
        return Tracker(self.services.tracking_uri)

    @cached_property
    def store(self) -> optuna.storages.RDBStorage:
        """Optuna's tables."""
        return sampling.storage(self.services.database_url)

    @property
    def tracker_if_up(self) -> Tracker | None:
        """MLflow, or None if the embedded server does not answer: another program may listen at its port."""
        return self.tracker if serving.running(self.settings) else None

    def reconciler(self, row: StudyRow) -> Reconciler:
        """Return what brings Optuna and MLflow in line with a study's rows."""
        return Reconciler(self.queue, self.tracker, self.store, row)

    def record(self, row: StudyRow) -> bool:
        """Record a study's changes in Optuna and MLflow at once; false if they are away: a worker does it later."""
        if self.tracker_if_up is None:
            return False
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
