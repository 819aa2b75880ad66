"""Data sets that do not fit into the memory are refused with the size that fits."""

import folders
import numpy as np
import pytest

from data_pipeline import memory
from data_pipeline.dataset import understand

GROUPS = {
    "nothing limits it": ({}, 8_000_000 * 1024),
    "version 2, no limit": ({"cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n"}, 8_000_000 * 1024),
    "version 2": ({"cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "3000000000\n"}, 3_000_000_000),
}


@pytest.mark.parametrize("case", GROUPS)
def test_the_memory_is_what_is_free_or_what_the_group_may_have(tmp_path, case):
    files, expected = GROUPS[case]
    files = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:  8000000 kB\n"} | {
        ("proc/self/cgroup" if name == "cgroup" else name): content for name, content in files.items()
    }
    files["proc/self/mountinfo"] = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert memory.room(tmp_path) == expected


@pytest.mark.parametrize("form", ["pictures", "array"])
def test_images_that_do_not_fit_are_refused_with_the_size_that_does(tmp_path, monkeypatch, form):
    monkeypatch.setattr(memory, "room", lambda: 6 * 24 * 8 * 8)
    if form == "pictures":
        folders.permeability(tmp_path)
    else:
        np.save(tmp_path / "x.npy", folders.cells().astype(np.float32))
        np.save(tmp_path / "y.npy", np.arange(24.0) ** 2)
    (error,) = understand(tmp_path).notes.errors
    assert "24 images of 16 x 16 pixels are too many to hold at once (at most 1,536 numbers, as the memory" in error
    assert error.endswith("Give a data.image_size of at most 8 in the study file.")
    assert understand(tmp_path, image_size=8).dataset.images.shape == (24, 1, 8, 8)


def test_a_lack_of_memory_is_one_message(tmp_path, monkeypatch):
    folders.permeability(tmp_path)
    monkeypatch.setattr("data_pipeline.understanding.pixels.understand", lambda *_, **__: bytearray(2**62))
    (error,) = understand(tmp_path).notes.errors
    assert "expected data that fit into the memory here" in error
