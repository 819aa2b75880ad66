"""One record for every table that people read, and its forms: terminal, Markdown, HTML, CSV and JSON.

Texts that people chose (names of files, descriptions, parameters) are escaped here, for each of these forms. Here the
numbers of a column get their digits, too: the same for all of them.
"""

import io
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import IO, TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup
from rich.box import HEAVY_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table as Drawn
from rich.text import Text

from hpo.text import for_csv, for_markdown, number_text, visible

if TYPE_CHECKING:
    import pandas

PAGE = 30  # rows of a table that a page shows; files have all
LOW, HIGH = " 95 % low", " 95 % high"  # behind a column's name: the ends of its interval
NONE = "–"  # of a number that is undefined
DIGITS = 4  # of the middle number of a column
MOST = 7  # decimals
SHEET, LETTER, PADDING = 530.0, 4.1, 7.0  # points: a sheet's width (A4), a digit's in print, that beside a cell
CUT, TEXT = 10, 20  # characters that a text which may be cut, and another one, get at least if they have them


def numbers_text(values: Sequence[Any], name: str = "") -> list[str]:
    """Return the values of a column as text: whole numbers in thousands, all others with the same decimals.

    The middle one has DIGITS digits; R², by the column's name, has four decimals. Texts stay; there is a dash for None
    and for a number that is not finite.
    """
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    sizes = [abs(value) for value in numbers if math.isfinite(value) and value]
    is_whole = all(size == int(size) for size in sizes)
    middle = statistics.median(sizes) if sizes and not is_whole else 10.0**DIGITS
    decimals = min(MOST, max(0, DIGITS - 1 - math.floor(math.log10(middle))))
    if name.startswith("R²"):
        decimals = 4

    def text(value: Any) -> str:
        if _is_missing(value) or (isinstance(value, float) and not math.isfinite(value)):
            return NONE
        return str(value) if isinstance(value, (bool, str)) else f"{value:,.{decimals}f}"

    return [text(value) for value in values]


def cell_text(value: Any) -> str:
    """Return a value as people write it; nothing for None."""
    return "" if value is None else number_text(value)


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: its name, under which rows have its values, and how these are written."""

    name: str
    label: str = ""  # the head, if it is not the name
    unit: str = ""  # behind the name in the head
    left: bool = False  # aligned to the left, as words are; numbers are aligned to the right
    text: Callable[[Any], str] | None = None  # of a value that is no text; without one see numbers_text
    interval: bool = False  # rows have the ends of a 95 % interval under name + LOW and name + HIGH
    cuts: bool = False  # a narrow terminal may cut its texts
    spare: bool = False  # a narrow terminal may leave it out
    in_title: bool = False  # behind the title of a row that is printed as a list
    style: str = ""  # on a terminal

    @property
    def head(self) -> str:
        return f"{self.label or self.name} {self.unit}".strip()

    def cells(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return the texts of the column's values, with the interval in brackets in a second line."""
        names = (self.name, self.name + LOW, self.name + HIGH) if self.interval else (self.name,)
        values = [row.get(name) for row in rows for name in names]
        if self.text is not None:
            texts = [value if isinstance(value, str) else self.text(value) for value in values]
        else:
            texts = numbers_text(values, self.name)
        if not self.interval:
            return texts
        triples = zip(texts[::3], texts[1::3], texts[2::3], strict=True)
        return [value if NONE in (value, low, high) else f"{value}\n[{low}, {high}]" for value, low, high in triples]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a table: plain values by the names of their columns; a value may be missing."""

    values: Mapping[str, Any]
    style: str = ""  # on a terminal
    rule: bool = False  # a line is drawn above it on a terminal


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table for people, and for programs under `name`."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    name: str = ""  # of its files
    note: str = ""
    limit: int = PAGE  # rows on a page
    leading: int = 1  # columns that say what a row is

    @property
    def left_out(self) -> int:
        """How many rows a page does not show."""
        return max(0, len(self.rows) - self.limit)

    def cells(self, limit: int | None = None) -> list[tuple[str, ...]]:
        """Return the rows as text, the first `limit` of them."""
        values = [row.values for row in self.rows[:limit]]
        return list(zip(*(column.cells(values) for column in self.columns), strict=True))


def of_records(
    records: Sequence[Mapping[str, Any]],
    *,
    title: str,
    name: str = "",
    note: str = "",
    keys: Sequence[str] = (),
    texts: Mapping[str, Callable[[Any], str]] | None = None,
    left: Sequence[str] = (),
    limit: int = PAGE,
    leading: int = 1,
) -> Table:
    """Return a table of flat dictionaries: a column for each of `keys`, or for each key in order of appearance.

    Keys that end with LOW and HIGH are the interval of the column before them. `texts`: how the values of a column are
    written, by its key. `left`: keys of words, as the first one is.
    """
    keys = keys or list(dict.fromkeys(key for record in records for key in record))
    columns = [
        Column(name=key, left=key in (keys[0], *left), text=(texts or {}).get(key), interval=key + LOW in keys)
        for key in keys
        if not key.endswith((LOW, HIGH))
    ]
    rows = [Row(values=record) for record in records]
    return Table(title=title, columns=columns, rows=rows, name=name, note=note, limit=limit, leading=leading)


def uncut(table: Table) -> Table:
    """Return a table of which a narrow terminal cuts no text."""
    return replace(table, columns=[replace(column, cuts=False) for column in table.columns])


# Terminal


class Plain(Console):
    """A console that prints text as it is: without markup, and without characters that command the terminal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, force_jupyter=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)


def console() -> Console:
    """Return the console of standard output; a pipe or file has 120 columns."""
    file = getattr(sys.stdout, "plain", None)
    plain = Plain(file=file)
    return plain if plain.is_terminal else Plain(file=file, width=120)


def plain_console(file: IO[str], *, width: int, is_screen: bool) -> Console:
    """Return a console that writes text alone to `file`, whatever the environment says of colours; for a screen,
    tables are broken to its width."""
    return Plain(file=file, width=width, force_terminal=is_screen, color_system=None)


def print_table(console: Console, table: Table) -> None:
    """Print a table. In a pipe or file each row is one line. A terminal breaks lines between words; if it is too narrow
    for that, the table has no lines between its columns, then no spare columns, then each row is a list."""
    cells = [[visible(cell) for cell in row] for row in table.cells()]
    columns = [[visible(column.head), *(row[index] for row in cells)] for index, column in enumerate(table.columns)]
    kept, room = list(range(len(columns))), console.width if console.is_terminal else 100_000
    spare = [index for index in kept if table.columns[index].spare]
    widths = _widths(table, columns, kept, room - 3 * len(kept) - 1)
    has_lines = widths is not None
    while widths is None and (widths := _widths(table, columns, kept, room - 2 * (len(kept) - 1))) is None and spare:
        kept.remove(spare.pop())
    if widths is None:
        _print_lists(console, table, cells)
        return
    drawn = Drawn(title=table.title, title_justify="left", box=HEAVY_HEAD if has_lines else None)
    if not has_lines:
        drawn.padding, drawn.pad_edge, drawn.header_style = (0, 2, 0, 0), False, "bold underline"
    for index, width in zip(kept, widths, strict=True):
        column = table.columns[index]
        head = _broken(columns[index][0], width)
        drawn.add_column(head, style=column.style, width=width, no_wrap=column.cuts)
        drawn.columns[-1].justify = "left" if column.left else "right"
        drawn.columns[-1].overflow = "ellipsis" if column.cuts else "fold"
    for row, line in zip(table.rows, cells, strict=True):
        if row.rule:
            drawn.add_section()
        drawn.add_row(*(line[index] for index in kept), style=row.style)
    width = console.width
    try:
        console.width = max(width, sum(widths) + 3 * len(widths) + 1) if has_lines else width  # a pipe's rows are whole
        console.print(drawn)
    finally:
        console.width = width


def _widths(table: Table, columns: Sequence[Sequence[str]], kept: Sequence[int], room: int) -> list[int] | None:
    """Return the widths of the columns `kept` (each its head and cells), together at most `room` characters; None if
    words or numbers would be cut."""
    least, whole, with_heads = [], [], []
    for index in kept:
        column, (head, *cells) = table.columns[index], columns[index]
        widest = _longest(cells, str.splitlines)
        need = widest
        if column.left:
            need = min(widest, CUT) if column.cuts else max(_longest(cells, str.split), min(widest, TEXT))
        least.append(max(need, _longest([head.replace("_", "_ ")], str.split)))
        whole.append(max(widest, least[-1]))
        with_heads.append(max(whole[-1], cell_len(head)))
    spare = room - sum(least)
    if spare < 0:
        return None
    widths = least
    for wanted in (with_heads, whole) if sum(with_heads) <= room else (whole, with_heads):  # numbers before heads
        for index in sorted(range(len(widths)), key=lambda index: wanted[index] - widths[index]):
            more = min(spare, max(0, wanted[index] - widths[index]))
            widths[index] += more
            spare -= more
    return widths


def _longest(texts: Sequence[str], parts: Callable[[str], list[str]]) -> int:
    return max((cell_len(part) for text in texts for part in parts(text)), default=0)


def _broken(head: str, width: int) -> str:
    """Return a head in lines of at most `width` characters, broken behind spaces and underscores."""
    lines = [""]
    for part in re.split(r"(?<=[ _])", head):
        if cell_len(lines[-1] + part.rstrip()) <= width:
            lines[-1] += part
        else:
            lines.append(part)
    return "\n".join(line.rstrip() for line in lines).lstrip("\n")


def _print_lists(console: Console, table: Table, cells: Sequence[Sequence[str]]) -> None:
    """Print each row as a list of its values, the first one as its title."""
    console.print(Text(table.title, style="italic"))
    for row, line in zip(table.rows, cells, strict=True):
        behind = [cell for column, cell in zip(table.columns, line, strict=True) if column.in_title]
        console.print(Text(" ".join([table.columns[0].head, line[0], *behind]).strip(), style=row.style or "bold"))
        listed = Drawn.grid(padding=(0, 2, 0, 0))
        listed.add_column(overflow="fold")
        listed.add_column(overflow="fold", ratio=1)
        for column, cell in zip(table.columns[1:], line[1:], strict=True):
            if cell and not column.in_title:
                listed.add_row(f"  {column.head}", cell.replace("\n", " ").rstrip())
        console.print(listed)


def text(*printed: Table) -> str:
    """Return tables as a text file has them."""
    with io.StringIO() as file:
        for table in printed:
            print_table(plain_console(file, width=120, is_screen=False), table)
        return file.getvalue()


# Pages


def page(template: str, **values: Any) -> str:
    """Return a template of this package, filled in: `.html.j2` or `.md.j2`, in which every text is escaped."""
    environment = jinja2.Environment(
        autoescape=template.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"as_text": for_markdown, "as_html": html, "as_markdown": markdown}
    text = (resources.files("hpo.report") / template).read_text(encoding="utf-8")
    return visible(environment.from_string(text).render(**values))


def html(table: Table) -> Markup:
    """Return the HTML of a table's first rows; one that is wider than a sheet of paper is several tables below each
    other, all of which begin with its leading columns."""
    cells = table.cells(table.limit)
    texts = [[column.head, *(row[index] for row in cells)] for index, column in enumerate(table.columns)]
    widths = [_points(column, own) for column, own in zip(table.columns, texts, strict=True)]
    leading = list(range(min(table.leading, len(table.columns))))  # a table without rows may lack them
    room = SHEET - sum(widths[: table.leading])
    parts: list[list[int]] = [[]]
    for index in range(table.leading, len(widths)):
        if parts[-1] and sum(widths[own] for own in parts[-1]) + widths[index] > room:
            parts.append([])
        parts[-1].append(index)
    return Markup("\n").join(_grid(table, cells, [*leading, *part]) for part in parts)


def _points(column: Column, texts: Sequence[str]) -> float:
    """Return the width that a column takes in print, in points; heads and texts are broken between words."""
    head, *cells = texts
    least = _longest([head.replace("_", "_ "), *cells], str.split)
    width = max(least, min(TEXT, _longest(cells, str.splitlines))) if column.left else _longest(cells, str.splitlines)
    return LETTER * max(least, width) + PADDING


def _grid(table: Table, cells: Sequence[Sequence[str]], kept: Sequence[int]) -> Markup:
    """Return the HTML of the columns `kept`."""

    def line(tag: str, texts: Sequence[Any]) -> Markup:
        kinds = [Markup(' class="text"') if table.columns[index].left else "" for index in kept]
        inner = (Markup("<{0}{1}>{2}</{0}>").format(tag, kind, text) for kind, text in zip(kinds, texts, strict=True))
        return Markup("<tr>{}</tr>").format(Markup("").join(inner))

    heads = [Markup("_<wbr>").join(table.columns[index].head.split("_")) for index in kept]
    body = Markup("\n").join(line("td", [row[index] for index in kept]) for row in cells)
    return Markup("<table>\n<thead>{}</thead>\n<tbody>\n{}\n</tbody>\n</table>").format(line("th", heads), body)


def markdown(table: Table) -> str:
    """Return the Markdown of a table's first rows."""
    lines = [[column.head for column in table.columns], *table.cells(table.limit)]
    head, *body = ["| " + " | ".join(map(for_markdown, cells)) + " |" for cells in lines]
    return "\n".join([head, "|" + "---|" * len(table.columns), *body])


# Files


def frame(table: Table) -> "pandas.DataFrame":
    """Return all rows in full, the ends of intervals as columns; whole numbers stay such where others are missing."""
    import pandas

    names = [
        name
        for column in table.columns
        for name in ((column.name, column.name + LOW, column.name + HIGH) if column.interval else (column.name,))
    ]
    full = pandas.DataFrame([row.values for row in table.rows], columns=names)
    for name in names:
        present = full[name].dropna()
        if present.dtype.kind == "f" and len(present) < len(full) and (present == present.round()).all():
            full[name] = full[name].astype("Int64")
    return full


def csv(full: "pandas.DataFrame") -> str:
    """Return a frame as CSV, in which no text is a formula of a spreadsheet."""
    return str(for_csv(full).to_csv(index=False))


def records(full: "pandas.DataFrame") -> str:
    """Return a frame as a JSON list of objects; a number that is undefined is null."""
    return json.dumps(plain(full.to_dict("records")), indent=1, allow_nan=False)


def plain(value: Any) -> Any:
    """Return a value as JSON takes it: None for a number that is undefined."""
    if isinstance(value, dict):
        return {name: plain(member) for name, member in value.items()}
    if isinstance(value, list):
        return [plain(member) for member in value]
    if _is_missing(value):
        return None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value.item() if hasattr(value, "item") else value


def _is_missing(value: Any) -> bool:
    """Whether a value is None or pandas.NA, told by its name: pandas takes a third of a second to import."""
    return value is None or type(value).__name__ == "NAType"
