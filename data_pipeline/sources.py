"""Where the images and the labels of a folder lie: guessed from its files, or as dataset.toml says."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from data_pipeline.findings import Finding
from data_pipeline.formats import arrays, tables
from data_pipeline.formats.limits import FormatProblem
from data_pipeline.formats.pictures import KINDS
from data_pipeline.messages import printable

MOST_FILES = 200_000
DEEPEST = 3  # folders below the data set's own
MOST_OFFERED = 5  # candidates that a question names
LARGEST_TENSOR = 6  # rows of a stiffness tensor; arrays (n, 2, 2) to (n, 6, 6) are labels, larger ones images
PARTS = {"train": "training", "val": "validation", "valid": "validation", "test": "test"}

_SIDE_FILES = {"cells.csv", "cells.partial.csv", "dataset.toml", "thumbs.db"}
_WORDS = re.compile(r"(.*/)?(read.?me|licen[cs]e|copying|changelog|citation|authors|requirements).*[.]txt", re.I)
_PART = re.compile(r"(?<![a-z])(train|val|test)(?:id|idation|ing)?(?![a-z])", re.IGNORECASE)
_WIDE = 64  # numbers a line from which a text file holds images


@dataclass
class Notes:
    """What is said about a folder beside the data: `questions` and `errors` keep it from being used.

    `facts` is what is understood nevertheless, by its key in the JSON form.
    """

    remarks: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def ask(self, question: str, *lines: str) -> None:
        """Add a question with the lines of dataset.toml that answer it."""
        self.questions.append(f"{question} Add to dataset.toml: {'  or  '.join(lines)}")


def files_of(folder: Path) -> list[str]:
    """Return the files of a folder and of those in it, relative, in natural order; none that are hidden."""
    files: list[str] = []
    for root, folders, names in os.walk(folder):
        depth = len(Path(root).relative_to(folder).parts)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__"))) if depth < DEEPEST else []
        where = Path(root).relative_to(folder).as_posix()
        for name in names:
            if not name.startswith((".", "~$")) and name.lower() not in _SIDE_FILES and len(files) < MOST_FILES:
                files.append(name if where == "." else f"{where}/{name}")
    return sorted(files, key=natural)


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts image 2 before image 10."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in re.split(r"([0-9]{1,18})", name)]


def part_of(text: str) -> str:
    """Return the part of the split that a name speaks of; "" if none."""
    words = {match[1].lower() for match in _PART.finditer(text)}
    return PARTS[words.pop()] if len(words) == 1 else ""


def expand(patterns: Sequence[str], files: Sequence[str]) -> list[str]:
    """Return the files that the patterns name, in the patterns' order; an array's reference names itself."""
    chosen: list[str] = []
    for pattern in patterns:
        file, _ = arrays.parted(pattern)
        depth = file.count("/")
        fitting = [name for name in files if name.count("/") == depth and fnmatchcase(name, file)]
        chosen += [pattern if file != pattern else name for name in fitting]
    return list(dict.fromkeys(chosen))


def guess(folder: Path, files: Sequence[str], notes: Notes) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the candidates for images and for tables: for each a list of patterns and references.

    References that differ in a word for a part of the split alone, as x_train.npy and x_test.npy, are one candidate.
    """
    images: dict[str, list[str]] = {}
    labels: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    single: dict[tuple[str, str], list[str]] = {}  # folder, suffix -> files that may hold one image each
    for file in files:
        where, suffix = os.path.dirname(file), os.path.splitext(file)[1].lower()
        if suffix in KINDS:
            pattern = f"{where}/*{os.path.splitext(file)[1]}".lstrip("/")
            key = _PART.sub("*", where)
            if pattern not in images.setdefault(key, []):
                images[key].append(pattern)
            counts[key] = counts.get(key, 0) + 1
        elif _WORDS.fullmatch(file):
            continue  # words about the data; named in dataset.toml it may be the table
        elif suffix in arrays.READERS:
            single.setdefault((where, suffix), []).append(file)
        elif suffix in tables.SUFFIXES:
            labels.setdefault(_PART.sub("*", file), []).append(file)
    for (where, suffix), names in single.items():
        shapes = _shapes(folder, names[0], notes)
        if suffix in (".npy", ".txt") and len(names) > 2 and all(_is_one_image(shape) for shape in shapes.values()):
            images.setdefault(f"{where} {suffix}", []).append(f"{where}/*{suffix}".lstrip("/"))
            counts[f"{where} {suffix}"] = len(names)
            continue
        for name in names:
            for reference, shape in _shapes(folder, name, notes).items():
                target = images if _is_images(shape, suffix) else labels
                target.setdefault(_PART.sub("*", reference), []).append(reference)
            if suffix == ".txt" and name not in [file for list_ in images.values() for file in list_]:
                labels.setdefault(_PART.sub("*", name), [name])
    most = max(counts.values(), default=0)
    for key in [key for key, count in counts.items() if 10 * count < most]:
        notes.doubts.append(f"Left out: {', '.join(map(printable, images.pop(key)))}, few pictures beside many.")
    return images, labels


def _shapes(folder: Path, file: str, notes: Notes) -> dict[str, tuple[int, ...]]:
    try:
        return arrays.members(folder, file)
    except FormatProblem as problem:
        notes.errors.append(f"{printable(file)}: {problem}")
        return {}


def _is_one_image(shape: tuple[int, ...]) -> bool:
    return len(shape) in (2, 3) and min(shape[:2]) > LARGEST_TENSOR


def _is_images(shape: tuple[int, ...], suffix: str) -> bool:
    if len(shape) == 2:
        return suffix == ".txt" and shape[1] >= _WIDE
    return len(shape) in (3, 4) and sorted(shape)[-2] > LARGEST_TENSOR


def choose(candidates: dict[str, list[str]], key: str, notes: Notes) -> tuple[str, ...]:
    """Return the only candidate; ask which if there are several, and return none."""
    if len(candidates) > 1:
        several = list(candidates.values())[:MOST_OFFERED]  # and images also all together
        together = [[pattern for patterns in several for pattern in patterns]] if key == "images" else []
        lines = [f"{key} = {_listed(patterns)}" for patterns in several + together]
        notes.ask(
            f"{len(candidates)} things in the folder may be the {'images' if key == 'images' else 'table'}.", *lines
        )
        return ()
    return tuple(next(iter(candidates.values()), ()))


def _listed(patterns: Sequence[str]) -> str:
    texts = [f'"{pattern}"' for pattern in patterns]
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
