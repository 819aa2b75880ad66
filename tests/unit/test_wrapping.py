"""Messages on a narrow terminal."""

import os
import pty

import pytest

from hpo.cli.terminal import Output

SENTENCE = (
    "Left at its limit: study hardness+064735af is open; `hpo run --study hardness+064735af --retry` goes on with it, "
    "and a_word_that_is_longer_than_the_terminal_is_wide_stays_as_it_is_although_it_does_not_fit too.\n"
)


def printed(text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a terminal of 80 columns gets."""
    monkeypatch.setenv("COLUMNS", "80")
    master, slave = pty.openpty()
    try:
        Output(slave, "utf-8", lines=True).write(text)
        return os.read(master, 10_000).decode().replace("\r\n", "\n")
    finally:
        os.close(slave)
        os.close(master)


def test_sentences_break_between_words_and_commands_stay_whole(monkeypatch):
    lines = printed(SENTENCE, monkeypatch).splitlines()
    assert len(lines) > 2 and " ".join(lines) == SENTENCE.strip()
    assert [line for line in lines if len(line) > 80] == [word for word in SENTENCE.split() if len(word) > 80]
    assert "`hpo run --study hardness+064735af --retry`" in lines[1]
    nested = printed(f"  {SENTENCE}", monkeypatch).splitlines()
    assert all(line.startswith("  ") for line in nested)


@pytest.mark.parametrize("text", [f'  "what": "{SENTENCE.strip()}",', f"list: http://127.0.0.1/{'x/' * 40} and more"])
def test_what_people_copy_is_not_broken(text, monkeypatch):
    assert printed(text, monkeypatch) == text


def test_a_pipe_gets_sentences_as_they_are(tmp_path):
    with (tmp_path / "piped").open("wb") as file:
        Output(file.fileno(), "utf-8", lines=True).write(SENTENCE)
    assert (tmp_path / "piped").read_text() == SENTENCE
