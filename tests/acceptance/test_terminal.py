"""Standard output and error of real processes: readers that go away, and text that is no more than text."""

import io
import logging
import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import cells
import psycopg
import pytest
from rich.live import Live
from rich.table import Table
from rich.text import Text
from shell import PATIENCE, Shell

from hpo.cli import main
from hpo.report.tables import Plain
from hpo.text import visible

ESCAPE = "\x1b]0;OWNED\x07"


def hpo(shell: Shell, *words: object, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [*shell.PROGRAM, *map(str, words)], env=shell.environment, start_new_session=True, **options
    )


@pytest.mark.slow
@pytest.mark.acceptance
def test_a_run_whose_reader_goes_away_trains_to_its_end_and_ends_well(shell, data, tmp_path):
    study = cells.study(tmp_path, "piped", data=data, epochs=3)
    run = hpo(shell, "run", "--study", study, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout.readline().startswith(b"Study piped: 4 trials")
    run.stdout.close()
    run.stderr.close()
    assert run.wait(PATIENCE) == 0
    assert [job.state for job in shell.trials("piped")] == ["done"] * 4

    for words in (["trials", "--study", "piped"], ["studies", "--json"], ["status"], ["status", "--watch"]):
        reading, writing = os.pipe()
        os.close(reading)
        listing = hpo(shell, *words, stdout=writing, stderr=writing)
        os.close(writing)
        assert listing.wait(PATIENCE) == 0, words

    reason = f"[/x] [enforce fail at alloc.cpp:1] :boom: {ESCAPE}"  # markup, an emoji's name and an escape sequence
    with psycopg.connect(shell.database_url.replace("+psycopg", "")) as connection:
        connection.execute("UPDATE hpo.job SET reason = %s WHERE kind = 'trial' AND number = 0", [reason])
    for words in (["trials", "--study", "piped"], ["compare", "piped/0", "piped/1"]):
        assert visible(reason) in shell.hpo(*words), "text is text"


@pytest.mark.long
@pytest.mark.acceptance
def test_a_run_without_a_terminal_or_any_output_goes_on_but_a_full_disk_is_said(shell, data, tmp_path):
    study = cells.study(tmp_path, "alone", data=data, epochs=3)
    master, slave = pty.openpty()
    run = hpo(shell, "run", "--study", study, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    assert b"Training on the CPU" in b"".join(iter(lambda: os.read(master, 1), b"\n")), "the first line"
    os.close(master)
    assert run.wait(PATIENCE) == 0
    assert [job.state for job in shell.trials("alone")] == ["done"] * 4

    closed = subprocess.run(
        ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *shell.PROGRAM, "trials", "--study", "alone"], env=shell.environment
    )
    assert closed.returncode == 0
    with Path("/dev/full").open("wb") as full:
        process = hpo(shell, "trials", "--study", "alone", stdout=full, stderr=subprocess.PIPE)
        said = process.communicate(timeout=PATIENCE)[1].decode()
    assert process.returncode == 1 and "No space left on device" in said and "Traceback" not in said


def on_a_terminal(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit code of a process on a terminal of its own, and what that shows."""
    master, slave = pty.openpty()
    process = subprocess.Popen(command, env=environment, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    parts = []
    with suppress(OSError):  # the last process that could write has ended
        while part := os.read(master, 1 << 16):
            parts.append(part)
    os.close(master)
    return process.wait(PATIENCE), b"".join(parts).decode()


@pytest.mark.long
@pytest.mark.acceptance
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(shell, data, tmp_path):
    study = cells.study(tmp_path, "dumb", data=data, epochs=3)
    command = [*shell.PROGRAM, "run", "--study", str(study)]
    code, shown = on_a_terminal(command, shell.environment | {"TERM": "dumb"})
    assert code == 0 and "\x1b" not in shown
    assert "dumb: 0 of 4 trials done, " in shown and "trial 3 of dumb done: val nmse" in shown


def test_a_password_is_shown_on_a_terminal_only_if_it_is_asked_for():
    code = (
        "from hpo.cli import terminal; from hpo.api import Services; terminal.take_over(); "
        "terminal.exports(Services('postgresql://hpo:secret@h/hpo', 'http://h'){}); import sys; sys.stdout.flush()"
    )
    shown = {
        asked: on_a_terminal([sys.executable, "-c", code.format(asked)], dict(os.environ))
        for asked in ("", ", asked=True")
    }
    assert shown[""] == (
        0,
        "For a notebook, `hpo up --show-credentials` prints the lines to export; one\r\nholds the password.\r\n",
    )
    assert "export HPO_DATABASE_URL=postgresql://hpo:secret@h/hpo" in shown[", asked=True"][1]
    piped = subprocess.run([sys.executable, "-c", code.format("")], capture_output=True, text=True, check=True)
    assert piped.stdout.startswith("export HPO_DATABASE_URL=postgresql://hpo:secret@h/hpo\n"), "a script reads them"
    assert main.parser().parse_args(["up", "--show-credentials"]).show_credentials


def test_what_a_terminal_would_obey_is_spelled_out():
    assert visible(f"bad{ESCAPE}\x9b2J\u202e.png\n\tcaf\udce9 µ² 日本") == (
        "bad\\x1b]0;OWNED\\x07\\x9b2J\\u202e.png\n\tcaf\\udce9 µ² 日本"
    )
    for text in ("日本\u3000語", "10\u00a0%", "👩\u200d🔬", "می\u200cخواهم"):
        assert visible(text) == text


def output_of(code: str, **variables: str) -> bytes:
    """Of a program whose standard output is taken over, in a pipe."""
    whole = f"import os, sys, time; from hpo.cli import terminal; terminal.take_over(); {code}; sys.stdout.flush()"
    environment = os.environ | variables
    return subprocess.run([sys.executable, "-c", whole], env=environment, check=True, capture_output=True).stdout


def test_what_a_program_reads_from_a_pipe_is_exact():
    code = r"""print('\x1b[2J', end=' '); terminal.exactly('/caf\udce9/\u202e\x1b'); print(' end')"""
    assert output_of(code, PYTHONUTF8="1") == b"\\x1b[2J /caf" + b"\xe9/" + "\u202e\x1b end\n".encode()


def test_python_writes_each_line_at_once_if_it_is_told_so_and_no_colours_of_its_own():
    code = "print('now'); os.write(1, b'later '); print(os.environ['PYTHON_COLORS'])"
    assert output_of(code, PYTHONUNBUFFERED="1", PYTHON_COLORS="1") == b"now\nlater 0\n"
    assert output_of(code, PYTHONUNBUFFERED="") == b"later now\n0\n"


def test_a_log_line_is_text_beside_a_live_display_too():
    shown = io.StringIO()
    console = Plain(file=shown, force_terminal=True, width=60)
    record = logging.LogRecord("hpo", logging.WARNING, "", 0, "\x1b[31mred", None, None)
    with Live(console=console, auto_refresh=False):
        main.Messages().emit(record)
    assert "\\x1b[31mred" in shown.getvalue() and "\x1b[31m" not in shown.getvalue()


def test_on_a_terminal_colours_are_commands_and_texts_are_not():
    shown = io.StringIO()
    console = Plain(file=shown, force_terminal=True, width=60)
    table = Table(f"[red]{ESCAPE}", "b")
    table.add_row(Text(f"x{ESCAPE}"), "[/y]", style="bold")
    console.print(table)
    console.print(f"[/z] {ESCAPE}", style="red")
    for text in ("[red]\\x1b]0;OWNED", "x\\x1b]0;OWNED", "[/y]", "[/z] \\x1b]0;OWNED"):
        assert text in shown.getvalue()
    assert "\x1b[1m" in shown.getvalue() and "\x1b]0" not in shown.getvalue()
