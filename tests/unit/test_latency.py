"""A server that answers late is told from one that does not, by real requests."""

import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from hpo.tracking.errors import TrackingUnavailable
from hpo.tracking.latency import AT_ONCE, LATE, MEASURED, latency, verdict


@contextmanager
def answering(*, late: float, status: int = 200):
    """A server that answers after so many seconds; gives its URL and the requests by connection."""
    requests: Counter[tuple] = Counter()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # which keeps the connection
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            requests[self.client_address] += 1
            time.sleep(late)
            self.send_response(status)
            self.send_header("Content-Length", "6")
            self.end_headers()
            self.wfile.write(b"3.17.2")

        def log_message(self, *_) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_that_answers_late_is_measured_on_one_kept_connection():
    with answering(late=0.1) as (url, requests):
        milliseconds = latency(url)
    assert list(requests.values()) == [AT_ONCE + MEASURED]
    assert milliseconds > LATE and "Install uvloop" in verdict(milliseconds)


def test_what_helps_is_named_above_the_limit_alone():
    assert verdict(4.4) == "The MLflow server answers within 4 ms."
    assert verdict(48.2).startswith("The MLflow server answers late: a small request takes 48 ms")


def test_a_server_in_trouble_has_no_latency(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # as for all requests of hpo
    with answering(late=0.0, status=503) as (url, _), pytest.raises(TrackingUnavailable):
        latency(url)
