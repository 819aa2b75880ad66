"""What a file may cost: limits that are checked before memory is taken, and the error of a file that breaks one."""

import importlib
import math
import struct
import zipfile
from pathlib import Path
from types import ModuleType

from data_pipeline.files import not_a_file

LARGEST_BYTES = 2**31  # of one array in memory, and of all members of a zip file together
LARGEST_TEXT = 512 * 2**20  # bytes of a text file of images; 20,000 images of 28 x 28 grey values have 60 MB
MOST_MEMBERS = 10_000  # of a zip or HDF5 file
_ZIP_END = struct.Struct("<4s4H2IH")


class FormatProblem(Exception):
    """A file cannot be read as its name says; the message says why, without the file's name."""


def library(module: str, package: str) -> ModuleType:
    """Return a module of the extra `formats`. Raise FormatProblem, which names the extra, if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise FormatProblem(f"needs {package}, which is not installed. Run: pip install 'hpo[formats]'") from None


def check_file(path: Path, most: int) -> int:
    """Return the size in bytes. Raise FormatProblem unless this is a regular, non-empty file of at most `most`."""
    if reason := not_a_file(path):
        raise FormatProblem(reason)
    size = path.stat().st_size
    if size > most:
        raise FormatProblem(f"expected at most {most // 2**20} MiB, found {size / 2**20:.0f} MiB.")
    if not size:
        raise FormatProblem("is empty.")
    return size


def check_array(shape: tuple[int, ...], itemsize: int) -> None:
    """Raise FormatProblem if an array of this shape would take more than LARGEST_BYTES."""
    if (size := math.prod(map(int, shape)) * itemsize) > LARGEST_BYTES:
        raise FormatProblem(
            f"expected arrays of at most {LARGEST_BYTES / 2**30:.0f} GiB, found one of the shape {tuple(shape)}, "
            f"{size / 2**30:,.0f} GiB. Use a part of the data."
        )


def check_zip(path: Path, most: int) -> zipfile.ZipFile:
    """Return the open zip file. Raise FormatProblem if its list of members or their unpacked size is too large."""
    size = check_file(path, most)
    with path.open("rb") as file:
        file.seek(max(0, size - 2**16 - _ZIP_END.size))
        tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + _ZIP_END.size > len(tail):
        raise FormatProblem("is damaged or cut off: it has no list of its members.")
    _, _, _, _, count, listed, _, _ = _ZIP_END.unpack_from(tail, at)
    if count > MOST_MEMBERS or listed > 200 * MOST_MEMBERS:  # 65,535 stands for more, in another place
        raise FormatProblem(f"expected at most {MOST_MEMBERS:,} members, found {count:,} or more.")
    archive = zipfile.ZipFile(path)
    total = sum(member.file_size for member in archive.infolist())
    if total > most:
        archive.close()
        raise FormatProblem(
            f"expected at most {most // 2**20} MiB when unpacked, found {total / 2**20:,.0f} MiB. It was not unpacked."
        )
    return archive
