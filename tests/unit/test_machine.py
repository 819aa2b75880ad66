"""Limits on processes and threads are recognised behind errors and named; the last error of a log is found."""

import argparse
import errno
import threading
from pathlib import Path

import pytest

from hpo import machine
from hpo.cli import main
from hpo.errors import ServiceError
from hpo.tracking.errors import TrackingUnavailable, server
from hpo.worker.processes import last_error

NONE = {"version": False, "print_completion": None}  # of the options without a command
NO_THREAD = RuntimeError("can't start new thread")
LIMITS = "The limits here: 45 (ulimit -u)."
LOGS = {
    "Traceback (most recent call last):\n  File x\n    y\nImportError: first\n\n"
    "Traceback (most recent call last):\n  File x\n    y\n    ^\nValueError: \nwrong\n" + "z" * 400: "  ValueError: \n"
    f"  wrong\n  {'z' * 299}…",
    "one\ntwo\n\nthree\nfour\n": "  two\n  three\n  four",
    "": "  (empty)",
}


@pytest.fixture(autouse=True)
def _limited(monkeypatch) -> None:
    monkeypatch.setattr(machine, "limits", lambda: f" {LIMITS}")


@pytest.mark.parametrize("error", [NO_THREAD, BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")])
def test_a_limit_is_named_in_the_place_of_a_traceback(error):
    assert main.message(error) == f"No more processes or threads may be started here. {LIMITS}"


def test_a_limit_is_named_behind_the_message_of_what_failed():
    error = ServiceError("Trainers cannot be started. The end of x.log:\n  RuntimeError: can't start new thread\n")
    assert main.message(error) == f"{str(error).strip()}. {LIMITS}"
    assert main.message(ServiceError("MLflow did not start.")) == "MLflow did not start."
    assert main.message(RuntimeError("a fault of hpo")) is None


def test_a_signal_that_a_library_raises_for_want_of_threads_is_no_interruption(monkeypatch, capsys):
    def interrupted(options: object) -> int:
        raise KeyboardInterrupt

    whole = main.parser()
    monkeypatch.setattr(
        whole, "parse_args", lambda words: argparse.Namespace(**NONE, command="down", function=interrupted)
    )
    monkeypatch.setattr(main, "parser", lambda: whole)
    assert main.main(["down"]) == 130 and capsys.readouterr().err == "Interrupted.\n"
    monkeypatch.setattr(threading.Thread, "start", _no_thread)
    assert main.main(["down"]) == 1 and capsys.readouterr().err.endswith(f"started here. {LIMITS}\n")


def _no_thread(thread: threading.Thread) -> None:
    raise NO_THREAD


def test_mlflow_is_waited_for_while_its_client_may_start_no_threads():
    with pytest.raises(TrackingUnavailable, match="may be started here"), server():
        raise NO_THREAD
    with pytest.raises(RuntimeError, match="else"), server():
        raise RuntimeError("something else")


@pytest.mark.parametrize(("text", "expected"), LOGS.items(), ids=["tracebacks", "lines", "empty"])
def test_the_last_error_of_a_log_is_a_few_lines(tmp_path: Path, text: str, expected: str):
    log = tmp_path / "trainer.log"
    log.write_text(text)
    assert last_error(log) == expected
