"""Detached processes whose life is a file lock: they inherit it, and the kernel frees it when the last of them dies.

A process id is never evidence: it outlives a crash in a pid file, is used again, and means nothing in another
container. A lock cannot be stale.
"""

import fcntl
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from hpo import files
from hpo.errors import ServiceError
from hpo.services import log_file
from hpo.services.home import LOOPBACK

LOG_LIMIT = 1_000_000  # bytes; then a log becomes the previous one, of which one is kept


@contextmanager
def locked(path: Path, *, waiting: Callable[[], object]) -> Iterator[None]:
    """Hold the lock at `path`; call `waiting` once if another process has it. The folder is made if it is missing."""
    asked = False
    while True:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            if not _take(file):
                if not asked:
                    waiting()
                asked = True
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, path):
                continue  # who had the lock removed its folder: this is nobody's any more
            yield
            return
        finally:
            os.close(file)


def _is_at(file: int, path: Path) -> bool:
    """Whether the open file is the one that `path` names."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def taken(path: Path) -> Iterator[int]:
    """Descriptor that holds the lock of life at `path`, for processes to inherit; ServiceError while one lives."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + 2.0
    try:
        while not _take(file):  # for the moment that another `lives` takes to ask, too
            if time.monotonic() > deadline:
                raise ServiceError(f"{path} is held by a process that was not there just now: try again.")
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
        return not _take(file, fcntl.LOCK_SH)  # shared: two that ask do not take each other for the process
    finally:
        os.close(file)


def _take(file: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock the open file unless another process has it; return whether this process has it now."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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


def end_in(folder: Path, is_service: Callable[[psutil.Process], bool]) -> bool:
    """End services of this user whose current folder is `folder`, also a removed one; return whether there were any.

    The system follows a folder that is moved: services of another place are not met.
    """
    processes = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # it has ended, or is another user's
            own = process.uids().effective == os.geteuid() and process.pid != os.getpid()
            own = own and process.cwd() == str(folder) and _is_in_our_file_system(process.pid)
            if own and is_service(process):
                processes.append(process)
    numbers = {process.pid for process in processes}
    for patience, signal_number in ((10.0, signal.SIGINT), (5.0, signal.SIGQUIT), (5.0, signal.SIGKILL)):
        for process in processes:
            with suppress(psutil.Error):
                if signal_number == signal.SIGKILL or process.ppid() not in numbers:  # which end those they started
                    process.send_signal(signal_number)
        processes = psutil.wait_procs(processes, timeout=patience)[1]
    return bool(numbers)


def _is_in_our_file_system(pid: int) -> bool:
    """Whether paths mean the same to a process as to us; in a container they do not."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")
    except FileNotFoundError:
        return True  # no Linux


def launch(
    command: Sequence[str], *, life: int, log: Path, environment: dict[str, str], folder: Path, user: str | None
) -> None:
    """Start `command` in a session of its own, in `folder`, as `user` (None: as we are), output to the end of `log`.

    It keeps nothing of this process open but `life`, so that a pipe of this process ends with this process. Nobody else
    may read what it writes. A second process keeps its log, see hpo/services/log_file.py.
    """
    log.parent.mkdir(mode=0o700, exist_ok=True)
    (pipe, output), kept = os.pipe(), log_file.opened(str(log))
    try:
        keeper = [sys.executable, "-I", "-S", log_file.__file__, *map(str, (pipe, kept, log, LOG_LIMIT))]
        libraries = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        _detach(keeper, (pipe, kept), env=libraries, cwd="/")
        _detach(command, (life,), stdout=output, stderr=output, cwd=folder, env=environment, **as_user(user))
    finally:
        for file in (pipe, output, kept):
            os.close(file)


def _detach(command: Sequence[str], keep: Sequence[int], **arguments: Any) -> None:
    """Start a process with no more of our descriptors than `keep`. The shell in between makes init its parent: a child
    of this process would stay a zombie, which `kill -0` takes for alive."""
    subprocess.run(
        ["/bin/sh", "-c", '"$@" &', "sh", *command],
        check=True,
        pass_fds=keep,
        start_new_session=True,
        umask=0o077,
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | arguments,
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
    """The last lines of a log file, indented, for an error message: all that a service which has ended wrote."""
    dies(log, timeout=1.0)  # what keeps it holds its lock
    return files.tail(log, lines=lines)


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
