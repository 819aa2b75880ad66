"""The supervisor: claims trials, hands them to trainers, renews leases, gives back what it cannot finish.

Torch-free. The main thread owns leases and trainers, and nothing that it does grows with what there is to do: one more
thread waits for MLflow (`hpo.recording.recorder`), another one judges epochs (`hpo.search.pruning`), and a process
chooses points (`hpo.worker.suggester`). The threads share `hpo.recording.holdings` and, in `returns`, the jobs to be
given back.
"""

import fcntl
import logging
import os
import re
import secrets
import selectors
import shutil
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from hpo import crash, study
from hpo.closing.steps import Closing
from hpo.errors import NotFound, ServiceError
from hpo.queue import ATTEMPTS, ENDED, DatabaseLost, Job, LeaseLost, Queue, State, Stop, require_whole
from hpo.recording import tasks
from hpo.recording.holdings import Holdings
from hpo.recording.reconciler import Mirror
from hpo.recording.recorder import Recorder
from hpo.search import sampling
from hpo.search.pruning import Pruning
from hpo.services import daemon, home
from hpo.settings import Settings
from hpo.study.records import TrialSpec
from hpo.tracking import data_sets
from hpo.tracking.client import Tracker, TrackingUnavailable
from hpo.worker.processes import Child, Suggester, Trainer, next_gpu, open_log, visible_gpus
from models import weights

TICK = 0.25  # seconds between two looks at the clock
FLUSH_INTERVAL = 1.0  # seconds an epoch may wait for the database
CLAIM_PAUSE = 1.0  # seconds between two looks into an empty queue
STOP_GRACE = 3.0  # seconds a trainer has to hand back its state
LOCK_PATIENCE = 1.0  # seconds to wait for a lock in Optuna's tables, at most; then the recorder tries again
STOP_LIMIT = 7.0  # seconds from the signal to the end of the process
START_ATTEMPTS = 3  # trainers in a row that may end before they are ready
ROOM = 64 * 2**20  # bytes that must be free under HPO_HOME before a trial is claimed after the disk was full
SLEPT = 5.0  # seconds; a longer turn of the loop means that the whole worker was stopped
SILENT_HOST = 7 * 86400.0  # seconds another host's worker is not heard of until its folder counts as left
WORK_FOLDER = re.compile(r"(?P<host>.+)-\d+-[0-9a-f]{6}")  # HOST-PROCESS-RANDOM
OUT_OF_TIME = "--max-hours is over"

log = logging.getLogger("hpo")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a worker leaves though its study is not closed; None: never."""

    trials: int | None = None  # taken by it; it leaves when they have ended
    seconds: float | None = None  # since its start; what it trains then is handed back
    idle: float | None = None  # seconds without anything to take; time in which it cannot ask does not count


NO_LIMITS = Limits()


class Supervisor:
    """One worker of one study. `run` returns when the study is closed, when stopped, or at a limit."""

    def __init__(
        self,
        settings: Settings,
        database_url: str,
        tracking_uri: str,
        name: str,
        *,
        trainers: int,
        device: str = "cpu",
        stops: int | None = None,
    ) -> None:
        """`stops`: how often the study had been stopped when this worker was asked for, if that was earlier."""
        self.settings, self.count, self.device = settings, trainers, device
        self.gpus = [] if device == "cpu" else visible_gpus()
        self.queue = Queue(database_url)
        self.row = self.queue.study(name)
        require_whole(self.row)
        if stops is not None:
            self.row = replace(self.row, stops=min(stops, self.row.stops))
        self.study = study.restore(name, self.row.spec)
        # The job's row is locked while Optuna is written: if somebody locks a table of Optuna, the lease must not wait.
        self.store = sampling.storage(database_url, patience=min(LOCK_PATIENCE, settings.lease / 3))
        self.tracker = Tracker(tracking_uri)  # of the recorder's thread, once that runs
        with suppress(TrackingUnavailable):  # it may be away for now
            self.tracker.require_version()
        self.process = f"{os.getpid()}-{secrets.token_hex(3)}"
        self.worker = f"{socket.gethostname()}:{self.process}"
        self.mirror = Mirror(self.queue, self.tracker, self.store, self.row, worker=self.worker)
        store = settings.home / "artifacts" if settings.embedded else None
        self.recorder = Recorder(self.mirror, lease=settings.lease, patience=settings.outage_limit, store=store)
        self.holdings = Holdings(self.queue)
        self.returns: deque[tuple[Job, str, bool]] = deque()  # job, reason, whether the attempt counts
        self.trainers: list[Trainer] = []
        self.stopping: str | None = None  # why
        self.asked: Stop | None = None  # by whom, if `hpo stop` is why
        self._error: ServiceError | None = None  # what ends this worker, once everything is given back
        self.hurry = False
        self.claimed = 0
        self.pruning = Pruning(self.queue, self.row.name, self.study)
        self._database_url = database_url
        self._suggester: Suggester | None = None
        self._closing: Closing | None = None
        self._stillborn = 0  # trainers in a row that ended before they were ready
        self._pointless = 0  # suggesters in a row that ended before they had chosen a point
        self._unsure = False  # whether a claim may have been made that we never heard of
        self._full = False  # whether a trainer found the disk full
        self._fetches = self._sound = 0  # how often the data set was fetched again; and when it was last found sound
        self._no_data: ServiceError | None = None  # why there is none to be had; set by the recorder's thread
        self._idle_since: float | None = None  # when the queue first had nothing for us
        self._stop_at = self._next_renewal = self._next_flush = self._next_claim = 0.0

    def run(self, *, limits: Limits = NO_LIMITS, on_tick: Callable[["Supervisor"], None] | None = None) -> bool:
        """Work until the study is closed; whether it is."""
        self.limits, self._began = limits, time.monotonic()
        with _for_us_alone(), self._work_folder(), self._signals(), selectors.DefaultSelector() as self._selector:
            for file in self.row.facts.get("weights", {}).values():
                weights.find(file["name"])  # before a trial is claimed that this machine cannot train
            self.data = data_sets.fetch(self.settings.home, self.tracker, self.row)
            self.recorder.start()
            if self.pruning.active:
                self.pruning.start()
            with open_log(self.settings.home, f"worker-{self.process}") as self.log:
                try:
                    closed = self._loop(on_tick)
                    if self._error is not None:
                        raise self._error
                    return closed
                finally:
                    self._leave()

    def stop(self, reason: str) -> None:
        """Give everything back and end; at a second Ctrl-C, at once. (SLURM sends each SIGTERM twice.)"""
        if self.stopping is None:
            self.stopping, self._stop_at = reason, time.monotonic()
        elif reason == "SIGINT":
            self.hurry = True

    def _end_for(self, error: ServiceError) -> None:
        """Give everything back, each trial with the state it has now, and end with this error."""
        if self._error is None:
            self._error = error
            self.stop("error")

    # The loop

    def _loop(self, on_tick: Callable[["Supervisor"], None] | None) -> bool:
        before = time.monotonic()
        while True:
            for key, _ in self._selector.select(TICK):
                if isinstance(key.data, Suggester):
                    self._read_points(key.data)
                else:
                    self._read(key.data)
            now = time.monotonic()
            if now - before > SLEPT:  # we were stopped as a whole: no trainer hung
                for child in self._children():
                    child.last_event = now
            before = now
            try:
                ended = self._turn(now)
                if ended is not None:
                    return ended
            except DatabaseLost as error:
                self._unsure, self._idle_since = True, None
                self.recorder.note(error)
                if self.stopping is not None and (self.hurry or now - self._stop_at > STOP_LIMIT):
                    return False
                time.sleep(TICK)
            if on_tick is not None:
                on_tick(self)

    def _turn(self, now: float) -> bool | None:
        """What is due now; whether the study is closed if the work ends, else None."""
        if self._unsure:
            self.queue.disown(self.worker, self.holdings.jobs())
            self._unsure = False
        if now >= self._next_renewal:  # before anything is written of jobs that may be lost
            for job in self.queue.renew(self.holdings.jobs(), lease=self.settings.lease):
                self._lost(job)
            self._attend()
            self._next_renewal = now + self.settings.lease / 6
        if now >= self._next_flush:
            if self.holdings.flush_some(self.holdings.jobs()):
                self._next_flush = now + FLUSH_INTERVAL
            self._obey()
            self.pruning.look([job for job in self.holdings.jobs() if job.kind == "trial"])
        self._prune()
        self._mind_recorder()
        self._give_back()
        self._end_hung(now)
        if self.stopping is not None:
            return False if self._stopped(now) else None
        if self.limits.seconds is not None and now - self._began > self.limits.seconds:
            self.stop(OUT_OF_TIME)
            return None
        if self.holdings.jobs():
            self._idle_since = None
        elif self._has_its_trials() or self._is_idle(now):
            return self._finished()
        if now >= self._next_claim:
            if self._finished():
                return True
            self._next_claim = now + CLAIM_PAUSE  # a trainer that gets free sets it back
            self._claim(now)
        return None

    def _finished(self) -> bool:
        state = self.queue.closing_state(self.row.name)
        if state is None:
            raise NotFound(f"The study {self.row.name} was deleted meanwhile.")
        return state in ENDED

    def _has_its_trials(self) -> bool:
        return self.limits.trials is not None and self.claimed >= self.limits.trials

    def _is_idle(self, now: float) -> bool:
        limit, since = self.limits.idle, self._idle_since
        return limit is not None and since is not None and now - since > limit

    def _claim(self, now: float) -> None:
        """Give work to every free trainer, as far as there is some."""
        recorder = self.recorder
        away = recorder.outage > self.settings.outage_limit or recorder.store_full or recorder.refusing
        if away or not self._room():
            self._idle_since = None
            return
        while len(self.trainers) < self.count:
            trainer = Trainer(self.log, gpu=next_gpu(self.gpus, [other.gpu for other in self.trainers]))
            self.trainers.append(trainer)
            self._selector.register(trainer, selectors.EVENT_READ, trainer)
        for trainer in self.trainers:
            if not trainer.free or self._has_its_trials():
                continue
            job = self.queue.claim(
                self.row.name,
                worker=self.worker,
                lease=self.settings.lease,
                stops=self.row.stops,
                take_over=self.recorder.calm,
            )
            if job is None:
                kept_off = not self.recorder.calm and self.queue.expired(self.row.name, lease=self.settings.lease)
                self._idle_since = None if kept_off else self._idle_since or now
                return
            self.holdings.add(job)
            self.claimed += job.kind == "trial"
            trainer.fetches = self._fetches
            self._begin(trainer, job)

    def _begin(self, trainer: Trainer, job: Job) -> None:
        if job.verdict is not None:
            log.info("%s was %s", job.title, job.verdict)
            self.recorder.put(job, partial(self._end, job, "pruned", {"epoch": job.epochs}, job.verdict))
            return
        if job.attempt > 1:
            log.warning("%s: %s, attempt %d of %d", job.title, job.reason, job.attempt, ATTEMPTS)
        if job.kind == "closing":
            log.info("closing of %s begins", job.study)
            crash.at("closing claimed")
            trainer.reserve(job)
            groups = list(self.study.report_by)
            self._closing = Closing(self.mirror, job, self._folder(job), self.data, groups, lease=self.settings.lease)
            self.recorder.put(job, partial(self._closing.fetch, partial(self._score_next, trainer, self._closing)))
            return
        if job.spec is None:
            self._choose(trainer, job)
            return
        self._begin_trial(trainer, job)

    def _begin_trial(self, trainer: Trainer, job: Job) -> None:
        assert job.spec is not None
        point = " ".join(f"{key}={value}" for key, value in job.spec["point"].items())
        log.info("%s claimed: %s", job.title, point)
        crash.at("claimed")
        trainer.reserve(job)
        if job.checkpoint is None and not job.spec.get("starts_from"):
            self._train(trainer, job, None, None)
        else:
            self.recorder.put(job, partial(self._fetch_and_train, trainer, job))
        self.recorder.put(job, partial(tasks.show, self.mirror, job.id))

    def _choose(self, trainer: Trainer, job: Job) -> None:
        """Let the sampler choose the point of a slot, in a process of its own: it takes longer with every trial."""
        if self._suggester is None:
            self._suggester = Suggester(self.log)
            self._selector.register(self._suggester, selectors.EVENT_READ, self._suggester)
        trainer.reserve(job)
        self._suggester.ask(trainer, job, database_url=self._database_url)

    def _train(self, trainer: Trainer, job: Job, checkpoint: Path | None, start: Path | None) -> None:
        with suppress(OSError):
            os.utime(self.data)  # in use: no cache to be cleared
        trainer.send(
            "train",
            spec=job.spec.to_json() if job.spec else None,
            data=str(self.data),
            checkpoint=str(checkpoint) if checkpoint else None,
            start=str(start) if start else None,
            cache=str(self.settings.home / "cache" / "features"),
            device=self.device,
            folder=str(self._folder(job)),
            checkpoint_interval=self.settings.checkpoint_interval,
        )

    def _lost(self, job: Job) -> None:
        """This job's row is not ours any more: stop, and write nothing more of it."""
        if job not in self.holdings:
            return
        current = self.queue.job(job.id)
        self._drop(job)
        cancelled = current is not None and current.state == "cancelled"
        if cancelled:  # shown after what is being recorded of it right now
            self.recorder.put(job, partial(tasks.show, self.mirror, job.id))
        if current is not None and current.fence == job.fence and current.state in ("done", "diverged", "pruned"):
            return  # it ended by our own hand, and only the answer was lost
        if any((each.id, each.fence) == (job.id, job.fence) for each, *_ in self.returns):
            return  # it goes back, or went back and only the answer was lost
        why = current.reason if current is not None and cancelled else "lost its lease"
        log.warning("%s: %s, stopping", job.title, why)
        if self._suggester is not None and self._suggester.answered(job.id, job.fence):
            return
        for trainer in self.trainers:  # none has it while it is recorded
            if trainer.has(job):
                trainer.kill()

    def _obey(self) -> None:
        """Do what people ask: leave, drop cancelled trials."""
        stop, cancelled = self.queue.orders(self.row.name, stops=self.row.stops, held=self.holdings.jobs())
        for job in cancelled:
            self._lost(job)
        if stop is not None and self.stopping is None:
            self.asked = stop
            log.warning("%s asked the workers of %s to stop: giving trials back", stop.by, self.row.name)
            self.stop("hpo stop")

    def _attend(self) -> None:
        """Say that we are here, and learn whether leases that ran out may be taken over."""
        self.recorder.calm = self.queue.attend(
            self.worker,
            self.row.name,
            trainers=self.count,
            device=self.device,
            stops=self.row.stops,
            lease=self.settings.lease,
        )
        with suppress(OSError):
            os.utime(self.folder / "lock")  # for hosts that do not see that it is locked

    def _prune(self) -> None:
        """Ask trainers to hand back trials that the pruner ends."""
        for trainer in self.trainers:
            if trainer.task == "train" and trainer.job and not trainer.asked and self.pruning.reason(trainer.job):
                trainer.ask()

    def _mind_recorder(self) -> None:
        """Act on what the recorder's thread found out."""
        if not self.recorder.is_alive():
            raise ServiceError("The thread that records results has ended unexpectedly. The same command goes on.")
        if self.recorder.stuck:
            self._end_for(
                ServiceError(
                    f"No result can be recorded any more. {self.recorder.stuck}. Everything is given back, and an "
                    f"attempt is counted of the trials whose results were refused: after {ATTEMPTS} they are dead. "
                    "When the cause is gone, the same command goes on (with --retry for dead trials); if it is this "
                    "trial alone, `hpo cancel` lets its study close without it."
                )
            )
        if self._no_data is not None:
            self._end_for(self._no_data)
        while self.recorder.lost:
            self._lost(self.recorder.lost.popleft())
        while self.recorder.failures:
            job, reason, full = self.recorder.failures.popleft()
            self._full = self._full or full
            self.returns.append((job, reason, not full))
            for trainer in self.trainers:
                if trainer.has(job):
                    if trainer.task == "reserved":
                        trainer.release()
                    else:
                        trainer.kill()
        self.recorder.live = [job for job in self.holdings.jobs() if job.kind == "trial"]

    def _give_back(self) -> None:
        """Return jobs to the queue; what the database does not take now waits for the next turn."""
        while self.returns:
            job, reason, counts = self.returns[0]
            if job in self.holdings:
                if not self.holdings.flush_some([job]):
                    return
                with suppress(LeaseLost):
                    self.queue.give_back(job, reason=reason, counts=counts)
                self._drop(job)
                self.recorder.put(job, partial(tasks.show, self.mirror, job.id))
            self.returns.popleft()
            self._next_claim = 0.0

    def _drop(self, job: Job) -> None:
        self.holdings.drop(job)
        shutil.rmtree(self._folder(job), ignore_errors=True)

    def _end_hung(self, now: float) -> None:
        limit = self.settings.hang_timeout
        for trainer in self.trainers:
            if trainer.job and trainer.task in ("train", "score") and now - trainer.last_event > limit:
                log.warning("%s: no progress for %.0f s", trainer.job.title, limit)
                trainer.kill(f"no progress for {limit:.0f} s")
        suggester = self._suggester
        if suggester is not None and suggester.waiting and now - suggester.last_event > limit:
            suggester.kill(f"no progress for {limit:.0f} s")

    def _children(self) -> list[Child]:
        return [*self.trainers, *([self._suggester] if self._suggester is not None else [])]

    # Events of trainers

    def _read(self, trainer: Trainer) -> None:
        for event in trainer.events():
            kind, job = event.pop("event"), trainer.job
            if kind == "ready":
                trainer.ready, self._stillborn, self._next_claim = True, 0, 0.0
                continue
            if kind in ("trained", "returned", "diverged", "failed", "full", "spoiled"):
                trainer.release()
                self._next_claim = 0.0
            if job is not None and job in self.holdings:
                getattr(self, f"_on_{kind}")(trainer, job, **event)
        if trainer.closed:
            self._on_exit(trainer)

    def _read_points(self, suggester: Suggester) -> None:
        for event in suggester.events():
            kind = event.pop("event")
            if kind == "ready" or (answered := suggester.answered(event["job"], event["fence"])) is None:
                continue
            trainer, job = answered
            self._next_claim, self._pointless = 0.0, 0
            if job not in self.holdings:
                continue
            if kind == "filled":
                job = replace(job, spec=TrialSpec.from_json(event["spec"]), cost=event["cost"])
                self.holdings.add(job)
                self._begin_trial(trainer, job)
            elif kind == "lost":
                self.recorder.lost.append(job)
            elif kind == "away":
                self.returns.append((job, "the sampler could not reach the database", False))
            else:
                self.returns.append((job, event["reason"], True))
        if suggester.closed:
            self._on_exit_of(suggester)

    def _on_exit_of(self, suggester: Suggester) -> None:
        """Its jobs wait again, and no attempt is counted: it has not come to a training."""
        self._selector.unregister(suggester)
        self._suggester = None
        reason = suggester.obituary()
        suggester.close()
        for trainer, job in suggester.waiting.values():
            if trainer.has(job):
                trainer.release()
            self.returns.append((job, reason, False))
        log.warning("%s; another one is started when it is needed", reason)
        self._pointless += 1
        if self._pointless >= START_ATTEMPTS:
            self._end_for(ServiceError(f"No point can be chosen: {reason}. Its log: {self.log.name}"))

    def _on_started(self, trainer: Trainer, job: Job, *, epoch: int, parameters: int) -> None:
        self._sound = self._fetches
        if epoch:
            log.info("%s goes on after epoch %d", job.title, epoch)

    def _on_alive(self, trainer: Trainer, job: Job) -> None:
        """An epoch takes long; that something came is all that counts."""

    def _on_epoch(self, trainer: Trainer, job: Job, *, number: int, at: int, metrics: dict[str, float]) -> None:
        self.holdings.put_epoch(job, (number, at, metrics))

    def _on_checkpoint(self, trainer: Trainer, job: Job, *, path: str, epoch: int, sha256: str) -> None:
        task = partial(tasks.store_checkpoint, self.mirror, self.holdings, job, Path(path))
        self.recorder.put(job, partial(task, epoch=epoch, sha256=sha256))

    def _on_returned(self, trainer: Trainer, job: Job, *, epoch: int) -> None:
        if reason := self.pruning.reason(job):
            log.info("%s pruned after epoch %d", job.title, epoch)
            self.recorder.put(job, partial(self._end, job, "pruned", {"epoch": epoch}, reason))
            return
        log.info("giving %s back after epoch %d", job.title, epoch)
        self.recorder.put(job, partial(self.returns.append, (job, "handed back", False)))  # after its checkpoint

    def _on_full(self, trainer: Trainer, job: Job, *, reason: str) -> None:
        log.warning("%s waits: %s", job.title, reason)
        self._full = True
        self.recorder.put(job, partial(self.returns.append, (job, reason, False)))  # after its checkpoint

    def _on_spoiled(self, trainer: Trainer, job: Job, *, reason: str) -> None:
        """The data set's file is damaged, which no trial can help."""
        log.warning("%s waits: %s", job.title, reason)
        self.recorder.put(job, partial(self._fetch_data, job, reason, trainer.fetches))

    def _on_trained(self, trainer: Trainer, job: Job, **found: Any) -> None:
        crash.at("trained")
        self.recorder.put(job, partial(self._record, job, found), partial(self._bury, job))

    def _on_diverged(self, trainer: Trainer, job: Job, *, epoch: int) -> None:
        log.warning("%s diverged at epoch %d", job.title, epoch)
        self.recorder.put(job, partial(self._end, job, "diverged", {"epoch": epoch}, f"diverged at epoch {epoch}"))

    def _on_failed(self, trainer: Trainer, job: Job, *, reason: str) -> None:
        if self._lacks_room():  # of a .pt2 file that it cannot finish torch says something else, and aborts
            self._on_full(trainer, job, reason=f"no room on the disk ({reason})")
            return
        log.warning("%s failed, attempt %d of %d: %s", job.title, job.attempt, ATTEMPTS, reason)
        self.returns.append((job, reason, True))

    def _on_scored(self, trainer: Trainer, job: Job, **found: Any) -> None:
        assert self._closing is not None
        try:
            self._closing.put(found)
        except ValueError as error:
            trainer.release()
            self.returns.append((job, str(error), True))
            return
        self._score_next(trainer, self._closing)

    def _score_next(self, trainer: Trainer, closing: Closing) -> None:
        """Ask the trainer for the next score, or finish the closing. Called by both threads, one after the other."""
        if closing.job not in self.holdings:
            return  # its trainer died, and it has been given back
        request = closing.next_request()
        if request is not None:
            trainer.send("score", **request)
            return
        trainer.release()
        self.recorder.put(closing.job, partial(self._finish_closing, closing.job, closing))

    def _on_exit(self, trainer: Trainer) -> None:
        self._selector.unregister(trainer)
        self.trainers.remove(trainer)
        reason, job = trainer.obituary(), trainer.job
        trainer.close()
        if job is not None and job in self.holdings:
            if trainer.killed is None and self._lacks_room():
                self._on_full(trainer, job, reason=f"no room on the disk ({reason})")
            else:
                log.warning("%s: worker lost, attempt %d of %d: %s", job.title, job.attempt, ATTEMPTS, reason)
                self.returns.append((job, reason, self.stopping is None))
        if not trainer.ready:
            self._stillborn += 1
            if self._stillborn >= START_ATTEMPTS:
                log_file = Path(self.log.name)
                end = daemon.tail(log_file, lines=3)
                self._end_for(ServiceError(f"Trainers cannot be started: {reason}. The end of {log_file}:\n{end}"))
        self._next_claim = 0.0

    # Tasks for the recorder's thread

    def _fetch_and_train(self, trainer: Trainer, job: Job) -> None:
        folder = self._folder(job)
        checkpoint = tasks.fetch_checkpoint(self.mirror, job, folder) if job.checkpoint else None
        self._train(trainer, job, checkpoint, tasks.fetch_start(self.mirror, job, folder))

    def _fetch_data(self, job: Job, reason: str, before: int) -> None:
        """`before`: fetches when the job was claimed; after another one its trainer may have met the old file."""
        try:
            if before == self._fetches:
                if self._fetches - self._sound == START_ATTEMPTS:
                    raise ServiceError(f"{reason} It was fetched {START_ATTEMPTS} times: is HPO_HOME's disk sound?")
                # `hpo doctor --fix` may have put it there anew, with another hash
                self.row = replace(self.row, facts=self.queue.study(self.row.name).facts)
                self.data = data_sets.fetch(self.settings.home, self.tracker, self.row)
                self._fetches += 1  # once it is here: what was claimed before may have met the damaged one
        except ServiceError as error:
            self._no_data = error
        self.returns.append((job, reason, False))

    def _record(self, job: Job, found: dict[str, Any]) -> bool:
        """Whether MLflow took the result."""
        self.holdings.flush(job)
        if verdict := self.pruning.settle(job):  # which came too late to spare the rest of the training
            self._end(job, "pruned", {"epoch": found["epochs"]}, verdict)
            return False
        tasks.record(self.mirror, self.holdings, job, found)
        self._ended(job)
        return True

    def _bury(self, job: Job, reason: str) -> None:
        """End a trial that was trained well and cannot be recorded: training it again would not help."""
        self.queue.bury(job, reason=reason)
        log.warning("%s is dead: %s", job.title, reason)
        self._ended(job)

    def _end(self, job: Job, state: str, result: dict[str, Any], reason: str) -> None:
        self.holdings.flush(job)
        if state == "diverged":
            self.queue.cut(job, result["epoch"] - 1)  # an attempt on another kind of machine may have come further
        if verdict := self.pruning.settle(job):
            state, reason = "pruned", verdict
        self.queue.end(job, State(state), result=result, reason=reason)
        self._ended(job)

    def _finish_closing(self, job: Job, closing: Closing) -> None:
        closing.finish()
        log.info("study %s closed", job.study)
        self._ended(job)

    def _ended(self, job: Job) -> None:
        self._drop(job)
        self.recorder.put(job, partial(tasks.show, self.mirror, job.id))
        self._next_claim = 0.0

    # Stopping

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP stop gracefully, the second time at once; only in the main thread.

        Whatever hangs then - a server that is frozen, a network that swallows packets - the process ends in time: what
        it could not give back it loses with its lease.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            numbers.append(signal.SIGHUP)
        wake, waker = os.pipe()  # a handler may start no thread: it could hold the lock that this takes

        def last_resort() -> None:
            asked = os.read(wake, 1) == b"!"
            os.close(wake)
            if asked:
                time.sleep(STOP_LIMIT + 0.5)
                if not ended:
                    os._exit(130)

        def stop(number: int, _: Any) -> None:
            self.stop(signal.Signals(number).name)
            with suppress(OSError):  # the second time nobody reads
                os.write(waker, b"!")

        ended: list[bool] = []
        threading.Thread(target=last_resort, daemon=True).start()
        before = [signal.signal(number, stop) for number in numbers]
        try:
            yield
        finally:
            ended.append(True)
            os.close(waker)  # lets the thread end, and with it the other side
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _stopped(self, now: float) -> bool:
        """Ask busy trainers for their state once; whether all is given back or time is up."""
        busy = [trainer for trainer in self.trainers if trainer.task == "train"]
        for trainer in busy:
            if self.hurry or now - self._stop_at > STOP_GRACE:
                trainer.kill(f"stopped: {self.stopping}")
            elif not trainer.asked:
                trainer.ask()
        if self.hurry or now - self._stop_at > STOP_LIMIT - 1:
            return True
        return not busy and self.recorder.idle and not self.returns

    def _leave(self) -> None:
        """End trainers and recorder; what is still held goes back to the queue from its newest stored checkpoint."""
        for child in self._children():
            child.kill()  # busy ones have handed back what they could, the others have nothing to lose
        left = 30.0
        if self.stopping is not None:
            left = 0.0 if self.hurry else STOP_LIMIT - 1 - (time.monotonic() - self._stop_at)
        self.recorder.finish(max(0.2, left), tidy=self.stopping is None)
        self.pruning.finish(0.2)
        with suppress(DatabaseLost):  # then the leases run out
            for job in self.holdings.jobs():
                self.holdings.flush(job)
                with suppress(LeaseLost):
                    self.queue.give_back(job, reason=f"stopped: {self.stopping or 'error'}", counts=False)
            self.queue.leave(self.worker)
        for child in self._children():
            child.close(timeout=0.5)
        self.queue.close()
        self.store.remove_session()
        self.store.engine.dispose()

    # Files

    def _room(self) -> bool:
        """Whether the disk takes another trial; looked at only after somebody found it full."""
        self._full = self._full and self._lacks_room()
        return not self._full

    def _lacks_room(self) -> bool:
        folders = (self.settings.home, self.folder.parent)  # ours itself may be gone; then it is made again
        return any(not os.access(each, os.W_OK) or shutil.disk_usage(each).free < ROOM for each in folders)

    def _folder(self, job: Job) -> Path:
        return self.folder / f"job-{job.id}-{job.fence}"

    @contextmanager
    def _work_folder(self) -> Iterator[None]:
        """A folder of our own under HPO_HOME/work, locked while we live; those of dead workers are removed."""
        home.folder(self.settings.home, "cache", "features")
        parent = home.folder(self.settings.home, "work")
        self.folder = parent / f"{socket.gethostname()}-{self.process}"
        with own_folder(self.folder):
            for other in parent.iterdir():
                if other != self.folder:
                    sweep(other)
            try:
                yield
            finally:
                shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def _for_us_alone() -> Iterator[None]:
    """All that a worker writes lies in HPO_HOME, and is nobody else's to read."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def own_folder(folder: Path) -> IO[str]:
    """Make a work folder and lock it; the lock falls when the file is closed. To `sweep` that is one step: what it
    removes before we hold the lock is made again."""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError):
            lock = (folder / "lock").open("a")
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_at(lock, folder / "lock"):
                return lock
            lock.close()


def sweep(folder: Path, *, remove: bool = True) -> bool:
    """Remove a work folder whose worker is dead; whether it is. Its lock is free then. Of another host's worker, whose
    lock a file system may show to that host alone, nothing has been heard for a week either."""
    named = WORK_FOLDER.fullmatch(folder.name)
    try:
        if named is None or named["host"] != socket.gethostname():
            seen = (folder / "lock").stat().st_mtime
            if time.time() - seen < SILENT_HOST:
                return False
        with (folder / "lock").open("a" if named else "r+") as lock:  # it may have died before it had one
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(lock, folder / "lock"):
                return False
            if remove:
                shutil.rmtree(folder, ignore_errors=True)
            return True
    except OSError:
        return False  # it lives, or another worker sweeps it right now


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether the open file is the one there now: a lock on a file that was removed guards nothing."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
