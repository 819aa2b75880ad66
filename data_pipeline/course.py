"""The form of the source study's course: row r of one table without a header belongs to the one PNG `r_….png`.

- The table is the one file named `*_Cij_pbc.csv`; if there is none, the one other `*.csv`. The side files `cells.csv`
  and `cells.partial.csv` of `make`, and hidden files, are ignored.
- Row r of the table, counted from 0, belongs to the one PNG whose name begins with `{r}_`.
"""

import logging
import os
import re
from pathlib import Path

import numpy as np

from data_pipeline.files import not_a_file
from data_pipeline.findings import Finding, in_alpha, resizing
from data_pipeline.messages import RESIZE, counted, printable
from data_pipeline.pixels import PixelProblem, check_total
from data_pipeline.png import LARGEST_SIDE, ImageProblem, is_in_alpha, png_size, read_png
from data_pipeline.table import COLUMNS, is_header, read_table

_IMAGE = re.compile(r"(0|[1-9][0-9]*)_.*\.png", re.IGNORECASE | re.DOTALL)
_SIDE_FILES = ("cells.csv", "cells.partial.csv")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # how Python represents such bytes in the name of a file

_log = logging.getLogger("data_pipeline")


def is_course(folder: Path) -> bool:
    """Return whether a folder has images `r_….png`, or none, and a table of ten columns without a header or with the
    course's name. One that cannot be read counts: then the form is the one that a message describes."""
    try:
        entries = [name for name in os.listdir(folder) if not name.startswith(".")]
    except OSError:
        return True
    others = any(Path(name).suffix.lower() not in (".csv", ".png", ".toml") for name in entries)
    images = any(_IMAGE.fullmatch(name) for name in entries)
    if not images and (others or any(name.lower().endswith(".png") for name in entries)):
        return False
    tables = _tables(entries)
    if len(tables) != 1 or not_a_file(folder / tables[0]):
        return images and not others
    with (folder / tables[0]).open("rb") as file:
        first = file.readline(2**16).decode("utf-8", "replace")
    return not is_header(first) and (first.count(",") == COLUMNS - 1 or tables[0].lower().endswith("_cij_pbc.csv"))


def read(
    folder: Path, image_size: int | None, problems: list[str], findings: list[Finding]
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]] | None:
    """Return pixels (n, 1, h, w) as uint8, components (n, 9) and the names of the image files; None, and what is wrong
    in `problems`, if there is anything wrong. Add what is lost of images to `findings`.

    With `image_size` (pixels) images of another size are resized to that square, nearest pixel; without it all images
    must have one size. Conversions to grey and resizing are logged as warnings.
    """
    if image_size is not None and not 1 <= image_size <= LARGEST_SIDE:
        problems.append(f"image_size: expected 1 to {LARGEST_SIDE} pixels, found {image_size}.")
        return None
    try:
        entries = sorted(os.listdir(folder))
    except OSError as error:
        problems.append(
            f"{folder}: expected a folder with images and a table, but it cannot be read ({error.strerror})."
        )
        return None
    targets = _targets(folder, entries, problems)
    files = _image_files(folder, entries, None if targets is None else len(targets), problems)
    pixels = _pixels(files, image_size, problems, findings)
    if problems or targets is None or pixels is None:
        return None
    return pixels, targets, tuple(file.name for file in files)


def _tables(entries: list[str]) -> list[str]:
    """Return the files that can be the table: exactly one if it is clear which."""
    tables = [
        name
        for name in entries
        if name.lower().endswith(".csv") and not name.startswith(".") and name.lower() not in _SIDE_FILES
    ]
    return [name for name in tables if name.lower().endswith("_cij_pbc.csv")] or tables


# --- the table ---


def _targets(folder: Path, entries: list[str], problems: list[str]) -> np.ndarray | None:
    """Return the components (rows, 9); None if there is no table, or nothing in it."""
    tables = _tables(entries)
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


def _pixels(
    files: list[Path], image_size: int | None, problems: list[str], findings: list[Finding]
) -> np.ndarray | None:
    """Return the images (n, 1, h, w) as uint8, or None if there is none or one cannot be used."""
    images: list[np.ndarray] = []
    converted: dict[str, list[str]] = {}  # mode -> files
    changed: list[int] = []
    hidden: list[int] = []
    expected: tuple[int, int] | None = None if image_size is None else (image_size, image_size)
    first = ""
    for file in files:
        try:
            if reason := not_a_file(file):
                raise ImageProblem(reason)
            size = png_size(file)
            if expected is None:
                expected, first = size, file.name
            try:
                check_total(len(files), 1, *expected)
            except PixelProblem as problem:
                problems.append(str(problem))
                return None
            if image_size is None and size != expected:
                raise ImageProblem(
                    f"expected {_size(expected)} pixels (height x width) as in {printable(first)}, "
                    f"found {_size(size)}. {RESIZE}"
                )
            pixels, mode, size = read_png(file, image_size=image_size)
        except ImageProblem as problem:
            problems.append(f"{printable(file.name)}: {problem}")
            continue
        if pixels.min() == pixels.max() and is_in_alpha(file):
            hidden.append(len(images))
        if mode != "L":
            converted.setdefault(mode, []).append(file.name)
        if size != expected:
            changed.append(len(images))
        images.append(pixels)
    if hidden:
        findings.append(in_alpha([printable(file.name) for file in files], hidden))
    for mode, names in converted.items():
        _log.warning(
            "%s converted from mode %s to grey, such as %s", counted(len(names), "image"), mode, printable(names[0])
        )
    if changed and expected:
        findings.append(resizing([printable(file.name) for file in files], changed, expected))
    return np.stack(images)[:, np.newaxis] if images and len(images) == len(files) else None


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
