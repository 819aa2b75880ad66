"""The MLflow server: its command (the same in docker-compose.yml), and the embedded one's life."""

import base64
import http.client
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import psutil  # type: ignore[import-untyped]

from hpo import credentials, ownership
from hpo.errors import ServiceError
from hpo.files import PRIVATE, write_atomically
from hpo.services import daemon, foreign, postgres
from hpo.services.home import Home, write

ADMIN = "admin"  # user of the server that may add users
USER = "hpo"  # of all that hpo starts: may do everything but manage users
KEY = "key"  # that the server signs its forms with
PREPARE = ("-P", "-m", "hpo.services.migrate")  # makes or upgrades both databases; follows `python`
START_TIMEOUT = 180.0  # seconds; imports and a fresh schema take 10 to 15 on an idle machine
STOP_TIMEOUT = 8.0  # seconds that requests get to end
MARK = "HPO_EMBEDDED_MLFLOW"  # environment variable of every process of the server: identity of the home
HEADER = "X-Hpo-Services"  # response header: identity of that home
INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH")  # MLFLOW_* of a notebook must not be
# Of a server whose artifacts lie in a bucket, too: its keys, and how it is reached.
_OF_BUCKETS = re.compile(r"AWS_|MLFLOW_S3_|MLFLOW_BOTO_|SSL_CERT_|(?:https?|no)_proxy$", re.IGNORECASE)
ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PYTHONSAFEPATH": "1",  # MLflow starts uvicorn by `python -m`, which would import from the current folder first
}


@dataclass(frozen=True)
class Served:
    """What a server with access control needs besides."""

    hosts: str  # host:port, comma-separated: what clients may call it
    environment: str  # file of `NAME=value` lines: the variables that hold secrets, which no command line may


def arguments(
    *, host: str, port: int, artifacts: str, served: Served | None = None, identity: str | None = None
) -> list[str]:
    """What follows `python` on the server's command line; the database comes as MLFLOW_BACKEND_STORE_URI.

    `served` where it listens beyond loopback: then it wants a user and a password. `identity` is sent in every answer.
    """
    # A worker process may be slow to answer its supervisor while trainers use all cores: that is no reason to kill it.
    uvicorn = ["--no-access-log", "--timeout-worker-healthcheck", "60"]
    if identity:
        uvicorn += ["--header", f"{HEADER}:{identity}"]
    access: list[str] = []
    if served:
        names = served.hosts.split(",")
        # The pages' own requests carry an Origin, which MLflow refuses as foreign unless it is localhost's.
        origins = ",".join(f"{scheme}://{name}" for name in names for scheme in ("http", "https"))
        access = ["--app-name", "basic-auth", "--allowed-hosts", served.hosts, "--cors-allowed-origins", origins]
    return [
        *("-P", "-m", "hpo.services.run_mlflow", *(("--env-file", served.environment) if served else ())),
        *("server", "--host", host, "--port", str(port), "--workers", "2"),
        *("--serve-artifacts", "--artifacts-destination", artifacts),
        *access,
        *("--uvicorn-opts", shlex.join(uvicorn)),
    ]


def url(home: Home) -> str:
    return f"http://{home.host}:{home.mlflow_port}"


def answers(home: Home) -> bool:
    """Whether our server lives, answers on our port, and reaches its database."""
    if home.mlflow_port is None or not daemon.lives(_life(home)):
        return False
    connection = http.client.HTTPConnection(home.host, home.mlflow_port, timeout=10)  # no proxy, whatever is set
    try:
        connection.request("GET", "/health")
        health = connection.getresponse()
        health.read()
        if health.status != 200 or health.getheader(HEADER) != home.identity:
            return False
        user = (USER, home.access[USER]) if home.listen else None
        return search(connection, user=user) == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def search(connection: http.client.HTTPConnection, *, user: tuple[str, str] | None) -> int:
    """Status of a search that reads one row of the server's database, as user with password or as nobody."""
    headers = {"Content-Type": "application/json"}
    if user is not None:
        headers["Authorization"] = f"Basic {base64.b64encode(':'.join(user).encode()).decode()}"
    body = json.dumps({"max_results": 1})
    connection.request("POST", "/api/2.0/mlflow/experiments/search", body, headers)
    response = connection.getresponse()
    response.read()
    return response.status


def start(home: Home, report: Callable[[str], object]) -> tuple[Home, bool]:
    """Have our MLflow server run, Postgres running. Return the home with its port, and whether we started it.

    The caller holds the lock of the home. ServiceError if it cannot be, or if the database is of another MLflow.
    """
    started = False
    while not daemon.comes_up(partial(answers, home), _life(home), timeout=START_TIMEOUT, name="MLflow", log=log(home)):
        if started and not _port_was_taken(home):
            raise ServiceError(f"MLflow did not start. The end of {log(home)}:\n{daemon.tail(log(home))}")
        stop(home)  # processes whose parent was killed would keep the port
        _check_schema(home)
        report("Starting the MLflow server.")
        temporary = ownership.folder(home.path, "services", _temporary(home).name)
        ownership.folder(home.path, "artifacts")
        environment = {name: os.environ[name] for name in INHERITED if name in os.environ} | ENVIRONMENT
        if home.bucket:
            environment |= {name: value for name, value in os.environ.items() if _OF_BUCKETS.match(name)}
        environment |= {MARK: home.identity, "TZ": "UTC"}
        environment["TMPDIR"] = str(temporary)  # MLflow's lock files there would stand in another user's way
        if home.listen:
            environment["MLFLOW_AUTH_CONFIG_PATH"] = str(_users_file(home))
            _prepare_users(home, environment)
        else:
            environment["MLFLOW_BACKEND_STORE_URI"] = postgres.url(home, "mlflow")
        with daemon.taken(_life(home)) as life:
            home = replace(home, mlflow_port=daemon.choose_port(home.mlflow_port, (home.host,)))
            write(home)
            daemon.launch(
                [sys.executable, *_embedded_arguments(home)],
                life=life,
                log=log(home),
                environment=environment,
                folder=temporary,
                user=None,
            )
        started = True
    return home, started


def stop(home: Home) -> bool:
    """End all processes of our MLflow server and wait for them; False if there were none."""
    was_running = False
    for patience, end in ((STOP_TIMEOUT, psutil.Process.terminate), (5.0, psutil.Process.kill)):
        processes = _processes(home)
        was_running = was_running or bool(processes)
        for process in processes:
            with suppress(psutil.Error):
                end(process)
        psutil.wait_procs(processes, timeout=patience)
    daemon.dies(log(home), timeout=2.0)  # what keeps its log ends after it
    if left := _processes(home):
        raise ServiceError(f"MLflow server processes do not end: {', '.join(str(process.pid) for process in left)}")
    return was_running


def lives(home: Home) -> bool:
    return daemon.lives(_life(home)) or bool(_processes(home))


def is_embedded(process: psutil.Process) -> bool:
    """Whether a process belongs to an embedded server of whatever home."""
    return MARK in process.environ()


def log(home: Home) -> Path:
    return home.logs / "mlflow.log"


def _life(home: Home) -> Path:
    return home.services / "mlflow.life"


def _embedded_arguments(home: Home) -> list[str]:
    assert home.mlflow_port is not None
    served = Served(f"{home.host}:{home.mlflow_port}", str(_environment_file(home))) if home.listen else None
    artifacts = _artifacts_uri(home)
    return arguments(host=home.host, port=home.mlflow_port, artifacts=artifacts, served=served, identity=home.identity)


def _temporary(home: Home) -> Path:
    """Current folder of the server's processes: the system follows it when the home is moved."""
    return home.services / "tmp"


def _artifacts_uri(home: Home) -> str:
    """Return where the server keeps artifacts: a bucket, or a folder of the home.

    MLflow decodes the path of a URI, and once more when it deletes: there %41 in a folder's name becomes an A. Linux
    knows the server's current folder by another name.
    """
    if home.bucket:
        return home.bucket
    if unquote(str(home.artifacts)) == str(home.artifacts) or not Path("/proc/self/cwd").exists():
        return home.artifacts.as_uri()
    link = _temporary(home) / "artifacts"
    if not link.is_symlink():
        link.symlink_to(Path("..", "..", "artifacts"))
    return f"file:///proc/self/cwd/{link.name}"


def _environment_file(home: Home) -> Path:
    return home.services / "mlflow.env"


def _users_file(home: Home) -> Path:
    return home.services / "mlflow-users.ini"


def _prepare_users(home: Home, environment: dict[str, str]) -> None:
    """Write the server's two files of secrets, and have its users be there. ServiceError if that fails."""
    environment_file, users_file = _environment_file(home), _users_file(home)
    content = credentials.server_variables(database=postgres.url(home, "mlflow"), key=home.access[KEY])
    write_atomically(environment_file, content.encode(), mode=PRIVATE)
    database, password = postgres.url(home, "mlflow_users"), home.access[ADMIN]
    users = credentials.server_users(database=database, admin=ADMIN, password=password)
    write_atomically(users_file, users.encode(), mode=PRIVATE)
    process = subprocess.run(
        [sys.executable, *PREPARE, str(environment_file)],
        input=home.access[USER],
        env=environment,
        cwd=_temporary(home),
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise ServiceError(f"MLflow's databases could not be prepared:\n{process.stderr}")


def _processes(home: Home) -> list[psutil.Process]:
    """Every process of our server; its worker processes do not inherit the lock of life."""
    processes = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # it has ended, or is another user's
            if process.uids().effective == os.geteuid() and _is_marked(process, home):
                processes.append(process)
    return processes


def _is_marked(process: psutil.Process, home: Home) -> bool:
    environment = process.environ()
    mark = environment.get(MARK)
    if mark == home.identity:  # as in a copy of the home, whose services are those of the folder that they run in
        return process.cwd() == str(_temporary(home))
    if mark != str(home.path):
        return False
    # The mark of an earlier hpo; other homes may have had this path, in a container say, but not the rest.
    marks = {home.identity, home.password, *home.access.values()}
    return any(word in text for text in (*process.cmdline(), *environment.values()) for word in marks)


def _port_was_taken(home: Home) -> bool:
    """Whether somebody took our port after we found it free."""
    return daemon.choose_port(home.mlflow_port, (home.host,)) != home.mlflow_port


def _check_schema(home: Home) -> None:
    """ServiceError if the database was made by another MLflow, which the server might migrate without a word."""
    with postgres.connect(home, "mlflow") as connection:
        stored, expected = foreign.schema(connection), foreign.newest_schema()
    if stored not in (None, expected):  # None: fresh, the server makes its tables
        raise ServiceError(
            f"The MLflow database of {home.path} has schema {stored}; the installed MLflow "
            f"{importlib.metadata.version('mlflow')} expects {expected}. Nothing was changed. Install the MLflow that "
            f"made it; or, if that was an older one, back up {home.path} and run: "
            f"mlflow db upgrade postgresql://{postgres.ROLE}:PASSWORD@127.0.0.1:{home.postgres_port}/mlflow "
            f"(its password is in {home.services / 'state.json'})."
        )
