"""The queue when several change one study at the same moment, on connections of their own."""

import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial

import pytest
import records
from shell import at_once
from sqlalchemy import text

from hpo.queue import ENDED, AttemptOutcome, DatabaseLost, Job, LeaseLost, NewJob, Queue, database
from hpo.queue.attempts import COUNTED_LIMIT

pytestmark = pytest.mark.service

SHORT, LONG = 1e-3, 3600.0  # seconds
TRIALS, REPEATS = 3, 2
SERIALIZABLE = "-c default_transaction_isolation=serializable"


def plan(queue: Queue, *, trials: int = 2, repeats: int = 1) -> None:
    """As `hpo run` does it: under a lock, and only if the study is not there."""
    with queue.lock("plan.s"):
        if "s" not in [row.name for row in queue.studies()]:
            queue.put_study(records.study_row("s"))
            jobs = [("closing", -1, 0), *(("trial", n, r) for n in range(trials) for r in range(repeats))]
            queue.put_jobs(
                "s",
                [NewJob(kind=k, number=n, repeat=r) for k, n, r in jobs],
            )


def delete(queue: Queue) -> None:
    with queue.lock("plan.s"):
        queue.delete_study("s")


@pytest.fixture
def queue(database_url) -> Iterator[Queue]:
    """That of a study of two cancelled trials."""
    made = Queue(database_url)
    made.install()
    plan(made)
    for number in (0, 1):
        made.cancel("s", number, None, by="anna")
    yield made
    made.close()


class Paused(Queue):
    """Each of its transactions waits before its commit."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.written, self.goes_on = threading.Event(), threading.Event()

    @contextmanager
    def _transaction(self):
        with super()._transaction() as connection:
            yield connection
            self.written.set()
            self.goes_on.wait(60)


def both(url: str, first: Callable[[Queue], object], second: Callable[[Queue], object]) -> list:
    """What the two give, `second` called when `first` has written and not committed."""
    paused, other = Paused(url), Queue(url)

    def call_second() -> object:
        assert paused.written.wait(60)
        threading.Timer(0.5, paused.goes_on.set).start()  # it waits for us, or has overlooked us by then
        return second(other)

    try:
        return at_once(partial(first, paused), call_second)
    finally:
        paused.close()
        other.close()


def claim(queue: Queue) -> Job | None:
    return queue.claim("s", worker="w", lease=LONG)


def undo(queue: Queue) -> list[Job]:
    return queue.undo_cancel("s", 0, None)


def retry(queue: Queue) -> list[int]:
    return queue.revive("s", trials=True)


@pytest.mark.parametrize("back", [undo, retry])
def test_a_closing_being_claimed_is_lost_to_a_trial_that_comes_back(queue, database_url, back):
    damage(queue, "UPDATE hpo.job SET state = 'dead' WHERE number = 0" if back is retry else "SELECT 1")
    closing, _ = both(database_url, claim, back)
    assert closing.kind == "closing"
    assert queue.closing_state("s") == "waiting"
    with pytest.raises(LeaseLost):
        queue.end(closing, "done", result={})
    assert claim(queue).number == 0


@pytest.mark.parametrize("back", [undo, retry])
def test_a_trial_coming_back_is_claimed_before_the_closing(queue, database_url, back):
    damage(queue, "UPDATE hpo.job SET state = 'dead' WHERE number = 0" if back is retry else "SELECT 1")
    _, claimed = both(database_url, back, claim)
    assert claimed is None or claimed.kind == "trial"
    assert queue.closing_state("s") == "waiting"


def test_a_closing_being_recorded_is_made_again_for_a_trial_that_comes_back(queue, database_url):
    closing = claim(queue)
    both(database_url, lambda first: first.end(closing, "done", result={"winner": 1}), undo)
    assert queue.closing_state("s") == "waiting"
    queue.end(claim(queue), "done", result={})
    assert claim(queue).kind == "closing"


def test_a_closing_is_not_recorded_while_a_trial_is_left_however_that_came(queue):
    closing = claim(queue)
    damage(queue, "UPDATE hpo.job SET state = 'waiting' WHERE number = 1")
    with pytest.raises(LeaseLost):
        queue.end(closing, "done", result={})


def test_a_dead_closing_waits_again_when_a_trial_comes_back(queue):
    for _ in range(COUNTED_LIMIT):
        queue.give_back(claim(queue), AttemptOutcome.FAILED, reason="y")
    assert queue.closing_state("s") == "dead"
    undo(queue)
    assert queue.closing_state("s") == "waiting"
    queue.end(claim(queue), "done", result={})
    assert claim(queue).attempt == 1, "its earlier failures are forgotten"


def test_a_worker_of_a_study_that_is_being_deleted_is_not_noted(queue, database_url):
    attend = {"trainers": 1, "device": "cpu", "stops": 0, "lease": 1.0}
    both(database_url, lambda first: first.delete_study("s"), lambda other: other.attend("w", "s", **attend))
    assert queue.workers("s") == []


BOTH = "SELECT FROM hpo.job WHERE kind = 'trial' ORDER BY id FOR UPDATE"  # as a worker renews two leases


@pytest.mark.parametrize(
    ("state", "act"),
    [("running", lambda queue: queue.delete_study("s")), ("dead", retry), ("cancelled", undo)],
)
def test_whoever_locks_several_jobs_does_so_by_their_ids(queue, database_url, state, act):
    damage(queue, f"UPDATE hpo.job SET state = '{state}', number = 0, repeat = number WHERE kind = 'trial'")
    damage(queue, "UPDATE hpo.job SET mirrored = false WHERE repeat = 0")  # it stands behind the other one now
    with queue.engine.begin() as first, ThreadPoolExecutor(2) as threads:
        first.execute(text("SELECT FROM hpo.job WHERE kind = 'trial' AND repeat = 0 FOR UPDATE"))
        others = [threads.submit(damage, queue, BOTH)]
        until_waiting(queue, 1)
        others.append(threads.submit(act, queue))
        until_waiting(queue, 2)
        first.commit()
        for other in others:
            other.result()  # no deadlock


def until_waiting(queue: Queue, count: int) -> None:
    found = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with queue.engine.connect() as connection:
        while connection.exec_driver_sql(found).scalar_one() < count:
            connection.rollback()
            time.sleep(0.02)


def damage(queue: Queue, statement: str) -> None:
    with queue.engine.begin() as connection:
        connection.execute(text(statement))


# Everything at once


class Party:
    """Whoever works on the study, or gives orders about it, at random."""

    def __init__(self, url: str, name: str, seed: str) -> None:
        self.queue, self.name, self.random = Queue(url), name, random.Random(f"{seed} {name}")
        self.rounding = self.random.choice((1.0, 1.5))  # of its kind of machine
        self.held: dict[tuple[int, int], tuple[Job, int]] = {}  # by job and fence: with its last epoch
        self.fences: dict[int, int] = {}  # by job: the highest seen
        self.recorded: list[tuple[int, int]] = []  # job and fence of the results it stored
        self.refused = 0  # times that the database took a transaction back

    def steps(self, count: int) -> None:
        actions = {
            self.claim: 8,
            self.renew: 2,
            self.train: 8,
            self.end: 4,
            self.give_back: 2,
            self.expire: 2,
            self.cancel: 4,
            self.undo: 3,
            self.retry: 1,
            self.resume: 2,
            self.stop: 1,
            self.disown: 1,
            self.delete: 0.2,
        }
        for action in self.random.choices(list(actions), weights=list(actions.values()), k=count):
            self.again(action)
            self.again(self.check)

    def again(self, action: Callable[[], None]) -> None:
        """Until the database takes it, as all callers do."""
        while True:
            try:
                return action()
            except DatabaseLost as error:
                assert "could not serialize" in str(error) or "deadlock" in str(error), error
                self.refused += 1

    def one(self) -> tuple[Job, int] | None:
        return self.random.choice(list(self.held.values())) if self.held else None

    @contextmanager
    def holding(self, job: Job) -> Iterator[None]:
        """It may have been lost; then it is dropped."""
        try:
            yield
        except LeaseLost:
            self.held.pop((job.id, job.fence), None)

    def claim(self) -> None:
        job = self.queue.claim("s", worker=self.name, lease=self.random.choice((SHORT, LONG)))
        if job is not None:
            self.held[job.id, job.fence] = job, job.checkpoint.epoch if job.checkpoint else 0

    def renew(self) -> None:
        for job in self.queue.renew([job for job, _ in self.held.values()], lease=LONG):
            del self.held[job.id, job.fence]

    def train(self) -> None:
        if (found := self.one()) is None or found[0].kind == "closing":
            return
        job, last = found
        with self.holding(job):
            epochs = range(last + 1, last + 1 + self.random.randint(1, 3))
            self.queue.add_epochs(job, [(number, number, {"val/nmse": self.rounding / number}) for number in epochs])
            self.held[job.id, job.fence] = job, epochs[-1]
            if self.random.random() < 0.5:
                self.queue.checkpoint(job, records.checkpoint(epochs[-1]))

    def end(self) -> None:
        if (found := self.one()) is None:
            return
        job, _ = found
        with self.holding(job):
            state = "done" if job.kind == "closing" else self.random.choice(("done", "diverged"))
            self.queue.end(job, state, result={"by": self.name}, reason="why")
            self.recorded.append((job.id, job.fence))
            del self.held[job.id, job.fence]

    def give_back(self) -> None:
        if (found := self.one()) is not None:
            with self.holding(found[0]):
                outcome = self.random.choice((AttemptOutcome.FAILED, AttemptOutcome.HANDED_BACK))
                self.queue.give_back(found[0], outcome, reason="why")
                del self.held[found[0].id, found[0].fence]

    def expire(self) -> None:
        self.queue.expire("s", lease=SHORT)

    def cancel(self) -> None:
        repeat = self.random.choice((None, *range(REPEATS)))
        self.queue.cancel("s", self.random.randrange(TRIALS), repeat, by=self.name)

    def undo(self) -> None:
        self.queue.undo_cancel("s", self.random.randrange(TRIALS), self.random.choice((None, *range(REPEATS))))

    def retry(self) -> None:
        self.queue.revive("s", trials=self.random.random() < 0.7)

    def resume(self) -> None:
        self.queue.resume("s")

    def stop(self) -> None:
        stops = self.queue.stop("s", by=self.name)
        assert self.queue.claim("s", worker=self.name, lease=LONG, stops=stops - 1) is None
        self.queue.orders(self.name, stops={"s": stops}, held=[job for job, _ in self.held.values()])

    def disown(self) -> None:
        self.queue.disown(self.name, [job for job, _ in self.held.values()])

    def delete(self) -> None:
        delete(self.queue)
        plan(self.queue, trials=TRIALS, repeats=REPEATS)

    def check(self) -> None:
        """What holds after each commit, whoever made it."""
        with self.queue._transaction() as connection:  # one statement: one moment
            rows = connection.execute(
                text("""
                    SELECT id, kind, state, ARRAY(SELECT fence FROM hpo.attempt WHERE job = job.id AND ended IS NULL),
                        fence, result IS NOT NULL, (checkpoint->>'epoch')::int,
                        ARRAY(SELECT number FROM hpo.epoch WHERE job = job.id ORDER BY number)
                    FROM hpo.job WHERE study = 's'
                """)
            ).all()
        left = [row for row in rows if row[1] == "trial" and row[2] not in ENDED]
        for job, kind, state, attempts, fence, result, checkpoint, epochs in rows:
            assert kind == "trial" or state == "waiting" or not left, "a trial is left of a closed study"
            assert attempts == ([fence] if state == "running" else []), "a running job has one attempt under way"
            assert fence >= self.fences.get(job, 0), "a fence never falls"
            assert result == (state in ("done", "diverged")), "whoever has ended so has a result, and nobody else"
            assert epochs == list(range(1, len(epochs) + 1)), "a curve has no gap"
            assert (checkpoint or 0) <= len(epochs), "a checkpoint is of a stored epoch"
            self.fences[job] = fence


def at_random(url: str, *, parties: int, steps: int, serializable: bool) -> None:
    seed = secrets.token_hex(4)
    print(f"seed {seed}")  # pytest shows it when something fails; who came first stays chance
    queue = Queue(url)
    queue.install()
    plan(queue, trials=TRIALS, repeats=REPEATS)
    people = [Party(url, f"party-{number}", seed) for number in range(parties)]
    try:
        at_once(*[partial(party.steps, steps) for party in people])
        kinds = {job.id: job.kind for job in queue.jobs("s")}
        recorded = [each for party in people for each in party.recorded]
        assert len(recorded) == len(set(recorded)), "each claim records once"
        trials = [job for job, _ in recorded if kinds.get(job) == "trial"]
        assert len(trials) == len(set(trials)), "a trial has one result for ever"
        assert recorded, "nothing was done"
        if not serializable:
            assert sum(party.refused for party in people) == 0, "nobody waits in a circle"
        finish(queue)
    finally:
        for each in [queue, *(party.queue for party in people)]:
            each.close()


def finish(queue: Queue) -> None:
    """One worker more leads the study to its end, whatever state the others left it in."""
    for job in queue.jobs("s"):
        if job.state == "running":
            damage(queue, f"UPDATE hpo.job SET lease_until = 'epoch' WHERE id = {job.id}")
    for _ in range(1000):
        if all(job.state in ENDED for job in queue.jobs("s")):
            break
        queue.resume("s")  # so many trials failed that it may pause at any claim
        if (job := queue.claim("s", worker="last", lease=SHORT)) is not None:
            with suppress(LeaseLost):
                queue.end(job, "done", result={})
    states = {job.kind: job.state for job in queue.jobs("s")}
    assert states["closing"] in ("done", "dead")
    assert all(job.state in ENDED for job in queue.jobs("s"))


@pytest.mark.parametrize("serializable", [False, True])
def test_whatever_several_do_to_a_study_at_once_its_rows_agree(database_url, monkeypatch, serializable):
    if serializable:
        monkeypatch.setattr(database, "ISOLATION", "SERIALIZABLE")
    at_random(database_url, parties=4, steps=400, serializable=serializable)


@pytest.mark.long
@pytest.mark.parametrize("serializable", [False, True])
def test_whatever_several_do_for_long_to_a_study_its_rows_agree(database_url, monkeypatch, serializable):
    if serializable:
        monkeypatch.setattr(database, "ISOLATION", "SERIALIZABLE")
    for _ in range(5):
        at_random(database_url, parties=8, steps=400, serializable=serializable)
        clean = Queue(database_url)
        clean.delete_study("s")
        clean.close()


def test_the_servers_default_isolation_changes_nothing(database_url):
    queue = Queue(database_url)
    with queue.engine.begin() as connection:
        name = connection.scalar(text("SELECT current_database()"))
        connection.execute(text(f"ALTER DATABASE {name} SET default_transaction_isolation = 'repeatable read'"))
    queue.engine.dispose()
    with queue.engine.begin() as connection:
        assert connection.scalar(text("SHOW transaction_isolation")) == "read committed"
    queue.close()
