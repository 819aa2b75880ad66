"""The MLflow server: its command (the same in docker-compose.yml), and the embedded one's life."""

import http.client
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from hpo import daemon, postgres
from hpo.errors import ServiceError
from hpo.home import Home, write

START_TIMEOUT = 180.0  # seconds; imports and a fresh schema take 10 to 15 on an idle machine
STOP_TIMEOUT = 8.0  # seconds that requests get to end
MARK = "HPO_EMBEDDED_MLFLOW"  # environment variable of every process of the server: the home it belongs to
HEADER = "X-Hpo-Services"  # response header: identity of that home
INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH")  # MLFLOW_* of a notebook must not be
ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def arguments(
    *, host: str, port: int, artifacts: str, allowed_hosts: str | None = None, identity: str | None = None
) -> list[str]:
    """What follows `python` on the server's command line; the database comes as MLFLOW_BACKEND_STORE_URI.

    `allowed_hosts`: names besides localhost that clients may call it by. `identity` is sent in every answer.
    """
    # A worker process may be slow to answer its supervisor while trainers use all cores: that is no reason to kill it.
    uvicorn = ["--no-access-log", "--timeout-worker-healthcheck", "60"]
    if identity:
        uvicorn += ["--header", f"{HEADER}:{identity}"]
    return [
        *("-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "2"),
        *("--serve-artifacts", "--artifacts-destination", artifacts),
        *(("--allowed-hosts", allowed_hosts) if allowed_hosts else ()),
        *("--uvicorn-opts", shlex.join(uvicorn)),
    ]


def url(home: Home) -> str:
    return f"http://127.0.0.1:{home.mlflow_port}"


def answers(home: Home) -> bool:
    """Whether our server lives, answers on our port, and reaches its database."""
    if home.mlflow_port is None or not daemon.lives(_life(home)):
        return False
    connection = http.client.HTTPConnection("127.0.0.1", home.mlflow_port, timeout=10)  # no proxy, whatever is set
    try:
        connection.request("GET", "/health")
        health = connection.getresponse()
        health.read()
        if health.status != 200 or health.getheader(HEADER) != home.identity:
            return False
        body = json.dumps({"max_results": 1})
        connection.request("POST", "/api/2.0/mlflow/experiments/search", body, {"Content-Type": "application/json"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


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
        temporary = home.services / "tmp"
        for folder in (temporary, home.artifacts):
            folder.mkdir(exist_ok=True)
        with daemon.taken(_life(home)) as life:
            home = replace(home, mlflow_port=daemon.choose_port(home.mlflow_port))
            write(home)
            daemon.launch(
                [sys.executable, *_embedded_arguments(home)],
                life=life,
                log=log(home),
                environment={name: os.environ[name] for name in INHERITED if name in os.environ}
                | ENVIRONMENT
                | {"MLFLOW_BACKEND_STORE_URI": postgres.url(home, "mlflow"), MARK: str(home.path), "TZ": "UTC"}
                | {"TMPDIR": str(temporary)},  # MLflow's lock files there would stand in another user's way
                folder=temporary,  # `python -m` imports from here first
                user=None,
            )
        started = True
    return home, started


def stop(home: Home) -> bool:
    """End all processes of our MLflow server and wait for them; False if there were none."""
    found = False
    for patience, end in ((STOP_TIMEOUT, psutil.Process.terminate), (5.0, psutil.Process.kill)):
        processes = _processes(home)
        found = found or bool(processes)
        for process in processes:
            with suppress(psutil.Error):
                end(process)
        psutil.wait_procs(processes, timeout=patience)
    if left := _processes(home):
        raise ServiceError(f"MLflow server processes do not end: {', '.join(str(process.pid) for process in left)}")
    return found


def log(home: Home) -> Path:
    return home.logs / "mlflow.log"


def _life(home: Home) -> Path:
    return home.services / "mlflow.life"


def _embedded_arguments(home: Home) -> list[str]:
    assert home.mlflow_port is not None
    return arguments(host="127.0.0.1", port=home.mlflow_port, artifacts=home.artifacts.as_uri(), identity=home.identity)


def _processes(home: Home) -> list[psutil.Process]:
    """Every process of our server; its worker processes do not inherit the lock of life."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # it has ended, or is another user's
            if process.environ().get(MARK) == str(home.path):
                found.append(process)
    return found


def _port_was_taken(home: Home) -> bool:
    """Whether somebody took our port after we found it free."""
    return daemon.choose_port(home.mlflow_port) != home.mlflow_port


def _check_schema(home: Home) -> None:
    """ServiceError if the database was made by another MLflow, which the server might migrate without a word."""
    with postgres.connect(home, "mlflow") as connection:
        if connection.execute("SELECT to_regclass('alembic_version')").fetchone() == (None,):
            return  # fresh: the server makes its tables
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    expected = schema_version()
    if row is not None and row[0] != expected:
        raise ServiceError(
            f"The MLflow database of {home.path} has schema {row[0]}; the installed MLflow "
            f"{importlib.metadata.version('mlflow')} expects {expected}. Nothing was changed. Install the MLflow that "
            f"made it; or, if that was an older one, back up {home.path} and run: "
            f"mlflow db upgrade postgresql://{postgres.ROLE}:PASSWORD@127.0.0.1:{home.postgres_port}/mlflow "
            f"(its password is in {home.services / 'state.json'})."
        )


def schema_version() -> str:
    """The installed MLflow's newest schema: the revision that no other names as its predecessor.

    Read from the text of its migrations, since importing MLflow takes seconds.
    """
    spec = importlib.util.find_spec("mlflow")
    assert spec is not None and spec.submodule_search_locations
    revisions, predecessors = set(), set()
    for file in (Path(spec.submodule_search_locations[0]) / "store" / "db_migrations" / "versions").glob("*.py"):
        text = file.read_text()
        revisions |= set(re.findall(r'^revision[^=\n]*=\s*["\'](\w+)', text, re.MULTILINE))
        for value in re.findall(r"^down_revision[^=\n]*=(.*)$", text, re.MULTILINE):
            predecessors |= set(re.findall(r'["\'](\w+)["\']', value))
    (head,) = revisions - predecessors
    return head
