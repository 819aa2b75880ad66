"""How late an MLflow server answers on a connection that is kept, as those of workers are."""

import socket
import statistics
import time
from contextlib import suppress
from urllib.parse import urlsplit

from hpo.tracking import foreign
from hpo.tracking.errors import server

AT_ONCE = 20  # requests of a new connection: Linux acknowledges them at once, so no answer of theirs is late
MEASURED = 10  # requests after them
LATE = 30.0  # milliseconds


@server()
def latency(uri: str) -> float:
    """Return the median time of small requests less the connection's round trip, in milliseconds."""
    seconds = []
    for _ in range(AT_ONCE + MEASURED):
        begin = time.perf_counter()
        foreign.server_version(uri)
        seconds.append(time.perf_counter() - begin)
    return 1000 * max(0.0, statistics.median(seconds[AT_ONCE:]) - _round_trip(uri))


def verdict(milliseconds: float) -> str:
    """Return for people whether a server answers late, and what helps."""
    if milliseconds <= LATE:
        return f"The MLflow server answers within {milliseconds:.0f} ms."
    return (
        f"The MLflow server answers late: a small request takes {milliseconds:.0f} ms beside the network's time; "
        f"expected at most {LATE:.0f}. Install uvloop where it runs (`pip install uvloop`), and start it again: "
        "without that, each answer waits for an acknowledgement. If it is there, the machine or a proxy is busy."
    )


def _round_trip(uri: str) -> float:
    """Return the seconds that a new connection takes; 0 if only a proxy reaches the server."""
    url = urlsplit(uri)
    address, seconds = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80)), []
    with suppress(OSError):
        for _ in range(3):
            begin = time.perf_counter()
            socket.create_connection(address, timeout=5).close()
            seconds.append(time.perf_counter() - begin)
    return min(seconds, default=0.0)
