"""The recorder's threads without services: the order of tasks, and outages that several threads meet."""

import logging
import threading
import time
from types import SimpleNamespace

import pytest

from hpo.recording.outage import Outage
from hpo.recording.outcomes import Inbox
from hpo.recording.recorder import Recorder
from hpo.tracking.errors import TrackingUnavailable

PATIENCE = 60.0  # seconds


class Services:
    """Stands for queue and reconcilers: nothing waits there."""

    lease = PATIENCE
    queue = SimpleNamespace(waiting_epochs=lambda study: 0)

    def reconcile(self, **_: object) -> int:
        return 0


@pytest.fixture
def recorder():
    services = Services()
    outage = Outage(services.queue, "a study", store=None)
    recorder = Recorder(services, Inbox(), outage, patience=PATIENCE)
    recorder.start()
    yield recorder
    assert recorder.finish(PATIENCE, reconcile=False)


def job(number: int) -> SimpleNamespace:
    return SimpleNamespace(id=number, fence=1, title=f"trial {number}")


def test_tasks_of_a_job_keep_their_order_and_do_not_wait_for_a_hung_one_of_another(recorder):
    answer, others, done = threading.Event(), threading.Event(), []

    def hang() -> None:
        assert answer.wait(PATIENCE)
        done.append("hung")

    recorder.put(job(1), hang)
    recorder.put(job(1), lambda: done.append("after it"))
    for number in range(3):
        recorder.put(job(2), lambda number=number: done.append(number))
    recorder.put(job(2), others.set)
    assert others.wait(PATIENCE) and done == [0, 1, 2] and not recorder.idle
    answer.set()
    until(lambda: recorder.idle)
    assert done[3:] == ["hung", "after it"]


def test_an_outage_lasts_until_no_task_meets_it_any_more(recorder, caplog):
    caplog.set_level(logging.WARNING)
    is_away, attempts = threading.Event(), []
    is_away.set()

    def refused() -> None:
        attempts.append(recorder.outage.text)
        if is_away.is_set():
            raise TrackingUnavailable("no answer")

    recorder.put(job(1), refused)
    until(lambda: attempts and recorder.outage.text)
    recorder.put(job(2), lambda: None)
    until(lambda: len(attempts) > 1)
    assert "all services answer again" not in caplog.text and None not in attempts[1:]
    is_away.clear()
    until(lambda: recorder.outage.text is None)
    assert caplog.text.count("all services answer again") == 1


def until(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
