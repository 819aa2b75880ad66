"""How much memory and time a large data set takes: `hpo data check`, and `hpo run` with one trainer per core.

    python bench/memory.py [--images 20000] [--size 64]

Draws images twice, from a seed: as an array of 8-bit grey values, and as one of 32-bit numbers. Of each set it prints
the seconds and the peak of `hpo data check`, and the peak of training: the sum over the worker and its trainers of the
memory that each has for itself or its share of (PSS, ten times a second). The servers are not counted. Linux only.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import cores, machine

from hpo import settings
from hpo.services import serving

SEED = 0
STUDY = """
[model]
family = "cnn"
filters = 8
kernel_size = 3
dropout = 0.0
[space]
learning_rate = {rates}
[training]
epochs = 1
batch_size = 64
"""
ROW = "| {:34} | {:>7} | {:>10} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000, help="of each set (default 20000)")
    parser.add_argument("--size", type=int, default=64, help="pixels a side (default 64)")
    arguments = parser.parse_args()
    print(f"{machine()}; {arguments.images} images of {arguments.size} x {arguments.size} pixels", flush=True)
    print(ROW.format("", "seconds", "peak, GB"))
    for kind in ("uint8", "float32"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make(folder / "data", kind, arguments.images, arguments.size)
            seconds, peak = watched([*hpo(), "data", "check", str(folder / "data")], folder)
            print(ROW.format(f"check, {kind}", f"{seconds:.1f}", f"{peak / 1e9:.2f}"), flush=True)
            rates = [0.001 * (1 + index) for index in range(cores())]
            (folder / "memory.toml").write_text(STUDY.format(rates=rates), encoding="utf-8")
            try:
                command = [*hpo(), "run", "--study", str(folder / "memory.toml"), "--data", str(folder / "data")]
                seconds, peak = watched(command, folder)
            finally:
                serving.erase(settings.read({"HPO_HOME": str(folder / "home")}))
            print(ROW.format(f"train, {kind}, {cores()} trainers", f"{seconds:.1f}", f"{peak / 1e9:.2f}"), flush=True)


def make(folder: Path, kind: str, count: int, size: int) -> None:
    """Write the images as one array, and a label of each: about a mixture rule."""
    draw = np.random.default_rng(SEED)
    folder.mkdir()
    fractions = draw.uniform(0.1, 0.9, count)
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", dtype=kind, shape=(count, size, size))
    for index, fraction in enumerate(fractions):
        noise = draw.random((size, size), dtype=np.float32)
        images[index] = noise**fraction if kind == "float32" else 255 * (noise < fraction)
    images.flush()
    np.save(folder / "labels.npy", 3.5 + 60 * fractions)


def watched(command: list[str], folder: Path) -> tuple[float, float]:
    """Run a command; return its seconds, and the largest sum (bytes) of its memory and that of its descendants."""
    begin, peak = time.monotonic(), 0.0
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment(folder), stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, sum(map(proportional, tree(process.pid))))
            time.sleep(0.1)
    if process.returncode:
        sys.exit((folder / "log").read_text()[-3000:])
    return time.monotonic() - begin, peak


def tree(pid: int) -> list[int]:
    """Return a process and its descendants, without the servers, which are services of their own."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
    if any(b"mlflow" in word or b"postgres" in word for word in words):
        return []
    return [pid, *(member for child in children for member in tree(int(child)))]


def proportional(pid: int) -> float:
    """Return the proportional set size of a process in bytes."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0.0)


def hpo() -> list[str]:
    return [sys.executable, "-m", "hpo"]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "HPO_HOME": str(folder / "home")}


if __name__ == "__main__":
    main()
