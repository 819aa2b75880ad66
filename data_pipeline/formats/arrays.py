"""Arrays of any format, as `FILE` or `FILE:KEY` names them."""

import re
from pathlib import Path
from types import ModuleType

import numpy as np

from data_pipeline.formats import hdf5, matlab, numbers, numpy_files
from data_pipeline.formats.limits import FormatProblem

READERS: dict[str, ModuleType] = {
    ".npy": numpy_files,
    ".npz": numpy_files,
    ".h5": hdf5,
    ".hdf5": hdf5,
    ".mat": matlab,
    ".txt": numbers,
}
_REFERENCE = re.compile(r"(.*?\.(?:npz|h5|hdf5|mat|xlsx))(?::(.*))?", re.IGNORECASE)


def parted(reference: str) -> tuple[str, str]:
    """Return the file and the key of a reference; the key is "" if there is none."""
    match = _REFERENCE.fullmatch(reference)
    return (match[1], match[2] or "") if match else (reference, "")


def members(folder: Path, file: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays of a file by their references. Raise FormatProblem if it cannot be read."""
    path = folder / file
    try:
        shapes: dict[str, tuple[int, ...]] = READERS[path.suffix.lower()].members(path)
    except (FormatProblem, MemoryError):
        raise
    except Exception as error:  # the libraries raise a dozen kinds when a file is damaged
        raise FormatProblem(f"is truncated or damaged ({error!s:.80}).") from None
    return {f"{file}:{key}" if key else file: shape for key, shape in shapes.items()}


def read(folder: Path, reference: str) -> np.ndarray:
    """Return the array that a reference names; the file's only one if the key is left out. Raise FormatProblem."""
    file, _ = parted(reference)
    shapes = members(folder, file)
    if reference == file and len(shapes) == 1:
        reference = next(iter(shapes))
    if reference not in shapes:
        raise FormatProblem(f"has no array {reference}. There are: {', '.join(list(shapes)[:10]) or 'none'}.")
    path = folder / file
    try:
        array: np.ndarray = READERS[path.suffix.lower()].read(path, reference[len(file) + 1 :])
    except (FormatProblem, MemoryError):
        raise
    except Exception as error:
        raise FormatProblem(f"is truncated or damaged ({error!s:.80}).") from None
    return array
