"""Workers of `bench/fleet.py`: everything of a worker that the database sees, and no training.

Each one is a thread that calls the queue's and the reconciler's own functions, at a worker's own intervals. A trial
takes as long as a recorded one, and each epoch is stored. Results go to Optuna's tables too. In MLflow's place is a
client that takes all and sends nothing.
"""

import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import sqlalchemy
from mlflow.store.entities import PagedList
from sqlalchemy.pool import QueuePool

from hpo.queue import (
    AttemptOutcome,
    Checkpoint,
    DatabaseLost,
    Job,
    LeaseLost,
    Queue,
    State,
    TrialResult,
    engine_arguments,
    postgres_url,
)
from hpo.recording.reconciler import Reconciler
from hpo.recording.recorder import FORWARD_INTERVAL, RECONCILE_INTERVAL
from hpo.study.records import NETWORK
from hpo.worker.claims import CLAIM_PAUSE
from hpo.worker.crew import BACKLOG
from hpo.worker.supervisor import FLUSH_INTERVAL
from hpo.worker.worker import LOCK_PATIENCE
from models.metrics import SCORES, Scores

# Seconds of ten trials of the grid, 300 epochs each, on one core: docs/tutorial/first-study.md shows them.
DURATIONS = (51, 118, 32, 396, 118, 69, 247, 394, 139, 190)
EPOCHS = 300
FILES = 10  # of a model
VALIDATION = 78  # images, of whose predictions a result holds the errors
TRAINED = "x" * 2000  # characters of a trainer's last message


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What the workers of a process have in common."""

    database_url: str
    study: str
    workers: int  # of this process
    process: int  # its number
    faster: float  # than recorded: trials, checkpoints, preemptions and deaths
    lease: float  # seconds
    checkpoint_interval: float  # seconds, as recorded
    preemption: float  # mean seconds until a worker has to hand back, as recorded
    death: float  # mean seconds until a worker dies without a word, as recorded
    ramp: float  # seconds in which the workers begin, before the window
    window: float  # seconds that are measured
    connections: int  # at most, of this process


@dataclass
class Seen:
    """What the workers of a process did."""

    claims: list[tuple[float, float]] = field(default_factory=list)  # when (monotonic), and how many seconds it took
    ended: list[tuple[float, int]] = field(default_factory=list)  # when a result was acknowledged, and of which job
    late: list[tuple[float, float]] = field(default_factory=list)  # when something was due, and how much later it began
    died: list[str] = field(default_factory=list)  # names of workers
    handed_back: int = 0
    leases_lost: int = 0
    errors: list[str] = field(default_factory=list)  # of the database


class Nowhere:
    """Takes what a Tracker takes, and sends nothing."""

    uri = ""
    client = SimpleNamespace(search_logged_models=lambda *_, **__: PagedList([], None))

    def ensure_run(self, *_: Any, **__: Any) -> str:
        """Return the id of a run."""
        return secrets.token_hex(16)

    def nothing(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    delete_other_runs = log_dataset = log_epochs = set_status = set_tags = delete_artifact = ping = nothing


class Shared:
    """Connections of one process, its clock, and what is seen."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.seen = fleet, Seen()
        pool = {"pool_size": fleet.connections // 2, "max_overflow": 0, "pool_timeout": 120, "pool_use_lifo": True}
        self.queue = Queue(fleet.database_url)
        self.queue.engine = sqlalchemy.create_engine(postgres_url(fleet.database_url), **engine_arguments(), **pool)
        patience = min(LOCK_PATIENCE, fleet.lease / 3)
        self.store = optuna.storages.RDBStorage(
            postgres_url(fleet.database_url).render_as_string(hide_password=False),
            engine_kwargs={"poolclass": QueuePool} | engine_arguments(patience=patience) | pool,
        )
        self.row = self.queue.study(fleet.study)
        self.threads = ThreadPoolExecutor(2 * fleet.workers)  # a worker's recorder has two
        names = self.row.facts.data.target_names
        means = dict.fromkeys(SCORES, 0.123456789)
        scores = Scores(**means, per_target={score: [0.123456789] * len(names) for score in SCORES})
        self.result = TrialResult(
            **dict.fromkeys(("best_val_nmse", "best_val_mse", "last_val_nmse", "last_val_mse"), 0.123456789),
            best_epoch=EPOCHS,
            validation=scores,
            last_validation=scores,
            epochs=EPOCHS,
            seconds=sum(DURATIONS) / len(DURATIONS),
            target_names=names,
            model_id=f"m-{'0' * 32}",
            files={f"data/file-{number}": "0" * 64 for number in range(FILES)},
        )
        self.errors = np.random.default_rng(0).random((VALIDATION, len(names)))
        self.begin = self.end = 0.0  # of the ramp, and of the window; monotonic seconds

    def close(self) -> None:
        """Wait for what is being recorded, and close the connections."""
        self.threads.shutdown()
        self.queue.close()
        self.store.engine.dispose()


class Lane:
    """Tasks of one worker that are done one after the other, as by one thread of its recorder."""

    def __init__(self, shared: Shared) -> None:
        self._shared, self._tasks = shared, deque[Callable[[], object]]()
        self._changed, self._is_busy, self.is_dead = threading.Condition(), False, False

    def put(self, task: Callable[[], object]) -> None:
        with self._changed:
            self._tasks.append(task)
            if not self._is_busy:
                self._is_busy = True
                self._shared.threads.submit(self._work)

    @property
    def idle(self) -> bool:
        return not self._is_busy

    def wait(self) -> None:
        """Wait until all is done."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_busy)

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._tasks or self.is_dead:
                    self._is_busy = False
                    self._changed.notify_all()
                    return
                task = self._tasks.popleft()
            try:
                while not self.is_dead and not attempted(self._shared.seen, task):
                    time.sleep(0.5)
            except LeaseLost:
                self._shared.seen.leases_lost += 1


def attempted(seen: Seen, task: Callable[[], object]) -> bool:
    """Do a task; return whether the database took it."""
    try:
        task()
    except (DatabaseLost, sqlalchemy.exc.TimeoutError) as error:
        seen.errors.append(str(error)[:200])
        return False
    return True


class Life:
    """One worker, with one trainer, from its start until it leaves or dies."""

    def __init__(self, shared: Shared, number: int, draw: random.Random, *, is_first: bool) -> None:
        """`is_first`: its first trial has begun long ago, so that a fleet need not get into its stride."""
        self.shared, self.fleet, self.queue, self.seen = shared, shared.fleet, shared.queue, shared.seen
        self.name = f"host{self.fleet.process}-{number}:{secrets.token_hex(6)}"
        self._draw, self._is_first = draw, is_first
        tracker: Any = Nowhere()
        self.reconciler = Reconciler(self.queue, tracker, shared.store, shared.row, worker=self.name)
        self.results, self.housekeeping = Lane(shared), Lane(shared)
        self.job: Job | None = None  # in training
        self.held: list[Job] = []  # that one, and those that are being recorded
        self._since = self._pace = 0.0  # when the first epoch began, or would have, and the seconds of an epoch
        self._stored = self._saved = 0  # epochs in the database, and in the last checkpoint
        self._may_expire = False
        now = time.monotonic()
        self._due = {self._renew: now, self._claim: now, self._flush: now}
        interval = self.fleet.checkpoint_interval / self.fleet.faster
        self._due |= {self._save: now + interval * draw.random(), self._forward: now + FORWARD_INTERVAL * draw.random()}
        self._due |= {self._reconcile: now + RECONCILE_INTERVAL * draw.random()}

    def run(self) -> None:
        """Work until the time is over, the worker is preempted, or dies."""
        now, fleet = time.monotonic(), self.fleet
        preempted = now + self._draw.expovariate(fleet.faster / fleet.preemption)
        dies = now + self._draw.expovariate(fleet.faster / fleet.death)
        end = min(preempted, dies, self.shared.end)
        while True:
            action, at = min(self._due.items(), key=lambda item: item[1])
            time.sleep(max(0.0, min(at, end) - time.monotonic()))
            if (now := time.monotonic()) >= end:
                break
            self.seen.late.append((at, now - at))
            self._due[action] = now + 1.0  # unless it says otherwise
            try:
                if not attempted(self.seen, action):
                    self._due[action] = now + 0.25
            except LeaseLost:
                self._lose()
        if end == dies:
            self.seen.died.append(self.name)
            self.results.is_dead = self.housekeeping.is_dead = True
            return
        while not attempted(self.seen, self._leave):
            time.sleep(0.25)

    def _renew(self) -> None:
        now = time.monotonic()
        lost = self.queue.renew(list(self.held), lease=self.fleet.lease)
        if any(job is self.job for job in lost):
            self._lose()
        study, stops = self.fleet.study, self.shared.row.stops
        self._may_expire = self.queue.attend(
            self.name, study, trainers=1, device="cpu", stops=stops, lease=self.fleet.lease
        )
        self._due[self._renew] = now + self.fleet.lease / 6

    def _lose(self) -> None:
        self.seen.leases_lost += 1
        if self.job in self.held:
            self.held.remove(self.job)
        self.job, self._due[self._claim] = None, time.monotonic()
        self._due.pop(self._end, None)

    def _claim(self) -> None:
        begin = time.monotonic()
        self._due[self._claim] = begin + CLAIM_PAUSE
        if self.job is not None or len(self.held) > 1 + BACKLOG:
            return
        row = self.shared.row
        job = self.queue.claim(
            row.name,
            worker=self.name,
            lease=self.fleet.lease,
            stops=row.stops,
            created_at=row.created_at,
            take_over=self._may_expire,
        )
        now = time.monotonic()
        self.seen.claims.append((begin, now - begin))
        if job is None:
            self.queue.closing_state(row.name, created_at=row.created_at)
            return
        begun, self._pace = 0, DURATIONS[job.number % len(DURATIONS)] / self.fleet.faster / EPOCHS
        if self._is_first:  # of all trials that run at some moment, long ones are more
            self._pace = self._draw.choices(DURATIONS, DURATIONS)[0] / self.fleet.faster / EPOCHS
            begun, self._is_first = self._draw.randrange(EPOCHS), False
        self._stored = self._saved = 0 if job.checkpoint is None else job.checkpoint.epoch
        self._since = now - max(begun, self._saved) * self._pace
        self.job = job
        self.held.append(job)
        self.results.put(lambda: self._show(job))
        self._due[self._end] = self._since + EPOCHS * self._pace

    def _show(self, job: Job) -> None:
        """Bring Optuna in line with a job."""
        current = self.queue.job(job.id)
        if current is not None:
            self.reconciler.reconcile_job(current)

    def _flush(self) -> None:
        """Store the epochs that are over, and ask for orders."""
        self._store()
        self.queue.orders(self.name, stops={self.fleet.study: self.shared.row.stops}, held=list(self.held))
        self._due[self._flush] = time.monotonic() + FLUSH_INTERVAL

    def _store(self) -> None:
        if self.job is None:
            return
        over = min(EPOCHS, int((time.monotonic() - self._since) / self._pace + 1e-6))
        ms, value = time.time_ns() // 1_000_000, self._draw.random()
        scores = {f"{split}/{score}": value for split in ("train", "val") for score in ("nmse", "mse")}
        scores |= {"learning_rate": 1e-3, "seconds": self._pace}
        if over > self._stored:
            self.queue.add_epochs(self.job, [(epoch, ms, scores) for epoch in range(self._stored + 1, over + 1)])
            self._stored = over

    def _save(self) -> None:
        """Commit a checkpoint."""
        job, epoch = self.job, self._stored
        self._due[self._save] = time.monotonic() + self.fleet.checkpoint_interval / self.fleet.faster
        if job is not None and epoch > self._saved:
            self._saved = epoch
            self.results.put(lambda: self._commit(job, epoch))

    def _commit(self, job: Job, epoch: int) -> None:
        current = self.queue.require(job)
        path = f"checkpoints/checkpoint-{epoch:06d}-{job.fence}.safetensors"
        checkpoint = Checkpoint(path=path, sha256="0" * 64, epoch=epoch, run_id=self.reconciler.ensure_run(current))
        self.queue.checkpoint(job, checkpoint)

    def _forward(self) -> None:
        """Send the epochs of the running trial."""
        self._due[self._forward] = time.monotonic() + FORWARD_INTERVAL
        job = self.job
        if job is not None and self.results.idle:
            self.housekeeping.put(lambda: self._send(job))

    def _send(self, job: Job) -> None:
        if (current := self.queue.job(job.id)) is not None:
            self.reconciler.update_judged(current)
            if current.run_id is not None:
                self.reconciler.send_epochs(current, current.run_id)

    def _reconcile(self) -> None:
        self._due[self._reconcile] = time.monotonic() + RECONCILE_INTERVAL
        lease, expire = self.fleet.lease, self._may_expire
        if self.housekeeping.idle:
            self.housekeeping.put(lambda: self.reconciler.reconcile(lease=lease, older_than=lease, expire=expire))

    def _end(self) -> None:
        """Hand over a trial whose last epoch is over, and claim the next one."""
        job = self.job
        if job is not None:
            self._store()
            self.queue.set_trained(job, TRAINED)
            self.results.put(lambda: self._record(job))
            self.job = None
        del self._due[self._end]
        self._due[self._claim] = time.monotonic()

    def _record(self, job: Job) -> None:
        self.queue.cut(job, EPOCHS)
        self.queue.require(job)
        self.queue.curve(job.id)
        self.queue.end(job, State.DONE, result=self.shared.result, validation={NETWORK: self.shared.errors})
        self.seen.ended.append((time.monotonic(), job.id))
        self.held.remove(job)
        self.results.put(lambda: self._show(job))

    def _leave(self) -> None:
        """Hand the trial back with its checkpoint."""
        self.results.wait()
        self.housekeeping.wait()
        if (job := self.job) is not None:
            try:
                self._store()
                if self._stored > self._saved:
                    self._commit(job, self._stored)
                self.queue.give_back(job, AttemptOutcome.HANDED_BACK, reason="handed back")
                self._show(job)
                self.seen.handed_back += 1
            except LeaseLost:
                self.seen.leases_lost += 1
            self.job = None
        self.queue.leave(self.name)


def work(fleet: Fleet, ready: Any, go: Any, begin: Any, seen: Any) -> None:
    """Be the workers of one process, from `begin` on; put what they did into `seen`."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    shared = Shared(fleet)
    ready.release()
    go.wait()
    shared.begin = begin.value
    shared.end = shared.begin + fleet.ramp + fleet.window

    def lives(number: int) -> None:
        draw = random.Random(f"{fleet.study}/{fleet.process}/{number}")
        time.sleep(max(0.0, shared.begin + draw.random() * fleet.ramp - time.monotonic()))
        is_first = True
        while time.monotonic() < shared.end:
            Life(shared, number, draw, is_first=is_first).run()
            is_first = False

    threads = [threading.Thread(target=lives, args=(number,)) for number in range(fleet.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shared.close()
    seen.put(shared.seen)
