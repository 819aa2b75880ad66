"""A text file of numbers, one image a line."""

from pathlib import Path

import numpy as np
import pandas as pd

from data_pipeline.formats.limits import LARGEST_TEXT, FormatProblem, check_array, check_file


def members(path: Path) -> dict[str, tuple[int, ...]]:
    """Return {"": (lines, numbers a line)}; empty if the first line holds something else than numbers."""
    check_file(path, LARGEST_TEXT)
    with path.open("rb") as file:
        first = file.readline(2**20)
        lines = 1 + sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))
    try:
        fields = [float(word) for word in first.replace(b",", b" ").split()]
    except ValueError:
        return {}
    return {"": (lines, len(fields))}


def read(path: Path, key: str) -> np.ndarray:
    """Return the numbers (lines, numbers a line) as float32. Raise FormatProblem for anything but a full rectangle."""
    shape = members(path)[key]
    check_array(shape, 4)
    with path.open("rb") as file:
        separator = "," if b"," in file.readline(2**20) else r"\s+"
    frame = pd.read_csv(path, sep=separator, header=None, dtype=np.float32, skipinitialspace=True, encoding="ascii")
    numbers = frame.to_numpy()
    if not np.isfinite(numbers).all():
        raise FormatProblem(f"expected {shape[1]} finite numbers in each line, found fewer or others.")
    return numbers
