"""What a worker serves: every open study of the database if it is one of the pool, or one study alone.

Trials of the study with the highest priority come first. Among studies of one priority a trainer goes to the one of
which the fewest jobs run on all workers: so they share the trainers equally, whatever a trial takes and whenever a
study was planned. Of several such studies it is the one that this worker has served longest ago. A study that this
worker cannot train is left to others; it is tried again after a growing delay, for what was missing may come.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hpo.closing.steps import Closing
from hpo.errors import NotFound, ServiceError, disk_is_full
from hpo.queue import ENDED, DatabaseLost, Job, OpenStudy, Queue, StudyRow
from hpo.queue.delays import delay
from hpo.recording import outcomes
from hpo.recording.reconciler import Reconciler
from hpo.recording.reconcilers import Reconcilers
from hpo.recording.recorder import Recorder
from hpo.recording.tasks import Tasks
from hpo.search.pruning import Pruning
from hpo.study.records import TrialSpec
from hpo.text import first_line
from hpo.tracking.errors import TrackingUnavailable
from hpo.worker.data_file import DataFile

OPENED_AT_ONCE = 2  # studies whose data sets and so on are fetched at the same time, in the order of claims

log = logging.getLogger("hpo")


@dataclass(frozen=True, kw_only=True)
class Served:
    """A study that a worker serves."""

    row: StudyRow
    tasks: Tasks  # for the recorder
    pruning: Pruning
    start_closing: Callable[[Job, Path, Path], Closing]  # of a claimed job, with its folder and the data set's file
    data: DataFile
    proof: TrialSpec  # the smallest network of the study, which shows whether a place can train


class Studies:
    """The studies of a worker. Owned by the supervisor's thread."""

    def __init__(
        self,
        queue: Queue,
        recorder: Recorder,
        reconcilers: Reconcilers,
        serve: Callable[[str], Served],
        *,
        only: Served | None,
    ) -> None:
        """`serve` gets what a study needs, in the recorder's thread; `only`: the one study, None for the pool."""
        self._queue, self._recorder, self._reconcilers, self._serve = queue, recorder, reconcilers, serve
        self.name = None if only is None else only.row.name
        self._served: dict[str, Served] = {}
        self._active: set[str] = set()
        self._opening: dict[str, OpenStudy] = {}
        self._prepared: dict[str, Served] = {}  # by the recorder's thread
        self._open: list[OpenStudy] = []  # as last seen
        self._begun: Counter[str] = Counter()  # jobs that were claimed since
        self._last: Counter[str] = Counter()  # when this worker served each study, in turns
        self._turns = 0
        self._leaving: dict[str, str] = {}  # why their jobs are handed back
        self._failures: Counter[str] = Counter()  # of each study here, in a row
        self._again: dict[str, float] = {}  # when a study that was left is tried again, monotonic seconds
        self._said: dict[str, str] = {}  # what was said of a study last
        self._now = 0.0
        if only is not None:
            self._begin(only)

    def __getitem__(self, study: str) -> Served:
        return self._served[study]

    @property
    def active(self) -> Sequence[Served]:
        """The studies whose trials are held or claimed here."""
        return [self._served[name] for name in self._active]

    def look(self, now: float, held: Sequence[Job]) -> bool:
        """Learn what is to be done; return whether the one study is closed. `now` in monotonic seconds."""
        if self.name is not None:
            return self._is_closed(self.name)
        self._now, self._open = now, self._queue.open_studies(lease=self._reconcilers.lease)
        self._begun.clear()
        still, busy = {study.name: study for study in self._open}, {job.study for job in held}
        for name in self._active - busy:
            if name in self._leaving or name not in still or not self._is_current(still[name]):
                self._close(name)
        for study in self._open:
            if study.paused is not None:
                self._say(study.name, f"{study.name} is paused, and left until that ends: {study.paused}")
            elif self._said.get(study.name, "").startswith(f"{study.name} is paused"):
                del self._said[study.name]
        if not self._open:
            self._say("", "No study is open. Waiting for one: `hpo run --detach` plans it. Ctrl-C ends this worker.")
        else:
            self._said.pop("", None)
        self._open_next()
        return False

    def _is_closed(self, study: str) -> bool:
        state = self._queue.closing_state(study, created_at=self._served[study].row.created_at)
        if state is None:
            raise NotFound(f"The study {study} was deleted meanwhile.")
        return state in ENDED

    def _is_current(self, study: OpenStudy) -> bool:
        """Return whether a study is served as it is now: not stopped, or deleted and planned again, since."""
        row = self._served[study.name].row
        return (row.created_at, row.stops) == (study.created_at, study.stops)

    def _candidates(self) -> Iterator[OpenStudy]:
        """Yield the studies with work, in the order of claims."""

        def order(study: OpenStudy) -> tuple[int, int, int]:
            return -study.priority, study.running + self._begun[study.name], self._last[study.name]

        for study in sorted(self._open, key=order):
            is_left = study.name in self._leaving or self._again.get(study.name, 0.0) > self._now
            if study.has_work and study.paused is None and not is_left:
                yield study

    def _open_next(self) -> None:
        for study in self._candidates():
            if (
                len(self._opening) < OPENED_AT_ONCE
                and study.name not in self._opening
                and study.name not in self._active
            ):
                self._opening[study.name] = study
                self._recorder.put(None, partial(self._prepare, study.name))

    def _prepare(self, study: str) -> outcomes.Opened:
        """Get what a study needs. In the recorder's thread, which repeats it while a service is away."""
        try:
            served = self._serve(study)
            store = served.tasks.prove_store()
        except Exception as error:
            if isinstance(error, TrackingUnavailable | DatabaseLost) and not disk_is_full(error):
                raise
            return outcomes.Opened(study=study, error=first_line(error))
        if isinstance(store, outcomes.NoStore):
            return outcomes.Opened(study=study, error=str(store.error))
        self._prepared[study] = served
        return outcomes.Opened(study=study)

    def on_opened(self, study: str, error: str | None) -> None:
        """Serve a study from now on, or leave it if it could not be prepared."""
        del self._opening[study]
        if error is not None:
            self._leave(study, error)
            return
        self._begin(self._prepared.pop(study))
        log.info("%s is open: this worker serves it", study)

    def _begin(self, served: Served) -> None:
        self._served[served.row.name] = served
        self._active.add(served.row.name)
        self._reconcilers.add(served.tasks.reconciler)
        if served.pruning.active:
            served.pruning.start()

    def _close(self, study: str) -> None:
        """Serve a study no longer: it is closed, stopped or deleted, and no job of it is held."""
        self._active.discard(study)
        self._leaving.pop(study, None)
        self._reconcilers.remove(study)
        self._served[study].pruning.finish(0.0)
        self._recorder.put(None, partial(_reconcile, self._served[study].tasks.reconciler, self._reconcilers.lease))

    def choices(self) -> Sequence[Served]:
        """Return the studies to claim a job of, in this order.

        A trainer waits for a study that is being prepared rather than begin one of a lower priority.
        """
        if self.name is not None:
            return self.active
        chosen, least = list[Served](), None
        for study in self._candidates():
            if least is not None and study.priority < least:
                break
            if study.name in self._active:
                chosen.append(self._served[study.name])
            elif study.name in self._opening:
                least = study.priority
        return chosen

    @property
    def are_opening(self) -> bool:
        """Whether one is being prepared."""
        return bool(self._opening)

    def begun(self, study: str) -> None:
        """Note that a trainer has got work of a study."""
        self._turns += 1
        self._begun[study] += 1
        self._last[study] = self._turns

    def recorded(self, study: str) -> None:
        """Note that a trial of a study has ended here in peace."""
        del self._failures[study]  # a Counter: it need not be there

    def fail(self, study: str, message: str) -> None:
        """Leave a study to other workers. Raise ServiceError with the message if it is the only one."""
        if self.name is not None:
            raise ServiceError(message)
        self._leave(study, message)

    def _leave(self, study: str, message: str) -> None:
        """Leave a study to other workers, and try it again after a delay."""
        if study in self._active:
            self._leaving[study] = message
        self._failures[study] += 1
        self._again[study] = self._now + delay(self._failures[study])
        self._say(study, f"{study} is left to other workers: {message}")

    def stop(self, study: str, reason: str) -> bool:
        """Work on a study no more here; return whether the worker goes on with others."""
        if self.name is None:
            self._leaving.setdefault(study, reason)
        return self.name is None

    @property
    def leaving(self) -> Mapping[str, str]:
        """The studies whose jobs are to be handed back, with the reasons."""
        return self._leaving

    def _say(self, study: str, line: str) -> None:
        """Say something of a study once."""
        if self._said.get(study) != line:
            self._said[study] = line
            log.warning("%s", line)


def _reconcile(reconciler: Reconciler, lease: float) -> None:
    """Bring Optuna and MLflow in line with a study before it is left."""
    reconciler.reconcile(lease=lease, older_than=0, expire=False)
