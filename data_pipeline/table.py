"""The label table: one strict grammar, and a message for every kind of violation.

UTF-8 (a byte-order mark is allowed), no header, one row a line, ten plain decimal numbers separated by commas (an
exponent is allowed: 6.9e-08): the row's index, then the nine components. The indices are 1..n or 0..n-1, in order.
"""

import re
from math import isfinite
from pathlib import Path

import numpy as np

from data_pipeline.components import COMPONENTS

COLUMNS = 1 + len(COMPONENTS)
LARGEST = 64 * 2**20  # bytes; 520 rows have about 100 kB
MOST_ROWS = 100_000  # a row costs 20 µs and, if all its numbers are kept, 500 bytes
LARGEST_LABEL = 1e30  # networks compute in single precision, which ends at 3.4e38
LONGEST_LINE = 4096  # characters; ten numbers have some 200

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity|#n/a|n/a|na|null|none)", re.IGNORECASE)
_SHAPE = f"expected {COLUMNS} numbers separated by commas (row index and nine components)"


def read_table(path: Path) -> tuple[np.ndarray, list[str]]:
    """Return the components (rows, 9) as float64 and all problems of the file; the rows are valid if there are none."""
    name = path.name
    nothing = np.empty((0, len(COMPONENTS)))
    try:
        size = path.stat().st_size
        if size > LARGEST:
            return nothing, [f"{name}: expected at most {LARGEST // 2**20} MiB, found {size / 2**20:.0f} MiB."]
        content = path.read_bytes().rstrip()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return nothing, [
            f"{name}: expected UTF-8 text, found the byte 0x{error.object[error.start]:02x} at position {error.start}. "
            "Save the table as CSV in UTF-8."
        ]
    except OSError as error:
        return nothing, [f"{name}: cannot be read ({error.strerror}). Check the file and its permissions."]
    if not text:
        return nothing, [f"{name}: is empty; {_SHAPE} in each line."]
    if (zero := text.find("\0")) >= 0:  # UTF-16 without its mark, or a file whose end never reached the disk
        return nothing, [f"{name}: expected text, found a zero byte at position {zero}. Save it again as CSV in UTF-8."]
    if (count := text.count("\n") + 1) > MOST_ROWS:
        return nothing, [f"{name}: expected at most {MOST_ROWS} rows, found {count} lines. Use a part of the data."]
    lines = [line.removesuffix("\r") for line in text.split("\n")]

    rows: list[list[float]] = []
    problems: list[str] = []
    seen: dict[float, int] = {}  # index -> its line
    previous: float | None = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            problems.append(f"{name} line {number}: {_SHAPE}, found an empty line. Delete the line.")
            continue
        if number == 1 and is_header(line[:LONGEST_LINE]):
            problems.append(f"{name} line 1: {_SHAPE}, found a header ({_shown(line)}). Delete it; the table has none.")
            continue
        values, problem = _row(line)
        if values is not None:
            problem = _index_problem(values[0], previous, seen, number)
            seen.setdefault(values[0], number)
            previous = values[0]
            rows.append(values[1:])
        else:
            previous = None  # the next index cannot be compared with it
            rows.append(
                [0.0] * len(COMPONENTS)
            )  # the row still counts, otherwise every later image would be a problem as well
        if problem:
            problems.append(f"{name} line {number}: {problem}")
    return np.array(rows, dtype=np.float64), problems


def is_header(line: str) -> bool:
    """Return whether most fields are words: neither numbers nor marks of missing numbers."""
    fields = [field.strip(" \t\"'") for field in re.split("[,;\t]", line)]
    words = [field for field in fields if re.match("[^0-9+.-]", field) and not _NOT_FINITE.fullmatch(field)]
    return 2 * len(words) > len(fields)


def _row(line: str) -> tuple[list[float] | None, str]:
    """Return the numbers of a line, or None and what is wrong with it."""
    if len(line) > LONGEST_LINE:  # millions of fields are a gigabyte
        return None, f"{_SHAPE}, found a line of {len(line)} characters."
    fields = [field.strip(" \t") for field in line.split(",")]
    if ";" in line:
        decimal = " and decimal commas" if re.search(r"[0-9],[0-9]", line) else ""
        return None, f"{_SHAPE}, found semicolons{decimal}. Export with commas between numbers and decimal points."
    if "\t" in line.strip() and len(fields) == 1:
        return None, f"{_SHAPE}, found tabs. Export with commas between numbers."
    if len(fields) in (2 * COLUMNS - 1, 2 * COLUMNS):
        return None, f"{_SHAPE}, found {len(fields)}: decimal commas? Export with decimal points."
    if len(fields) != COLUMNS:
        return None, f"{_SHAPE}, found {len(fields)}."
    values = []
    for column, field in enumerate(fields, start=1):
        what = "index" if column == 1 else COMPONENTS[column - 2]
        if not field:
            return None, f"column {column} ({what}): expected a number, found nothing."
        if _NOT_FINITE.fullmatch(field):
            return (
                None,
                f"column {column} ({what}): expected a finite number, found {_shown(field)}. Compute the label again.",
            )
        if not _NUMBER.fullmatch(field):
            return (
                None,
                f"column {column} ({what}): expected a plain decimal number such as 6.91e-08, found {_shown(field)}.",
            )
        value = float(field)
        if not isfinite(value):
            return None, f"column {column} ({what}): expected a finite number, found {_shown(field)}, which overflows."
        if abs(value) > LARGEST_LABEL and column > 1:
            return None, (
                f"column {column} ({what}): expected a number of at most {LARGEST_LABEL:.0e}, because networks compute "
                f"in single precision, found {_shown(field)}. Use a larger unit."
            )
        values.append(value)
    return values, ""


def _index_problem(index: float, previous: float | None, seen: dict[float, int], line: int) -> str:
    if index in seen:
        return f"column 1 (index): {index:g} occurs twice, first in line {seen[index]}. Each row has its own index."
    if index != int(index) or index < 0:
        return f"column 1 (index): expected a whole number from 0 or 1 on, found {index!r}."
    if line == 1 and index not in (0, 1):
        return f"column 1 (index): expected 1 (or 0) in the first row, found {index:.0f}. Is the beginning missing?"
    if previous is not None and index != previous + 1:
        return (
            f"column 1 (index): expected {previous + 1:.0f} after {previous:.0f}, found {index:.0f}. "
            "Sort the rows, and add what is missing."
        )
    return ""


def _shown(text: str) -> str:
    """Return the text for a message: quoted, escaped, and short."""
    return repr(text if len(text) <= 40 else text[:37] + "...")
