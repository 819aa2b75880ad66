"""Arrays of an HDF5 file that lie in the file itself: no link and no storage that leads out of it is followed."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.formats.limits import LARGEST_BYTES, MOST_MEMBERS, FormatProblem, check_array, check_file, library

LARGEST_CHUNK = 2**28  # bytes; a chunk is unpacked whole
_FILTERS = {1, 2, 3, 6, 32000}  # deflate, shuffle, Fletcher's checksum, scale and offset, lzf: no loaded plug-in
_DEEPEST = 6  # groups within groups


def members(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays of numbers by their paths, "/group/data". Raise FormatProblem for a link."""
    with _opened(path) as file:
        shapes: dict[str, tuple[int, ...]] = {}
        _visit(file, "", shapes, library("h5py", "h5py"))
    return shapes


def read(path: Path, key: str) -> np.ndarray:
    """Return one of the arrays that `members` lists."""
    with _opened(path) as file:
        array: np.ndarray = file[key][()]
    return array


def _opened(path: Path) -> Any:
    h5py = library("h5py", "h5py")
    check_file(path, 2**40)  # only what is asked for is read
    return h5py.File(path, "r", locking=False)


def _visit(group: Any, where: str, shapes: dict[str, tuple[int, ...]], h5py: Any) -> None:
    for name in group:
        at = f"{where}/{name}"
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise FormatProblem(f"{at} is a link. hpo follows none. Copy the array into the file.")
        if len(shapes) >= MOST_MEMBERS or at.count("/") > _DEEPEST:
            raise FormatProblem(f"expected at most {MOST_MEMBERS:,} arrays, {_DEEPEST} groups deep.")
        member = group[name]
        if isinstance(member, h5py.Group):
            _visit(member, at, shapes, h5py)
        elif isinstance(member, h5py.Dataset) and member.dtype.kind in "biuf":
            _check(member, at)
            shapes[at] = tuple(map(int, member.shape))


def _check(member: Any, at: str) -> None:
    properties = member.id.get_create_plist()
    filters = {properties.get_filter(index)[0] for index in range(properties.get_nfilters())}
    if member.external or member.is_virtual or not filters <= _FILTERS:
        raise FormatProblem(f"{at} is stored outside the file, or packed by a plug-in. Store the array plainly.")
    check_array(member.shape, member.dtype.itemsize)
    if member.chunks and math.prod(member.chunks) * member.dtype.itemsize > min(LARGEST_CHUNK, LARGEST_BYTES):
        raise FormatProblem(f"{at} has chunks of the shape {member.chunks}. Store it in smaller ones.")
