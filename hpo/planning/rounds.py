"""Successive halving by the clock: how many trainings of how many epochs fill a time, from measured seconds.

Each round takes the same time. It trains a third of the configurations of the round before, three times as long. Every
training has a whole schedule of its own, so that each round ends with networks that can be used.
"""

import math
from dataclasses import dataclass

FACTOR = 3  # times as many epochs in each round
MOST_ROUNDS = 4
LEAST_BATCHES = 600  # of a training; the order of shorter ones says little
MOST_BATCHES = 20_000  # of a training; longer ones bring little
MARGIN = 0.95  # of the time that trainings are to take, for epochs that take longer than those that were measured
MOST_REPEATS = 3  # of a configuration, in the last round


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast networks are trained here."""

    trainers: int
    epoch_seconds: float
    batches: int  # in an epoch
    overhead: float = 0.0  # seconds of a round that train nothing

    @property
    def least(self) -> int:
        """The fewest epochs of a training."""
        return math.ceil(LEAST_BATCHES / self.batches)

    def epochs(self, seconds: float) -> int:
        """Return for how many epochs one training goes on in a round of so many seconds."""
        most = math.ceil(MOST_BATCHES / self.batches)
        return max(0, min(most, math.floor(self._training(seconds) / self.epoch_seconds)))

    def trainings(self, seconds: float, epochs: int) -> int:
        """Return how many trainings of so many epochs fill a round of so many seconds; at least one a trainer."""
        in_turn = math.floor(self._training(seconds) / (epochs * self.epoch_seconds))
        return self.trainers * max(1, in_turn)

    def _training(self, seconds: float) -> float:
        return MARGIN * (seconds - self.overhead)


@dataclass(frozen=True, kw_only=True)
class Round:
    """Trainings of one length, side by side."""

    seconds: float  # it is to take, with its overhead
    trainings: int
    epochs: int  # of each

    @property
    def repeats(self) -> int:
        """How often each configuration is trained if this is the last round, with a seed of its own each time."""
        return next(count for count in (2, MOST_REPEATS, 1) if self.trainings % count == 0)


def rounds(seconds: float, speed: Speed) -> list[Round]:
    """Return the rounds that fill so many seconds: as many as leave the shortest trainings long enough, or one."""
    for count in range(MOST_ROUNDS, 1, -1):
        if next_round(seconds, count, speed).epochs >= speed.least:
            return [next_round(seconds / count * left, left, speed) for left in range(count, 0, -1)]
    return [next_round(seconds, 1, speed)]


def next_round(seconds: float, left: int, speed: Speed) -> Round:
    """Return the first of the `left` rounds that fill so many seconds. The last one has the longest trainings."""
    share = seconds / left
    epochs = max(1, speed.epochs(share) // FACTOR ** (left - 1))
    return Round(seconds=share, trainings=speed.trainings(share, epochs), epochs=epochs)
