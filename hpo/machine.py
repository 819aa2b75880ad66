"""This machine and its user, as runs and messages name them."""

import getpass
import os
import platform
import socket
import subprocess
import time
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from hpo.text import utf8


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
