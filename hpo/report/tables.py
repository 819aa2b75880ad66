"""One record for every table that people read, and its forms: terminal, Markdown, HTML, CSV and JSON.

Texts that people chose (names of files, descriptions, parameters) are escaped here, for each of these forms.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import IO, Any

import jinja2
import pandas
from markupsafe import Markup
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table as Drawn
from rich.text import Text

from hpo.text import for_csv, for_markdown, visible

PAGE = 30  # rows of a table that a page shows; files have all
LOW, HIGH = " 95 % low", " 95 % high"  # behind a column's name: the ends of its interval


def value_text(value: Any, places: str = ".4g") -> str:
    """Return a value as a page shows it: integers in thousands, floats with so many digits, a dash for none."""
    if value is None or value is pandas.NA or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    whole = isinstance(value, int) or (places == ".4g" and value == int(value) and abs(value) >= 1000)
    return f"{value:,.0f}" if whole else f"{value:{places}}"


def r2_text(value: Any) -> str:
    """Return R² with four decimals."""
    return value_text(value, ".4f")


def cell_text(value: Any) -> str:
    """Return a value as it is; nothing for None."""
    return "" if value is None else str(value)


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: its name, under which rows have its values, and how these are written."""

    name: str
    label: str = ""  # the head, if it is not the name
    unit: str = ""  # behind the name in the head
    left: bool = False  # aligned to the left, as words are; numbers are aligned to the right
    text: Callable[[Any], str] = value_text  # of a value that is no text
    interval: bool = False  # rows have the ends of a 95 % interval under name + LOW and name + HIGH
    folds: bool = False  # a narrow terminal may break its cells into lines
    width: int | None = None  # characters on a terminal, at least
    style: str = ""  # on a terminal

    @property
    def head(self) -> str:
        return f"{self.label or self.name} {self.unit}".strip()

    def cell(self, values: Mapping[str, Any]) -> str:
        """Return the text of the column's value, with the interval in brackets in a second line."""
        value = values.get(self.name)
        text = value if isinstance(value, str) else self.text(value)
        ends = [self.text(values.get(self.name + end)) for end in (LOW, HIGH)] if self.interval else ["–"]
        return text if "–" in (text, *ends) else f"{text}\n[{', '.join(ends)}]"


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

    @property
    def left_out(self) -> int:
        """How many rows a page does not show."""
        return max(0, len(self.rows) - self.limit)

    def cells(self) -> Iterator[list[str]]:
        """Yield the rows as text."""
        for row in self.rows:
            yield [column.cell(row.values) for column in self.columns]


def of_records(
    records: Sequence[Mapping[str, Any]],
    *,
    title: str,
    name: str,
    note: str = "",
    keys: Sequence[str] = (),
    text: Callable[[Any], str] = value_text,
    limit: int = PAGE,
) -> Table:
    """Return a table of flat dictionaries: a column for each of `keys`, or for each key in order of appearance.

    Keys that end with LOW and HIGH are the interval of the column before them. R² has four decimals, everything else
    the form of `text`.
    """
    keys = keys or list(dict.fromkeys(key for record in records for key in record))
    columns = [
        Column(
            name=key,
            left=key == keys[0],
            text=r2_text if key.startswith("R²") else text,
            interval=key + LOW in keys,
        )
        for key in keys
        if not key.endswith((LOW, HIGH))
    ]
    rows = [Row(values=record) for record in records]
    return Table(title=title, columns=columns, rows=rows, name=name, note=note, limit=limit)


def of_lines(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """Return a table of texts under `heads` (two may be the same), aligned to the right."""
    columns = [Column(name=str(index), label=head) for index, head in enumerate(heads)]
    return Table(
        title=title,
        columns=columns,
        rows=[Row(values=dict(zip(map(str, range(len(heads))), line, strict=True))) for line in lines],
    )


# Terminal


class Plain(Console):
    """A console that prints text as it is: without markup, and without characters that command the terminal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)


def console(*, file: IO[str] | None = None) -> Console:
    """Return the console of standard output, or of a file; a pipe or file has 120 columns."""
    file = file or getattr(sys.stdout, "plain", None)
    plain = Plain(file=file)
    return plain if plain.is_terminal else Plain(file=file, width=120)


def print_table(console: Console, table: Table) -> None:
    """Print a table. On a terminal only columns that fold are made narrower (`| less -S`); in a pipe or file each row
    is one line."""
    drawn = Drawn(title=table.title, title_justify="left")
    for column in table.columns:
        drawn.add_column(
            column.head,
            justify="left" if column.left else "right",
            header_style=column.style,
            style=column.style,
            overflow="fold" if column.folds else "ellipsis",
            min_width=column.width,
        )
    for row, cells in zip(table.rows, table.cells(), strict=True):
        if row.rule:
            drawn.add_section()
        drawn.add_row(*cells, style=row.style)
    unlimited = console.options.update(width=100_000)
    narrow = console.is_terminal and console.measure(drawn, options=unlimited).maximum > console.width
    for column, drawn_column in zip(table.columns, drawn.columns, strict=True):
        if not column.folds:
            if narrow:  # rich gives a head of several words more room than there is, and cuts the row
                drawn_column.header = column.head.replace(" ", "\n")
            widths = [console.measure(cell).maximum for cell in (*drawn_column.cells, drawn_column.header)]
            drawn_column.min_width = max(widths)
    width, measured = console.width, console.measure(drawn, options=unlimited)
    try:
        console.width = max(width, measured.minimum if console.is_terminal else measured.maximum)
        console.print(drawn)
    finally:
        console.width = width


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
    """Return the HTML of a table's first rows; its class is "words" if all columns are aligned to the left."""

    def line(tag: str, texts: Sequence[str]) -> Markup:
        return Markup("<tr>{}</tr>").format(
            Markup("").join(Markup(f"<{tag}>{{}}</{tag}>").format(text) for text in texts)
        )

    kind = Markup(' class="words"') if all(column.left for column in table.columns) else ""
    head = line("th", [column.head for column in table.columns])
    body = Markup("\n").join(line("td", cells) for cells in list(table.cells())[: table.limit])
    return Markup("<table{}>\n<thead>{}</thead>\n<tbody>\n{}\n</tbody>\n</table>").format(kind, head, body)


def markdown(table: Table) -> str:
    """Return the Markdown of a table's first rows."""
    lines = [[column.head for column in table.columns], *list(table.cells())[: table.limit]]
    head, *body = ["| " + " | ".join(map(for_markdown, cells)) + " |" for cells in lines]
    return "\n".join([head, "|" + "---|" * len(table.columns), *body])


# Files


def frame(table: Table) -> pandas.DataFrame:
    """Return all rows in full, the ends of intervals as columns; whole numbers stay such where others are missing."""
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


def csv(full: pandas.DataFrame) -> str:
    """Return a frame as CSV, in which no text is a formula of a spreadsheet."""
    return str(for_csv(full).to_csv(index=False))


def records(full: pandas.DataFrame) -> str:
    """Return a frame as a JSON list of objects; a number that is undefined is null."""
    rows = [{name: _plain(value) for name, value in row.items()} for row in full.to_dict("records")]
    return json.dumps(rows, indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    """Return a value as JSON takes it."""
    if value is pandas.NA:
        return None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value.item() if hasattr(value, "item") else value
