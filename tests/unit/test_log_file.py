"""The process that keeps a service's log, whatever happens to the file and its folder."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpo.services import log_file

LIMIT = 1000


class Kept:
    """A log with its keeper, and the end of the pipe that a service writes to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        reading, self.pipe = os.pipe()
        log = log_file.opened(str(path))
        words = [sys.executable, "-I", "-S", log_file.__file__, str(reading), str(log), str(path), str(LIMIT)]
        self.keeper = subprocess.Popen(words, pass_fds=(reading, log))
        os.close(reading)
        os.close(log)

    def says(self, line: str, within: Path) -> None:
        """Write a line; wait until it is in that file."""
        os.write(self.pipe, f"{line}\n".encode())
        end = time.monotonic() + 60
        while not within.is_file() or line not in within.read_text():
            assert time.monotonic() < end, f"{line!r} is not in {within}"
            time.sleep(0.005)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    (tmp_path / "logs").mkdir()
    made = Kept(tmp_path / "logs" / "x.log")
    yield made
    os.close(made.pipe)
    assert made.keeper.wait(60) == 0


def test_a_full_log_becomes_the_first_and_one_that_was_moved_away_is_begun_again(kept):
    first = kept.path.with_name("x.log.1")
    kept.says("a" * 800, within=kept.path)
    kept.says("b" * 800, within=kept.path)
    assert first.read_text() == "a" * 800 + "\n"
    kept.path.rename(kept.path.with_name("mine"))
    kept.says("c" * 800, within=kept.path)
    assert first.read_text() == "a" * 800 + "\n", "what others put away is left alone"


def test_a_log_that_cannot_be_put_away_goes_on_within_its_limit(kept):
    kept.path.with_name("x.log.1").mkdir()
    for letter in "abcdef":
        kept.says(letter * 800, within=kept.path)
        assert kept.path.stat().st_size <= 2 * LIMIT


def test_lines_go_on_in_the_old_file_until_a_new_one_can_be_made(kept):
    folder = kept.path.parent
    moved = folder.rename(folder.with_name("moved"))
    for letter in "abcdef":
        kept.says(letter * 800, within=moved / "x.log")
        assert (moved / "x.log").stat().st_size <= 2 * LIMIT
    folder.mkdir()
    kept.says("at home again", within=kept.path)
