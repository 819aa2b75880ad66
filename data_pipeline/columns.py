"""What the columns of a table mean: targets and their units, groups, parts of the split."""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pandas as pd

from data_pipeline.dataset_keys import MOST_INPUTS, MOST_TARGETS, Layout
from data_pipeline.formats.arrays import parted
from data_pipeline.formats.tables import Table, check_rows
from data_pipeline.messages import printable
from data_pipeline.sources import LARGEST_TENSOR, Notes, part_of
from data_pipeline.table import LARGEST_LABEL

MOST_NAMED = 5  # rows or columns in a message
LONGEST_NAME, LONGEST_UNIT = 100, 60  # characters; MLflow takes 250 for the name of a metric

_NOT_IN_NAMES = re.compile(r"[^\w .:-]+")  # MLflow names metrics by the targets, and takes no other characters
_WITH_UNIT = re.compile(r"(.*\S)\s*\[([^\[\]]+)\]")
_GROUPS = re.compile(
    r"(?:group|simulation|sim|sample|specimen|batch|series|rve|source|material)(?:[ _]?(?:id|no\.?|name))?"
)


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns by their meaning; arrays have a row for every row of the table."""

    targets: np.ndarray  # (rows, k) float64, NaN where missing
    names: tuple[str, ...]  # k
    units: tuple[str, ...]  # k, "" if unknown
    groups: tuple[str, ...] | None
    parts: tuple[str, ...] | None  # training, validation or test
    inputs: np.ndarray  # (rows, m) float64
    input_names: tuple[str, ...]  # m
    input_units: tuple[str, ...]  # m, "" if unknown


def of_array(reference: str, array: np.ndarray, n: int) -> Table:
    """Return an array of labels, n along its first or last axis, as a table: one column for every entry.

    The entries of a tensor (n, d, d) are called by their indices, as C12; a symmetric one gives its upper half. Raise
    FormatProblem for too many rows.
    """
    check_rows(n)
    if array.shape[0] != n and array.shape[-1] == n:
        array = np.moveaxis(array, -1, 0)
    file, key = parted(reference)
    base = PurePosixPath(key or PurePosixPath(file).stem).name
    sides = array.shape[1:]
    if len(sides) == 2 and sides[0] == sides[1] <= LARGEST_TENSOR:
        entries = [(row, column) for row in range(sides[0]) for column in range(sides[0])]
        if np.allclose(array, array.swapaxes(1, 2), rtol=1e-6, atol=0):
            entries = [(row, column) for row, column in entries if row <= column]
        columns = {f"{base}{row + 1}{column + 1}": array[:, row, column] for row, column in entries}
    else:
        flat = array.reshape(len(array), -1)
        names = [base] if flat.shape[1] == 1 else [f"{base}_{column + 1}" for column in range(flat.shape[1])]
        columns = {name: flat[:, column] for column, name in enumerate(names)}
    cells = pd.DataFrame({name: np.asarray(values, np.float64) for name, values in columns.items()})
    return Table(cells, tuple(f"{reference}[{row}]" for row in range(len(cells))))


def understand(table: Table, layout: Layout, used: str, notes: Notes, *, further: bool = False) -> Columns | None:
    """Return the meaning of the columns; `used` is the one that names the images. Add what is wrong to the notes.

    Inputs of `further` images need not vary."""
    named = {column: name_and_unit(column) for column in map(str, table.cells)}
    columns = {name: column for column, (name, _) in named.items()}
    columns |= {column: column for column in named}  # a name with its unit is understood as well
    stated = [*(layout.targets or ()), *(layout.inputs or ()), *filter(None, (layout.group, layout.split))]
    if unknown := [name for name in stated if name not in columns]:
        notes.errors.append(
            f"no column is called {', '.join(map(printable, unknown))}. There are: {', '.join(list(named)[:10])}."
        )
        return None
    inputs = [columns[name] for name in layout.inputs or ()]
    split = columns[layout.split] if layout.split else _guess_split(table, used)
    taken = {used, split, *inputs}
    group = columns[layout.group] if layout.group else _guess_group(table, taken, layout, notes)
    targets = [columns[name] for name in layout.targets or ()]
    if not targets:
        targets = _guess_targets(table, taken | {group}, notes)
    if not 1 <= len(targets) <= MOST_TARGETS:
        notes.errors.append(
            f"targets: expected 1 to {MOST_TARGETS} columns of numbers that vary, found {len(targets)}"
            f"{_why_none(table, taken | {group})}."
        )
        return None
    names = tuple(named[column][0] for column in targets)
    input_names = tuple(named[column][0] for column in inputs)
    units = {named[column][0]: named[column][1] for column in [*targets, *inputs]}
    units |= {named.get(name, (name, ""))[0]: unit for name, unit in (layout.units or {}).items()}
    every = (*names, *input_names)
    if strange := set(units) - set(every):
        notes.errors.append(f"units: no target is called {', '.join(sorted(strange))}. There are: {', '.join(every)}.")
    if len(set(every)) < len(every) or {"", "image", "images"} & set(every):
        notes.errors.append(
            f"targets: expected different names, none of them an input or called image, found {', '.join(every)}."
        )
    return Columns(
        targets=_numbers(table, targets, notes),
        names=names,
        units=tuple(units.get(name, "") for name in names),
        groups=tuple(table.cells[group].astype(str)) if group else None,
        parts=_parts(table, split, notes) if split else None,
        inputs=_inputs(table, inputs, notes, further=further),
        input_names=input_names,
        input_units=tuple(units.get(name, "") for name in input_names),
    )


def _inputs(table: Table, columns: list[str], notes: Notes, *, further: bool) -> np.ndarray:
    """Return the inputs (rows, m); add missing ones, and columns that do not vary, to the errors."""
    numbers = _numbers(table, columns, notes)
    if len(columns) > MOST_INPUTS:
        notes.errors.append(f"inputs: expected at most {MOST_INPUTS} columns, found {len(columns)}.")
    for column, values in zip(columns, numbers.T, strict=True):
        rows = np.flatnonzero(np.isnan(values) & ~table.numbers(column)[1])
        if len(rows):
            lines = ", ".join(table.lines[row] for row in rows[:MOST_NAMED])
            more = f" and {len(rows) - MOST_NAMED} more" if len(rows) > MOST_NAMED else ""
            notes.errors.append(
                f"{lines}{more}: {printable(column)}: expected a number, because it is an input, found none. "
                "Fill it in, or remove the row."
            )
        elif (values == values[0]).all() and not further:
            notes.errors.append(f"inputs: {printable(column)} is {values[0]:g} in every row. Leave it out.")
    return numbers


def name_and_unit(column: str) -> tuple[str, str]:
    """Return the name of a target, without what MLflow refuses, and its unit, as in "E [GPa]"; both cut if too long."""
    match = _WITH_UNIT.fullmatch(column)
    name, unit = (match[1], match[2].strip()) if match else (column, "")
    printed = "".join(letter for letter in unit if letter.isprintable())
    return " ".join(_NOT_IN_NAMES.sub(" ", name).split())[:LONGEST_NAME], printed[:LONGEST_UNIT]


def _guess_split(table: Table, used: str) -> str:
    for column in map(str, table.cells):
        values = set(table.cells[column].astype(str))
        if column != used and 2 <= len(values) <= 3 and all(part_of(value) for value in values):
            return column
    return ""


def _parts(table: Table, split: str, notes: Notes) -> tuple[str, ...] | None:
    parts = tuple(part_of(value) for value in table.cells[split].astype(str))
    if wrong := [row for row, part in enumerate(parts) if not part]:
        notes.errors.append(
            f"{table.lines[wrong[0]]}: {split}: expected training, validation or test, "
            f"found {table.cells[split][wrong[0]]!r}."
        )
        return None
    return parts


def _guess_group(table: Table, used: set[str], layout: Layout, notes: Notes) -> str:
    """Return a column whose name and repeated values say that its rows belong together."""
    for column in [name for name in map(str, table.cells) if name not in used | set(layout.targets or ())]:
        count = table.cells[column].nunique()
        if not 2 <= count <= len(table.cells) / 2:
            continue
        if _GROUPS.fullmatch(column.strip().lower()):
            notes.remarks.append(f"{column} groups the rows ({count} groups)")
            return column
        if table.numbers(column)[1].all():
            notes.doubts.append(
                f"{printable(column)} has {count} texts for {len(table.cells)} rows. If rows that share one are alike, "
                f'add group = "{column}".'
            )
    return ""


def _guess_targets(table: Table, used: set[str], notes: Notes) -> list[str]:
    """Return the columns of numbers that vary and are no running number; say which others are left out."""
    targets, others = [], {}
    for column in [name for name in map(str, table.cells) if name not in used]:
        values, bad = table.numbers(column)
        there = values[np.isfinite(values)]
        if len(there) <= len(values) / 2 or (bad.sum() > len(values) / 2):
            others[column] = "no numbers"
        elif there.min() == there.max():
            others[column] = "constant"
        elif len(there) == len(values) > 2 and np.array_equal(np.sort(values), values.min() + np.arange(len(values))):
            others[column] = "a running number"
        else:
            targets.append(column)
    if others:
        named = [f"{printable(column)} ({why})" for column, why in others.items()]
        more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
        notes.remarks.append(f"no targets: {', '.join(named[:MOST_NAMED])}{more}")
    return targets


def _why_none(table: Table, used: set[str]) -> str:
    """Return what the columns that might be targets hold instead of numbers."""
    texts = [
        f"{printable(column)} with {str(table.cells[column][row]).strip()!r:.40}"
        for column in map(str, table.cells)
        if column not in used
        for row in np.flatnonzero(table.numbers(column)[1])[:1]
    ][:MOST_NAMED]
    return f": no numbers are in {', '.join(texts)}. A unit belongs into the header, as in 'E [GPa]'" if texts else ""


def _numbers(table: Table, columns: list[str], notes: Notes) -> np.ndarray:
    """Return columns (rows, k) as float64; add cells that hold something else, or are too large, to the errors."""
    numbers = np.full((len(table.cells), len(columns)), np.nan)
    for place, column in enumerate(columns):
        values, bad = table.numbers(column)
        numbers[:, place] = values
        beyond = np.abs(values) > LARGEST_LABEL
        for wrong, expected in (
            (bad, "a number"),
            (beyond & ~bad, f"a number of at most {LARGEST_LABEL:.0e}, the limit of single precision"),
        ):
            if wrong.any():
                row = int(np.flatnonzero(wrong)[0])
                more = f" ({int(wrong.sum())} such rows)" if wrong.sum() > 1 else ""
                notes.errors.append(
                    f"{table.lines[row]}: {printable(column)}: expected {expected}, "
                    f"found {str(table.cells[column][row]).strip()!r:.40}{more}. Correct it."
                )
    return numbers
