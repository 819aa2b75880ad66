"""The two services that everything talks to: started under HPO_HOME unless URLs of others are set.

On loopback; or, asked to serve a lab, on an address of this machine, and then never without access control.
"""

import importlib.util
import ipaddress
import os
import secrets
import shlex
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import psycopg

from hpo import credentials, machine, ownership, surroundings
from hpo.errors import ServiceError
from hpo.services import daemon, mlflow_server, postgres
from hpo.services import home as homes
from hpo.services.home import Home
from hpo.settings import Settings

TASKS = 50  # processes and threads of both services, with some clients at work


@dataclass(frozen=True)
class Services:
    """Where the database and the MLflow server are: all that a worker needs to know."""

    database_url: str = field(repr=False)  # SQLAlchemy URL for Optuna and the queue, with the password
    tracking_uri: str  # of the MLflow server; in a browser, its pages
    username: str | None = None  # of hpo at the MLflow server, if it wants one
    password: str | None = field(default=None, repr=False)
    credentials: Path | None = None  # file that gives all of it to anyone with a copy


def up(
    settings: Settings, *, listen: str | None = None, report: Callable[[str], object] = print
) -> tuple[Services, bool]:
    """Have both services run; return them and whether anything had to be started. They outlive this process.

    Several callers at once share one pair. `report` gets a line for each step that takes time. `listen` is the address
    to serve other machines at, a loopback one to serve none; without it, it is as it was. ServiceError if a service
    cannot be started, when the message ends with its log, or cannot be what is asked.
    """
    path = homes.resolved(settings.home)
    wanted = None if listen is None else _address(listen)
    _check_asked(path, wanted, settings)
    if services := running(settings):
        if wanted is not None:
            _check_is(homes.read(path), wanted)
        if settings.embedded and services.credentials and _open(path):
            with _locked(path, report):
                _tighten(path, report)
        if settings.embedded and services.credentials and not services.credentials.exists():
            home = homes.read(path)
            assert home is not None, "its services run"
            credentials.write(home.credentials, _credentials(home))
            report(f"{home.credentials} was missing: written again, with the passwords in use.")
        return services, False
    if not machine.may_start(TASKS):
        raise ServiceError(
            f"Postgres and the MLflow server take {TASKS} processes and threads, and fewer may be started here."
            f"{machine.limits()}"
        )
    try:
        for name in ("services", "logs", "artifacts"):
            ownership.folder(path, name)
        with _locked(path, report):
            if homes.read(path) is None and _stop_remains(path):
                report(f"Services of an earlier {path} were still running: stopped.")
            home = homes.settle(path, report, _stop)
            home = replace(home, bucket=home.bucket or settings.artifacts)
            if wanted is None and home.listen:
                _address(home.listen)
            if wanted is not None and wanted != home.host:
                if postgres.lives(home) or mlflow_server.lives(home):
                    _check_is(home, wanted)
                home = replace(home, listen=None if wanted == homes.LOOPBACK else wanted)
                homes.write(home)
            if home.listen:
                _tighten(path, report)
            before, home = home, _with_passwords(home)
            homes.write(home)
            home, postgres_started = postgres.start(home, report)
            if (home.postgres_port, home.access) != (before.postgres_port, before.access):
                mlflow_server.stop(home)  # it was told the old ones
            home, mlflow_started = mlflow_server.start(home, report)
            if home.listen:
                credentials.write(home.credentials, _credentials(home))
    except (OSError, psycopg.Error) as error:
        raise ServiceError(f"The services under {path} (HPO_HOME) could not be started: {error}") from error
    return _entered(_services(home)), postgres_started or mlflow_started


def running(settings: Settings, *, mlflow: bool = True) -> Services | None:
    """The services if both are there (those of the settings' URLs are taken to be); starts and writes nothing.

    Without `mlflow` it is enough that the database is there, and nobody knows who answers in the other's place.
    MLflow's client in this process, and in those that it starts, logs in with what was found.
    """
    if settings.database_url and settings.tracking_uri:
        user = (settings.tracking_username, settings.tracking_password)
        return _entered(Services(settings.database_url, settings.tracking_uri, *user, settings.credentials), False)
    path = homes.resolved(settings.home)
    home = homes.read(path)
    if home is None or home.path != path or not postgres.answers(home) or (mlflow and not mlflow_server.answers(home)):
        return None
    return _entered(_services(home))


def hangs(settings: Settings) -> bool:
    """Whether the embedded Postgres lives, asked where `running` says that it does not answer."""
    home = None if settings.database_url else homes.read(homes.resolved(settings.home))
    return home is not None and postgres.lives(home)


def down(settings: Settings) -> bool:
    """End both services of HPO_HOME, all of their processes, and wait for it; False if none ran.

    This is about HPO_HOME whatever the URLs say: the shell may have exported those of this home.
    """
    path = homes.resolved(settings.home)
    if homes.read(path) is None:
        return _stop_remains(path)
    with _locked(path, lambda line: None):
        home = homes.serving(path)
        return home is not None and _stop(home)


def erase(settings: Settings) -> None:
    """Stop the services and remove their databases without return; artifacts and logs stay."""
    path = homes.resolved(settings.home)
    if homes.read(path) is None:
        return
    with _locked(path, lambda line: None):
        home = homes.serving(path)
        if home is not None:
            _stop(home)
        removed = path / f"services.removed-{secrets.token_hex(4)}"
        (path / "services").rename(removed)  # with the lock: a process that waits for it begins in a new folder
    if home is not None and not home.data.is_relative_to(home.path):
        shutil.rmtree(home.data.parent, ignore_errors=True)
    shutil.rmtree(removed)


def export_lines(services: Services) -> str:
    """Lines for a shell or a notebook's environment; where passwords are for others too, they stay in their file."""
    if services.credentials:
        return f"export HPO_CREDENTIALS={shlex.quote(str(services.credentials))}"
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
    uris = (postgres.url(home, "hpo"), mlflow_server.url(home))
    if not home.listen:
        return Services(*uris)
    return Services(*uris, mlflow_server.USER, home.access[mlflow_server.USER], home.credentials)


def _entered(services: Services, is_own: bool = True) -> Services:
    surroundings.reach_mlflow(services.tracking_uri, user=services.username, password=services.password, is_own=is_own)
    return services


def _credentials(home: Home) -> dict[str, str]:
    """What the credentials file of a listening home says."""
    services = _services(home)
    return {
        "database_url": services.database_url,
        "tracking_uri": services.tracking_uri,
        "tracking_username": services.username or "",
        "tracking_password": services.password or "",
    }


def _with_passwords(home: Home) -> Home:
    """A listening home with passwords: new ones if there is no credentials file, which is how they are changed."""
    if not home.listen or (home.access and home.credentials.exists()):
        return home
    uses = (*postgres.ROLES.values(), mlflow_server.ADMIN, mlflow_server.USER, mlflow_server.KEY)
    return replace(home, access={use: secrets.token_hex(24) for use in uses})  # hexadecimal: parts of URLs


def _open(path: Path) -> list[Path]:
    """Folders of the home that others may enter: neither made by this hpo nor tightened to their end. Only those that
    lie there: a link leads to what may be meant for more than hpo."""
    tops = [path / name for name in homes.GUARDED if not (path / name).is_symlink() and (path / name).is_dir()]
    return [top for top in tops if ownership.is_ours(top) and top.stat().st_mode & 0o077]


def _tighten(path: Path, report: Callable[[str], object]) -> None:
    """Have nobody else read what access control guards: an earlier hpo left it with the modes of its user's umask."""
    others: list[str] = []
    for top in _open(path):
        for folder, folders, files in os.walk(top):
            for part, mode in [*((entry, 0o700) for entry in folders[:]), *((entry, 0o600) for entry in files)]:
                file = Path(folder, part)
                with suppress(FileNotFoundError):  # a worker is busy here
                    if not ownership.is_ours(file):
                        others.append(str(file))
                        if part in folders:
                            folders.remove(part)  # they may put anything in it
                    elif not file.is_symlink():
                        file.chmod(mode)
        top.chmod(0o700)
    if others:
        report(f"Below {path}, {len(others)} of other users were left as they are, such as {others[0]}.")


def _address(text: str) -> str:
    """The IPv4 address to listen on. ServiceError if this machine does not have it."""
    here = {
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET
    }
    address = homes.LOOPBACK if text == "localhost" else text
    with suppress(ValueError):
        if address in here or ipaddress.IPv4Address(address).is_loopback:
            return address
    raise ServiceError(
        f"--listen: expected one IPv4 address of this machine ({', '.join(sorted(here))}), found {text!r}. "
        "127.0.0.1 serves this machine alone."
    )


def _check_is(home: Home | None, wanted: str) -> None:
    """ServiceError if the services of the home run, but for others than wanted."""
    if home is not None and home.host != wanted:
        raise ServiceError(
            f"The services of {home.path} run already, and listen on {home.host}. Stop them first (`hpo down`); "
            f"workers go on when they are back."
        )


def _check_asked(path: Path, address: str | None, settings: Settings) -> None:
    """ServiceError if what is asked is about the services of others, or the artifacts of the home lie elsewhere."""
    if address is not None and not settings.embedded:
        raise ServiceError(
            "--listen is about the services of HPO_HOME, but HPO_DATABASE_URL and MLFLOW_TRACKING_URI (or "
            "HPO_CREDENTIALS) name others: unset them."
        )
    if not settings.embedded:
        return
    home, wanted = homes.read(path), settings.artifacts
    if wanted and home is not None and home.postgres_port is not None and home.bucket != wanted:
        raise ServiceError(
            f"HPO_ARTIFACTS: expected {home.bucket or 'no value'}, found {wanted}: the studies of {home.path} "
            f"(HPO_HOME) have their files in {home.bucket or home.artifacts}. `hpo backup` and `hpo restore` bring "
            "them to a new HPO_HOME with another HPO_ARTIFACTS."
        )
    if (wanted or (home and home.bucket)) and importlib.util.find_spec("boto3") is None:
        raise ServiceError("HPO_ARTIFACTS: a bucket needs boto3, an extra of hpo: pip install 'hpo[s3]'")


def store_folder(settings: Settings) -> Path | None:
    """Folder of this machine where the embedded MLflow server keeps artifacts; None if they lie elsewhere."""
    if not settings.embedded:
        return None
    home = homes.read(homes.resolved(settings.home))
    if home is not None and home.bucket is not None:
        return None
    return homes.resolved(settings.home) / "artifacts"


def _stop(home: Home) -> bool:
    ended = [mlflow_server.stop(home), postgres.stop(home)]
    return any(ended)


def _stop_remains(path: Path) -> bool:
    """End what runs of a home whose folder or state.json was removed; return whether there was anything."""
    ended = [_stop(home) for home in homes.left_behind(path)]
    ended.append(daemon.end_in(path / "services" / "tmp", mlflow_server.is_embedded))
    ended.append(daemon.end_in(path / "services" / "postgres", lambda process: process.name() == "postgres"))
    return any(ended)
