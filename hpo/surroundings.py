"""Variables of libpq, requests and MLflow's client: where they are about other servers than those of hpo.

A variable such as PGSERVICE or HTTP_PROXY says how to reach a server elsewhere. For the services of HPO_HOME it leaves
the environment of this process, and so of those that it starts. For other servers it is the user's: messages name it.
"""

import ipaddress
import os
from contextlib import suppress
from urllib.parse import urlsplit

_IN_EVERY_URL = ("PGHOST", "PGPORT", "PGUSER", "PGPASSWORD", "PGDATABASE", "PGCLIENTENCODING")  # what hpo gives counts
# Of libpq, though it does not list them as options: where PGSERVICE is looked up, and what a session begins with.
_UNLISTED = ("PGSERVICEFILE", "PGSYSCONFDIR", "PGTZ", "PGDATESTYLE", "PGGEQO")
_OF_OTHER_SERVERS = (  # variables of MLflow's client that a server of hpo has no use for
    "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_AWS_SIGV4",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "MLFLOW_TRACKING_INSECURE_TLS",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
)


def of_postgres() -> list[str]:
    """Return the variables set here that change how libpq reaches a server whose URL is given."""
    from psycopg.pq import Conninfo

    listed = [option.envvar.decode() for option in Conninfo.get_defaults() if option.envvar]
    return [name for name in (*listed, *_UNLISTED) if name in os.environ and name not in _IN_EVERY_URL]


def reach_own_postgres() -> None:
    """Have no variable change how libpq reaches the Postgres of HPO_HOME."""
    for name in of_postgres():
        del os.environ[name]


def proxies(uri: str) -> list[str]:
    """Return the variables set here that lead requests for this server to a proxy."""
    from requests.utils import get_environ_proxies, select_proxy

    address = select_proxy(uri, get_environ_proxies(uri))
    return [name for name, value in os.environ.items() if name.lower().endswith("_proxy") and value == address]


def of_mlflow() -> list[str]:
    """Return the variables set here that change how MLflow's client speaks to its server."""
    return [name for name in _OF_OTHER_SERVERS if name in os.environ]


def reach_mlflow(uri: str, *, user: str | None, password: str | None, is_own: bool) -> None:
    """Have MLflow's client reach the server at `uri` directly if it is on this machine or, `is_own`, of HPO_HOME.

    User and password, where hpo has them, come before those of a .netrc file.
    """
    url = urlsplit(uri)
    if is_own or _is_loopback(url.hostname or ""):
        passed = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")  # the first is what requests asks for first
        if url.hostname not in (passed or "").split(","):
            os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, (passed, url.hostname)))
        for name in _OF_OTHER_SERVERS if is_own or url.scheme == "http" else ():
            os.environ.pop(name, None)
    if user and password:
        os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"] = user, password
        os.environ["NETRC"] = os.devnull


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
