"""Which row of a table belongs to which image: by the image's name, by a number in it, or by the row's place."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from data_pipeline.formats.tables import Table
from data_pipeline.messages import printable
from data_pipeline.sources import Notes

ENOUGH = 0.5  # of the images or rows must match, or a column is no name of the images
MOST_NAMED = 5  # in a message

_PICTURE = re.compile(r"\.(?:png|jpe?g|tiff?|bmp|gif|npy|txt)$")


@dataclass(frozen=True, eq=False)
class Pairing:
    """One way to pair; `rows` has the row of every image, -1 for none."""

    match: tuple[str, str]  # "column" or "number" with the column, or ("row", "")
    rows: np.ndarray
    offset: int = 0  # the image's number minus that in the table
    twice: tuple[str, ...] = ()  # what several rows or several images are called

    def is_complete(self, n_rows: int) -> bool:
        """Return whether every image has one row and every row one image."""
        return not self.twice and bool((self.rows >= 0).all()) and len(self.rows) == n_rows

    def line(self) -> str:
        """Return the line of dataset.toml that asks for this pairing."""
        kind, column = self.match
        return f'match = {{{kind} = "{column}"}}' if column else f'match = "{kind}"'


def pair(
    names: Sequence[str], table: Table, stated: tuple[str, str] | None, notes: Notes, *, are_files: bool
) -> Pairing | None:
    """Return the one pairing that fits. If there is none or several that differ, ask, and return None.

    `names` are those of the image files, or of the places in an array, which have no name that a table could hold.
    """
    if stated and stated[1] and stated[1] not in table.cells:
        columns = ", ".join(map(str, list(table.cells)[:10]))
        notes.errors.append(f"match: no column is called {printable(stated[1])}. There are: {columns}.")
        return None
    n = len(table.cells)
    if stated == ("row", ""):
        if len(names) != n:
            notes.errors.append(f'match = "row": expected as many rows as images, {len(names)}, found {n}.')
            return None
        return Pairing(("row", ""), np.arange(n))
    pairings = [*(_by_name(names, table, n) if are_files else []), *_by_number(names, table, are_files)]
    if stated:
        pairings = [pairing for pairing in pairings if pairing.match == stated]
    complete = [pairing for pairing in pairings if pairing.is_complete(n)]
    if not are_files and len(names) == n and not complete and not stated:
        return Pairing(("row", ""), np.arange(n))
    if not pairings:
        _ask(names, table, stated, notes)
        return None
    pairings = complete or [max(pairings, key=lambda pairing: int((pairing.rows >= 0).sum()))]
    if not are_files and not stated and not np.array_equal(pairings[0].rows, np.arange(n)):
        notes.ask(
            f"Column {pairings[0].match[1]} numbers the images in another order than the rows have. Which holds?",
            pairings[0].line(),
            'match = "row"',
        )
        return None
    if any(not np.array_equal(pairing.rows, pairings[0].rows) for pairing in pairings[1:]):
        notes.ask("Several columns name the images, and they disagree. Which holds?", *(p.line() for p in pairings[:5]))
        return None
    return pairings[0]


def _by_name(names: Sequence[str], table: Table, n: int) -> list[Pairing]:
    pairings = []
    for column in table.cells:
        cells = table.cells[column].astype(str)
        for simplify in (_stem, _path):
            keys = [simplify(name) for name in names]
            if (pairing := _matched(("column", str(column)), keys, [simplify(cell) for cell in cells])) is not None:
                pairings.append(pairing)
                if not pairing.twice:
                    break
    return pairings


def by_name(names: Sequence[str], table: Table) -> Pairing | None:
    """Return the pairing by the column that names most of the images; None if none does."""
    pairings = _by_name(names, table, len(table.cells))
    return max(pairings, key=lambda pairing: (int((pairing.rows >= 0).sum()), -len(pairing.twice)), default=None)


def names_of(name: str) -> set[str]:
    """Return what an image is called in a pairing by name: without folder and extension, and with its folder."""
    return {_stem(name), _path(name)}


def _by_number(names: Sequence[str], table: Table, are_files: bool) -> list[Pairing]:
    """Return the pairings by the first or last number of the names, with the offset under which all images match."""
    if are_files:
        numbers = [[int(word) for word in re.findall(r"[0-9]{1,15}", os.path.basename(name))] for name in names]
        if not all(numbers):
            return []
        choices = [[words[place] for words in numbers] for place in (0, -1)]
        choices = choices[:1] if choices[0] == choices[1] else choices
    else:
        choices = [list(range(len(names)))]
    pairings = []
    for column in table.cells:
        values, bad = table.numbers(str(column))
        if (
            bad.any()
            or not np.isfinite(values).all()
            or (values != np.rint(values)).any()
            or np.abs(values).max() > 1e15
        ):
            continue
        cells = values.astype(np.int64).tolist()
        for chosen in choices:
            offset = max((0, 1, -1, min(chosen) - min(cells)), key=partial(_common, chosen, set(cells)))
            keys = [str(number - offset) for number in chosen]
            if (pairing := _matched(("number", str(column)), keys, list(map(str, cells)), offset)) is not None:
                pairings.append(pairing)
    return pairings


def _common(numbers: Sequence[int], cells: set[int], offset: int) -> int:
    return len(cells.intersection(number - offset for number in numbers))


def _matched(match: tuple[str, str], keys: list[str], cells: list[str], offset: int = 0) -> Pairing | None:
    rows: dict[str, int] = {}
    twice = [cell for row, cell in enumerate(cells) if cell and rows.setdefault(cell, row) != row]
    paired = np.array([rows.get(key, -1) for key in keys])
    if (paired >= 0).sum() < max(1, ENOUGH * min(len(keys), len(set(cells)))):
        return None
    seen: set[str] = set()
    twice += [key for key in keys if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
    return Pairing(match, paired, offset, tuple(dict.fromkeys(twice)))


def _stem(name: str) -> str:
    return _PICTURE.sub("", name.replace("\\", "/").rpartition("/")[2].strip().casefold())


def _path(name: str) -> str:
    return _PICTURE.sub("", name.replace("\\", "/").strip().removeprefix("./").casefold())


def _ask(names: Sequence[str], table: Table, stated: tuple[str, str] | None, notes: Notes) -> None:
    first = ", ".join(map(printable, names[:3]))
    if stated:
        notes.errors.append(
            f"match: column {stated[1]} does not name the images ({first}, …): it has "
            f"{', '.join(map(repr, table.cells[stated[1]].astype(str)[:3].tolist()))}, …"
        )
        return
    rows = f"The table has {len(table.cells)} rows, and there are {len(names)} images ({first}, …)."
    lines = [f'match = {{column = "{next(iter(table.cells))}"}}'] + (
        ['match = "row"'] if len(names) == len(table.cells) else []
    )
    notes.ask(f"No column of the table names the images. {rows} How do they belong together?", *lines)


def check(pairing: Pairing, names: Sequence[str], table: Table, notes: Notes, *, has_inputs: bool) -> None:
    """Add the images without a row, the rows without an image, and what occurs twice to the errors."""
    copies = "Give each row a copy of the image, under a name of its own, and name a group that all copies share."
    if pairing.offset:
        notes.remarks.append(f"number in the image's name = {pairing.match[1]} {pairing.offset:+d}")
    lonely = [name for name, row in zip(names, pairing.rows, strict=True) if row < 0]
    unused = sorted(set(range(len(table.cells))) - set(pairing.rows.tolist()))
    for what, things, remedy in (
        ("image without a row", [*map(printable, lonely)], "Add the rows, or remove the images."),
        ("row without an image", [table.lines[row] for row in unused], "Add the images, or remove the rows."),
        (
            "name that several images or rows have",
            [*map(printable, pairing.twice)],
            copies if has_inputs else "Keep one of each.",
        ),
    ):
        if things and not (
            what.startswith("row") and pairing.twice and not lonely and len(unused) == len(pairing.twice)
        ):
            more = f", and {len(things) - MOST_NAMED} more" if len(things) > MOST_NAMED else ""
            count = "1 " + what if len(things) == 1 else f"{len(things)} " + what.replace(" ", "s ", 1)
            notes.errors.append(f"{count}: {', '.join(things[:MOST_NAMED])}{more}. {remedy}")
