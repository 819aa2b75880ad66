"""What a machine that is to train answers before a worker is handed in to it: who it is, and what it reaches."""

import platform
import socket
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from hpo import settings
from hpo.errors import ServiceError
from hpo.queue import Queue
from hpo.services import serving


@dataclass(frozen=True, kw_only=True)
class Probed:
    """A machine on which a worker could work."""

    version: str  # of hpo
    host: str
    database: str  # the random name of the database that it reaches


def probe(*, say: Callable[[str], object] = print) -> Probed:
    """Say which hpo this machine has, then whether it reaches the database and the MLflow server; change nothing there.

    Raise UserError, or Unreachable.
    """
    version, host = metadata.version("hpo"), socket.gethostname()
    say(f"This is hpo {version} on {host}, with Python {platform.python_version()}.")
    chosen = settings.read()
    services = serving.running(chosen)
    if services is None:
        raise ServiceError(
            f"{host} knows no database: HPO_CREDENTIALS is not set, and the services of {chosen.home} do not run."
        )
    queue = Queue(services.database_url)
    try:
        if not queue.installed():
            raise ServiceError(f"The database that {host} reaches has no tables of hpo: it is another one.")
        database = queue.database_id()
    finally:
        queue.close()
    from hpo.tracking.client import Tracker

    Tracker(services.tracking_uri).require_version()
    say(f"It reaches the database {database[:8]} and the MLflow server.")
    return Probed(version=version, host=host, database=database)
