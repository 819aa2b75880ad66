"""A folder of images and one label table -> Dataset.

The folder's form (of the source study's course):

- The table is the one file named `*_Cij_pbc.csv`; if there is none, the one other `*.csv`. The side files `cells.csv`
  and `cells.partial.csv` of `make`, and hidden files, are ignored.
- Row r of the table, counted from 0, belongs to the one PNG whose name begins with `{r}_`.
- `dataset.toml`, see `data_pipeline.description`.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data_pipeline import description
from data_pipeline.components import COMPONENTS, SYMMETRIES
from data_pipeline.description import Description
from data_pipeline.files import not_a_file
from data_pipeline.images import LARGEST_SIDE, ImageProblem, png_size, read_png
from data_pipeline.messages import printable
from data_pipeline.phase import Phase
from data_pipeline.table import read_table

DEFAULT = Path(__file__).parent / "default"  # the data set that ships with this package
MOST_PROBLEMS = 20  # of a folder, that an error lists
LARGEST_TOTAL = 2**29  # pixels of all images together: 2 GiB as float32

_IMAGE = re.compile(r"(0|[1-9][0-9]*)_.*\.png", re.IGNORECASE | re.DOTALL)
_SIDE_FILES = ("cells.csv", "cells.partial.csv")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # how Python represents such bytes in the name of a file

_log = logging.getLogger("data_pipeline")


class DatasetError(ValueError):
    """The data cannot be used as it is; the message says what was expected, what was found, where, and what to do."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Images of microstructure cells and their stiffness components."""

    images: np.ndarray  # (n, c, h, w) float32 in 0..1
    targets: np.ndarray  # (n, k) float64 in `unit`
    target_names: tuple[str, ...]  # k
    names: tuple[str, ...]  # of the n image files
    description: Description
    symmetries: Mapping[str, tuple[int, ...]]  # transformation of the image -> permutation of the k targets

    @property
    def name(self) -> str:
        """The data set's name."""
        return self.description.name

    @property
    def unit(self) -> str:
        """The unit of the targets; "label unit" if it is unknown."""
        return self.description.unit

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
        """The phases of grey value 0, "matrix", and 1, "inclusion"; None if unknown, or if there are other pixels."""
        phases = self.description.phases
        return phases if phases and np.isin(self.pixels(), (0, 255)).all() else None

    def pixels(self) -> np.ndarray:
        """Return the images (n, c, h, w) as uint8, 0..255, as they were in the files."""
        return np.rint(self.images * np.float32(255)).astype(np.uint8)


def load(folder: Path, *, image_size: int | None = None) -> Dataset:
    """Return the data set of a folder. Raise DatasetError with its first twenty problems and their count.

    With `image_size` (pixels) images of another size are resized to that square, nearest pixel; without it all images
    must have one size. Conversions to grey and resizing are logged as warnings.
    """
    dataset, problems = _read(Path(folder), image_size)
    if dataset is None:
        head = f"The data set in {folder} has {len(problems)} problem{'s' if len(problems) > 1 else ''}:"
        more = [f"... and {len(problems) - MOST_PROBLEMS} more."] if len(problems) > MOST_PROBLEMS else []
        raise DatasetError("\n  ".join([head, *problems[:MOST_PROBLEMS], *more]))
    return dataset


def check(folder: Path, *, image_size: int | None = None) -> list[str]:
    """Return all problems of a folder, each with its file and line; an empty list if `load` would succeed."""
    return _read(Path(folder), image_size)[1]


def _read(folder: Path, image_size: int | None) -> tuple[Dataset | None, list[str]]:
    if image_size is not None and not 1 <= image_size <= LARGEST_SIDE:
        return None, [f"image_size: expected 1 to {LARGEST_SIDE} pixels, found {image_size}."]
    try:
        entries = sorted(os.listdir(folder))
    except OSError as error:
        return None, [f"{folder}: expected a folder with images and a table, but it cannot be read ({error.strerror})."]
    problems: list[str] = []
    described = description.read(folder, problems)
    targets = _targets(folder, entries, problems)
    files = _image_files(folder, entries, None if targets is None else len(targets), problems)
    pixels = _pixels(files, image_size, problems)
    if problems or targets is None or pixels is None:
        return None, problems
    height, width = pixels.shape[2:]
    turns = ("transpose", "quarter_turn")  # these keep the shape of squares only
    return Dataset(
        images=scaled(pixels),
        targets=targets,
        target_names=COMPONENTS,
        names=tuple(file.name for file in files),
        description=described,
        symmetries={name: order for name, order in SYMMETRIES.items() if height == width or name not in turns},
    ), []


def scaled(pixels: np.ndarray) -> np.ndarray:
    """Return pixels 0..255 as float32 in 0..1."""
    images = pixels.astype(np.float32)
    images /= np.float32(255)  # in place: half the memory
    return images


# --- the table ---


def _targets(folder: Path, entries: list[str], problems: list[str]) -> np.ndarray | None:
    """Return the components (rows, 9); None if there is no table, or nothing in it."""
    tables = [
        name
        for name in entries
        if name.lower().endswith(".csv") and not name.startswith(".") and name.lower() not in _SIDE_FILES
    ]
    tables = [name for name in tables if name.lower().endswith("_cij_pbc.csv")] or tables
    if len(tables) != 1:
        unfinished = " `make` was not finished here: run it again." if "cells.partial.csv" in entries else ""
        problems.append(
            f"{folder}: expected one label table (such as 1-520_Cij_pbc.csv), found "
            + (f"{len(tables)}: {', '.join(tables[:5])}. Keep one." if tables else f"none.{unfinished}")
        )
        return None
    path = folder / tables[0]
    if reason := not_a_file(path):
        problems.append(f"{path.name}: {reason}")
        return None
    targets, table_problems = read_table(path)
    problems.extend(table_problems)
    return targets if len(targets) else None


# --- the images ---


def _image_files(folder: Path, entries: list[str], rows: int | None, problems: list[str]) -> list[Path]:
    """Return the image of every row; without a readable table, the image of every number."""
    by_id: dict[int, list[str]] = {}
    for name in entries:
        if match := _IMAGE.fullmatch(name):
            by_id.setdefault(int(match[1]), []).append(name)
            if _NOT_UTF8.search(name):  # no table of predictions could hold it
                problems.append(f"{printable(name)}: expected a file name in UTF-8. Rename the file.")
    files = []
    for row in range(rows) if rows is not None else sorted(by_id):
        names = by_id.pop(row, [])
        if len(names) == 1:
            files.append(folder / names[0])
        elif names:
            problems.append(
                f"row {row}: expected one image {row}_*.png, found {len(names)}: "
                + f"{', '.join(map(printable, names[:5]))}. Keep one."
            )
        else:
            problems.append(f"row {row}: expected one image {row}_*.png, found none. Add it, or remove the row.")
    for number in sorted(by_id) if rows is not None else []:
        for name in by_id[number]:
            problems.append(
                f"{printable(name)}: has no row in the table, which has {rows} (0 to {rows - 1 if rows else 0})."
            )
    return files


def _pixels(files: list[Path], image_size: int | None, problems: list[str]) -> np.ndarray | None:
    """Return the images (n, 1, h, w) as uint8, or None if there is none or one cannot be used."""
    images: list[np.ndarray] = []
    converted: dict[str, list[str]] = {}  # mode -> files
    resized: list[str] = []
    expected: tuple[int, int] | None = None if image_size is None else (image_size, image_size)
    first = ""
    for file in files:
        try:
            if reason := not_a_file(file):
                raise ImageProblem(reason)
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
                raise ImageProblem(
                    f"expected {_size(expected)} pixels (height x width) as in {printable(first)}, "
                    f"found {_size(size)}. Give an image_size to have all resized."
                )
            pixels, mode, size = read_png(file, image_size=image_size)
        except ImageProblem as problem:
            problems.append(f"{printable(file.name)}: {problem}")
            continue
        if mode != "L":
            converted.setdefault(mode, []).append(file.name)
        if size != expected:
            resized.append(file.name)
        images.append(pixels)
    for mode, names in converted.items():
        _log.warning("%d image(s) converted from mode %s to grey, such as %s", len(names), mode, printable(names[0]))
    if resized and expected:
        _log.warning(
            "%d image(s) resized to %s pixels, such as %s", len(resized), _size(expected), printable(resized[0])
        )
    return np.stack(images)[:, np.newaxis] if images and len(images) == len(files) else None


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
