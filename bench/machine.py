"""What each script of this folder prints first: the machine that its figures are of."""

import platform
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # hpo need not be installed: Keras runs a script, too
from data_pipeline.cores import cores


def machine() -> str:
    """Return the processor's name, the number of cores this process may use, and Python's version."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {cores()} cores, Python {platform.python_version()}"
