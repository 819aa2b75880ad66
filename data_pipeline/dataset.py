"""A folder of images and one label table -> Dataset; Dataset <-> one NPZ file.

The folder's form (of the source study's course):

- The table is the one file named `*_Cij_pbc.csv`; if there is none, the one other `*.csv`. The side files `cells.csv`
  and `cells.partial.csv` of `make`, and hidden files, never count.
- Row r of the table, counted from 0, belongs to the one PNG whose name begins with `{r}_`.
- `dataset.toml`, which may be absent, gives `name`, `unit` (of the components) and
  `[phases.matrix]` (pixel 0), `[phases.inclusion]` (pixel 255) with `young_modulus` (in that unit) and `poisson_ratio`.
"""

import hashlib
import io
import json
import logging
import math
import os
import re
import secrets
import stat
import struct
import tomllib
import zipfile
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_pipeline.components import COMPONENTS, SYMMETRIES
from data_pipeline.images import LARGEST_SIDE, ImageProblem, png_size, read_png
from data_pipeline.phase import Phase
from data_pipeline.table import read_table

DEFAULT = Path(__file__).parent / "default"  # the data set that ships with this package
UNKNOWN_UNIT = "label unit"
SHOWN = 20  # problems of a folder that an error spells out
LARGEST_TOML = 2**14  # bytes; reading a key of n parts takes n² time and memory: 1 s and 300 MB at this size
LARGEST_TOTAL = 2**29  # pixels of all images together: 2 GiB as float32

_IMAGE = re.compile(r"(0|[1-9][0-9]*)_.*\.png", re.IGNORECASE | re.DOTALL)
_SIDE_FILES = ("cells.csv", "cells.partial.csv")
_NOT_IN_NAMES = re.compile(r"[^\w .+-]")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # how Python spells the odd bytes of a file's name

_MEMBERS = {"pixels.npy": r"\|u1", "targets.npy": r"<f8", "facts.npy": r"<U\d+"}  # of an NPZ: their types
_ZIP_END = struct.Struct("<4s4H2IH")  # of a zip file without a comment

_log = logging.getLogger("data_pipeline")


class DatasetError(ValueError):
    """The data cannot be used as it is; the message says what was expected, what was found, where, and what to do."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Images of microstructure cells and their stiffness components."""

    images: np.ndarray  # (n, c, h, w) float32 in 0..1
    targets: np.ndarray  # (n, k) float64 in `unit`
    target_names: tuple[str, ...]  # k
    unit: str  # of the targets; "label unit" when nobody said
    names: tuple[str, ...]  # the n image files'
    metadata: dict[str, Any]  # JSON-able: "name" of the data set; "phases" and "made" when known
    symmetries: dict[str, tuple[int, ...]]  # transformation of the image -> permutation of the k targets

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over shape, target names, unit, pixels (0..255) and targets; not over file names and bytes."""
        facts = {"shape": self.images.shape, "targets": self.target_names, "unit": self.unit}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        digest.update(self.pixels().tobytes())
        digest.update(np.ascontiguousarray(self.targets, dtype="<f8").tobytes())
        return digest.hexdigest()

    @cached_property
    def phases(self) -> dict[str, Phase] | None:
        """The phases of grey value 0, "matrix", and 1, "inclusion"; None if not given, or if there are other pixels."""
        given = self.metadata.get("phases")
        if not given or not np.isin(self.pixels(), (0, 255)).all():
            return None
        return {name: Phase(**constants) for name, constants in given.items()}

    def pixels(self) -> np.ndarray:
        """The images (n, c, h, w) as uint8, 0..255, as they were in the files."""
        return np.rint(self.images * np.float32(255)).astype(np.uint8)


def load(folder: Path, *, image_size: int | None = None) -> Dataset:
    """Return the data set of a folder. DatasetError names its problems, the first twenty and their count.

    With `image_size` (pixels) images of another size are resized to that square, nearest pixel; without it all images
    must have one size. Conversions to grey and resizing are logged as warnings.
    """
    dataset, problems = _read(Path(folder), image_size)
    if dataset is None:
        head = f"The data set in {folder} has {len(problems)} problem{'s' if len(problems) > 1 else ''}:"
        more = [f"... and {len(problems) - SHOWN} more."] if len(problems) > SHOWN else []
        raise DatasetError("\n  ".join([head, *problems[:SHOWN], *more]))
    return dataset


def check(folder: Path, *, image_size: int | None = None) -> list[str]:
    """Return all problems of a folder, each with its file and line; an empty list if `load` would succeed."""
    return _read(Path(folder), image_size)[1]


def save_npz(dataset: Dataset, path: Path) -> None:
    """Write the data set as one NPZ file (pixels as uint8, no pickle), atomically."""
    facts = {
        "target_names": dataset.target_names,
        "unit": dataset.unit,
        "names": dataset.names,
        "metadata": dataset.metadata,
        "symmetries": dataset.symmetries,
    }
    content = io.BytesIO()
    np.savez_compressed(
        content, pixels=dataset.pixels(), targets=dataset.targets.astype("<f8"), facts=np.array(json.dumps(facts))
    )
    write_atomically(Path(path), content.getvalue())


def load_npz(path: Path, *, sha256: str | None = None) -> Dataset:
    """Return the data set that `save_npz` wrote, with the same digest. DatasetError if the file will not do, or has not
    this SHA-256 (hex), where one is given.

    What a folder may not hold is refused here, too, before memory is taken for it: more than 2^29 pixels, say.
    """
    try:
        with Path(path).open("rb") as file:
            if sha256 is not None and (found := hashlib.file_digest(file, "sha256").hexdigest()) != sha256:
                raise DatasetError(f"{path}: expected the SHA-256 {sha256:.8}, found {found:.8}: the file was damaged.")
            _check_members(file)
            with np.load(file, allow_pickle=False) as content:
                pixels, targets = content["pixels"], content["targets"]
                facts = _npz_facts(str(content["facts"]))
        n, k = len(facts["names"]), len(facts["target_names"])
        if pixels.ndim != 4 or len(pixels) != n or 0 in pixels.shape or targets.shape != (n, k) or not n * k:
            raise ValueError(f"{n} images and ({n}, {k}) targets stated, found {pixels.shape} and {targets.shape}")
        if not np.isfinite(targets).all():
            raise ValueError("targets that are not finite")
        return Dataset(images=_scaled(pixels), targets=targets, **facts)
    except FileNotFoundError:
        raise DatasetError(f"There is no file {path}; expected a data set written by save_npz.") from None
    except (DatasetError, MemoryError):
        raise
    except Exception as error:  # zipfile, zlib, numpy and json raise a dozen kinds when a file is damaged
        raise DatasetError(
            f"{path}: expected a data set written by save_npz, found something else ({error})."
        ) from None


def sha256_in(path: Path) -> str | None:
    """The SHA-256 (hex) that the name of a file ends with, as in `NAME-SHA256.npz`; None of another name."""
    found = re.search("-([0-9a-f]{64})$", path.stem)
    return found[1] if found else None


def _check_members(file: BinaryIO) -> None:
    """ValueError unless this is a zip of the three arrays, of the types and below the sizes that `save_npz` writes."""
    start = file.seek(-_ZIP_END.size - 20, os.SEEK_END)
    tail = file.read()
    mark, _, _, count, total, size, _, comment = _ZIP_END.unpack(tail[20:])
    # The list of members is small, before it is read: a longer one could take any memory.
    if mark != b"PK\5\6" or count != len(_MEMBERS) or total != count or size > 4096 or comment or tail[:4] == b"PK\6\7":
        raise ValueError(f"no list of {len(_MEMBERS)} members at {start}")
    with zipfile.ZipFile(file) as archive:
        if sorted(member.filename for member in archive.infolist()) != sorted(_MEMBERS):
            raise ValueError(f"the members {archive.namelist()!r:.80}")
        for member in archive.infolist():
            if member.file_size > LARGEST_TOTAL + 2**16:
                raise ValueError(f"{member.filename} of {member.file_size:,} bytes, at most {LARGEST_TOTAL:,} are read")
            with archive.open(member) as content:
                if np.lib.format.read_magic(content) != (1, 0):
                    raise ValueError(f"{member.filename} in another format")
                shape, _, dtype = np.lib.format.read_array_header_1_0(content)
                header = content.tell()
            # Memory is taken by the header's shape: the member must hold so much.
            if not re.fullmatch(_MEMBERS[member.filename], dtype.str) or any(side < 0 for side in shape):
                raise ValueError(f"{member.filename} of the type {dtype.str}")
            if header + math.prod(shape) * dtype.itemsize != member.file_size:
                raise ValueError(f"{member.filename} of {member.file_size:,} bytes for the shape {shape}")
    file.seek(0)


def _npz_facts(text: str) -> dict[str, Any]:
    """What stands beside the arrays, as a Dataset has it. ValueError where it is of another kind."""
    facts = json.loads(text)
    words = [facts["target_names"], facts["names"]]
    if not all(isinstance(each, list) and all(isinstance(word, str) for word in each) for each in words):
        raise ValueError("names that are no lists of texts")
    if not isinstance(facts["unit"], str) or not isinstance(facts["metadata"], dict):
        raise ValueError("a unit that is no text, or metadata that are no object")
    if not isinstance(facts["metadata"].get("name"), str):
        raise ValueError("metadata without a name")
    for order in facts["symmetries"].values():
        if not isinstance(order, list) or sorted(order) != list(range(len(facts["target_names"]))):
            raise ValueError("a symmetry that does not permute the targets")
    return {
        "target_names": tuple(facts["target_names"]),
        "unit": facts["unit"],
        "names": tuple(facts["names"]),
        "metadata": facts["metadata"],
        "symmetries": {name: tuple(order) for name, order in facts["symmetries"].items()},
    }


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file such that other processes see all of it or nothing, and so does the next boot."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    file = temporary.open("xb")  # a new file, never one that a link of others leads to
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def plain_name(folder: Path) -> str:
    """The name of a data set that has none of its own: its folder's, with - for characters that names cannot have."""
    return _NOT_IN_NAMES.sub("-", folder.resolve().name).strip()[:60] or "data"


def _read(folder: Path, image_size: int | None) -> tuple[Dataset | None, list[str]]:
    if image_size is not None and not 1 <= image_size <= LARGEST_SIDE:
        return None, [f"image_size: expected 1 to {LARGEST_SIDE} pixels, found {image_size}."]
    try:
        entries = sorted(os.listdir(folder))
    except OSError as error:
        return None, [f"{folder}: expected a folder with images and a table, but it cannot be read ({error.strerror})."]
    problems: list[str] = []
    facts = _facts(folder, entries, problems)
    targets = _targets(folder, entries, problems)
    files = _image_files(folder, entries, None if targets is None else len(targets), problems)
    pixels = _pixels(files, image_size, problems)
    if problems or targets is None or pixels is None:
        return None, problems
    height, width = pixels.shape[2:]
    turns = ("transpose", "quarter_turn")  # keep the shape of a square only
    return Dataset(
        images=_scaled(pixels),
        targets=targets,
        target_names=COMPONENTS,
        unit=facts.pop("unit", UNKNOWN_UNIT),
        names=tuple(file.name for file in files),
        metadata={"name": plain_name(folder), **facts},
        symmetries={name: order for name, order in SYMMETRIES.items() if height == width or name not in turns},
    ), []


def _scaled(pixels: np.ndarray) -> np.ndarray:
    scaled = pixels.astype(np.float32)
    scaled /= np.float32(255)  # in place: half the memory
    return scaled


# --- the table ---


def _targets(folder: Path, entries: list[str], problems: list[str]) -> np.ndarray | None:
    tables = [
        name
        for name in entries
        if name.lower().endswith(".csv") and not name.startswith(".") and name.lower() not in _SIDE_FILES
    ]
    named = [name for name in tables if name.lower().endswith("_cij_pbc.csv")]
    found = named or tables
    if len(found) != 1:
        unfinished = " `make` was not finished here: run it again." if "cells.partial.csv" in entries else ""
        problems.append(
            f"{folder}: expected one label table (such as 1-520_Cij_pbc.csv), found "
            + (f"{len(found)}: {', '.join(found[:5])}. Keep one." if found else f"none.{unfinished}")
        )
        return None
    path = folder / found[0]
    if reason := _not_a_file(path):
        problems.append(f"{path.name}: {reason}")
        return None
    targets, table_problems = read_table(path)
    problems.extend(table_problems)
    return targets if len(targets) else None


def _not_a_file(path: Path) -> str:
    """Why this is no regular file (a pipe or device would block or never end), or nothing."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"cannot be read ({error.strerror})."
    return "" if stat.S_ISREG(mode) else "expected a regular file, found a folder, pipe or device."


# --- the images ---


def _image_files(folder: Path, entries: list[str], rows: int | None, problems: list[str]) -> list[Path]:
    """The image of each row; of each number there is when the table could not be read."""
    by_id: dict[int, list[str]] = {}
    for name in entries:
        if match := _IMAGE.fullmatch(name):
            by_id.setdefault(int(match[1]), []).append(name)
            if _NOT_UTF8.search(name):  # no table of predictions could hold it
                problems.append(f"{_shown(name)}: expected a file name in UTF-8. Rename the file.")
    files = []
    for row in range(rows) if rows is not None else sorted(by_id):
        names = by_id.pop(row, [])
        if len(names) == 1:
            files.append(folder / names[0])
        elif names:
            problems.append(
                f"row {row}: expected one image {row}_*.png, found {len(names)}: "
                + f"{', '.join(map(_shown, names[:5]))}. Keep one."
            )
        else:
            problems.append(f"row {row}: expected one image {row}_*.png, found none. Add it, or remove the row.")
    for number in sorted(by_id) if rows is not None else []:
        for name in by_id[number]:
            problems.append(
                f"{_shown(name)}: has no row in the table, which has {rows} (0 to {rows - 1 if rows else 0})."
            )
    return files


def _pixels(files: list[Path], image_size: int | None, problems: list[str]) -> np.ndarray | None:
    """The images (n, 1, h, w) as uint8, or None when there is none or one will not do."""
    images: list[np.ndarray] = []
    converted: dict[str, list[str]] = {}  # mode -> files
    resized: list[str] = []
    expected: tuple[int, int] | None = None if image_size is None else (image_size, image_size)
    first = ""
    before = len(problems)
    for file in files:
        if reason := _not_a_file(file):
            problems.append(f"{_shown(file.name)}: {reason}")
            continue
        try:
            size = png_size(file)
            if expected is None:
                expected, first = size, file.name
            if expected[0] * expected[1] * len(files) > LARGEST_TOTAL:
                problems.append(
                    f"{len(files)} images of {_size(expected)} pixels are too many to hold at once "
                    f"(at most {LARGEST_TOTAL:,} pixels). Give a smaller image_size."
                )
                return None
            if image_size is None and size != expected:
                problems.append(
                    f"{_shown(file.name)}: expected {_size(expected)} pixels (height x width) as in {_shown(first)}, "
                    f"found {_size(size)}. Give an image_size to have all resized."
                )
                continue
            pixels, mode, size = read_png(file, image_size=image_size)
        except ImageProblem as problem:
            problems.append(f"{_shown(file.name)}: {problem}")
            continue
        if mode != "L":
            converted.setdefault(mode, []).append(file.name)
        if size != expected:
            resized.append(file.name)
        images.append(pixels)
    for mode, names in converted.items():
        _log.warning("%d image(s) converted from mode %s to grey, such as %s", len(names), mode, _shown(names[0]))
    if resized:
        _log.warning("%d image(s) resized to %s pixels, such as %s", len(resized), _size(expected), _shown(resized[0]))
    if len(problems) > before or not images:
        return None
    return np.stack(images)[:, np.newaxis]


def _shown(name: str) -> str:
    """A name as a message shows it: on one line, with nothing that a terminal would obey or not show."""
    return name if name.isprintable() else repr(name)


def _size(size: tuple[int, int] | None) -> str:
    return f"{size[0]} x {size[1]}" if size else "no"


# --- dataset.toml ---


def _facts(folder: Path, entries: list[str], problems: list[str]) -> dict[str, Any]:
    """What dataset.toml says: name, unit, phases, made; each only if there and valid."""
    if "dataset.toml" not in entries:
        return {}
    path = folder / "dataset.toml"
    if reason := _not_a_file(path):
        problems.append(f"{path.name}: {reason}")
        return {}
    what = "dataset.toml: expected a TOML file in UTF-8, but it"
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_TOML + 1)
        if len(text) > LARGEST_TOML:
            problems.append(f"{what} is larger than {LARGEST_TOML // 2**10} KiB. Keep name, unit and phases.")
            return {}
        return _stated(tomllib.loads(text.decode("utf-8-sig")), problems)
    except RecursionError:  # in reading a value, or in showing it
        problems.append(f"{what} is nested too deeply. Keep name, unit and phases.")
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        problems.append(f"{what} cannot be read: {error}")
    return {}


def _stated(content: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    _unknown_keys(content, ("name", "unit", "phases", "made"), "", problems)
    facts: dict[str, Any] = {}
    for key in ("name", "unit"):
        value = content.get(key)
        if value is None:
            continue
        if not isinstance(value, str) or not 1 <= len(value.strip()) <= 60 or not value.isprintable():
            problems.append(f"dataset.toml: {key}: expected a text of 1 to 60 characters, found {value!r:.60}.")
        elif key == "name" and _NOT_IN_NAMES.search(value):
            problems.append(f"dataset.toml: name: expected letters, digits, spaces and . _ + -, found {value!r}.")
        else:
            facts[key] = value.strip()
    if "phases" in content and (phases := _phases(content["phases"], problems)):
        facts["phases"] = phases
    # What `make` writes there to know its own folder again: whole numbers, which go into the study's JSON.
    made = content.get("made", {})
    if not isinstance(made, dict) or not all(type(n) is int and 0 <= n < 2**63 for n in made.values()):
        problems.append("dataset.toml: made: expected the table that `make` wrote. Remove the key.")
    elif made:
        facts["made"] = made
    return facts


def _phases(content: Any, problems: list[str]) -> dict[str, dict[str, float]] | None:
    keys = ("young_modulus", "poisson_ratio")
    if not isinstance(content, dict) or set(content) != {"matrix", "inclusion"}:
        found = ", ".join(map(_shown, content)) if isinstance(content, dict) else repr(content)
        problems.append(f"dataset.toml: phases: expected the tables matrix and inclusion, found {found or 'none'}.")
        return None
    phases = {}
    for name in ("matrix", "inclusion"):
        phase = content[name]
        if not isinstance(phase, dict):
            problems.append(
                f"dataset.toml: phases.{name}: expected a table with {' and '.join(keys)}, found {phase!r}."
            )
            continue
        _unknown_keys(phase, keys, f"phases.{name}.", problems)
        if missing := [key for key in keys if key not in phase]:
            problems.append(f"dataset.toml: phases.{name}: {' and '.join(missing)} missing.")
            continue
        try:
            valid = Phase(phase["young_modulus"], phase["poisson_ratio"])
        except ValueError as error:
            problems.append(f"dataset.toml: phases.{name}: {error}")
            continue
        phases[name] = {key: float(getattr(valid, key)) for key in keys}
    return phases if len(phases) == 2 else None


def _unknown_keys(table: dict[str, Any], valid: tuple[str, ...], prefix: str, problems: list[str]) -> None:
    for key in table:
        if key not in valid:
            near = get_close_matches(key, valid, 1)
            guess = f" Did you mean {near[0]}?" if near else ""
            problems.append(
                f"dataset.toml: no key is called {_shown(prefix + key)}. There are: {', '.join(valid)}.{guess}"
            )
