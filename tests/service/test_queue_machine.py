"""The queue as a state machine: whatever workers do in whatever order, the rows are what a small model says."""

from dataclasses import dataclass, field

import pytest
import records
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

from hpo.queue import ATTEMPTS, ENDED, Job, LeaseLost, NewJob, Queue

pytestmark = pytest.mark.service

COUNT = 4
TINY, LONG = 1e-3, 3600.0  # seconds
WORKERS = ("anna", "ben")


@dataclass
class Row:
    """What the model knows of one job."""

    number: int
    state: str = "waiting"
    attempt: int = 0
    fence: int = 0
    worker: str | None = None
    expired: bool = False
    checkpoint: int | None = None
    result: int | None = None
    epochs: dict[int, int] = field(default_factory=dict)  # number: who computed it


class Machine(RuleBasedStateMachine):
    """Two workers, four trials, their closing. Time is the one thing that is faked: leases end when a rule says so."""

    url: str
    runs = 0
    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        Machine.runs += 1
        self.name = f"s{Machine.runs}"
        self.queue = Queue(self.url)
        self.queue.put_study(records.study_row(self.name))
        jobs = [("trial", n, float(n % 2)) for n in range(COUNT)] + [("closing", -1, 0.0)]
        self.queue.put_jobs(self.name, [NewJob(kind=k, number=n, config=n, cost=cost) for k, n, cost in jobs])
        self.rows = {number: Row(number) for number in range(-1, COUNT)}
        self.serial = 0  # makes every written result another one

    def teardown(self) -> None:
        self.queue.close()

    def trials(self) -> list[Row]:
        return [row for row in self.rows.values() if row.number >= 0]

    def ours(self, job: Job) -> Row | None:
        """The row if this claim still holds it."""
        row = self.rows[job.number]
        return row if row.state == "running" and row.fence == job.fence else None

    def write(self, job: Job, act) -> Row | None:
        """Do something that only the holder may; the row if it was allowed."""
        row = self.ours(job)
        if row is None:
            with pytest.raises(LeaseLost):
                act()
        else:
            act()
        return row

    def lease_until(self, job_id: int, seconds: float) -> None:
        with self.queue.engine.begin() as connection:
            connection.exec_driver_sql(
                "UPDATE hpo.job SET lease_until = clock_timestamp() + make_interval(secs => %s) WHERE id = %s",
                (seconds, job_id),
            )

    @rule(target=claims, worker=st.sampled_from(WORKERS))
    def claim(self, worker):
        ended = all(row.state in ENDED for row in self.trials())
        free = [
            row
            for row in self.rows.values()
            if row.attempt < ATTEMPTS
            and (row.state == "waiting" or (row.state == "running" and row.expired))
            and (row.number >= 0 or ended)
        ]
        job = self.queue.claim(self.name, worker=worker, lease=TINY)
        if not free:
            assert job is None
            return multiple()
        best = min(free, key=lambda row: (row.checkpoint is None, -(max(row.number, 0) % 2), row.number))
        assert job.number == best.number
        best.state, best.attempt, best.fence, best.worker, best.expired = (
            "running",
            best.attempt + 1,
            best.fence + 1,
            worker,
            False,
        )
        self.lease_until(job.id, LONG)
        return job

    @rule(job=claims)
    def time_passes_until_its_lease_ends(self, job):
        if (row := self.ours(job)) is not None:
            self.lease_until(job.id, -1)
            row.expired = True

    @rule(job=claims)
    def renew(self, job):
        row = self.ours(job)
        assert self.queue.renew([job], lease=LONG) == ([] if row else [job])
        if row is not None:
            row.expired = False

    @rule(job=claims, counts=st.booleans())
    def give_back(self, job, counts):
        row = self.write(job, lambda: self.queue.give_back(job, reason="why", counts=counts))
        if row is not None:
            row.attempt -= not counts
            row.state = "dead" if row.attempt >= ATTEMPTS else "waiting"

    @rule(job=claims, state=st.sampled_from(["done", "diverged"]))
    def end(self, job, state):
        self.serial += 1
        row = self.write(job, lambda: self.queue.end(job, state, result=records.result(self.serial), reason="why"))
        if row is not None:
            assert row.result is None, "recorded once"
            row.state, row.result = state, self.serial

    @rule(job=claims, first=st.integers(1, 5), count=st.integers(1, 3))
    def store_epochs(self, job, first, count):
        numbers = range(first, first + count)
        row = self.write(job, lambda: self.queue.add_epochs(job, [(n, n, {"fence": job.fence}) for n in numbers]))
        if row is not None:
            if differing := [n for n in numbers if row.epochs.get(n, job.fence) != job.fence]:
                row.epochs = {n: by for n, by in row.epochs.items() if n < differing[0]}
                row.checkpoint = None if (row.checkpoint or 0) >= differing[0] else row.checkpoint
            row.epochs = dict.fromkeys(numbers, job.fence) | row.epochs

    @rule(job=claims, epoch=st.integers(1, 5))
    def commit_checkpoint(self, job, epoch):
        row = self.write(job, lambda: self.queue.checkpoint(job, records.checkpoint(epoch)))
        if row is not None:
            row.checkpoint = epoch

    @rule()
    def expire(self):
        self.queue.expire(self.name, lease=TINY)
        for row in self.rows.values():
            if row.state == "running" and row.expired:
                row.state = "dead" if row.attempt >= ATTEMPTS else "waiting"

    @rule(worker=st.sampled_from(WORKERS))
    def a_claim_of_whom_was_never_answered(self, worker):
        self.queue.disown(worker, [])
        for row in self.rows.values():
            if row.state == "running" and row.worker == worker:
                row.state, row.attempt = "waiting", row.attempt - 1

    @rule(number=st.integers(0, COUNT - 1))
    def cancel(self, number):
        row = self.rows[number]
        ended = row.state in ENDED
        assert len(self.queue.cancel(self.name, number, None, by="anna")) == (0 if ended else 1)
        if not ended:
            row.state = "cancelled"

    @rule(number=st.integers(0, COUNT - 1))
    def undo_cancel(self, number):
        row = self.rows[number]
        cancelled = row.state == "cancelled"
        assert len(self.queue.undo_cancel(self.name, number, None)) == (1 if cancelled else 0)
        if cancelled:
            row.state, row.attempt = "waiting", 0
        self.close_again()

    @rule(worker=st.sampled_from(WORKERS))
    def who_was_asked_to_stop_claims_nothing_more(self, worker):
        stops = self.queue.stop(self.name, by="anna")
        assert self.queue.claim(self.name, worker=worker, lease=TINY, stops=stops - 1) is None
        stop, _ = self.queue.orders(self.name, stops=stops - 1, held=[])
        assert stop is not None and stop.by == "anna"
        assert self.queue.orders(self.name, stops=stops, held=[]) == (None, [])

    @rule(trials=st.booleans())
    def revive(self, trials):
        self.queue.revive(self.name, trials=trials)
        for row in self.rows.values():
            if row.state == "dead" and (trials or row.number < 0):
                row.state, row.attempt = "waiting", 0
        if trials:
            self.close_again()

    def close_again(self):
        closing = self.rows[-1]
        if closing.state != "waiting" and any(r.state not in ENDED for r in self.trials()):
            closing.state, closing.attempt, closing.result, closing.fence = "waiting", 0, None, closing.fence + 1

    @invariant()
    def the_rows_are_what_the_model_says(self):
        for job in self.queue.jobs(self.name):
            row = self.rows[job.number]
            found = (job.state, job.attempt, job.fence, job.result and job.result.best_val_nmse)
            assert found == (row.state, row.attempt, row.fence, row.result)
            assert (job.checkpoint and job.checkpoint.epoch) == row.checkpoint
            assert {number: metrics["fence"] for number, metrics in self.queue.curve(job.id)} == row.epochs
            assert job.alive == (row.state == "running" and not row.expired)
            assert 0 <= job.attempt <= ATTEMPTS


def test_no_order_of_events_breaks_the_queue(database_url):
    queue = Queue(database_url)
    queue.install()
    queue.close()
    Machine.url = database_url
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
