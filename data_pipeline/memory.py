"""How much memory a process may take: what is free, or the limit of its control groups (Linux)."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from data_pipeline.cores import control_groups


@cache
def room(root: Path = Path("/")) -> int:
    """Return the bytes of memory that this process could have when first asked; the largest number where unknown.

    `root`: where /proc and /sys are.
    """
    return min([sys.maxsize, *_limits(root)])


def _limits(root: Path) -> Iterator[int]:
    with suppress(OSError, StopIteration):
        lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        yield 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    for folder in control_groups("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):  # of version 2, which says "max" for none, and 1
            with suppress(OSError, ValueError):
                yield int((folder / name).read_text(encoding="utf-8"))
