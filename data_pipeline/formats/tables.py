"""Tables of any format as columns of cells: the separator, decimal mark, encoding and header of a text are guessed."""

import csv
import io
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data_pipeline.formats.arrays import parted
from data_pipeline.formats.limits import FormatProblem, check_array, check_file, check_zip, library
from data_pipeline.table import MOST_ROWS

LARGEST = 64 * 2**20  # bytes; 100,000 rows of 60 numbers
MOST_COLUMNS = 1000
LONGEST_LINE = 2**16  # characters
SUFFIXES = (".csv", ".tsv", ".txt", ".xlsx", ".parquet")
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas", r"\s+": "blanks"}

_SAMPLE = 50  # lines from which the separator is told
_MISSING = {"", "na", "n/a", "#n/a", "nan", "null", "none", "-", "?"}
_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_WITH_COMMA = re.compile(r"[+-]?[0-9.]*,[0-9,]*[0-9](?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?")
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")
_BOMS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of cells under names, and what was found out about the file."""

    cells: pd.DataFrame  # texts, or numbers where the file has them as such; no empty rows or columns
    lines: tuple[str, ...]  # where each row stands, as "labels.csv line 3"
    decimal: str = "."
    has_header: bool = True
    ambiguous: str = ""  # an example, if commas may be decimal ones or stand between thousands
    remarks: tuple[str, ...] = ()

    def numbers(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a column as float64, NaN where there is none, and a mask of the cells that hold something else."""
        cells = self.cells[column]
        if pd.api.types.is_numeric_dtype(cells):
            numbers = cells.to_numpy(dtype=np.float64, na_value=np.nan)
            return numbers, np.isinf(numbers)
        texts = cells.astype(str).str.strip()
        missing = texts.str.lower().isin(_MISSING)
        texts = texts.str.replace(".", "").str.replace(",", ".") if self.decimal == "," else texts.str.replace(",", "")
        valid = texts.str.fullmatch(_NUMBER)
        values = pd.to_numeric(texts.where(valid), errors="coerce").to_numpy(dtype=np.float64)
        bad = ~valid.to_numpy(dtype=bool) & ~missing.to_numpy(dtype=bool) | np.isinf(values)
        return values, bad


def read_table(folder: Path, reference: str, *, decimal: str = "") -> Table:
    """Return the table of a text, Excel or Parquet file. Raise FormatProblem.

    `decimal` is the mark of the numbers in a text, "." or ","; "" if it is to be found out.
    """
    file, sheet = parted(reference)
    path = folder / file
    try:
        if path.suffix.lower() == ".parquet":
            return _read_parquet(path, file)
        if path.suffix.lower() == ".xlsx":
            return _headed(_read_excel(path, sheet), f"{file} row", ".", ())
        return _read_text(path, file, decimal)
    except (FormatProblem, MemoryError):
        raise
    except Exception as error:  # zipfile, XML, Arrow and pandas raise a dozen kinds when a file is damaged
        raise FormatProblem(f"cannot be read as a table ({' '.join(str(error).split())[:120]}).") from None


# --- text ---


def _read_text(path: Path, file: str, decimal: str) -> Table:
    check_file(path, LARGEST)
    text, encoding = _decoded(path.read_bytes())
    check_rows(text.count("\n"))  # without the header
    lines = text.split("\n")
    longest = max(range(len(lines)), key=lambda index: len(lines[index]))
    if (length := len(lines[longest])) > LONGEST_LINE:
        raise FormatProblem(f"line {longest + 1}: expected at most {LONGEST_LINE} characters, found {length}.")
    separator = _separator([line for line in lines if line.strip()][:_SAMPLE])
    try:
        raw = pd.read_csv(
            io.StringIO(text),
            sep=separator,
            header=None,
            names=range(max(len(_fields(line, separator)) for line in lines[:_SAMPLE])),
            index_col=False,
            dtype=str,
            keep_default_na=False,
            skip_blank_lines=False,
            on_bad_lines="error",
        ).fillna("")
    except pd.errors.ParserError as error:
        raise FormatProblem(f"expected as many fields in every line ({str(error).strip()[-80:]}).") from None
    mark, ambiguous = _decimal_mark(raw, decimal)
    remarks: tuple[str, ...] = (f"{SEPARATORS[separator]} between columns",) if raw.shape[1] > 1 else ()
    remarks += ("decimal commas",) if mark == "," else ()
    remarks += (f"encoding {encoding}",) if encoding != "utf-8" else ()
    return _headed(raw, f"{file} line", mark, remarks, ambiguous)


def _decoded(content: bytes) -> tuple[str, str]:
    """Return the text, with "\\n" at the ends of its lines, and its encoding. Raise FormatProblem if it is no text."""
    encodings = [next((name for mark, name in _BOMS.items() if content.startswith(mark)), ""), "utf-8", "cp1252"]
    for encoding in filter(None, encodings):
        try:
            text = content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n").rstrip()
        except UnicodeDecodeError:
            continue
        if (zero := text.find("\0")) >= 0:
            raise FormatProblem(f"expected text, found a zero byte at position {zero}. Save it again as CSV in UTF-8.")
        if not text.strip("# \n"):
            raise FormatProblem("is empty.")
        return text.lstrip("#"), encoding.removesuffix("-sig")  # numpy writes a header behind "#"
    raise FormatProblem("expected text in UTF-8, UTF-16 or cp1252. Save the table as CSV in UTF-8.")


def _fields(line: str, separator: str) -> list[str]:
    return line.split() if separator == r"\s+" else next(csv.reader([line], delimiter=separator), [])


def _separator(lines: list[str]) -> str:
    """Return the first of SEPARATORS that cuts all the lines into as many fields; else the one that cuts most."""
    counts = {separator: [len(_fields(line, separator)) for line in lines] for separator in SEPARATORS}
    if (most := max(map(max, counts.values()))) > MOST_COLUMNS:
        raise FormatProblem(f"expected at most {MOST_COLUMNS} columns, found {most}.")
    for separator, numbers in counts.items():
        if len(set(numbers)) == 1 and numbers[0] > 1:
            return separator
    cut = {separator: sum(number > 1 for number in numbers) for separator, numbers in counts.items()}
    return max(cut, key=lambda separator: cut[separator]) if any(cut.values()) else ","


def _decimal_mark(raw: pd.DataFrame, stated: str) -> tuple[str, str]:
    """Return the decimal mark of the cells, and an example if commas can be decimal ones or stand between thousands."""
    texts = raw.to_numpy(dtype=str).ravel()
    commas = [text for text in texts[np.char.find(texts, ",") >= 0].tolist() if _WITH_COMMA.fullmatch(text.strip())]
    if stated or not commas:
        return stated or ".", ""
    if not all(_THOUSANDS.fullmatch(text.strip()) for text in commas):
        return ",", ""
    points = texts[np.char.find(texts, ".") >= 0].tolist()
    clear = any(text.count(",") > 1 for text in commas) or any(re.fullmatch(_NUMBER, text) for text in points)
    return ".", "" if clear or any("." in text for text in commas) else commas[0]


# --- Excel and Parquet ---


def _read_excel(path: Path, sheet: str) -> pd.DataFrame:
    openpyxl = library("openpyxl", "openpyxl")
    check_zip(path, LARGEST * 4).close()
    book = openpyxl.load_workbook(path, read_only=True, data_only=True, keep_links=False)
    try:
        sheets = {title: rows for title in book.sheetnames if (rows := list(_rows(book[title])))}
    finally:
        book.close()
    if (sheet and sheet not in sheets) or not sheets:
        raise FormatProblem(f"has no filled sheet {sheet}. There are: {', '.join(sheets) or 'none'}.")
    if not sheet and len(sheets) > 1:
        lines = " or ".join(f'table = "{path.name}:{title}"' for title in list(sheets)[:5])
        raise FormatProblem(f"has {len(sheets)} filled sheets. Which is the table? Add to dataset.toml: {lines}")
    return pd.DataFrame(sheets[sheet or next(iter(sheets))], dtype=object).map(_cell)


def _rows(sheet: object) -> Iterator[tuple[object, ...]]:
    """Yield the rows of a sheet. Raise FormatProblem for more than the limits: a file may claim a million of each."""
    sheet.reset_dimensions()  # type: ignore[attr-defined]  # what the file says of them may be wrong
    rows = sheet.iter_rows(max_row=MOST_ROWS + 2, values_only=True)  # type: ignore[attr-defined]
    with closing(rows):
        yield from _filled(rows)


def _filled(rows: Iterator[tuple[object, ...]]) -> Iterator[tuple[object, ...]]:
    empty = 0
    for row in rows:
        if not any(cell is not None for cell in row):
            empty += 1
            continue
        if empty and row:
            yield from [()] * empty  # so that a row keeps its number
            empty = 0
        if len(row) > MOST_COLUMNS:
            raise FormatProblem(f"expected at most {MOST_COLUMNS} columns, found more.")
        yield row


def _cell(value: object) -> str:
    return "" if value is None or value != value else str(value)


def _read_parquet(path: Path, file: str) -> Table:
    from pyarrow import parquet

    check_file(path, LARGEST * 4)
    with parquet.ParquetFile(path) as opened:
        facts = opened.metadata
        check_rows(facts.num_rows)
        if facts.num_columns > MOST_COLUMNS:
            raise FormatProblem(f"expected at most {MOST_COLUMNS} columns, found {facts.num_columns}.")
        check_array((sum(facts.row_group(index).total_byte_size for index in range(facts.num_row_groups)),), 1)
        frame = opened.read().to_pandas(ignore_metadata=True)
    frame.columns = frame.columns.astype(str)
    for name in frame.columns[[not pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes]]:
        frame[name] = frame[name].map(_cell)
    return Table(frame, tuple(f"{file} row {row}" for row in range(1, len(frame) + 1)))


# --- header ---


def _headed(raw: pd.DataFrame, where: str, decimal: str, remarks: tuple[str, ...], ambiguous: str = "") -> Table:
    """Return the table under its header, if its first row is one, without empty rows and nameless empty columns."""
    raw = raw.apply(lambda column: column.str.strip())
    raw = raw.loc[(raw != "").any(axis=1), (raw != "").any(axis=0)]
    if not len(raw):
        raise FormatProblem("is empty.")
    first, rest = raw.iloc[0], raw.iloc[1:]
    plain = Table(raw.set_axis(raw.columns.astype(str), axis=1), (), decimal)
    parsed = np.stack([plain.numbers(name)[0] for name in plain.cells.columns], axis=1)
    digits = raw.apply(lambda column: column.str.contains(r"\d")).to_numpy().any(axis=1)  # of "0.3 GPa": no number
    numbers = np.isfinite(parsed).any(axis=1)
    has_header = not numbers[0] and bool(numbers[1:].any() or (not digits[0] and digits[1:].all() and len(digits) > 1))
    if has_header:
        names = [name or f"column {index + 1}" for index, name in enumerate(first)]
        for column in [column for column, name in first.items() if not name]:  # no header, but cells
            filled = rest.index[[cell != "" for cell in rest[column]]]
            if 2 * len(filled) < len(rest) + 1:
                count = int((first != "").sum())
                raise FormatProblem(
                    f"{where.split()[-1]} {filled[0] + 1}: expected {count} fields as in the header, found more."
                )
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise FormatProblem(f"has several columns called {', '.join(repeated)}. Rename all but one.")
    else:
        rest, names = raw, [f"column {index + 1}" for index in range(raw.shape[1])]
        remarks += ("no header",)
    lines = tuple(f"{where} {index + 1}" for index in rest.index)
    return Table(rest.set_axis(names, axis=1).reset_index(drop=True), lines, decimal, has_header, ambiguous, remarks)


def check_rows(count: int) -> None:
    """Raise FormatProblem for more than MOST_ROWS rows, of whatever format."""
    if count > MOST_ROWS:
        raise FormatProblem(f"expected at most {MOST_ROWS:,} rows, found {count:,}. Use a part of the data.")


def joined(tables: list[Table]) -> Table:
    """Return the rows of all tables, which have the same columns, one below the other. Raise FormatProblem if not."""
    check_rows(sum(len(table.cells) for table in tables))
    columns = list(tables[0].cells.columns)
    for table in tables[1:]:
        if set(table.cells.columns) != set(columns) or table.decimal != tables[0].decimal:
            raise FormatProblem(f"expected the columns {', '.join(columns[:10])} in each of the tables.")
    return Table(
        pd.concat([table.cells[columns] for table in tables], ignore_index=True),
        tuple(line for table in tables for line in table.lines),
        tables[0].decimal,
        tables[0].has_header,
        next((table.ambiguous for table in tables if table.ambiguous), ""),
        tuple(dict.fromkeys(remark for table in tables for remark in table.remarks)),
    )
