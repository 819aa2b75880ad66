"""The queue as a state machine: whatever workers do in whatever order, the rows are what a small model says."""

from dataclasses import dataclass, field, replace

import pytest
import records
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

from hpo.queue import ENDED, Attempt, AttemptOutcome, Job, LeaseLost, NewJob, Queue, is_exhausted

pytestmark = pytest.mark.service

COUNT = 4
TINY, LONG = 1e-3, 3600.0  # seconds
WORKERS = ("anna", "ben")
RETURNS = [outcome for outcome in AttemptOutcome if outcome not in (AttemptOutcome.RECORDED, AttemptOutcome.CANCELLED)]


@dataclass
class Row:
    """What the model knows of one job."""

    number: int
    state: str = "waiting"
    attempts: list[Attempt] = field(default_factory=list)
    fence: int = 0
    worker: str | None = None
    expired: bool = False
    checkpoint: int | None = None
    result: int | None = None
    epochs: dict[int, int] = field(default_factory=dict)  # number: who computed it

    def note(self, **changes) -> None:
        """Change the present attempt."""
        self.attempts[-1] = replace(self.attempts[-1], **changes)

    def end_attempt(self, outcome: AttemptOutcome, *, alone: bool = True) -> None:
        """End the present attempt; the job waits again or is dead."""
        self.note(outcome=outcome, alone=alone)
        self.state, self.expired = "dead" if outcome.failed and is_exhausted(self.attempts) else "waiting", False

    def forgive(self) -> None:
        self.attempts = [
            replace(attempt, forgiven=True, outcome=attempt.outcome or AttemptOutcome.HANDED_BACK)
            for attempt in self.attempts
        ]

    @property
    def failures(self) -> int:
        own = (AttemptOutcome.FAILED, AttemptOutcome.OUT_OF_MEMORY)
        return sum(attempt.outcome in own and not attempt.forgiven for attempt in self.attempts)

    @property
    def attempt(self) -> int:
        free = (AttemptOutcome.HANDED_BACK, AttemptOutcome.PLACE_FAILED)
        return sum(attempt.outcome not in free and not attempt.forgiven for attempt in self.attempts)


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
        ended = all(row.state in ENDED for row in self.trials())  # before it is seen which leases have expired
        self.expired()
        free = [
            row
            for row in self.rows.values()
            if row.state == "waiting" and (row.number >= 0 or (ended and self.all_ended()))
        ]
        job = self.queue.claim(self.name, worker=worker, lease=TINY)
        if not free:
            assert job is None
            return multiple()
        best = min(free, key=lambda row: (row.checkpoint is None, row.failures, -(max(row.number, 0) % 2), row.number))
        assert job.number == best.number
        best.state, best.fence, best.worker, best.expired = "running", best.fence + 1, worker, False
        best.attempts.append(Attempt(job=job.id, fence=best.fence, host=worker, device="cpu", began=0.0))
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

    @rule(job=claims, outcome=st.sampled_from(RETURNS), alone=st.booleans())
    def give_back(self, job, outcome, alone):
        row = self.write(job, lambda: self.queue.give_back(job, outcome, reason="why", alone=alone))
        if row is not None:
            row.end_attempt(outcome, alone=alone)

    @rule(job=claims, state=st.sampled_from(["done", "diverged"]))
    def end(self, job, state):
        self.serial += 1
        row = self.write(job, lambda: self.queue.end(job, state, result=records.result(self.serial), reason="why"))
        if row is not None:
            assert row.result is None, "recorded once"
            row.end_attempt(AttemptOutcome.RECORDED)
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
            row.note(checkpoint=epoch)

    @rule()
    def expire(self):
        self.queue.expire(self.name, lease=TINY)
        self.expired()

    def expired(self) -> None:
        for row in self.rows.values():
            if row.state == "running" and row.expired:
                row.end_attempt(AttemptOutcome.LOST)

    def all_ended(self) -> bool:
        return all(row.state in ENDED for row in self.trials())

    @rule(worker=st.sampled_from(WORKERS))
    def a_claim_of_whom_was_never_answered(self, worker):
        self.queue.disown(worker, [])
        for row in self.rows.values():
            if row.state == "running" and row.worker == worker:
                row.end_attempt(AttemptOutcome.HANDED_BACK)

    @rule(number=st.integers(0, COUNT - 1))
    def cancel(self, number):
        row = self.rows[number]
        ended = row.state in ENDED
        assert len(self.queue.cancel(self.name, number, None, by="anna")) == (0 if ended else 1)
        if not ended:
            if row.state == "running":
                row.end_attempt(AttemptOutcome.CANCELLED)
            row.state = "cancelled"

    @rule(number=st.integers(0, COUNT - 1))
    def undo_cancel(self, number):
        row = self.rows[number]
        cancelled = row.state == "cancelled"
        assert len(self.queue.undo_cancel(self.name, number, None)) == (1 if cancelled else 0)
        if cancelled:
            row.state = "waiting"
            row.fence += 1
            row.forgive()
        self.close_again()

    @rule(worker=st.sampled_from(WORKERS))
    def who_was_asked_to_stop_claims_nothing_more(self, worker):
        stops = self.queue.stop(self.name, by="anna")
        self.expired()
        assert self.queue.claim(self.name, worker=worker, lease=TINY, stops=stops - 1) is None
        assert self.queue.orders(worker, stops={self.name: stops - 1}, held=[]).stopped[self.name].by == "anna"
        assert self.queue.orders(worker, stops={self.name: stops}, held=[]).stopped == {}

    @rule(trials=st.booleans())
    def revive(self, trials):
        self.queue.revive(self.name, trials=trials)
        for row in self.rows.values():
            if row.state == "dead" and (trials or row.number < 0):
                row.state = "waiting"
                row.forgive()
        if trials:
            self.close_again()

    def close_again(self):
        closing = self.rows[-1]
        if closing.state != "waiting" and any(r.state not in ENDED for r in self.trials()):
            closing.state, closing.result, closing.fence, closing.expired = "waiting", None, closing.fence + 1, False
            closing.forgive()

    @invariant()
    def the_rows_are_what_the_model_says(self):
        for job in self.queue.jobs(self.name):
            row = self.rows[job.number]
            found = (job.state, job.attempt, job.fence, job.result and job.result.best_val_nmse)
            assert found == (row.state, row.attempt, row.fence, row.result)
            assert (job.checkpoint and job.checkpoint.epoch) == row.checkpoint
            assert {number: metrics["fence"] for number, metrics in self.queue.curve(job.id)} == row.epochs
            assert job.alive == (row.state == "running" and not row.expired)
            assert (row.state == "dead") <= is_exhausted(row.attempts)


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
