"""When a study pauses: rules on any history of the attempts of its trials."""

import math
from contextlib import suppress
from dataclasses import replace

import pytest
import records
from hypothesis import given
from hypothesis import strategies as st

from hpo.errors import ServiceError
from hpo.operations import work
from hpo.queue import Attempt, AttemptOutcome, DatabaseLost, PlaceFailures
from hpo.queue.delays import FIRST_DELAY, LONGEST_DELAY, delay
from hpo.queue.pauses import IN_A_ROW, doubtful_since, is_tried, pause_reason
from hpo.tracking.errors import TrackingUnavailable
from models.specs import SpecError

FAULTS = [AttemptOutcome.FAILED, AttemptOutcome.LOST, AttemptOutcome.OUT_OF_MEMORY]


def attempt(job: int, began: float, ended: float | None = None, **values) -> Attempt:
    outcome = None if ended is None else AttemptOutcome.FAILED
    named = {"host": "lab", "device": "cpu", "outcome": outcome, "reason": "odd"} | values
    return Attempt(job=job, fence=1, began=began, ended=ended, **named)


def failures(*jobs: int) -> list[Attempt]:
    """One failure after the other, at 1, 2, 3 … seconds, each claimed half a second before."""
    return [attempt(job, end - 0.5, float(end)) for end, job in enumerate(jobs, start=1)]


@st.composite
def failing(draw) -> list[Attempt]:
    history = failures(*draw(st.lists(st.integers(1, 6), max_size=10)))
    return [replace(each, outcome=draw(st.sampled_from(FAULTS))) for each in history]


@given(failing())
def test_a_study_is_in_doubt_from_the_fourth_different_trial_on(history):
    jobs: list[int] = []
    ends = None
    for failure in history:
        if failure.job not in jobs:
            jobs.append(failure.job)
            ends = failure.ended if len(jobs) == IN_A_ROW else ends
    assert doubtful_since(history) == ends


@given(failing(), st.floats(0, 12))
def test_a_finished_epoch_or_the_end_of_a_pause_begins_a_new_row(history, moment):
    later = [failure for failure in history if failure.ended > moment]
    trained = [*history, attempt(9, 0.0, epoch_at=moment)]
    assert doubtful_since(trained) == doubtful_since(history, resumed_at=moment) == doubtful_since(later)
    assert pause_reason(trained) == pause_reason(history, resumed_at=moment) == pause_reason(later)


@given(failing())
def test_faulty_places_and_what_was_handed_back_never_pause_a_study(history):
    for outcome in (AttemptOutcome.PLACE_FAILED, AttemptOutcome.HANDED_BACK, AttemptOutcome.CANCELLED):
        assert doubtful_since([replace(failure, outcome=outcome) for failure in history]) is None


def test_a_study_pauses_when_the_trial_that_is_tried_next_fails_too():
    four = failures(1, 2, 3, 4)
    since = doubtful_since(four)
    assert since == 4.0 and pause_reason(four) is None and not is_tried(four, since)
    running = [*four, attempt(5, 3.5)]
    assert not is_tried(running, since), "it was claimed before"
    claimed_before = [*four, attempt(5, 3.5, 6.0)]
    assert pause_reason(claimed_before) is None
    assert is_tried([*claimed_before, attempt(6, 6.5)], since)
    assert pause_reason([*claimed_before, attempt(6, 6.5, 7.0)]) == (
        "6 trials in a row failed without an epoch finished in between, at last the cheapest: odd"
    )


def test_one_trial_that_fails_again_and_again_pauses_nothing():
    assert doubtful_since(failures(1, 1, 1, 2, 2, 2, 3, 3, 3)) is None


@given(st.integers(1, 10_000))
def test_the_delay_of_a_failing_place_grows_to_its_limit(count):
    assert FIRST_DELAY <= delay(count) <= delay(count + 1) <= LONGEST_DELAY
    assert delay(10) == LONGEST_DELAY


class Noted:
    """What a worker notes of its place, of which two have failed; `hpo stop` comes in the first second."""

    def __init__(self, monkeypatch) -> None:
        self.notes: list[str] = []
        self.now = 0.0
        monkeypatch.setattr(work, "time", self)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def study(self, name):
        return records.study_row(name, stops=int(self.now > 1))

    def failures(self, study, *, host, device):
        return PlaceFailures(count=2, reason="odd.", seconds_left=60.0)

    def note_failure(self, study, *, host, device, reason):
        self.notes.append(reason)

    def note_success(self, study, *, host, device):
        self.notes.append("success")

    def begin(self, *, most: float = math.inf, stops: int = 9):
        return work._slower_after_failures(self, records.study_row("s"), "cpu", work.Watch(), most, stops)


@pytest.mark.parametrize("error", [ServiceError("no GPU"), SpecError("no weights"), ZeroDivisionError(), None])
def test_a_worker_that_ends_by_any_error_makes_the_next_one_wait(monkeypatch, error):
    noted = Noted(monkeypatch)
    with suppress(Exception), noted.begin() as note_success:
        if error is not None:
            raise error
        note_success()
    assert noted.notes == ["success" if error is None else str(error) or "ZeroDivisionError"]
    assert noted.now == pytest.approx(60)


@pytest.mark.parametrize("error", [DatabaseLost("gone"), TrackingUnavailable("gone")])
def test_a_worker_that_reaches_no_service_notes_nothing_of_its_place(monkeypatch, error):
    noted = Noted(monkeypatch)
    with suppress(Exception), noted.begin():
        raise error
    assert noted.notes == []


def test_a_worker_waits_no_longer_than_its_own_limit_and_until_hpo_stop(monkeypatch):
    noted = Noted(monkeypatch)
    with noted.begin(most=7.0):
        assert noted.now == pytest.approx(7)
    noted = Noted(monkeypatch)
    with noted.begin(stops=0):
        assert noted.now == pytest.approx(work.POLL)


def test_a_worker_that_is_interrupted_while_it_waits_notes_nothing(monkeypatch):
    noted = Noted(monkeypatch)
    monkeypatch.setattr(noted, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), noted.begin():
        raise AssertionError("it does not begin")
    assert noted.notes == []
