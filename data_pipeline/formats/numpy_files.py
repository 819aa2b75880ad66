"""Arrays of .npy and .npz files, never pickled ones."""

import math
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_pipeline.formats.limits import LARGEST_BYTES, FormatProblem, check_array, check_file, check_zip

Shape = tuple[int, ...]


def members(path: Path) -> dict[str, Shape]:
    """Return the shapes of the arrays of numbers by their keys, "" in an .npy, from the headers alone."""
    if path.suffix.lower() == ".npy":
        size = check_file(path, 2**40)  # it is mapped, not read
        with path.open("rb") as file:
            shape, dtype = _header(file)
            if file.tell() + math.prod(shape) * dtype.itemsize > size:
                raise FormatProblem("is truncated: it has fewer numbers than its header says.")
        return {"": shape} if dtype.kind in "biuf" else {}
    shapes: dict[str, Shape] = {}
    with check_zip(path, LARGEST_BYTES) as archive:
        for member in archive.infolist():
            if not member.filename.endswith(".npy"):
                continue
            with archive.open(member) as file:
                shape, dtype = _header(file)
                # numpy takes memory for the shape in the header, so the member must be as large.
                if dtype.kind in "biuf" and file.tell() + math.prod(shape) * dtype.itemsize == member.file_size:
                    shapes[member.filename.removesuffix(".npy")] = shape
    return shapes


def read(path: Path, key: str) -> np.ndarray:
    """Return one of the arrays that `members` lists; that of an .npy is mapped from the disk."""
    shape = members(path)[key]
    if path.suffix.lower() == ".npy":
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        return array
    check_array(shape, 1)
    with np.load(path, allow_pickle=False) as content:
        member: np.ndarray = content[key]
    return member


def _header(file: IO[bytes]) -> tuple[Shape, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise FormatProblem(f"expected an array in NumPy's format 1 or 2, found {version}.")
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(file)
    if any(side < 0 for side in shape):
        raise FormatProblem(f"has an array of the shape {shape}.")
    return shape, dtype
