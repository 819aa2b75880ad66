"""Standard output and error: what is printed is text, and nobody needs to read it."""

import errno
import io
import os
import re
import shutil
import sys
from typing import TYPE_CHECKING, Any

from hpo import api
from hpo.text import visible

if TYPE_CHECKING:
    from hpo.api import Services


class Output(io.TextIOWrapper):
    """Text for a file descriptor. Nothing that is printed commands the terminal; `plain` takes rich's own commands.

    A reader that goes away (`| head`, a terminal that is closed) ends nothing: the rest is written nowhere.
    """

    def __init__(self, descriptor: int, encoding: str, *, lines: bool) -> None:
        """`lines`: each line is written at once, as on a terminal."""
        self._lasting = _Lasting(descriptor)
        buffer = io.BufferedWriter(self._lasting)
        # written through: both write into one buffer, in the order of their calls
        shape: Any = {"encoding": encoding, "errors": "backslashreplace", "write_through": True}
        shape["line_buffering"] = lines or self._lasting.terminal
        super().__init__(buffer, **shape)
        self.plain = io.TextIOWrapper(buffer, **shape)

    def write(self, text: str) -> int:
        super().write("\n".join(map(_wrapped, visible(text).split("\n"))) if self._lasting.terminal else visible(text))
        return len(text)

    def exactly(self, text: str) -> None:
        """Write what a program is to read: as it is, bytes of a file's name too, unless this is a terminal."""
        if self._lasting.terminal:
            super().write(visible(text))
            return
        try:
            self.buffer.write(text.encode(self.encoding, "surrogateescape"))
        except UnicodeEncodeError:
            self.plain.write(text)

    @property
    def gone(self) -> bool:
        """Whether something was written that nobody could read any more."""
        return self._lasting.gone


def _wrapped(line: str) -> str:
    """Return a sentence in lines as wide as the terminal, broken between words. A command in backticks stays whole, and
    a line with a link or of JSON as it is: both are there to be copied."""
    width, words = shutil.get_terminal_size().columns, re.findall(r"`[^`]*`\S*|\S+", line)
    if len(line) <= width or "://" in line or line.lstrip()[:1] in ('"', "{", "["):
        return line
    indent = " " * (len(line) - len(line.lstrip()))
    lines = [indent + words[0]]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) > width:
            lines.append(indent + word)
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines)


class _Lasting(io.FileIO):
    """A file descriptor that goes on taking what is written when its reader has gone; a full disk is an error."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.terminal = self.isatty()  # asked now: one that has gone says no
        self.gone = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EPIPE and not (self.terminal and error.errno == errno.EIO):
                raise
            self.gone = True
            return memoryview(data).nbytes


def take_over() -> None:
    """Make `Output` of standard output and error. 0, 1 and 2 are open then, though whatever started us closed them: a
    lock, say, with such a number would reach no child process, and a file would get what is printed."""
    while (file := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(file, True)
    os.close(file)
    os.environ["PYTHON_COLORS"] = "0"  # those of argparse and tracebacks would be spelled out
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8", closefd=False)
    at_once = getattr(sys.stdout, "write_through", False)  # by PYTHONUNBUFFERED or python -u
    sys.stdout, sys.stderr = (
        Output(number, getattr(stream, "encoding", "utf-8"), lines=lines)
        for number, stream, lines in ((1, sys.stdout, at_once), (2, sys.stderr, True))
    )


def exactly(text: str) -> None:
    """Print what a program is to read to standard output; see `Output.exactly`."""
    getattr(sys.stdout, "exactly", sys.stdout.write)(text)


def exports(services: "Services", *, asked: bool = False) -> None:
    """Print the lines that a notebook needs to reach the services, one of which holds a password: not on a terminal,
    which others may see or record, unless it is asked for."""
    if asked or services.credentials or not sys.stdout.isatty():
        exactly(f"{api.export_lines(services)}\n")
    else:
        print("For a notebook, `hpo up --show-credentials` prints the lines to export; one holds the password.")


def gone() -> bool:
    """Whether the reader of standard output has gone."""
    return getattr(sys.stdout, "gone", False)


def progress(text: str) -> None:
    """Print a line on standard error that replaces itself; nothing in a pipe, or where a line cannot be replaced."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        print(f"\r\033[K{text}", end="", file=getattr(sys.stderr, "plain", sys.stderr), flush=True)
