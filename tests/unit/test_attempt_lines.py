"""How `hpo show` lists the attempts of a trial."""

import time

import pytest

from hpo.queue import Attempt, AttemptOutcome
from hpo.report.attempts import lines


@pytest.fixture(autouse=True)
def _utc(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_each_attempt_is_a_line_with_its_place_its_end_and_whether_it_counts():
    place = {"job": 1, "host": "lab", "device": "cuda:0"}
    attempts = [
        Attempt(fence=1, began=0.0, ended=40.0, outcome=AttemptOutcome.FAILED, reason="ValueError:\nodd", **place),
        Attempt(
            fence=2,
            began=60.0,
            ended=660.0,
            epochs=7,
            outcome=AttemptOutcome.HANDED_BACK,
            reason="handed back",
            **place,
        ),
        Attempt(
            fence=3,
            began=700.0,
            ended=701.0,
            outcome=AttemptOutcome.OUT_OF_MEMORY,
            alone=False,
            reason="20 MiB",
            **place,
        ),
        Attempt(fence=4, began=900.0, epochs=9, **place),
    ]
    assert lines(attempts) == [
        "attempt 1: lab cuda:0, 1970-01-01 00:00:00, 40 s, no epoch, failed: ValueError:\\nodd (counts)",
        "attempt 2: lab cuda:0, 1970-01-01 00:01:00, 10 min, epoch 7, handed back",
        "attempt 3: lab cuda:0, 1970-01-01 00:11:40, 1 s, no epoch, out of memory beside other trials: 20 MiB",
        "attempt 4: lab cuda:0, 1970-01-01 00:15:00, epoch 9, running",
    ]
