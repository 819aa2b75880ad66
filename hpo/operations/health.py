"""`python -m hpo.operations.health server|worker`: the health checks of docker-compose.yml.

Exit code 1 and one line if the service is not healthy.
"""

import http.client
import socket
import sys
from contextlib import suppress
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped]

from hpo import settings
from hpo.errors import UserError
from hpo.services import mlflow_server


def server() -> str | None:
    """What is wrong with the MLflow server: it must answer a search, which reads its database, for our user."""
    settings_here = settings.read()
    assert settings_here.tracking_uri is not None
    url = urlsplit(settings_here.tracking_uri)
    user = (settings_here.tracking_username, settings_here.tracking_password)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=10)
    try:
        status = mlflow_server.search(connection, user=user if all(user) else None)  # type: ignore[arg-type]
    except (OSError, http.client.HTTPException) as error:
        return f"The MLflow server does not answer: {error}"
    return None if status == 200 else f"The MLflow server answers a search with the status {status}."


def worker() -> str | None:
    """What is wrong with this container's `hpo worker`: it must have said within its lease that it lives."""
    from hpo.queue import Queue

    settings_here = settings.read()
    assert settings_here.database_url is not None
    queue = Queue(settings_here.database_url)
    try:
        present = queue.workers() if queue.installed() else []
    except Exception as error:
        return f"The database cannot be asked: {type(error).__name__}"  # not more: its text may hold the URL
    finally:
        queue.close()
    here = [worker for worker in present if _runs_here(worker.name)]
    if any(worker.alive for worker in here):
        return None
    return "The worker was not seen within its lease." if here else "No worker is here."


def _runs_here(name: str) -> bool:
    """Whether a worker's name (host:pid-token) is that of a process `hpo worker` that we see."""
    host, _, process = name.rpartition(":")
    with suppress(psutil.Error):
        return host == socket.gethostname() and "worker" in psutil.Process(int(process.partition("-")[0])).cmdline()
    return False


if __name__ == "__main__":
    try:
        wrong = {"server": server, "worker": worker}[sys.argv[1]]()
    except UserError as error:
        wrong = str(error)
    print(wrong or "well")
    sys.exit(1 if wrong else 0)
