"""This machine, its user and that user's limits, as runs and messages name them."""

import errno
import getpass
import os
import platform
import resource
import socket
import subprocess
import threading
import time
from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from data_pipeline.cores import control_groups
from hpo.text import utf8

LIMITED = "No more processes or threads may be started here."
_LIMIT = ("can't start new thread", "Resource temporarily unavailable", f"[Errno {errno.EAGAIN}]")  # as errors say it


@lru_cache(maxsize=1)
def environment() -> dict[str, str]:
    """Where a trial runs: what may change between attempts, so tags and not params."""
    versions = {name: metadata.version(name) for name in ("hpo", "torch", "optuna", "mlflow", "numpy")}
    return {
        "hpo.host": socket.gethostname(),
        "hpo.user": _user(),
        "hpo.device": f"cpu: {_processor()}",
        "hpo.python": platform.python_version(),
        **{f"hpo.version.{name}": version for name, version in versions.items()},
        "hpo.commit": _commit(),
    }


def who() -> str:
    """The user of this process and this host: `user@host`."""
    return f"{_user()}@{socket.gethostname()}"


def _user() -> str:
    try:
        return utf8(getpass.getuser())
    except (KeyError, OSError):
        return str(os.getuid())


def is_limit(error: BaseException | None) -> bool:
    """Return whether a limit on processes and threads is behind the error, by its words or those of its causes."""
    while error is not None:
        if any(words in str(error) for words in _LIMIT):
            return True
        error = error.__cause__ or error.__context__
    return False


def may_start(count: int) -> bool:
    """Return whether so many more threads may be started, which is tried; processes count as threads do."""
    end = threading.Event()
    try:
        for _ in range(count):
            threading.Thread(target=end.wait, daemon=True).start()
    except RuntimeError:
        return False
    finally:
        end.set()
    return True


def limits(root: Path = Path("/")) -> str:
    """Return the limits on processes and threads here, and what to do, as further sentences of a message."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    names = [f"{soft} (ulimit -u)"] if soft != resource.RLIM_INFINITY and os.geteuid() != 0 else []
    for folder in control_groups("pids", root):
        with suppress(OSError, ValueError):  # none: the file is missing, or holds "max"
            names.append(f"{int((folder / 'pids.max').read_text(encoding='utf-8'))} (pids.max of {folder})")
    reached = f" The limits here: {', '.join(names)}." if names else ""
    return f"{reached} Raise the limit, or start fewer at once (--trainers). Then the same command goes on."


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the program's own checkout, with `+changes` if files differ; empty for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return run("rev-parse", "HEAD") + ("+changes" if run("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def now_ms() -> int:
    """Milliseconds since 1970, this machine's clock: for times MLflow shows, never for a decision."""
    return time.time_ns() // 1_000_000
