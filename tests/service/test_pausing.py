"""Pauses and places on a real Postgres."""

import pytest
import records

from hpo.queue import AttemptOutcome, NewJob, Queue

pytestmark = pytest.mark.service

TRIALS = 7


@pytest.fixture
def queue(database_url):
    """That of a study of trials 0 (the cheapest) to 6 (the most expensive)."""
    planned = Queue(database_url)
    planned.install()
    planned.put_study(records.study_row("s"))
    jobs = [NewJob(kind="trial", number=n, config=n, cost=float(n), spec=records.spec()) for n in range(TRIALS)]
    planned.put_jobs("s", [*jobs, NewJob(kind="closing", number=-1)])
    yield planned
    planned.close()


def claim(queue: Queue, worker: str = "w"):
    return queue.claim("s", worker=worker, lease=30)


def fail(queue: Queue, outcome: AttemptOutcome = AttemptOutcome.FAILED, *, count: int = 1) -> list[int]:
    numbers = []
    for _ in range(count):
        job = claim(queue)
        numbers.append(job.number)
        queue.give_back(job, outcome, reason="odd")
    return numbers


def test_after_four_failures_in_a_row_the_cheapest_is_tried_alone_and_then_all_wait(queue):
    assert fail(queue, count=4) == [6, 5, 4, 3], "what has failed waits for the others"
    tried = claim(queue, "a")
    assert tried.number == 0 and claim(queue, "b") is None, "its end is waited for"
    assert queue.pause("s") is None
    queue.give_back(tried, AttemptOutcome.FAILED, reason="odd")
    assert claim(queue) is None
    reason = "5 trials in a row failed without an epoch finished in between, at last the cheapest: odd"
    assert queue.pause("s") == queue.study("s").paused == reason
    assert {job.state for job in queue.jobs("s")} == {"waiting"}, "nothing died"
    assert queue.resume("s") and not queue.resume("s")
    assert fail(queue, count=3) == [2, 1, 6], "earlier failures do not count for the next pause"
    assert queue.pause("s") is None


def test_an_epoch_anywhere_ends_the_doubt(queue):
    other = claim(queue, "other")
    fail(queue, count=4)
    tried = claim(queue)
    assert tried.number == 0 and claim(queue) is None
    queue.add_epochs(other, [(1, 1000, {"val/nmse": 1.0})])
    assert claim(queue).number == 1, "the most expensive of those that have not failed"


def test_places_that_fail_and_trials_that_are_handed_back_pause_nothing(queue):
    for outcome in (AttemptOutcome.PLACE_FAILED, AttemptOutcome.HANDED_BACK):
        assert fail(queue, outcome, count=5) == [6] * 5
    assert claim(queue).number == 6 and queue.pause("s") is None


def test_a_study_whose_trials_have_all_ended_closes_though_it_is_paused(queue):
    fail(queue, count=5)
    assert claim(queue) is None and queue.pause("s")
    for number in range(TRIALS):
        queue.cancel("s", number, None, by="anna")
    assert claim(queue).kind == "closing"


def test_a_place_that_fails_again_and_again_waits_longer_until_one_ends_in_peace(queue):
    place = {"host": "lab", "device": "cuda"}
    assert queue.failures("s", **place) is None
    waits = []
    for count in (1, 2, 3):
        queue.note_failure("s", reason="no GPU", **place)
        failures = queue.failures("s", **place)
        assert (failures.count, failures.reason) == (count, "no GPU")
        waits.append(failures.seconds_left)
    assert 0 < waits[0] <= 5 < waits[1] <= 10 < waits[2] <= 20
    assert queue.failures("s", host="lab", device="cpu") is None
    queue.note_success("s", **place)
    assert queue.failures("s", **place) is None
    queue.note_failure("s", reason="no GPU", **place)
    with queue.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE hpo.place SET failed_at = failed_at - interval '1 hour'")
    assert queue.failures("s", **place) is None, "it is forgotten"
    queue.note_failure("s", reason="no GPU", **place)
    assert queue.failures("s", **place).count == 1
    queue.note_failure("gone", reason="no GPU", **place)
