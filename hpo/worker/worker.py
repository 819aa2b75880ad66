"""A worker: a supervisor with a real queue, recorder and processes."""

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import IO

from hpo.closing.steps import Closing
from hpo.queue import Job, Queue, StudyRow, require_whole
from hpo.recording.outage import Outage
from hpo.recording.outcomes import Inbox
from hpo.recording.reconciler import Reconciler
from hpo.recording.reconcilers import Reconcilers
from hpo.recording.recorder import Recorder
from hpo.recording.tasks import Tasks
from hpo.search import sampling
from hpo.search.pruning import Pruning
from hpo.services import serving
from hpo.settings import Settings
from hpo.study import Study, trial_spec
from hpo.study.records import TrialSpec
from hpo.tracking import data_sets
from hpo.tracking.client import Tracker
from hpo.tracking.errors import TrackingUnavailable
from hpo.worker import ending, user_code
from hpo.worker.children import Suggester, Trainers
from hpo.worker.collaborators import Collaborators
from hpo.worker.data_file import DataFile
from hpo.worker.devices import CPU, Place
from hpo.worker.ending import NO_LIMITS, Limits
from hpo.worker.processes import Process, open_log
from hpo.worker.signals import stopped_by_signals
from hpo.worker.studies import Served, Studies
from hpo.worker.supervisor import Supervisor
from hpo.worker.work_folder import WorkFolder
from models import user, weights
from models.specs import SpecError

LOCK_PATIENCE = 1.0  # seconds to wait for a lock in Optuna's tables, at most; then the recorder tries again


class Worker:
    """One worker on this machine: of one study, or of the pool. `run` may be called once."""

    def __init__(
        self,
        settings: Settings,
        database_url: str,
        tracking_uri: str,
        name: str | None,
        *,
        trainers: int,
        place: Place = CPU,
        stops: int | None = None,
    ) -> None:
        """`name`: of the study, None for the pool; `stops`: how often that had been stopped when this worker was asked
        for, if that was earlier."""
        self.settings, self.count, self.place = settings, trainers, place
        self.queue = Queue(database_url)
        self.row = None if name is None else self.queue.study(name)
        self._stops = 0
        if name is None:
            present = self.queue.pool_stops()
            self._stops = present if stops is None else min(stops, present)
        if self.row is not None:
            require_whole(self.row)
            self.row = replace(self.row, stops=min(self.row.stops if stops is None else stops, self.row.stops))
        self._database_url = database_url
        # The job's row is locked while Optuna is written: if somebody locks a table of Optuna, the lease must not wait.
        with self.queue.lock("optuna"):  # a worker of the pool may be the first to make its tables
            self._store = sampling.storage(database_url, patience=min(LOCK_PATIENCE, settings.lease / 3))
        self.tracker = Tracker(tracking_uri)  # of the recorder's threads, once they run
        with suppress(TrackingUnavailable):  # it may be away for now
            self.tracker.require_version()
        process = f"{os.getpid()}-{secrets.token_hex(3)}"
        self._log_name, self._name = f"worker-{process}", f"{socket.gethostname()}:{process}"
        self._folder = WorkFolder(settings.home, process)
        self.ending = ending.Ending(time)
        self.failed_gpus: Mapping[str, str] = {}  # why each one trained no more, though others did

    def run(self, *, limits: Limits = NO_LIMITS, on_tick: Callable[[Supervisor], None] = lambda _: None) -> bool:
        """Work until the study is closed; return whether it is. Raise ServiceError if nothing can be done here."""
        limit = ending.STOP_LIMIT + 0.5
        with _for_us_alone(), self._folder.lock(), stopped_by_signals(self.ending.stop, limit=limit):
            served = None if self.row is None else self.serve(self.row)  # before it claims what it cannot train
            with open_log(self.settings.home, self._log_name) as log:
                parts = self._parts(log, served)
                parts.recorder.start()
                supervisor = Supervisor(self._name, parts, self.ending, limits=limits)
                self.failed_gpus = supervisor.failed_gpus
                try:
                    return supervisor.run(on_tick)
                finally:
                    self.close()

    def serve(self, row: StudyRow) -> Served:
        """Get what a study needs.

        Raise Untrusted if its code is not to run here, SpecError without its pretrained weights, ServiceError without
        its data set.
        """
        user_code.fetch_trusted(self.settings.home, self.tracker, row)
        _require_weights(row)
        study = row.specification
        reconciler = Reconciler(self.queue, self.tracker, self._store, row, worker=self._name)
        pruning = Pruning(self.queue, row.name, study)

        def start_closing(job: Job, folder: Path, data_file: Path) -> Closing:
            reconcile = partial(reconciler.reconcile, lease=self.settings.lease, older_than=0)
            return Closing(self.queue, self.tracker, row, job=job, folder=folder, data=data_file, reconcile=reconcile)

        return Served(
            row=row,
            tasks=Tasks(reconciler, pruning, self.settings.home),
            pruning=pruning,
            start_closing=start_closing,
            data=DataFile(data_sets.fetch(self.settings.home, self.tracker, row.name, row.facts)),
            proof=self._smallest(row, study),
        )

    def _smallest(self, row: StudyRow, study: Study) -> TrialSpec:
        """Return the specification of the study's cheapest trial, planned or at an end of its space."""
        planned = self.queue.cheapest(row.name)
        if planned is not None:
            return planned
        specs = [trial_spec(study, row.identity, row.facts, point, config=None) for point in study.corners()]
        return min(specs, key=lambda pair: pair[1])[0]

    def close(self) -> None:
        """Close the connections to the database."""
        self.queue.close()
        self._store.remove_session()
        self._store.engine.dispose()

    def _parts(self, log: IO[bytes], served: Served | None) -> Collaborators:
        settings, inbox = self.settings, Inbox()
        reconcilers = Reconcilers(self.queue, lease=settings.lease)
        store = serving.store_folder(settings)
        outage = Outage(self.queue, None if served is None else served.row.name, store=store)
        recorder = Recorder(reconcilers, inbox, outage, patience=settings.outage_limit)

        code = [str(user_code.folder_in(settings.home)), *user.trusted()]

        def start_suggester() -> Suggester:
            return Suggester(Process("suggester", log), time, database_url=self._database_url)

        def serve(name: str) -> Served:
            return self.serve(self.queue.study(name))

        return Collaborators(
            settings=settings,
            queue=self.queue,
            recorder=recorder,
            inbox=inbox,
            studies=Studies(self.queue, recorder, reconcilers, serve, only=served),
            trainers=Trainers(
                lambda gpu: Process("trainer", log, gpu=gpu, code=code),
                count=self.count,
                gpus=self.place.gpus,
                clock=time,
            ),
            start_suggester=start_suggester,
            folder=self._folder,
            device=self.place.device,
            log_file=Path(log.name),
            wait=connection.wait,
            clock=time,
            stops=self._stops,
        )


def _require_weights(row: StudyRow) -> None:
    """Raise SpecError unless torchvision's weights are those that the study was planned with."""
    for file in [file for key, file in (row.facts.weights or {}).items() if key in weights.FILES]:
        path, sha256 = weights.find(file.name)
        if sha256 != file.sha256:
            raise SpecError(f"{path}: expected SHA-256 {file.sha256}, as the study was planned, found {sha256}.")


@contextmanager
def _for_us_alone() -> Iterator[None]:
    """Let everything that a worker writes in HPO_HOME be readable by its own user alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
