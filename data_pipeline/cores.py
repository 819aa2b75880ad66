"""How many cores a process may keep busy: what its affinity allows, or the CPU quota of its control groups (Linux)."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def cores(root: Path = Path("/")) -> int:
    """Return the number of cores of this process, at least 1; of a quota such as 2.5 cores, the whole ones.

    A container, a pod or a batch job has such a quota. `root`: where /proc and /sys are.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([count, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Yield the quotas, in cores."""
    for folder in control_groups("cpu", root):
        with suppress(OSError, ValueError):  # there is none: the file is missing, or holds "max"
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
            yield int(quota) / int(period)
        with suppress(OSError, ValueError):  # version 1; -1 where there is no quota
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="utf-8")
            period = (folder / "cpu.cfs_period_us").read_text(encoding="utf-8")
            if int(quota) > 0:
                yield int(quota) / int(period)


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Yield the folders of this process's control groups, and of the groups above them, that may limit `controller`."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        mounts = (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and controller not in controllers.split(","):
            continue
        for fields in map(str.split, mounts):
            kind, options = fields[fields.index("-") + 1], fields[-1].split(",")
            if kind != ("cgroup" if controllers else "cgroup2") or (controllers and controller not in options):
                continue
            mount = root / fields[4].lstrip("/")
            # A container sees its own group as the mount's root, and its path perhaps as the host has it.
            group = Path(path).relative_to(fields[3]) if Path(path).is_relative_to(fields[3]) else Path()
            yield from (mount / group, *(mount / above for above in group.parents))
