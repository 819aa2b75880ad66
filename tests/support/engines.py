"""What every engine of `--on` keeps to, and one in memory that keeps to it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from itertools import count
from typing import ClassVar, Self

from hpo.errors import ServiceError
from hpo.launch.engine import Engine, Fate, Fleet, Placed, Resources
from hpo.launch.probing import WORDS
from hpo.settings import Settings

VERSION = metadata.version("hpo")
REACHED = f"""This is hpo {VERSION} on n1, with Python 3.11.2.
It reaches the database 01234567 and the MLflow server."""
ANSWERS = {("--version",): f"hpo {VERSION}", WORDS: REACHED}


@dataclass
class Worker:
    """One that was handed in to the engine in memory."""

    id: str
    fleet: str
    words: Sequence[str]
    host: str = ""
    is_leaving: bool = False


@dataclass
class Machines:
    """The cluster of the engine in memory: as many workers run as it has hosts, in the order of handing in."""

    hosts: list[str]
    workers: list[Worker] = field(default_factory=list)
    written: dict[str, str] = field(default_factory=dict)  # by fleet
    log: list[str] = field(default_factory=list)  # what it was asked for
    answers: dict[tuple[str, ...], str] = field(default_factory=lambda: dict(ANSWERS))  # by the words of a worker
    is_away: bool = False
    is_hopeless: bool = False  # what waits now waits without end
    numbers: "count[int]" = field(default_factory=count)

    def end(self, number: int = 0) -> None:
        """Let one of the workers end."""
        del self.workers[number]

    def schedule(self) -> None:
        """Give free hosts to workers that wait; let those leave that are leaving, and those end that run no worker."""
        self.workers = [worker for worker in self.workers if not (worker.is_leaving and worker.host)]
        for worker in list(self.workers):
            free = [host for host in self.hosts if host not in [other.host for other in self.workers]]
            if not worker.host and free:
                worker.host = free[0]
            answer = self.answers.get(tuple(worker.words))
            if worker.host and answer is not None:
                self.written[worker.fleet] = answer
                self.workers.remove(worker)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """An engine in memory."""

    title: ClassVar[str] = "Memory"
    machines: Machines = field(default_factory=lambda: Machines(["n1", "n2"]))
    cpus: int | None = None

    @classmethod
    def parse(cls, words: Sequence[str], settings: Settings) -> Self:
        return cls()

    @property
    def resources(self) -> Resources:
        return Resources(cpus=self.cpus)

    def sized(self, cpus: int) -> Self:
        return type(self)(machines=self.machines, cpus=self.cpus or cpus)

    def check(self) -> None:
        self._answer()

    def hand_in(self, fleet: Fleet, commands: Sequence[Sequence[str]]) -> None:
        self._answer()
        self.machines.log.append(f"hand in {len(commands)}")
        for words in commands:
            self.machines.workers.append(Worker(f"w{next(self.machines.numbers)}", fleet.name, words))

    def placed(self, fleet: Fleet) -> list[Placed]:
        self._answer()
        self.machines.schedule()
        fates = {True: Fate.RUNNING, False: Fate.WAITING}
        return [
            Placed(
                id=worker.id,
                fate=Fate.LEAVING if worker.is_leaving else fates[bool(worker.host)],
                host=worker.host,
                reason="" if worker.host else "Resources",
                is_hopeless=self.machines.is_hopeless and not worker.host,
            )
            for worker in self.machines.workers
            if worker.fleet == fleet.name
        ]

    def take_back(self, fleet: Fleet, *, waiting_only: bool = False) -> None:
        self._answer()
        self.machines.log.append(f"take back{' waiting' if waiting_only else ''}")
        own = [worker for worker in self.machines.workers if worker.fleet == fleet.name]
        for worker in own:
            if not worker.host:
                self.machines.workers.remove(worker)
            elif not waiting_only:
                worker.is_leaving = True

    def output(self, fleet: Fleet) -> str:
        return self.machines.written.get(fleet.name, "")

    def forget(self, fleet: Fleet) -> None:
        self.machines.written.pop(fleet.name, None)

    def logs(self, fleet: Fleet) -> str:
        return "nowhere"

    def _answer(self) -> None:
        if self.machines.is_away:
            raise ServiceError("Memory does not answer.")


def check_engine(make: Callable[[], Engine], *, stays: Sequence[str], patience: float) -> None:
    """Hold an engine to the protocol: `make` gives one as another terminal does, for a cluster that runs two workers.

    `stays`: words behind `hpo` of a worker that stays. `patience` in seconds.
    """
    fleet, other = (Fleet(name=f"hpo-contract-{letter}", label=letter, folder=letter) for letter in "ab")

    def until(condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + patience
        while not condition():
            assert time.monotonic() < end, f"not within {patience:.0f} s: {what}: {make().placed(fleet)}"
            time.sleep(0.2)

    def fates(which: Fleet = fleet) -> list[Fate]:
        return sorted(worker.fate for worker in make().placed(which) if worker.fate != Fate.ENDED)

    assert fates() == [] and fates(other) == []
    make().take_back(fleet)  # nothing is there, and that is no error

    make().hand_in(other, [["--version"]])
    until(lambda: fates(other) == [] and f"hpo {VERSION}" in make().output(other), "what a worker wrote, and its end")
    make().forget(other)
    assert make().output(other) == ""

    make().hand_in(fleet, [stays] * 3)
    assert len(fates()) == 3, "found again by the name of the fleet, at once"
    until(
        lambda: (
            fates() == [Fate.RUNNING, Fate.RUNNING, Fate.WAITING]
            and any(worker.reason for worker in make().placed(fleet) if worker.fate == Fate.WAITING)
        ),
        "two run, and one waits and says why",
    )
    for worker in make().placed(fleet):
        assert worker.id and bool(worker.host) == (worker.fate == Fate.RUNNING), worker
        assert bool(worker.reason) == (worker.fate == Fate.WAITING), worker
    assert fates(other) == [], "another name is another fleet"

    make().take_back(fleet, waiting_only=True)
    until(lambda: fates() == [Fate.RUNNING, Fate.RUNNING], "the one that waited is gone")
    make().take_back(fleet)
    make().take_back(fleet)
    until(lambda: fates() == [], "all have left")
