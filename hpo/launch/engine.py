"""What an engine is: it places worker processes on machines, keeps them there, and takes them back.

The engine's own queue is the only record of the workers that were handed in. They are found again by the name of their
fleet, from any terminal. What runs on a machine is `hpo worker`, as anywhere else.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Protocol, Self

from hpo.errors import SettingsError
from hpo.settings import Settings, at_least

IDLE_EXIT = 120.0  # seconds; a machine that trains nothing belongs to others


class Fate(StrEnum):
    """Where a worker that was handed in is in its life."""

    WAITING = "waiting"  # for a machine
    RUNNING = "running"
    LEAVING = "leaving"
    ENDED = "ended"


@dataclass(frozen=True, kw_only=True)
class Placed:
    """What became of a worker that was handed in."""

    id: str  # as the engine's own commands take it
    fate: Fate
    host: str = ""  # where it runs
    reason: str = ""  # why it waits, or why it has ended
    is_hopeless: bool = False  # it waits for what this cluster never has


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What each worker gets, as far as options say; None: as the engine decides."""

    cpus: int | None = None  # cores
    has_gpus: bool = False


@dataclass(frozen=True, kw_only=True)
class Size:
    """How many workers there are to be: `least` at any time, up to `most` while trials wait for them."""

    least: int
    most: int
    grows: bool = False  # between the two; else `most` are handed in once

    @classmethod
    def parse(cls, text: int | str) -> Self:
        """Return the size of `8`, or of `2..8`. Raise SettingsError."""
        first, dots, second = str(text).partition("..")
        try:
            least, most = int(first), int(second if dots else first)
        except ValueError:
            raise SettingsError(
                f"--workers: expected a number such as 8, or MIN..MAX such as 2..8, found {str(text)!r}."
            ) from None
        at_least("--workers", most, 1)
        at_least("--workers", least, 0)
        if most < least:
            raise SettingsError(f"--workers: expected MIN..MAX with MIN below MAX, found {text}.")
        return cls(least=least, most=most, grows=bool(dots))

    def wanted(self, jobs: int, trainers: int) -> int:
        """Return how many workers of so many trainers a number of open jobs can use."""
        return max(self.least, min(self.most, -(-jobs // trainers))) if self.grows else self.most


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The workers of one study, or of the pool, on an engine."""

    name: str  # such as hpo-grid-1a2b3c4d-0: a fleet that was stopped, or is of another database, has another one
    label: str  # of the study, or `the pool`
    folder: str  # of its files below a folder of the engine's in HPO_HOME, if it has one


class Engine(Protocol):
    """Where workers are handed in, with what each of them gets.

    Every method but `parse` and `sized` may raise ServiceError: the engine does not answer, or refuses.
    """

    title: ClassVar[str]  # for people, such as SLURM

    @classmethod
    def parse(cls, words: Sequence[str], settings: Settings) -> Self:
        """Return the engine with its options: `KEY=VALUE`, or `KEY`. Raise SettingsError."""

    @property
    def resources(self) -> Resources:
        """What each worker gets."""

    def sized(self, cpus: int) -> Self:
        """Return the same engine with so many cores for each worker, where options say nothing of them."""

    def check(self) -> None:
        """Raise ServiceError if nothing can be handed in here, or the workers could never reach the services."""

    def hand_in(self, fleet: Fleet, commands: Sequence[Sequence[str]]) -> None:
        """Hand in one more worker for each list of words behind `hpo`."""

    def placed(self, fleet: Fleet) -> list[Placed]:
        """Return what became of the workers. The engine may have forgotten those that have ended."""

    def take_back(self, fleet: Fleet, *, waiting_only: bool = False) -> None:
        """Have all workers hand back and leave, or those that wait for a machine. It may be called again."""

    def output(self, fleet: Fleet) -> str:
        """Return the end of what its workers wrote, as far as it can be had from here; empty if there is none."""

    def forget(self, fleet: Fleet) -> None:
        """Remove what is kept of a fleet, its output as well."""

    def logs(self, fleet: Fleet) -> str:
        """Return where people find what its workers write."""


def key_values(engine: str, words: Sequence[str], *, own: Mapping[str, str] | None = None) -> dict[str, str | bool]:
    """Return the options `KEY=VALUE` of an engine; True for a KEY without a value.

    `own`: other names of some keys. Raise SettingsError for what is no such word, or a key that is given twice.
    """
    options: dict[str, str | bool] = {}
    for word in words:
        key, equals, value = word.partition("=")
        key = key.removeprefix("--").replace("_", "-")
        if not re.fullmatch("[a-z][a-z0-9-]*", key) or "\n" in value:
            raise SettingsError(f"--{engine}: expected KEY=VALUE such as cpus=4, found {word!r}.")
        key = (own or {}).get(key, key)
        if key in options:
            raise SettingsError(f"--{engine}: expected {key} once, found it twice.")
        options[key] = value if equals else True
    return options


def whole(engine: str, key: str, value: str | bool) -> int:
    """Return an option's value as a whole number above 0. Raise SettingsError."""
    if not re.fullmatch("[1-9][0-9]*", str(value)):
        raise SettingsError(f"--{engine}: {key}: expected a whole number, found {value!r}.")
    return int(value)
