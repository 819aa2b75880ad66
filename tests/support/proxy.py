"""A reverse proxy in front of an MLflow server or a bucket: it can answer as gateways, logins and full stores do."""

import http.client
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HTML = "text/html; charset=utf-8"
LOGIN = "/gateway/login"  # a page of the proxy's own: `login` sends there

# What it answers instead of the server: status, further headers, body.
MODES: dict[str, tuple[int, dict[str, str], str]] = {
    "401": (401, {"Content-Type": "text/plain", "WWW-Authenticate": 'Basic realm="mlflow"'}, "You are not logged in."),
    "403": (403, {"Content-Type": HTML}, "<html><h1>403 Forbidden</h1></html>"),
    "host": (403, {"Content-Type": "text/plain"}, "Invalid Host header - possible DNS rebinding attack detected"),
    "404": (404, {"Content-Type": HTML}, "<html><h1>404 Not Found</h1><hr>nginx</html>"),
    "json 404": (404, {"Content-Type": "application/json"}, '{"message": "no Route matched with those values"}'),
    "login": (302, {"Location": LOGIN}, ""),
    "html": (200, {"Content-Type": HTML}, "<html><h1>Down for maintenance</h1></html>"),
    "413": (413, {"Content-Type": HTML}, "<html><h1>413 Request Entity Too Large</h1></html>"),
    "429": (429, {"Content-Type": "text/plain"}, "Too many requests"),
    "503": (503, {"Content-Type": HTML}, "<html><h1>503 Service Temporarily Unavailable</h1></html>"),
}
MODES |= {  # as S3, and stores like it, word them
    code: (
        status,
        {"Content-Type": "application/xml"},
        f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>',
    )
    for status, code, message in (
        (503, "SlowDown", "Please reduce your request rate."),
        (403, "ExpiredToken", "The provided token has expired."),
        (403, "AccessDenied", "Access Denied"),
        (507, "QuotaExceeded", "The quota of the bucket is used up."),
    )
}
HANG, DROP = "hang", "drop"  # take the request and say nothing until the mode changes; close the connection
HOP = ("connection", "keep-alive", "transfer-encoding", "content-length", "host", "date", "server")


class Proxy:
    """`url` stands for the server; `mode` is what every request gets (None: the server's own answer), or, with `only`,
    every request whose method, path and login, such as `PUT /api/2.0/mlflow-artifacts/…`, hold this text.

    `pace` seconds go by for each MB of what is sent or answered."""

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream)
        self.mode: str | None = None
        self.only, self.pace = "", 0.0
        self.answered: Counter[str] = Counter()  # requests by the mode they met
        self.requests: list[str] = []  # method and path of each, in order
        self.parts = 0  # requests that sent one part of a file
        self._closing = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def set(self, mode: str | None, *, only: str = "") -> None:
        assert mode is None or mode in (*MODES, HANG, DROP), mode
        self.only, self.mode = only, mode

    @contextmanager
    def answering(self, mode: str, *, only: str = "") -> Iterator[None]:
        """It answers so inside of the block, and as the server does after it."""
        self.set(mode, only=only)
        try:
            yield
        finally:
            self.set(None)

    def close(self) -> None:
        self._closing, self.mode = True, None
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def proxy(upstream: str) -> Iterator[Proxy]:
    """A proxy in front of the server at this URL, until the end of the block."""
    made = Proxy(upstream)
    try:
        yield made
    finally:
        made.close()


def _handler(owner: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_one_request(self) -> None:
            with suppress(OSError):  # the client has gone
                super().handle_one_request()
                return
            self.close_connection = True

        def forward(self) -> None:
            body = self.body()
            time.sleep(owner.pace * len(body) / 1e6)
            asked = f"{self.command} {self.path} {self.headers.get('Authorization', '')}"
            mode = owner.mode if owner.only in asked else None
            if self.path.startswith(LOGIN):
                mode = mode or "html"
            owner.answered[str(mode)] += 1
            owner.requests.append(f"{self.command} {self.path.partition('?')[0]}")
            owner.parts += "partNumber=" in self.path
            while mode == HANG and owner.mode == HANG and not owner._closing:
                threading.Event().wait(0.05)
            if mode in (HANG, DROP):
                self.close_connection = True
                return
            if mode is not None and not (mode == "login" and self.path.startswith(LOGIN)):
                status, headers, text = MODES[mode]
                self.respond(status, headers, text.encode())
                return
            if self.path.startswith(LOGIN):
                self.respond(200, {"Content-Type": HTML}, b"<html><form>User, password</form></html>")
                return
            status, headers, content = self.ask(body)
            time.sleep(owner.pace * len(content) / 1e6)
            self.respond(status, headers, content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = forward

        def body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            server = http.client.HTTPConnection(owner.upstream.hostname or "", owner.upstream.port, timeout=60)
            given = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
            try:
                server.request(self.command, self.path, body=body, headers=given)
                answer = server.getresponse()
                return answer.status, dict(answer.getheaders()), answer.read()
            except OSError as error:
                return 502, {"Content-Type": "text/plain"}, str(error).encode()
            finally:
                server.close()

        def respond(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in HOP:
                    self.send_header(name, value)
            size = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", size)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing: a test's output is its own."""

    return Handler
