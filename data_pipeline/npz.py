"""A data set as one NPZ file: the form in which it is cached, stored and handed to the trainer processes."""

import hashlib
import io
import json
import math
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_pipeline.dataset import Dataset, scaled
from data_pipeline.description import Description
from data_pipeline.errors import DatasetError
from data_pipeline.files import write_atomically
from data_pipeline.lineage import Earlier
from data_pipeline.pixels import LARGEST_TOTAL
from data_pipeline.split import Split
from data_pipeline.target_moves import is_order

_MEMBERS = {"pixels.npy": r"\|u1|<f4", "targets.npy": r"<f8", "facts.npy": r"<U\d+"}  # of the file: their types
_INPUTS = {"inputs.npy": r"<f8"}  # of a file with numbers beside the images
_SIDES = ("train", "validation", "test")
_ZIP_END = struct.Struct("<4s4H2IH")  # of a zip file without a comment


def save_npz(dataset: Dataset, path: Path) -> None:
    """Write the data set as one file (no pickle), whole or not at all."""
    facts: dict[str, Any] = {
        "target_names": dataset.target_names,
        "unit": dataset.unit,
        "names": dataset.names,
        "metadata": dataset.description.to_dict(),
        "symmetries": dataset.symmetries,
    }
    if dataset.given_split is not None:
        facts["split"] = {name: getattr(dataset.given_split, name).tolist() for name in _SIDES}
    if dataset.groups is not None:
        facts["groups"] = dataset.groups
    if dataset.earlier:
        facts["earlier"] = [earlier.to_dict() for earlier in dataset.earlier]
    arrays = {"pixels": dataset.pixels(), "targets": dataset.targets.astype("<f8")}
    if dataset.inputs is not None:
        facts["input_names"] = dataset.input_names
        arrays["inputs"] = dataset.inputs.astype("<f8")
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays, facts=np.array(json.dumps(facts)))
    write_atomically(Path(path), content.getvalue())


def load_npz(path: Path, *, sha256: str | None = None) -> Dataset:
    """Return the data set that `save_npz` wrote, with the same digest.

    Raise DatasetError if the file is another one, is damaged, or does not have the SHA-256 (hex), if one is given. The
    limits of a folder hold here as well, such as 2^29 pixels, and are checked before memory is taken for them.
    """
    try:
        with Path(path).open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 is not None and actual != sha256:
                raise DatasetError(f"{path}: expected SHA-256 {sha256:.8}, found {actual:.8}: the file was damaged.")
            _check_members(file)
            with np.load(file, allow_pickle=False) as content:
                return _dataset(content["pixels"], content["targets"], str(content["facts"]), content.get("inputs"))
    except FileNotFoundError:
        raise DatasetError(f"There is no file {path}; expected a data set written by save_npz.") from None
    except (DatasetError, MemoryError):
        raise
    except Exception as error:  # zipfile, zlib, numpy and json raise a dozen kinds when a file is damaged
        raise DatasetError(
            f"{path}: expected a data set written by save_npz, found something else ({error})."
        ) from None


def sha256_in(path: Path) -> str | None:
    """Return the SHA-256 (hex) at the end of a file's name, as in `NAME-SHA256.npz`; None for another name."""
    match = re.search("-([0-9a-f]{64})$", path.stem)
    return match[1] if match else None


def _check_members(file: BinaryIO) -> None:
    """Raise ValueError unless this is a zip of the three arrays, of the types and below the sizes of `save_npz`."""
    start = file.seek(-_ZIP_END.size - 20, os.SEEK_END)
    tail = file.read()
    mark, _, _, count, total, size, _, comment = _ZIP_END.unpack(tail[20:])
    # Check the size of the list of members before it is read: a long one could take any amount of memory.
    members = _MEMBERS if count == len(_MEMBERS) else _MEMBERS | _INPUTS
    if mark != b"PK\5\6" or count != len(members) or total != count or size > 4096 or comment or tail[:4] == b"PK\6\7":
        raise ValueError(f"no list of {len(_MEMBERS)} members at {start}")
    with zipfile.ZipFile(file) as archive:
        if sorted(member.filename for member in archive.infolist()) != sorted(members):
            raise ValueError(f"the members {archive.namelist()!r:.80}")
        for member in archive.infolist():
            with archive.open(member) as content:
                if np.lib.format.read_magic(content) != (1, 0):
                    raise ValueError(f"{member.filename} in another format")
                shape, _, dtype = np.lib.format.read_array_header_1_0(content)
                header = content.tell()
            # numpy takes memory for the shape in the header, so the member must be as large.
            if not re.fullmatch(members[member.filename], dtype.str) or any(side < 0 for side in shape):
                raise ValueError(f"{member.filename} of the type {dtype.str}")
            if header + math.prod(shape) * dtype.itemsize != member.file_size:
                raise ValueError(f"{member.filename} of {member.file_size:,} bytes for the shape {shape}")
            if math.prod(shape) > LARGEST_TOTAL:
                raise ValueError(
                    f"{member.filename} of {math.prod(shape):,} numbers, at most {LARGEST_TOTAL:,} are read"
                )
    file.seek(0)


def _dataset(pixels: np.ndarray, targets: np.ndarray, text: str, inputs: np.ndarray | None) -> Dataset:
    """Return the data set; `text` is the JSON beside the arrays. Raise ValueError if it has another form."""
    facts = json.loads(text)
    target_names, names = facts["target_names"], facts["names"]
    if not all(
        isinstance(words, list) and all(isinstance(word, str) for word in words) for words in (target_names, names)
    ):
        raise ValueError("names that are no lists of texts")
    if not isinstance(facts["unit"], str) or not isinstance(facts["metadata"], dict):
        raise ValueError("a unit that is no text, or metadata that are no object")
    for order in facts["symmetries"].values():
        if not isinstance(order, list) or not is_order(order, len(target_names)):
            raise ValueError("a symmetry that does not permute the targets")
    n, k = len(names), len(target_names)
    if pixels.ndim != 4 or len(pixels) != n or 0 in pixels.shape or targets.shape != (n, k) or not n * k:
        raise ValueError(f"{n} images and ({n}, {k}) targets stated, found {pixels.shape} and {targets.shape}")
    description = Description.from_dict(facts["metadata"], unit=facts["unit"])
    missing = np.isnan(targets)
    if np.isinf(targets).any() or missing.all(axis=1).any() or (missing.any() and description.layout.missing != "mask"):
        raise ValueError("targets that are not finite")
    input_names = facts.get("input_names", [])
    if not isinstance(input_names, list) or not all(isinstance(name, str) for name in input_names):
        raise ValueError("names of inputs that are no list of texts")
    if (None if inputs is None else inputs.shape) != ((n, len(input_names)) if input_names else None):
        raise ValueError(f"inputs for {n} images and {len(input_names)} names stated, found others")
    if inputs is not None and not np.isfinite(inputs).all():
        raise ValueError("inputs that are not finite")
    groups = facts.get("groups")
    if groups is not None and (len(groups) != n or not all(isinstance(group, str) for group in groups)):
        raise ValueError(f"groups of {n} images stated, found others")
    return Dataset(
        inputs=inputs,
        input_names=tuple(input_names),
        images=scaled(pixels) if pixels.dtype == np.uint8 else pixels,
        targets=targets,
        target_names=tuple(target_names),
        names=tuple(names),
        description=description,
        symmetries={name: tuple(order) for name, order in facts["symmetries"].items()},
        given_split=_split(facts["split"], n) if "split" in facts else None,
        groups=None if groups is None else tuple(groups),
        earlier=tuple(Earlier.from_dict(values, n) for values in facts.get("earlier", ())),
    )


def _split(sides: dict[str, list[int]], n: int) -> Split:
    """Return the stored split. Raise ValueError unless each image is in it at most once."""
    indices = [index for name in _SIDES for index in sides[name]]
    if any(type(index) is not int or not 0 <= index < n for index in indices) or len(set(indices)) < len(indices):
        raise ValueError("a split that is none")
    return Split(*(np.array(sides[name], dtype=np.int64) for name in _SIDES))
