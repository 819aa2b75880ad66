"""Arrays of MATLAB files: version 5 to 7 by SciPy, version 7.3 as HDF5."""

import struct
import zlib
from pathlib import Path

import numpy as np

from data_pipeline.formats import hdf5
from data_pipeline.formats.limits import LARGEST_BYTES, FormatProblem, check_array, check_file

_NUMBERS = {"double", "single", "logical", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}
_COMPRESSED = 15  # the type of a compressed element
_HEADER = 128  # bytes


def members(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays of numbers by their names, in MATLAB's order of the axes."""
    from scipy.io import whosmat

    check_file(path, LARGEST_BYTES)
    if _is_hdf5(path):
        return {key.removeprefix("/"): shape[::-1] for key, shape in hdf5.members(path).items()}
    shapes = {name: tuple(shape) for name, shape, kind in whosmat(path) if kind in _NUMBERS}
    for shape in shapes.values():
        check_array(shape, 8)
    return shapes


def read(path: Path, key: str) -> np.ndarray:
    """Return one of the arrays that `members` lists."""
    from scipy.io import loadmat

    if _is_hdf5(path):
        return hdf5.read(path, f"/{key}").T
    _check_unpacked(path)
    array: np.ndarray = loadmat(path, variable_names=[key])[key]
    return array


def _is_hdf5(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(512)
        return file.read(8) == b"\x89HDF\r\n\x1a\n"


def _check_unpacked(path: Path) -> None:
    """Raise FormatProblem if the elements hold more than LARGEST_BYTES when unpacked, whatever their headers say."""
    left = LARGEST_BYTES
    with path.open("rb") as file:
        order = ">" if file.read(_HEADER)[126:128] == b"MI" else "<"
        while len(tag := file.read(8)) == 8:
            kind, length = struct.unpack(f"{order}II", tag)
            end = file.tell() + length
            if kind == _COMPRESSED:
                unpacker = zlib.decompressobj()
                while not unpacker.eof and file.tell() < end and (block := file.read(min(2**16, end - file.tell()))):
                    while block and left > 0:
                        left -= len(unpacker.decompress(block, 2**20))
                        block = unpacker.unconsumed_tail
                    if left <= 0:
                        raise FormatProblem(f"expected at most {LARGEST_BYTES / 2**30:.0f} GiB when unpacked.")
            file.seek(end)
