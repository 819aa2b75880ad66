"""Detached processes whose life is a file lock: they inherit it, and the kernel frees it when the last of them dies.

A process id is never evidence: it outlives a crash in a pid file, is used again, and means nothing in another
container. A lock cannot be stale.
"""

import fcntl
import os
import pwd
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hpo.errors import ServiceError
from hpo.home import LOOPBACK

LOG_LIMIT = 1_000_000  # bytes; a log that is longer at the start becomes the previous one


@contextmanager
def locked(path: Path, *, waiting: Callable[[], object]) -> Iterator[None]:
    """Hold the lock at `path`, which must be in an existing folder; call `waiting` once if another process has it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


@contextmanager
def taken(path: Path) -> Iterator[int]:
    """Descriptor that holds the lock of life at `path`, for processes to inherit; ServiceError while one lives."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + 2.0
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # for the moment that another `lives` takes to ask, too
                if time.monotonic() > deadline:
                    raise ServiceError(f"{path} is held by a process that was not there just now: try again.") from None
                time.sleep(0.01)
        yield file
    finally:
        os.close(file)


def lives(path: Path) -> bool:
    """Whether a process holds the lock of life at `path`."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who ask do not take each other for the process
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(file)


def comes_up(answers: Callable[[], bool], life: Path, *, timeout: float, name: str, log: Path) -> bool:
    """Wait until the service answers (True) or none of its processes lives (False); ServiceError after `timeout` s."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        alive = lives(life)  # asked first: it may come up between the two questions, never go unnoticed
        if answers():
            return True
        if not alive:
            return False
        time.sleep(0.05)
    raise ServiceError(
        f"{name} lives but did not answer within {timeout:.0f} s, in another container or frozen perhaps. "
        f"Try `hpo down`, then again. The end of {log}:\n{tail(log)}"
    )


def dies(life: Path, *, timeout: float) -> bool:
    """Wait until no process holds the lock of life; False after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while lives(life):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def launch(
    command: Sequence[str], *, life: int, log: Path, environment: dict[str, str], folder: Path, user: str | None
) -> None:
    """Start `command` in a session of its own, in `folder`, as `user` (None: as we are), output to the end of `log`.

    It keeps nothing of ours open but `life`, so a pipe that we write into ends with us. The shell in between makes
    init its parent: a child of ours would stay a zombie, which `kill -0` takes for alive.
    """
    log.parent.mkdir(exist_ok=True)
    if log.exists() and log.stat().st_size > LOG_LIMIT:
        log.replace(log.with_name(log.name + ".1"))
    with log.open("ab") as output:
        subprocess.run(
            ["/bin/sh", "-c", '"$@" &', "sh", *command],
            check=True,
            pass_fds=(life,),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
            env=environment,
            start_new_session=True,
            **as_user(user),
        )


def as_user(name: str | None) -> dict:
    """Arguments that make `subprocess` run a command as the user `name`, without our groups; {} for None."""
    if name is None:
        return {}
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise ServiceError(f"There is no user {name!r} here to run Postgres as: run hpo as a normal user.") from None
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def tail(log: Path, *, lines: int = 12) -> str:
    """The last lines of a log file, indented, for an error message."""
    try:
        text = log.read_text(errors="replace")
    except FileNotFoundError:
        text = ""
    return "\n".join("  " + line for line in text.splitlines()[-lines:]) or "  (empty)"


def choose_port(remembered: int | None, addresses: Sequence[str] = (LOOPBACK,)) -> int:
    """The remembered port if nobody listens on it at any of the addresses, else one that the system gives."""
    for port in (remembered, 0):
        if port is None:
            continue
        with ExitStack() as probes:
            try:
                for address in addresses:
                    probe = probes.enter_context(socket.socket())
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
                    probe.bind((address, port))
                    port = probe.getsockname()[1]
            except OSError:
                continue
            return port
    raise ServiceError(f"No port of {' and '.join(addresses)} is free.")
