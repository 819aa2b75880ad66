"""Fleets: the workers of a study, or of the pool, on an engine; handed in once, found again, followed to their end."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass

from hpo.errors import ServiceError
from hpo.launch.engine import IDLE_EXIT, Engine, Fate, Fleet, Placed, Size
from hpo.launch.probing import prove
from hpo.queue import ENDED, DatabaseLost, Queue, Stop, StudyRow
from hpo.text import counted, in_brackets

POLL = 5.0  # seconds between two looks into the engine's queue
TICK = 0.5  # seconds
IDLE = ["--idle-exit", f"{IDLE_EXIT:.0f}"]
SHOWN = 3  # hosts, and reasons, in the line of a display
TRIES = 5  # times that workers are handed in for the same trials before a study's command gives up
OVER = 600.0  # seconds after which workers were of use, whatever ended them


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of an engine for a study."""

    engine: Engine
    size: Size
    words: tuple[str, ...]  # of `hpo worker`, beside the study's name
    trainers: int = 1  # of each worker, as far as that is known here


@dataclass(frozen=True, kw_only=True)
class End:
    """How the work of a fleet has ended."""

    closed: bool = False  # its study is
    stop: Stop | None = None  # the request, if it was `hpo stop`


class Handed:
    """A fleet that was handed in, as this process follows it."""

    def __init__(self, request: Request, queue: Queue, row: StudyRow | None) -> None:
        """`row`: of the study that its workers train; None for the pool."""
        self.request, self.engine, self._queue, self.row = request, request.engine, queue, row
        self._study: str | None = None if row is None else row.name
        self._stops = queue.pool_stops() if row is None else row.stops
        name, label = (".pool", "the pool") if row is None else (f"-{row.name}", row.name)
        self.fleet = Fleet(
            name=f"hpo{name}-{queue.database_id()[:8]}-{self._stops}", label=label, folder=self._study or ".pool"
        )
        self.placed: list[Placed] = []
        self.trouble: str | None = None  # why the last look failed
        self._next_look, self._is_taken_back = 0.0, False
        self._asked: Stop | None = None
        self._grown_for, self._grown_at, self._grown = 0, 0.0, 0  # jobs, monotonic seconds, times for these jobs

    def hand_in(self, report: Callable[[str], object], *, interrupts: Sequence[int] = ()) -> None:
        """Have workers in the engine's queue, unless there are some that nobody has asked to stop.

        Raise ServiceError. After an interrupt nothing is handed in.
        """
        title, where = self.engine.title, f"as {self.fleet.name}; logs: {self.engine.logs(self.fleet)}"
        with self._lock(lambda: report("Another command hands in the same workers: waiting for it.")):
            if self._look():
                report(f"{title} has {counted(len(self.placed), 'worker')} already, {where}")
            else:
                prove(self.engine, self._queue.database_id(), report=report, interrupts=interrupts)
                if interrupts:
                    report(f"Nothing was handed in to {title}.")
                    return
                self._note_growth(jobs := self._jobs())
                self._add(self.request.size.wanted(jobs, self.request.trainers))
                report(f"Handed {counted(len(self.placed), 'worker')} to {title}, {where}")
        report("Ctrl-C takes them back. They go on if this terminal goes away; the same command shows them again.")

    def _lock(self, waits: Callable[[], object] = lambda: None) -> AbstractContextManager[object]:
        """Return what keeps two commands at once from handing in workers for the same trials."""
        return self._queue.lock(f"launch.{self.fleet.name}", waits=waits)

    def _jobs(self) -> int:
        return self._queue.open_jobs(self._study)

    def _add(self, count: int) -> None:
        """Hand in so many workers more."""
        study = [] if self._study is None else ["--study", self._study]
        words = ["worker", *study, "--stops", str(self._stops), *self.request.words]
        stays = self.request.size.least if self.request.size.grows and not self.placed else 0
        idle = [] if "--idle-exit" in words else IDLE
        commands = [[*words, *([] if number < stays else idle)] for number in range(count)]
        if commands:
            self.engine.hand_in(self.fleet, commands)
        self._look()

    def _look(self) -> list[Placed]:
        self.placed = [worker for worker in self.engine.placed(self.fleet) if worker.fate != Fate.ENDED]
        return self.placed

    def follow(self, *, interrupts: Sequence[int], tick: Callable[[str], None]) -> End:
        """Wait until the study is closed, or the workers have left after Ctrl-C or `hpo stop`; return which it was.
        Workers of the pool may also leave because nothing is left to train.

        Raise ServiceError if no worker is left. A second interrupt does not wait for them.
        """
        while len(interrupts) < 2:
            self._act(is_interrupted=bool(interrupts))
            with suppress(DatabaseLost):  # asked after the engine: a worker closes its study before it leaves
                if (end := self._end()) is not None:
                    return end
            tick(self.trouble or summary(self.engine.title, self.placed, is_taken_back=self._is_taken_back))
            time.sleep(TICK)
        if not self._is_taken_back:  # both came at once
            self.engine.take_back(self.fleet)
        return End()

    def _act(self, *, is_interrupted: bool) -> None:
        """Look into the engine's queue if it is time, and do there what is asked of the fleet."""
        is_due = is_interrupted and not self._is_taken_back
        if time.monotonic() < self._next_look and not is_due:
            return
        self._next_look = time.monotonic() + POLL
        try:
            if is_due:
                self.engine.take_back(self.fleet)
                self._is_taken_back = True
            elif self._asked is not None:  # at every look: one that the engine was ending just now may wait again
                self.engine.take_back(self.fleet, waiting_only=True)
            self._look()
            if self.request.size.grows and not self._is_taken_back and self._asked is None:
                with suppress(DatabaseLost):
                    self._grow()
            self.trouble = None
        except ServiceError as error:  # the engine restarts, say
            self.trouble = str(error)

    def _grow(self) -> None:
        """Hand in workers for trials that wait; later each time if those before did nothing for them."""
        jobs = self._jobs()
        times = min(self._times(jobs), TRIES + 1)
        is_early = time.monotonic() < self._grown_at + POLL * 2**times
        if self._missing(jobs) <= 0 or (times and is_early) or (not self.placed and self._is_in_vain(jobs)):
            return
        with self._lock():  # the same command, in another terminal, may have done so by now
            self._look()
            if (missing := self._missing(jobs := self._jobs())) > 0:
                self._note_growth(jobs)
                self._add(missing)

    def _missing(self, jobs: int) -> int:
        return self.request.size.wanted(jobs, self.request.trainers) - len(self.placed) if jobs else 0

    def _note_growth(self, jobs: int) -> None:
        self._grown_for, self._grown_at, self._grown = jobs, time.monotonic(), self._times(jobs) + 1

    def _times(self, jobs: int) -> int:
        """Return how often workers were handed in for these jobs, of which none has been done since."""
        return self._grown if jobs == self._grown_for and time.monotonic() < self._grown_at + OVER else 0

    def _is_in_vain(self, jobs: int) -> bool:
        """Return whether a study's workers do nothing but end. The pool waits for other studies."""
        return self._study is not None and self._times(jobs) > TRIES

    def _end(self) -> End | None:
        """Return how the work has ended, if it has. Raise ServiceError if no worker is left."""
        if self._study is not None and self._queue.closing_state(self._study) in ENDED:
            with suppress(ServiceError):  # they would leave at once
                self.engine.take_back(self.fleet, waiting_only=True)
            return End(closed=True)
        if self._asked is None and (asked := self._stop()):
            self._asked, self._next_look = asked, 0.0
        if self.placed or self.trouble is not None:
            return None
        if self._is_taken_back or self._asked is not None:
            return End(stop=self._asked)
        if self.request.size.grows and (self._study is None or ((jobs := self._jobs()) and not self._is_in_vain(jobs))):
            return None  # others are handed in at one of the next looks
        if self._study is None and not self._jobs():
            return End()  # nothing is left to train
        open_study = "a study is open" if self._study is None else "the study is not closed"
        raise ServiceError(
            f"No worker of {self.fleet.label} is left in {self.engine.title}'s queue, and {open_study}. What is "
            f"done is kept; the same command hands in others. Why they ended: {self.engine.logs(self.fleet)}"
        )

    def _stop(self) -> Stop | None:
        """Return the request of `hpo stop` after the fleet was handed in."""
        if self._study is None:
            return self._queue.pool_stop(self._stops)
        return self._queue.orders("", stops={self._study: self._stops}, held=()).stopped.get(self._study)


@contextmanager
def collect_interrupts() -> Iterator[list[int]]:
    """Collects each Ctrl-C instead of raising."""
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def summary(title: str, workers: Sequence[Placed], *, is_taken_back: bool = False) -> str:
    """Return a fleet in one line: how many workers wait, and why; how many run, and on which hosts."""
    words = []
    for fate in (Fate.RUNNING, Fate.WAITING, Fate.LEAVING):
        members = [worker for worker in workers if worker.fate == fate]
        details = sorted({worker.host if fate == Fate.RUNNING else worker.reason for worker in members} - {""})
        if members:
            words.append(f"{len(members)} {fate}{in_brackets(*details[:SHOWN], '…' if details[SHOWN:] else '')}")
    return f"{title}: {'taken back, giving trials back: ' if is_taken_back else ''}{', '.join(words) or 'no workers'}"
