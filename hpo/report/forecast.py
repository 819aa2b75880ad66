"""How long a study still takes: training, the recording of results, the pauses of trainers in between, the closing.

Measured on the trials that have ended; what has not happened yet is taken to last as long as usual.
"""

import bisect
import heapq
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from hpo.queue import Job, Pace, Present, State

FIRST_RECORD = 10.0  # seconds from the last epoch to the record: a trainer's first network, exported for PyTorch
FIRST_LARGE = 17.0  # the same of a backbone of more than a hundred layers
LARGE = 2_000_000  # parameters: of such a backbone
RECORD = 2.0  # seconds of a later one, with the pause until the next trial
LATER = 0.1  # of what a first one took, as long as no later one has been seen
PRUNED = 0.3  # of the trials under a pruner: trained to the end, as long as none has ended
SUPPOSED = 2  # later pauses that are taken to have been seen so
JUDGED = 1.25  # times the epochs of a rung: until then the pruner has said whether a trial goes on
SETTLED = 10  # epochs of a trial after which its pace counts
FIXED = 0.3  # of an epoch's time: what does not grow with the network
CLOSING = 2.0  # seconds, and
WINNER = 2.0  # of each winner that is scored and registered, and
PICTURES = 0.9  # of each configuration that gets pictures, which are at most
PICTURED = 10
OVERTIME = 0.2  # of the time that something has taken: what it still takes once it took longer than expected


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A study at one moment, and what follows from it."""

    jobs: Sequence[Job]  # its trials
    closing: Job | None
    workers: Sequence[Present]
    paces: Mapping[int, Pace]  # of the trials with an epoch, by the id of the job
    now: float  # the database's clock, seconds since 1970
    epochs: Callable[[Job], int]  # planned
    report_by: Sequence[str]  # parameters: a winner of each combination of their values is registered
    pruner: Mapping[str, Any]  # of the study's specification
    folds: int | None = None  # of a cross-validation: its winners are trained again

    @cached_property
    def trainers(self) -> int:
        """How many trials are trained at the same time."""
        present = sum(worker.trainers_left for worker in self.workers if worker.alive)
        return present or sum(job.alive for job in self.jobs)

    @cached_property
    def open(self) -> list[Job]:
        """The trials that have not ended, in the order in which they are claimed."""
        waiting = [job for job in self.jobs if not job.state.ended]
        return sorted(waiting, key=lambda job: (not job.alive, -job.cost, job.number))

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the study is closed; None if they are unknown."""
        closing = self.closing
        if closing is not None and closing.state.ended:
            return 0.0
        if closing is not None and closing.alive:
            return _rest(self.closing_seconds, self.now - closing.changed_at)
        if not self.open and self.jobs:
            return self._refit_seconds + self.closing_seconds if self.trainers or self.workers else None
        if not self.paces or not self.trainers:
            return None
        return self._training_seconds() + self._refit_seconds + self.closing_seconds

    @property
    def _refit_seconds(self) -> float:
        """Return the seconds in which the winners of a cross-validation are trained again, while that is not planned:
        each as long as a mean trial, on the images of one fold more."""
        if not self.folds or not self.paces or any(job.is_refit for job in self.jobs):
            return 0.0
        times = [self._share * self.epochs(job) * self.epoch_seconds(job) for job in self.jobs]
        rounds = math.ceil(self._winners / max(1, self.trainers))
        return rounds * (statistics.fmean(times) * self.folds / (self.folds - 1) + RECORD)

    def _training_seconds(self) -> float:
        """Return the seconds until the last trial is recorded: trainers take the open trials one after the other."""
        cold, (first, later) = float(self.trainers - len(self._first)), self._pauses
        recorded = [0.0]
        free: list[float] = []  # when each trainer is free
        for job in self.open:
            left = self.seconds_of(job)
            if job.alive and not left:
                taken = self.now - self.paces[job.id].last
                if job in self._first:
                    heapq.heappush(free, _rest(first, taken))  # its trainer exports the network
                else:
                    recorded.append(_rest(later, taken))
                continue
            begin = heapq.heappop(free) if len(free) >= self.trainers and not job.alive else 0.0
            heapq.heappush(free, begin + left + later + (first - later) * min(1.0, max(0.0, cold)) * self._done_share)
            cold -= self._done_share
        return max(recorded + free)

    def seconds_of(self, job: Job) -> float:
        """Return the seconds of training that an open trial still takes, as far as others or its pruner tell."""
        return self._expected(job.epochs, self.epochs(job), self.pruner) * self.epoch_seconds(job)

    def _expected(self, done: int, planned: int, pruner: Mapping[str, Any]) -> float:
        """Return how many epochs a trial with `done` of its planned epochs still takes."""
        if pruner.get("name") == "successive-halving":
            return _halving(done, planned, int(pruner["min_epochs"]), int(pruner["reduction_factor"]))
        return max(0, planned - done) if done else self._share * planned

    def epoch_seconds(self, job: Job) -> float:
        """Return the seconds of an epoch: of the trial itself, else of others by the cost of the network; the mean of
        all if the sampler has not chosen the configuration yet."""
        if job.id in self._measured:
            return self._measured[job.id].seconds
        if job.spec is None:
            return self._mean_seconds
        return self.at_cost(job.cost)

    def at_cost(self, cost: float) -> float:
        """Return the seconds of an epoch of a network of this cost, from those of the nearest cost."""
        costs = self._seconds_by_cost
        place = bisect.bisect_left(costs, cost, key=lambda pair: pair[0])
        near, seconds = min(costs[max(0, place - 1) : place + 1], key=lambda pair: abs(pair[0] - cost))
        return seconds * (FIXED + (1 - FIXED) * cost / near if near else 1.0)

    @cached_property
    def _seconds_by_cost(self) -> list[tuple[float, float]]:
        """Costs of measured networks, ascending, each with the mean seconds of an epoch."""
        seconds: dict[float, list[float]] = {}
        for job in self.jobs:
            if job.id in self._measured:
                seconds.setdefault(job.cost, []).append(self._measured[job.id].seconds)
        return sorted((cost, statistics.fmean(values)) for cost, values in seconds.items())

    @cached_property
    def _mean_seconds(self) -> float:
        return statistics.fmean(pace.seconds for pace in self._measured.values())

    @cached_property
    def _measured(self) -> Mapping[int, Pace]:
        """The paces that tell something: a trial's first epochs are slow; they count only where there are no others."""
        epochs = {job.id: job.epochs for job in self.jobs}
        return {id: pace for id, pace in self.paces.items() if epochs.get(id, 0) >= SETTLED} or self.paces

    @cached_property
    def _share(self) -> float:
        """Which share of its epochs a trial is trained for: a pruner or patience ends some early."""
        shares = [job.epochs / self.epochs(job) for job in self.jobs if job.state in (State.DONE, State.PRUNED)]
        if not shares:
            return 1.0
        middle = statistics.fmean(shares)
        further = [1.0 for job in self.jobs if job.alive and job.epochs > middle * self.epochs(job)]
        return statistics.fmean(shares + further)

    def later_seconds(self, costs: Sequence[float], epochs: int, pruner: Mapping[str, Any]) -> float:
        """Return roughly the seconds that a later study of networks of these costs takes here."""
        share = self._expected(0, epochs, pruner)
        times = [share * self.at_cost(cost) + RECORD for cost in costs]
        return FIRST_RECORD + max(sum(times) / max(1, self.trainers), max(times, default=0.0)) + self.closing_seconds

    # Pauses

    @cached_property
    def _began(self) -> float:
        """When the first of these workers trained its first epoch."""
        joined = self.now - max((worker.here for worker in self.workers if worker.alive), default=self.now)
        starts = [pace.first - pace.seconds for pace in self.paces.values() if pace.last >= joined]
        return max(joined, min(starts, default=self.now))

    @cached_property
    def _trained(self) -> list[Job]:
        """The trials whose training has ended since then, in that order."""
        trained = [
            job
            for job in self.jobs
            if job.id in self.paces
            and self.paces[job.id].last >= self._began
            and (job.state.ended or job.epochs >= self.epochs(job))
        ]
        return sorted(trained, key=lambda job: self.paces[job.id].last)

    @cached_property
    def _first(self) -> list[Job]:
        """The first trial of each trainer that is recorded, or about to be."""
        whole = (job for job in self._trained if job.state in (State.DONE, State.RUNNING))
        return list(islice(whole, self.trainers))

    @cached_property
    def _usual_first(self) -> float:
        """The seconds that the first of them usually take from the last epoch to the record."""
        is_large = any(job.spec is not None and job.spec.parameters > LARGE for job in self.jobs)
        return FIRST_LARGE if is_large else FIRST_RECORD

    @cached_property
    def _pauses(self) -> tuple[float, float]:
        """Return the seconds from the last epoch of a trial to the first one of the next: of a trainer's first trial,
        and of later ones."""
        tails = {job.id: max(0.0, self._ended(job) - self.paces[job.id].last) for job in self._first}
        recorded = [tail for job, tail in zip(self._first, tails.values(), strict=True) if job.state == State.DONE]
        first = statistics.fmean(recorded) if recorded else max([self._usual_first, *tails.values()])
        later = LATER * first if recorded else RECORD
        count = len(self._trained) - len(self._first)
        since = self.now - self._began
        present = sum(worker.trainers * min(worker.here, since) for worker in self.workers if worker.alive)
        active = {job.id: job.epochs for job in self.jobs if job.alive} | {job.id: job.epochs for job in self._trained}
        trained = sum(min(since, epochs * self.paces[id].seconds) for id, epochs in active.items() if id in self.paces)
        under_way = sum(self.paces[job.id].seconds for job in self.jobs if job.alive and job.id in self.paces) / 2
        paused = max(0.0, (present or self.trainers * since) - trained - sum(tails.values()) - under_way)
        return first, (paused * bool(count) + SUPPOSED * later) / (count + SUPPOSED)  # few pauses tell little

    def _ended(self, job: Job) -> float:
        return job.changed_at if job.state.ended else self.now

    @cached_property
    def _done_share(self) -> float:
        """Which share of the trials is trained to the end, and recorded."""
        ended = [job for job in self.jobs if job.state.ended]
        if not ended:
            return 1.0 if self.pruner.get("name", "none") == "none" else PRUNED
        return sum(job.state == State.DONE for job in ended) / len(ended)

    @property
    def _winners(self) -> int:
        """How many networks are registered."""
        points = (job.spec.point for job in self.jobs if job.spec is not None)
        return max(1, len({tuple(repr(point.get(name)) for name in self.report_by) for point in points}))

    @property
    def closing_seconds(self) -> float:
        """Return the seconds of the whole closing."""
        done = {job.number for job in self.jobs if job.state == State.DONE}
        configurations = min(PICTURED, len(done) + self._done_share * len({job.number for job in self.open}))
        usual = CLOSING + WINNER * self._winners + PICTURES * configurations
        is_recorded = any(job.state == State.DONE for job in self._first)
        return usual * max(1.0, self._pauses[0] / self._usual_first) if is_recorded else usual  # on a slow machine


def _rest(expected: float, taken: float) -> float:
    """Return the seconds that something still takes: never none before it is over."""
    return max(expected - taken, OVERTIME * taken, 1.0)


def _halving(done: int, planned: int, first: int, factor: int) -> float:
    """Return the epochs that a trial still takes under successive halving: one of `factor` goes beyond each rung.

    The pruner says so some epochs later: a trial that has just passed a rung may still end there.
    """
    left, chance, epoch, rung = 0.0, 1.0, done, first
    while epoch < planned:
        if rung > epoch:
            until = min(rung, planned)
            left, epoch, chance = left + chance * (until - epoch), until, chance / factor
        elif done < JUDGED * rung:
            chance /= factor
        rung *= factor
    return left
