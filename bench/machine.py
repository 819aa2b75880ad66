"""What each script of this folder prints first: the machine that its figures are of."""

import os
import platform
from pathlib import Path


def machine() -> str:
    """Return the processor's name, the number of cores this process may use, and Python's version."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {cores()} cores, Python {platform.python_version()}"


def cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
