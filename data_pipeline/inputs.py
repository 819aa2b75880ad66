"""Numbers that belong to further images, from a table such as those of a data set."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_pipeline import columns, pairing
from data_pipeline.formats import arrays, tables
from data_pipeline.formats.limits import FormatProblem
from data_pipeline.formats.tables import Table
from data_pipeline.messages import printable


def read_inputs(path: Path, images: Sequence[str], names: Sequence[str], units: Mapping[str, str]) -> np.ndarray:
    """Return the inputs (n, m) of n images, called `images`, from the columns `names` of a table, in their units.

    A column of the table names the images, with or without extension or folder; of an array of images the table has a
    row each. Raise FormatProblem.
    """
    table = _table(path, len(images))
    columns_of: dict[str, str] = {}
    for column in map(str, table.cells):
        name, unit = columns.name_and_unit(column)
        if name in names and unit and units.get(name, unit) != unit:
            raise FormatProblem(f"{printable(name)}: expected the unit {units[name]} as in training, found {unit}.")
        columns_of |= {name: column, column: column}
    if missing := [name for name in names if name not in columns_of]:
        raise FormatProblem(
            f"expected the columns {', '.join(names)}, found no {', '.join(missing)}. "
            f"There are: {', '.join(map(printable, list(map(str, table.cells))[:10]))}."
        )
    chosen = [columns_of[name] for name in names]
    rows = _rows(images, table, chosen)
    inputs = np.empty((len(images), len(names)))
    for place, column in enumerate(chosen):
        inputs[:, place] = table.numbers(column)[0][rows]
        if not np.isfinite(inputs[:, place]).all():
            row = rows[np.flatnonzero(~np.isfinite(inputs[:, place]))[0]]
            raise FormatProblem(
                f"{table.lines[row]}: {printable(column)}: expected a number, found "
                f"{str(table.cells[column][row]).strip()!r:.40}."
            )
    return inputs


def _table(path: Path, count: int) -> Table:
    file, key = arrays.parted(str(path))
    folder, reference = Path(file).parent, f"{Path(file).name}:{key}" if key else Path(file).name
    if Path(file).suffix.lower() in tables.SUFFIXES:
        table = tables.read_table(folder, reference)
    else:
        table = columns.of_array(reference, arrays.read(folder, reference), count)
    if table.ambiguous:
        raise FormatProblem(f"are the commas in {table.ambiguous} decimal commas? Write decimal points.")
    return table


def _rows(images: Sequence[str], table: Table, inputs: Sequence[str]) -> np.ndarray:
    """Return the row of every image."""
    beside = [column for column in map(str, table.cells) if column not in inputs]
    unique = list(dict.fromkeys(images))
    pairs = pairing.by_name(unique, replace(table, cells=table.cells[beside]))
    if pairs is None and any("[" in image for image in images) and len(table.cells) == len(images):
        return np.arange(len(images))  # an array of images
    rows = dict(zip(unique, pairs.rows.tolist(), strict=True)) if pairs else {}
    if repeated := [image for image in rows if pairs and pairing.names_of(image) & set(pairs.twice)]:
        raise FormatProblem(f"expected one row for {printable(repeated[0])}, found several.")
    if lonely := [image for image in unique if rows.get(image, -1) < 0]:
        more = f" and {len(lonely) - 5} more" if len(lonely) > 5 else ""
        raise FormatProblem(
            f"expected a column that names the images, found no row for {', '.join(map(printable, lonely[:5]))}{more}."
        )
    return np.array([rows[image] for image in images])
