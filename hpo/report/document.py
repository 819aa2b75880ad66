"""A report as files: one HTML page, Markdown, CSV and JSON of every table, SVG of every figure."""

import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from hpo import files as sums
from hpo.errors import ReportError
from hpo.files import sha256_of, write_atomically
from hpo.report import tables
from hpo.report.answers import Answer
from hpo.report.tables import Column, Row, Table

GENERATOR = '<meta name="generator" content="hpo">'  # by which a page is known
SUMS = "report.sha256"  # which files of a folder are a report's


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure with a name for its file."""

    name: str
    title: str
    svg: str


@dataclass(frozen=True, kw_only=True)
class Tile:
    """An image of a data set, or several that are to be compared, with a few lines below."""

    uris: Sequence[str]  # of the images themselves, as data:
    lines: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Images side by side; only pages have them."""

    title: str
    tiles: Sequence[Tile]


@dataclass(frozen=True, kw_only=True)
class Section:
    title: str
    text: list[str] = field(default_factory=list)
    galleries: list[Gallery] = field(default_factory=list)
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
        """All tables, that of the claims first."""
        asked = Table(
            name="answers",
            title="Claims",
            columns=[Column(name=name, left=True) for name in ("question", "answer", "because")],
            rows=[Row(values=answer.__dict__) for answer in self.answers],
            limit=len(self.answers),
        )
        return [asked, *(table for section in self.sections for table in section.tables)]

    @property
    def pictures(self) -> list[Picture]:
        return [picture for section in self.sections for picture in section.pictures]


def write(document: Document, folder: Path) -> list[Path]:
    """Write report.html, report.md, tables/*.csv and *.json, figures/*.svg; return their paths.

    report.sha256 lists them. Files that an earlier report listed and nobody has changed are replaced or, if they are
    none of this report, removed; everything else stays. Processes that write into one folder take turns. Raise
    ReportError, with nothing changed, if a file that is not of a report has one of these names.
    """
    files = {"report.html": html(document), "report.md": tables.page("report.md.j2", document=document)}
    for table in document.tables:
        full = tables.frame(table)
        files |= {f"tables/{table.name}.csv": tables.csv(full), f"tables/{table.name}.json": tables.records(full)}
    files |= {f"figures/{picture.name}.svg": picture.svg for picture in document.pictures}
    contents = {name: text.encode() for name, text in files.items()}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    with _alone_in(folder):
        listed = sums.listed(folder / SUMS)
        if foreign := [name for name in (*files, SUMS) if not _is_of_report(folder, name, listed)]:
            raise ReportError(_refusal(folder, foreign))
        for name in ("tables", "figures"):
            (folder / name).mkdir(exist_ok=True)
        sums.write(folder / SUMS, hashes, listed)  # both, in case this is interrupted
        for name, content in contents.items():
            write_atomically(folder / name, content)
        for stale in listed.keys() - files.keys():
            if _is_of_report(folder, stale, listed):
                (folder / stale).unlink(missing_ok=True)
        sums.write(folder / SUMS, hashes)
    return [folder / name for name in files]


def check_page(path: Path) -> None:
    """Raise ReportError if a page cannot be written there: an earlier one is replaced, any other file is kept."""
    if not path.parent.is_dir():
        raise ReportError(f"{path}: expected a file in a folder that exists, found no folder {path.parent}. Make it.")
    if path.suffix not in (".html", ".htm"):
        raise ReportError(f"{path}: expected the name of a page, such as page.html, found another ending.")
    if not os.access(path.parent, os.W_OK):
        raise ReportError(f"{path}: expected a folder in which files can be made, found one in which none can.")
    if path.is_dir():
        raise ReportError(f"{path}: expected the name of a file, such as page.html, found a folder. Name a file in it.")
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file() or not _is_page(path)):
        raise ReportError(f"{path} exists and is no page of hpo: nothing was changed. Name another file, or remove it.")


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(1024)


def write_page(document: Document, path: Path) -> None:
    """Write the document as one HTML page with all its figures, whole or not at all. Raise ReportError."""
    check_page(path)
    write_atomically(path, html(document).encode())


def html(document: Document) -> str:
    """Return the document as one HTML page with all its figures."""
    return tables.page("report.html.j2", document=document)


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


def _is_of_report(folder: Path, name: str, listed: Mapping[str, set[str]]) -> bool:
    """Whether a file is missing, or as the list says."""
    file = folder / name
    if not os.path.lexists(file):
        return True
    if file.is_symlink() or not file.is_file():
        return False
    if name == SUMS:
        return "report.html" in listed
    return sha256_of(file) in listed.get(name, ())
