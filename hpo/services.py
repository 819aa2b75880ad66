"""The two services that everything talks to: started under HPO_HOME on loopback unless URLs of others are set."""

import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from hpo import daemon, mlflow_server, postgres
from hpo import home as homes
from hpo.errors import ServiceError
from hpo.home import Home
from hpo.settings import Settings


@dataclass(frozen=True)
class Services:
    """Where the database and the MLflow server are: all that a worker needs to know."""

    database_url: str = field(repr=False)  # SQLAlchemy URL for Optuna and the queue, with the password
    tracking_uri: str  # of the MLflow server; in a browser, its pages


def up(settings: Settings, *, report: Callable[[str], object] = print) -> tuple[Services, bool]:
    """Have both services run; return them and whether anything had to be started. They outlive this process.

    Several callers at once share one pair. `report` gets a line for each step that takes time. ServiceError if a
    service cannot be started: the message ends with its log.
    """
    if found := running(settings):
        return found, False
    path = settings.home.resolve()
    try:
        (path / "services").mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path, report):
            home = homes.settle(path, report, _stop)
            port = home.postgres_port
            home, postgres_started = postgres.start(home, report)
            if home.postgres_port != port:
                mlflow_server.stop(home)  # it was told the old one
            home, mlflow_started = mlflow_server.start(home, report)
    except (OSError, psycopg.Error) as error:
        raise ServiceError(f"The services under {path} (HPO_HOME) could not be started: {error}") from error
    return _services(home), postgres_started or mlflow_started


def running(settings: Settings) -> Services | None:
    """The services if both are there (those of the settings' URLs are taken to be); starts and writes nothing."""
    if settings.database_url and settings.tracking_uri:
        return Services(settings.database_url, settings.tracking_uri)
    path = settings.home.resolve()
    home = homes.read(path)
    if home is None or home.path != path or not postgres.answers(home) or not mlflow_server.answers(home):
        return None
    return _services(home)


def down(settings: Settings) -> bool:
    """End both services of HPO_HOME, all of their processes, and wait for it; False if none ran.

    This is about HPO_HOME whatever the URLs say: the shell may have exported ours.
    """
    path = settings.home.resolve()
    if homes.read(path) is None:
        return False
    with _locked(path, lambda line: None):
        home = homes.read(path)
        return home is not None and _stop(home)


def erase(settings: Settings) -> None:
    """Stop the services and remove their databases for ever; artifacts and logs stay."""
    down(settings)
    path = settings.home.resolve()
    home = homes.read(path)
    if home is not None:
        if not home.data.is_relative_to(path):
            shutil.rmtree(home.data.parent)
        shutil.rmtree(home.services)


def export_lines(services: Services) -> str:
    """Two lines for a shell or a notebook's environment."""
    return (
        f"export HPO_DATABASE_URL={shlex.quote(services.database_url)}\n"
        f"export MLFLOW_TRACKING_URI={shlex.quote(services.tracking_uri)}"
    )


def _locked(path: Path, report: Callable[[str], object]):
    return daemon.locked(
        path / "services" / "lock",
        waiting=lambda: report("Waiting for another hpo that starts or stops the services."),
    )


def _services(home: Home) -> Services:
    return Services(postgres.url(home, "hpo"), mlflow_server.url(home))


def _stop(home: Home) -> bool:
    ended = [mlflow_server.stop(home), postgres.stop(home)]
    return any(ended)
