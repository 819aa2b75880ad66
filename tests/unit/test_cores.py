"""A process keeps as many cores busy as its affinity and the quotas of its control groups allow."""

import os
from pathlib import Path

import pytest

from data_pipeline.cores import cores

HOST_V1 = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
POD_V1 = "32 31 0:29 /pods/a /sys/fs/cgroup/cpu ro shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n"
POD_V2 = "30 23 0:26 /pods/a /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n"
ONE, THREE_AND_A_HALF = "100000 100000\n", "350000 100000\n"
CASES = {  # mounts, group, files below /sys/fs/cgroup -> cores of the eight that the affinity allows
    "no control groups": ("", "", {}, 8),
    "version 2, no quota": (V2, "0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}, 8),
    "version 2, three and a half cores": (V2, "0::/a\n", {"a/cpu.max": THREE_AND_A_HALF}, 3),
    "version 2, a quota of the group above": (V2, "0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": ONE}, 1),
    "version 2, less than a core": (V2, "0::/a\n", {"a/cpu.max": "50000 100000"}, 1),
    "version 2, more than there are": (V2, "0::/a\n", {"a/cpu.max": "1600000 100000"}, 8),
    "version 2, of a container": (V2, "0::/\n", {"cpu.max": ONE}, 1),
    "version 2, a container that sees the host's path": (POD_V2, "0::/pods/a\n", {"cpu.max": ONE}, 1),
    "version 2, a path outside of the mount": (POD_V2, "0::/../../elsewhere\n", {"cpu.max": ONE}, 1),
    "version 1, no quota": (HOST_V1, "4:memory:/m\n1:cpu:/a\n", {"cpu/a": "-1"}, 8),
    "version 1, two cores": (HOST_V1, "4:memory:/m\n1:cpu:/a\n", {"cpu/a": "200000"}, 2),
    "version 1, a quota of the group above": (HOST_V1, "1:cpu:/a/b\n", {"cpu/a/b": "-1", "cpu/a": "100000"}, 1),
    "version 1, of a container": (POD_V1, "1:cpuacct,cpu:/pods/a\n", {"cpu": "200000"}, 2),
}


@pytest.mark.parametrize(("mounts", "group", "files", "expected"), CASES.values(), ids=list(CASES))
def test_the_quota_of_a_control_group_counts(tmp_path: Path, monkeypatch, mounts, group, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(mounts)
    (tmp_path / "proc/self/cgroup").write_text(group)
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        if path.name != "cpu.max":
            path.mkdir(parents=True, exist_ok=True)
            (path / "cpu.cfs_period_us").write_text("100000\n")
            path /= "cpu.cfs_quota_us"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert cores(tmp_path) == expected


def test_without_control_groups_the_affinity_counts(tmp_path: Path):
    assert cores(tmp_path) == (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
