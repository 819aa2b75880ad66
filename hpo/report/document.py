"""A document of tables and figures as one HTML page, Markdown, and CSV and JSON of every table.

Frames hold full numbers; only the pages round them.
"""

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pandas

from data_pipeline.dataset import write_atomically
from hpo import files as sums
from hpo.errors import ReportError
from hpo.report.answers import Answer
from hpo.text import for_csv, for_markdown, number_text, visible

SUMS = "report.sha256"  # which files of a folder are a report's
SHOWN = 30  # rows of a table that the page shows; files have all
LOW, HIGH = " 95 % low", " 95 % high"  # columns of an interval, behind the name of the score


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with a name for its files."""

    name: str
    title: str
    frame: pandas.DataFrame
    note: str = ""
    shown: int = SHOWN
    plain: bool = False  # numbers in full, as settings are

    @cached_property
    def values(self) -> pandas.DataFrame:
        """The frame, whole numbers as such though others of their column are missing."""
        found = self.frame.copy()
        for name in found.columns:
            known = found[name].dropna()
            if known.dtype.kind == "f" and len(known) < len(found) and (known == known.round()).all():
                found[name] = found[name].astype("Int64")
        return found

    @property
    def columns(self) -> list[str]:
        return [name for name in map(str, self.frame.columns) if not name.endswith((LOW, HIGH))]

    def cells(self) -> Iterator[list[str]]:
        """The rows as the page shows them: rounded, intervals in brackets below their score."""
        for row in self.values.head(self.shown).to_dict("records"):
            yield [self._cell(row, name) for name in self.columns]

    def _cell(self, row: Mapping[Any, Any], name: str) -> str:
        if self.plain:
            return number_text(row[name])
        text = shown(row[name], name)
        if name + LOW in row and text != "–":
            ends = [shown(row[name + end], name) for end in (LOW, HIGH)]
            text += f"\n[{', '.join(ends)}]" if "–" not in ends else ""
        return text

    @property
    def left_out(self) -> int:
        return max(0, len(self.frame) - self.shown)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure with a name for its file."""

    name: str
    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Document:
    """A whole report."""

    title: str
    summary: list[str]
    alarms: list[str]
    answers: list[Answer]
    sections: list[Section]

    @property
    def tables(self) -> list[Table]:
        asked = pandas.DataFrame([each.__dict__ for each in self.answers])
        first = Table(name="answers", title="The source study's questions and claims", frame=asked)
        return [first, *(table for section in self.sections for table in section.tables)]

    @property
    def pictures(self) -> list[Picture]:
        return [picture for section in self.sections for picture in section.pictures]


def write(document: Document, folder: Path) -> list[Path]:
    """Write report.html, report.md, tables/*.csv and *.json, figures/*.svg; return their paths.

    report.sha256 lists them. What an earlier report listed and nobody changed is replaced or, if it is not of this
    report, removed; everything else stays. Who writes into the folder meanwhile is waited for. ReportError, with
    nothing changed, if a file of others has a name of ours.
    """
    files = {"report.html": _rendered("report.html.j2", document), "report.md": _rendered("report.md.j2", document)}
    for table in document.tables:
        files[f"tables/{table.name}.csv"] = for_csv(table.values).to_csv(index=False)
        records = [{name: _plain(value) for name, value in row.items()} for row in table.values.to_dict("records")]
        files[f"tables/{table.name}.json"] = json.dumps(records, indent=1, allow_nan=False)
    files |= {f"figures/{picture.name}.svg": picture.svg for picture in document.pictures}
    contents = {name: text.encode() for name, text in files.items()}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    with _alone_in(folder):
        listed = sums.listed(folder / SUMS)
        if foreign := [name for name in (*files, SUMS) if not _is_ours(folder, name, listed)]:
            raise ReportError(_refusal(folder, foreign))
        for name in ("tables", "figures"):
            (folder / name).mkdir(exist_ok=True)
        sums.write(folder / SUMS, hashes, listed)  # both, in case this is interrupted
        for name, content in contents.items():
            write_atomically(folder / name, content)
        for stale in listed.keys() - files.keys():
            if _is_ours(folder, stale, listed):
                (folder / stale).unlink(missing_ok=True)
        sums.write(folder / SUMS, hashes)
    return [folder / name for name in files]


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Make the folder, and hold its lock, which ends with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _refusal(folder: Path, foreign: list[str]) -> str:
    if not os.path.lexists(folder / SUMS):
        return (
            f"{folder} has files with names of a report ({len(foreign)}, such as {foreign[0]}), but no {SUMS}: it was "
            "made by an earlier hpo, or is no report. Nothing was changed: move the folder away, or name another."
        )
    more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
    return (
        f"{folder / foreign[0]}{more} is not as an earlier report left it: nothing was changed. Name another folder, "
        "or move it away."
    )


def _is_ours(folder: Path, name: str, listed: Mapping[str, set[str]]) -> bool:
    """Whether a file is missing, or as the list says."""
    file = folder / name
    if not os.path.lexists(file):
        return True
    if file.is_symlink() or not file.is_file():
        return False
    if name == SUMS:
        return "report.html" in listed
    return hashlib.sha256(file.read_bytes()).hexdigest() in listed.get(name, ())


def shown(value: Any, column: str = "") -> str:
    """A value as people read it: whole numbers in thousands, scores in four digits, nothing as a dash."""
    if value is None or value is pandas.NA or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if column.startswith("R²"):
        return f"{value:.4f}"
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 1000 else f"{value:.4g}"


# Rendering


def _rendered(template: str, document: Document) -> str:
    environment = jinja2.Environment(
        autoescape=template.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["as_text"] = for_markdown
    text = (resources.files("hpo.report") / template).read_text(encoding="utf-8")
    return visible(environment.from_string(text).render(document=document))


def _plain(value: Any) -> Any:
    """A value as JSON takes it."""
    if value is pandas.NA:
        return None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value.item() if hasattr(value, "item") else value
