"""Programs of the system that people put in front of the services: nginx, and the pooler pgbouncer."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from shell import PATIENCE

from hpo.services import daemon


@contextmanager
def nginx(folder: Path, upstream: str, *, server: str = "", location: str = "") -> Iterator[str]:
    """URL of an nginx in front of the server at `upstream`, with further lines in its server and in its location."""
    port = daemon.choose_port(None)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    pass_on = f"proxy_pass {upstream}; proxy_set_header Host $proxy_host; {location}"
    configuration = folder / "nginx.conf"
    configuration.write_text(
        f"daemon off; pid {folder}/nginx.pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; {temporary}\n"
        f"server {{ listen 127.0.0.1:{port};\n{server}\nlocation / {{ {pass_on} }} }} }}\n"
    )
    folder.chmod(0o755)
    with _running([_program("nginx"), "-c", str(configuration), "-e", "stderr"], port):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def pgbouncer(folder: Path, url: str, *settings: str, mode: str = "transaction") -> Iterator[str]:
    """SQLAlchemy URL of a pooler in front of the Postgres at `url`."""
    parts, port = urlsplit(url), daemon.choose_port(None)
    users, configuration = folder / "users.txt", folder / "pgbouncer.ini"
    users.write_text(f'"{parts.username}" "{parts.password}"\n')
    configuration.write_text(
        f"[databases]\n* = host={parts.hostname} port={parts.port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
        f"listen_port = {port}\nauth_type = scram-sha-256\nauth_file = {users}\npool_mode = {mode}\nunix_socket_dir =\n"
        + "".join(f"{line}\n" for line in settings)
    )
    for path in (folder, *folder.parents):
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o011)  # it does not run as root
    for path in (users, configuration):
        path.chmod(0o644)
    user = daemon.as_user("nobody" if os.geteuid() == 0 else None)
    with _running([_program("pgbouncer"), str(configuration)], port, **user):
        yield f"postgresql://{parts.username}:{parts.password}@127.0.0.1:{port}{parts.path}"


def _program(name: str) -> str:
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None:
        pytest.skip(f"needs {name}")
    return path


@contextmanager
def _running(command: Sequence[str], port: int, **arguments: object) -> Iterator[None]:
    """The program, from when it listens at the port to the end of the block."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, **arguments)  # type: ignore[call-overload]
    try:
        end = time.monotonic() + PATIENCE
        while True:
            assert process.poll() is None and time.monotonic() < end, process.communicate()[1].decode()
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)
