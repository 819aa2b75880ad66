"""The supervisor: claims trials, hands them to trainers, renews leases, gives back what it cannot finish.

Torch-free. The main thread owns leases and trainers; one more thread (`hpo.recorder`) talks to MLflow. What each
event of a trial leads to stands in `_on_*`.
"""

import fcntl
import logging
import os
import secrets
import selectors
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from hpo import closing, mirror, sampling, study
from hpo.errors import ServiceError
from hpo.mirror import Mirror
from hpo.queue import ENDED, DatabaseLost, Job, LeaseLost, Queue, StudyRow
from hpo.recorder import Recorder
from hpo.settings import Settings
from hpo.tracking import Tracker
from hpo.trainers import Trainer, open_log
from models import specs

TICK = 0.25  # seconds between two looks at the clock
CLAIM_PAUSE = 1.0  # seconds between two looks into an empty queue
STOP_GRACE = 3.0  # seconds a trainer has to hand back its state
STOP_LIMIT = 7.0  # seconds from the signal to the end of the process
START_ATTEMPTS = 3  # trainers in a row that may end before they are ready
OUTAGE_LIMIT = 600.0  # seconds without MLflow or database after which no new trial is claimed

log = logging.getLogger("hpo")


class Supervisor:
    """One worker of one study. `run` returns when the study is closed, when stopped, or after one trial (`once`)."""

    def __init__(self, settings: Settings, database_url: str, tracking_uri: str, name: str, *, trainers: int) -> None:
        self.settings = settings
        self.queue = Queue(database_url)
        self.row: StudyRow = self.queue.study(name)
        self.study = study.restore(name, self.row.spec)
        self.tracker = Tracker(tracking_uri)
        self.store = sampling.storage(database_url)
        self.mirror = Mirror(self.queue, self.tracker, self.store, self.row)
        self.recorder = Recorder(self.mirror, lease=settings.lease)
        self.worker = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(3)}"
        self.count = trainers
        self.trainers: list[Trainer] = []
        self.held: dict[int, Job] = {}  # every job whose lease is ours: training, or waiting to be recorded
        self.epochs: dict[int, list[tuple[int, int, dict[str, float]]]] = {}  # not in the database yet
        self._flushing = threading.Lock()
        self.stopping: str | None = None  # why
        self.hurry = False
        self.claimed = 0
        self._stop_at = 0.0
        self._next_renewal = self._next_claim = 0.0
        self._closing: dict[str, Any] = {}
        self._stillborn = 0  # trainers in a row that ended before they were ready

    def run(self, *, once: bool = False, on_tick: Callable[["Supervisor"], None] | None = None) -> bool:
        """Work until the study is closed; whether it is."""
        with self._work_folder(), self._signals():
            data = self._data()
            self.recorder.start()
            with open_log(self.settings.home, f"worker-{self.worker.split(':', 1)[1].replace(':', '-')}") as self.log:
                self._selector = selectors.DefaultSelector()
                try:
                    return self._loop(data, once, on_tick)
                finally:
                    self._leave()

    def stop(self, reason: str) -> None:
        """Give everything back and end; called a second time, at once."""
        if self.stopping is None:
            self.stopping, self._stop_at = reason, time.monotonic()
        else:
            self.hurry = True

    # The loop

    def _loop(self, data: Path, once: bool, on_tick: Callable[["Supervisor"], None] | None) -> bool:
        while True:
            for key, _ in self._selector.select(TICK):
                self._read(key.data)
            now = time.monotonic()
            try:
                self._flush_epochs()
                if now >= self._next_renewal:
                    self._renew()
                    self._next_renewal = now + self.settings.lease / 6
                self._mind_recorder()
                if self.stopping is not None:
                    if self._stopped(now):
                        return False
                elif once and self.claimed and not self.held:
                    return self._finished()
                elif now >= self._next_claim:
                    if self._finished():
                        return True
                    if not self._claim(data, once):
                        self._next_claim = now + CLAIM_PAUSE
                self._end_hung(now)
            except DatabaseLost as error:
                self.recorder.trouble = self.recorder.trouble or "database lost, retrying"
                log.warning("database lost, retrying: %s", str(error).splitlines()[0])
                if self.stopping is not None and (self.hurry or now - self._stop_at > STOP_LIMIT):
                    return False
                time.sleep(TICK)
            if on_tick is not None:
                on_tick(self)

    def _finished(self) -> bool:
        jobs = self.queue.jobs(self.row.name)
        return all(job.state in ENDED for job in jobs if job.kind == "closing")

    def _claim(self, data: Path, once: bool) -> bool:
        """Give work to every free trainer; whether there was any to give."""
        if self.recorder.trouble and time.monotonic() - self.recorder.trouble_since > OUTAGE_LIMIT:
            return False
        while len(self.trainers) < self.count:
            self._start_trainer()
        given = False
        for trainer in self.trainers:
            if not trainer.free or (once and self.claimed):
                continue
            job = self.queue.claim(self.row.name, worker=self.worker, lease=self.settings.lease)
            if job is None:
                return given
            given, self.claimed = True, self.claimed + (job.kind == "trial")
            self.held[job.id] = job
            if job.kind == "closing":
                trainer.job, trainer.request = job, {"do": "closing"}
                log.info("closing of %s begins", job.study)
                self.recorder.put(job, partial(self._prepare_closing, job, trainer))
                continue
            if job.spec is None:
                job = self._fill(job)
            assert job.spec is not None
            log.info(
                "trial %d of %s claimed: %s%s",
                job.number,
                job.study,
                " ".join(f"{key}={value}" for key, value in job.spec["point"].items()),
                f" (attempt {job.attempt} of 3: {job.reason})" if job.attempt > 1 else "",
            )
            trainer.job = job
            if job.checkpoint is None:
                self._send_training(job, trainer, data, None)
            else:
                trainer.request = {"do": "fetch"}  # reserved until the checkpoint is here
                self.recorder.put(job, partial(self._fetch_checkpoint, job, trainer, data))
            self.recorder.put(job, partial(self._show, job.id))
        return given

    def _fill(self, job: Job) -> Job:
        """Let the sampler choose the point of a slot."""
        point = sampling.fill(self.store, self.row.name, self.study, job.number)
        spec, cost = trial_spec(self.study, self.row.identity, self.row.facts, point, config=None)
        self.queue.fill(job, spec, cost)
        filled = self.queue.job(job.id)
        assert filled is not None
        self.held[job.id] = filled
        return filled

    def _send_training(self, job: Job, trainer: Trainer, data: Path, checkpoint: Path | None) -> None:
        trainer.send(
            "train",
            spec=job.spec,
            data=str(data),
            checkpoint=str(checkpoint) if checkpoint else None,
            folder=str(self._job_folder(job)),
            checkpoint_interval=self.settings.checkpoint_interval,
        )

    def _start_trainer(self) -> None:
        trainer = Trainer(self.log)
        self.trainers.append(trainer)
        self._selector.register(trainer, selectors.EVENT_READ, trainer)

    def _renew(self) -> None:
        for job in self.queue.renew(list(self.held.values()), lease=self.settings.lease):
            self._lost(job)

    def _lost(self, job: Job) -> None:
        """Somebody else has this job: stop, and write nothing more of it."""
        current = self.queue.job(job.id)
        if current is not None and current.fence == job.fence and current.state != "running":
            return  # it ended by our own hand between the two statements
        if self.held.pop(job.id, None) is None:
            return
        self.epochs.pop(job.id, None)
        log.warning("trial %d of %s: lost its lease, stopping", job.number, job.study)
        for trainer in self.trainers:
            if trainer.job is not None and trainer.job.id == job.id:
                trainer.kill()

    def _end_hung(self, now: float) -> None:
        for trainer in self.trainers:
            busy = trainer.request is not None and trainer.request["do"] in ("train", "score")
            if trainer.job and busy and now - trainer.last_event > self.settings.hang_timeout:
                assert trainer.request is not None
                log.warning("trial %d: no progress for %.0f s", trainer.job.number, self.settings.hang_timeout)
                trainer.request["hung"] = True
                trainer.kill()

    # Events of trainers

    def _read(self, trainer: Trainer) -> None:
        for event in trainer.events():
            kind = event.pop("event")
            if kind == "ready":
                trainer.ready, self._stillborn = True, 0
                self._next_claim = 0.0
            elif trainer.job is not None and trainer.job.id in self.held:
                getattr(self, f"_on_{kind}")(trainer, trainer.job, **event)
            elif kind in ("trained", "returned", "diverged", "failed", "scored"):
                self._release(trainer)
        if trainer.closed:
            self._on_exit(trainer)

    def _release(self, trainer: Trainer) -> None:
        trainer.job = trainer.request = None
        self._next_claim = 0.0

    def _on_started(self, trainer: Trainer, job: Job, *, epoch: int, parameters: int) -> None:
        if epoch:
            log.info("trial %d of %s goes on after epoch %d", job.number, job.study, epoch)

    def _on_epoch(self, trainer: Trainer, job: Job, *, number: int, at: int, metrics: dict[str, float]) -> None:
        self.epochs.setdefault(job.id, []).append((number, at, metrics))

    def _on_checkpoint(self, trainer: Trainer, job: Job, *, path: str, epoch: int, sha256: str) -> None:
        self.recorder.put(job, partial(self._store_checkpoint, job, Path(path), epoch, sha256))

    def _on_returned(self, trainer: Trainer, job: Job, *, epoch: int) -> None:
        self._release(trainer)
        log.info("giving trial %d back after epoch %d", job.number, epoch)
        self.recorder.put(job, partial(self._give_back, job, "handed back", False))

    def _on_trained(self, trainer: Trainer, job: Job, **found: Any) -> None:
        self._release(trainer)
        self.recorder.put(job, partial(self._record, job, found))

    def _on_diverged(self, trainer: Trainer, job: Job, *, epoch: int) -> None:
        self._release(trainer)
        log.warning("trial %d of %s diverged at epoch %d", job.number, job.study, epoch)
        self.recorder.put(job, partial(self._end, job, "diverged", {"epoch": epoch}, f"diverged at epoch {epoch}"))

    def _on_failed(self, trainer: Trainer, job: Job, *, reason: str) -> None:
        self._release(trainer)
        log.warning("trial %d of %s failed, attempt %d of 3: %s", job.number, job.study, job.attempt, reason)
        self.recorder.put(job, partial(self._give_back, job, reason, True))

    def _on_scored(self, trainer: Trainer, job: Job, **found: Any) -> None:
        number = self._closing["todo"].pop(0)
        self._closing["scored"][number] = found
        if not self._score_next(trainer):
            self._release(trainer)
            self.recorder.put(job, partial(self._finish_closing, job))

    def _on_exit(self, trainer: Trainer) -> None:
        self._selector.unregister(trainer)
        self.trainers.remove(trainer)
        reason = trainer.obituary()
        if trainer.request and trainer.request.get("hung"):
            reason = f"no progress for {self.settings.hang_timeout:.0f} s"
        trainer.close()
        job = trainer.job
        if job is not None and job.id in self.held:
            log.warning("trial %d of %s: worker lost, attempt %d of 3: %s", job.number, job.study, job.attempt, reason)
            self.recorder.put(job, partial(self._give_back, job, reason, self.stopping is None))
        if not trainer.ready:
            self._stillborn += 1
            if self._stillborn >= START_ATTEMPTS:
                raise ServiceError(f"Trainers cannot be started: {reason}. Their log: {self.log.name}")
        self._next_claim = 0.0

    # Tasks of the recorder's thread

    def _show(self, job_id: int) -> None:
        """Make Optuna and MLflow show a job as the database has it now."""
        job = self.queue.job(job_id)
        if job is not None:
            self.mirror.show(job)

    def _flush_epochs(self, only: int | None = None) -> None:
        """Store the epochs that have arrived; called by both threads."""
        with self._flushing:
            for job_id in [only] if only is not None else list(self.epochs):
                job, rows = self.held.get(job_id), self.epochs.get(job_id)
                if job is None or not rows:
                    continue
                batch = list(rows)
                with suppress(LeaseLost):  # the renewal finds out and acts on it
                    self.queue.add_epochs(job, batch)
                del rows[: len(batch)]

    def _store_checkpoint(self, job: Job, path: Path, epoch: int, sha256: str) -> None:
        current = self.queue.job(job.id)
        if current is None or current.fence != job.fence or current.state != "running":
            raise LeaseLost(job.number)
        run_id = self.mirror.run(current)
        name = f"checkpoint-{epoch:06d}-{job.fence}.safetensors"  # a new name: an older worker cannot touch it
        if path.name != name and path.exists():
            path = path.rename(path.with_name(name))
        path = path.with_name(name)
        self.tracker.upload(run_id, path, "checkpoints")
        self.queue.checkpoint(job, {"path": f"checkpoints/{name}", "sha256": sha256, "epoch": epoch, "run_id": run_id})
        path.unlink(missing_ok=True)
        if current.checkpoint is not None and current.checkpoint["path"] != f"checkpoints/{name}":
            self.tracker.delete_artifact(run_id, current.checkpoint["path"])

    def _fetch_checkpoint(self, job: Job, trainer: Trainer, data: Path) -> None:
        assert job.checkpoint is not None
        from hpo.tracking import sha256_of

        path = self.tracker.download_artifact(job.checkpoint["run_id"], job.checkpoint["path"], self._job_folder(job))
        if (found := sha256_of(path)) != job.checkpoint["sha256"]:
            log.warning(
                "trial %d: its checkpoint is damaged (SHA-256 %s, recorded %s); it starts again from epoch 0",
                job.number,
                found[:8],
                job.checkpoint["sha256"][:8],
            )
            self._send_training(job, trainer, data, None)
            return
        self._send_training(job, trainer, data, path)

    def _give_back(self, job: Job, reason: str, counts: bool) -> None:
        self._flush_epochs(job.id)
        self.queue.give_back(job, reason=reason, counts=counts)
        self._drop(job)
        self._show(job.id)

    def _end(self, job: Job, state: str, result: dict[str, Any], reason: str | None) -> None:
        self._flush_epochs(job.id)
        self.queue.end(job, state, result=result, reason=reason)
        self._drop(job)
        self._show(job.id)

    def _record(self, job: Job, found: dict[str, Any]) -> None:
        """Log the model, then record the one result, then show it."""
        self._flush_epochs(job.id)
        current = self.queue.job(job.id)
        if current is None or current.fence != job.fence or current.state != "running":
            raise LeaseLost(job.number)
        run_id = self.mirror.run(current)
        folder = Path(found.pop("folder"))
        curve = dict(self.queue.curve(job.id))
        assert job.spec is not None
        epochs = job.spec["training"]["epochs"]
        if sorted(curve) != list(range(1, epochs + 1)):
            raise ValueError(f"the curve has {len(curve)} of {epochs} epochs")
        from hpo.tracking import sha256_of

        model = self.tracker.log_model(
            run_id,
            self.row.facts["experiment_id"],
            folder,
            name="model",
            # the weights are in the key: another attempt with other weights must not reuse the files
            key=f"{mirror.key(job)}/{sha256_of(folder / 'weights.safetensors')[:12]}",
        )
        best, last = curve[found["best_epoch"]], curve[epochs]
        result = found | {
            "best_val_mse": best["val/mse"],
            "last_val_nmse": last["val/nmse"],
            "last_val_mse": last["val/mse"],
            "seconds": sum(metrics["seconds"] for metrics in curve.values()),
            "epochs": epochs,
            "target_names": self.row.facts["data"]["target_names"],
            "model_id": model.model_id,
            "files": model.sha256,
        }
        self.queue.end(job, "done", result=result)
        self._drop(job)
        log.info(
            "trial %d of %s done: val nmse %.4g at epoch %d, %.0f s",
            job.number,
            job.study,
            found["best_val_nmse"],
            found["best_epoch"],
            result["seconds"],
        )
        self._show(job.id)

    def _drop(self, job: Job) -> None:
        self.held.pop(job.id, None)
        self.epochs.pop(job.id, None)
        shutil.rmtree(self._job_folder(job), ignore_errors=True)

    def _mind_recorder(self) -> None:
        """Act on what the recorder's thread found out."""
        while self.recorder.lost:
            self._lost(self.recorder.lost.popleft())
        while self.recorder.failures:
            job, reason = self.recorder.failures.popleft()
            for trainer in self.trainers:
                if trainer.job is not None and trainer.job.id == job.id and trainer.request:
                    if trainer.request["do"] in ("fetch", "closing"):
                        self._release(trainer)
                    else:
                        trainer.kill()
            if job.id in self.held:
                with suppress(LeaseLost):
                    self.queue.give_back(job, reason=reason, counts=True)
                self._drop(job)
        self.recorder.live = {job.id: job for job in self.held.values() if job.kind == "trial"}

    # Closing

    def _prepare_closing(self, job: Job, trainer: Trainer) -> None:
        self.mirror.reconcile(older_than=0)
        chosen = closing.winners(self.queue.jobs(job.study), list(self.study.report_by))
        folder = self._job_folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        for winner in chosen:
            closing.fetch(self.tracker, winner, folder / f"model-{winner.number}")
        self._closing = {
            "folder": folder,
            "todo": [winner.number for winner in chosen],
            "jobs": {winner.number: winner for winner in chosen},
            "scored": {},
        }
        if not self._score_next(trainer):
            self._release(trainer)
            self.recorder.put(job, partial(self._finish_closing, job))

    def _score_next(self, trainer: Trainer) -> bool:
        """Ask the trainer to score the next winner; whether there is one."""
        if not self._closing["todo"]:
            return False
        number, folder = self._closing["todo"][0], self._closing["folder"]
        trainer.send(
            "score",
            folder=str(folder / f"model-{number}"),
            data=str(self._data()),
            predictions=str(folder / f"trial-{number}.csv"),
        )
        return True

    def _finish_closing(self, job: Job) -> None:
        from hpo import report

        state = self._closing
        for number, found in state["scored"].items():
            closing.check_same(found, state["jobs"][number])
        predictions = {number: state["folder"] / f"trial-{number}.csv" for number in state["scored"]}
        result = closing.promote(self.mirror, job, state["scored"], predictions)
        closing.held(self.queue, job)
        report.log_study(self.mirror, result)
        self.queue.end(job, "done", result=result)
        self._drop(job)
        log.info("study %s closed: %s", job.study, result["reason"])
        self._next_claim = 0.0

    # Stopping

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM stop gracefully, the second time at once; only in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(n, lambda number, _: self.stop(signal.Signals(number).name)) for n in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _stopped(self, now: float) -> bool:
        """Ask busy trainers for their state once; whether all is given back or time is up."""
        busy = [t for t in self.trainers if t.request and t.request["do"] == "train" and not t.closed]
        for trainer in busy:
            assert trainer.request is not None
            if self.hurry or now - self._stop_at > STOP_GRACE:
                trainer.kill()
            elif not trainer.request.get("asked"):
                trainer.request["asked"] = True
                trainer.send("stop")
        if self.hurry or now - self._stop_at > STOP_LIMIT - 1:
            return True
        return not busy and self.recorder.idle

    def _leave(self) -> None:
        """End trainers and recorder; what is still held goes back to the queue from its newest stored checkpoint."""
        for trainer in self.trainers:
            if trainer.request is not None:
                trainer.kill()
        left = 0.2 if self.hurry else 30.0 if self.stopping is None else STOP_LIMIT - (time.monotonic() - self._stop_at)
        self.recorder.finish(max(0.2, left))
        for job in list(self.held.values()):
            with suppress(LeaseLost, DatabaseLost):
                self.queue.give_back(job, reason=f"stopped: {self.stopping or 'error'}", counts=False)
        for trainer in self.trainers:
            trainer.close(timeout=0.5)
        self._selector.close()

    # Files

    def _data(self) -> Path:
        """The study's data set as a local file, fetched from the tracking server if it is not here, and checked."""
        return fetch_data(self.settings.home, self.tracker, self.row)

    def _job_folder(self, job: Job) -> Path:
        return self.folder / f"job-{job.id}-{job.fence}"

    @contextmanager
    def _work_folder(self) -> Iterator[None]:
        """A folder of our own under HPO_HOME/work, locked while we live; those of dead workers are removed."""
        parent = self.settings.home / "work"
        self.folder = parent / self.worker.split(":", 1)[1].replace(":", "-")
        self.folder.mkdir(parents=True)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for other in parent.iterdir():
                if other != self.folder:
                    _sweep(other)
            try:
                yield
            finally:
                shutil.rmtree(self.folder, ignore_errors=True)


def trial_spec(
    plan: study.Study, identity: str, facts: dict[str, Any], point: dict[str, Any], *, config: int | None
) -> tuple[dict[str, Any], float]:
    """The frozen description of one trial, and its cost (multiply-adds of one image, forward)."""
    model, training = plan.trial(point)
    data = facts["data"]
    size = specs.size(specs.from_dict(model), tuple(data["image_shape"]), len(data["target_names"]))
    return {
        "point": point,
        "config": config,
        "model": model,
        "training": training,
        "seed": plan.seed,
        "parameters": size.parameters,
        "data": data["digest"],
        "split": data["split"],
        "identity": identity,
        "numerics": study.NUMERICS_VERSION,
    }, size.multiply_adds


def fetch_data(home: Path, tracker: Tracker, row: StudyRow) -> Path:
    """HPO_HOME/cache/data/<digest>.npz, downloaded if need be; the digest is checked after a download."""
    from data_pipeline.dataset import load_npz

    digest = row.facts["data"]["digest"]
    path = home / "cache" / "data" / f"{digest}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = path.parent / f".{digest[:12]}-{os.getpid()}"
        try:
            got = tracker.download_artifact(row.facts["study_run_id"], f"data/{digest}.npz", folder)
            if load_npz(got).digest != digest:
                raise ValueError(f"the data set of {row.name} was damaged on its way: expected digest {digest}")
            got.replace(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return path


def _sweep(folder: Path) -> None:
    """Remove a work folder whose worker is dead: its lock is free."""
    try:
        with (folder / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except (OSError, BlockingIOError):
        return
