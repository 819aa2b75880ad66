"""The end of a worker: why it comes, and how much time is left for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpo.errors import ServiceError
from hpo.queue import Stop
from hpo.worker.children import Clock

STOP_GRACE = 3.0  # seconds a trainer has to hand back its state
STOP_LIMIT = 7.0  # seconds from the signal to the end of the process
OUT_OF_TIME = "--max-hours is over"
UNHURRIED = 30.0  # seconds for the last tasks of the recorder where nobody asked for the end


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a worker leaves though its study is not closed; None: never."""

    trials: int | None = None  # claimed by it; it leaves when they have ended
    seconds: float | None = None  # since its start; what it trains then is handed back
    idle: float | None = None  # seconds without anything to claim; time in which it cannot ask does not count
    stays: bool = False  # while the study is paused, too

    def has_its_trials(self, claimed: int) -> bool:
        """Return whether a worker has claimed all that it was to claim."""
        return self.trials is not None and claimed >= self.trials


NO_LIMITS = Limits()


class Ending:
    """Whether a worker is to end, and why. `stop` may be called by a handler of signals."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._since = clock, 0.0
        self.reason: str | None = None  # None: it goes on
        self.asked: Stop | None = None  # by whom, if `hpo stop` is why
        self.error: ServiceError | None = None  # raised once everything is given back
        self.hurry = False

    def stop(self, reason: str) -> None:
        """Let the worker give everything back and end; at a second Ctrl-C at once. (SLURM sends SIGTERM twice.)"""
        if self.reason is None:
            self.reason, self._since = reason, self._clock.monotonic()
        elif reason == "SIGINT":
            self.hurry = True

    def attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        """Call `action`; if it raises ServiceError, the worker gives everything back, and ends with that error."""
        try:
            action(*arguments)
        except ServiceError as error:
            if self.error is None:
                self.error = error
                self.stop("error")

    @property
    def _seconds(self) -> float:
        """Since `stop`."""
        return self._clock.monotonic() - self._since

    @property
    def grace_is_over(self) -> bool:
        """Whether trainers have had their time to hand back."""
        return self.hurry or self._seconds > STOP_GRACE

    @property
    def is_late(self) -> bool:
        """Whether what is not given back by now must be left."""
        return self.hurry or self._seconds > STOP_LIMIT - 1

    @property
    def is_over(self) -> bool:
        """Whether a worker that was stopped must end, though the database is lost."""
        return self.reason is not None and (self.hurry or self._seconds > STOP_LIMIT)

    @property
    def seconds_left(self) -> float:
        """For the last tasks of the recorder."""
        if self.reason is None:
            return UNHURRIED
        return max(0.2, 0.0 if self.hurry else STOP_LIMIT - 1 - self._seconds)
