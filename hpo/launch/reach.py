"""Whether workers on other hosts could reach the services at all, by the look of their URLs."""

import ipaddress
import socket
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from hpo.errors import ServiceError
from hpo.settings import Settings


def require_reachable(engine: str, settings: Settings, hosts: Callable[[], Iterable[str]]) -> None:
    """Raise ServiceError if a service is on loopback, and workers may run on a host that is not this one.

    `hosts`: the names of those they may get, asked only if that matters.
    """
    urls = (settings.database_url, settings.tracking_uri)
    if not any(url is None or _here_only(url) for url in urls):
        return
    if others := {name.partition(".")[0] for name in hosts()} - {socket.gethostname().partition(".")[0]}:
        raise ServiceError(
            f"--on {engine}: the workers run on other hosts ({', '.join(sorted(others)[:3])}, …), and those reach "
            "neither the embedded services nor any on 127.0.0.1. Set HPO_CREDENTIALS (or HPO_DATABASE_URL and "
            "MLFLOW_TRACKING_URI) to services that they reach."
        )


def _here_only(url: str) -> bool:
    """Return whether a URL leads to this machine from every machine: loopback, or a socket."""
    host = urlsplit(url).hostname
    if host is None or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name
