"""Pruning: Optuna's pruners, asked about the epochs the database holds.

A pruner sees a trial's validation NMSE epoch by epoch, in order, whichever worker trained it. The rules are Optuna's,
written for many epochs at once; a test holds them to the decisions of Optuna's own classes. What has been judged stands
in the job's row, written under the fence of its claim before anything is done about it: the next holder of the job goes
on from there, and a trial that is to end ends. Optuna's tables are updated later (`hpo.recording.reconciler`).
"""

import logging
import math
import threading
from binascii import crc32
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import numpy as np

from hpo import crash
from hpo.queue import DatabaseLost, Job, Judged, LeaseLost, Queue
from hpo.study import Study

BATCH = 10_000  # epochs of one job that are judged at a time, so that the others wait for no longer

log = logging.getLogger("hpo")


class Pruning(threading.Thread):
    """Judges the trials of one study in a thread of its own: however long that takes, leases are renewed meanwhile."""

    def __init__(self, queue: Queue, name: str, study: Study) -> None:
        super().__init__(name="pruning", daemon=True)
        self.queue, self.name, self.settings = queue, name, study.pruner
        self.most = int(study.most("epochs"))
        self._live: list[Job] = []
        self._ends: dict[tuple[int, int], str] = {}  # by job and fence
        self._finished: dict[int, np.ndarray] = {}  # curves of trials that are done, by job
        self._judging = threading.Lock()  # of two trials that come to a rung one is the first
        self._wake = threading.Event()
        self._closing = False

    # For the thread that owns the leases

    @property
    def active(self) -> bool:
        """Whether the study has a pruner."""
        return self.settings["name"] != "none"

    def look(self, jobs: list[Job]) -> None:
        """Judge soon what is stored of these jobs."""
        self._live = jobs
        self._wake.set()

    def reason(self, job: Job) -> str | None:
        """Return why this claim of the job is to end; None if it goes on so far."""
        return self._ends.get((job.id, job.fence))

    def finish(self, timeout: float) -> None:
        """End the thread. Where the database takes longer than `timeout` seconds it is left behind."""
        self._closing = True
        self._wake.set()
        if self.is_alive():
            self.join(timeout)

    # For other threads

    def run(self) -> None:
        while not self._closing:
            self._wake.wait()
            self._wake.clear()
            for job in self._live:
                try:
                    while not self._closing and self._judge(job):
                        pass
                except LeaseLost:
                    continue  # the next renewal finds out, and acts on it
                except DatabaseLost:
                    break  # the supervisor says so, and we are woken again
                except Exception as error:
                    log.warning("trial %d of %s could not be judged: %s", job.number, job.study, error)
                    log.debug("", exc_info=True)

    def settle(self, job: Job) -> str | None:
        """Judge all that is stored of the job; return why it is to end, None if it is not.

        Raise LeaseLost or DatabaseLost.
        """
        while self.active and self._judge(job):
            pass
        return self.reason(job)

    def _judge(self, job: Job) -> bool:
        """Judge the next epochs of the job; return whether there may be more."""
        if self.reason(job) is not None:
            return False
        with self._judging:
            judged, curve = self.queue.unjudged(job, limit=BATCH)
            if judged.ends is None and curve:
                judged = self._decide(job, judged, [number for number, _ in curve], [value for _, value in curve])
                self.queue.judge(job, judged)
                if judged.ends is not None:
                    crash.at("verdict stored")
        if judged.ends is not None:
            self._ends[job.id, job.fence] = judged.ends
        return judged.ends is None and len(curve) == BATCH

    def _decide(self, job: Job, judged: Judged, epochs: list[int], values: list[float]) -> Judged:
        assert job.spec is not None
        last, settings = job.spec.training["epochs"], self.settings
        if settings["name"] == "median":
            startup, warmup = settings["startup_trials"], settings["warmup_epochs"]
            return median(judged, epochs, values, self._others(epochs), last=last, startup=startup, warmup=warmup)
        least, factor = settings["min_epochs"], settings["reduction_factor"]
        kind, bracket_of = "SuccessiveHalvingPruner", lambda number: 0
        if settings["name"] == "hyperband":
            kind = "HyperbandPruner"
            bracket_of = partial(bracket, self.name, least=least, most=self.most, factor=factor)
        mine = bracket_of(job.number)

        def others(rung: int) -> list[float]:
            return [value for number, value in self.queue.at_rung(job, rung) if bracket_of(number) == mine]

        return halving(judged, epochs, values, others, kind=kind, last=last, first=least * factor**mine, factor=factor)

    def _others(self, epochs: list[int]) -> np.ndarray:
        """Return the validation NMSE (trials, epochs) of the trials that are done, NaN where one has no such epoch."""
        for job, numbers, values in self.queue.finished(self.name, without=list(self._finished)):
            self._finished[job] = np.full(max(numbers), math.nan)
            self._finished[job][np.array(numbers) - 1] = values
        table = np.full((len(self._finished), len(epochs)), math.nan)
        columns = np.array(epochs) - 1
        for row, curve in zip(table, self._finished.values(), strict=True):
            exists = columns < len(curve)
            row[exists] = curve[columns[exists]]
        return table


def median(
    judged: Judged,
    epochs: Sequence[int],
    values: Sequence[float],
    others: np.ndarray,
    *,
    last: int,
    startup: int,
    warmup: int,
) -> Judged:
    """Return the judgement of Optuna's MedianPruner.

    It ends a trial whose lowest validation NMSE so far is above the median of what the trials that are done had at the
    same epoch: `others` (trials, epochs). Not in the first `warmup` epochs, before `startup` trials are done, or
    after the trial's `last` epoch, when nothing is left to be saved.
    """
    lowest = np.fmin.accumulate([math.nan if judged.value is None else judged.value, *values])[1:]
    ends = np.zeros(len(epochs), dtype=bool)
    if len(others) >= startup:
        numbers = np.array(epochs)
        # Written this way round, a trial without any number so far ends, and one that nothing can be compared with
        # goes on.
        ends = (numbers > warmup) & (numbers < last) & (np.isnan(lowest) | (lowest > _medians(others)))
    at = int(ends.argmax()) if ends.any() else len(epochs) - 1
    value = None if math.isnan(lowest[at]) else float(lowest[at])
    reason = f"pruned by MedianPruner at epoch {epochs[at]}" if ends[at] else None
    return Judged(epoch=epochs[at], value=value, ends=reason)


def halving(
    judged: Judged,
    epochs: Sequence[int],
    values: Sequence[float],
    others: Callable[[int], list[float]],
    *,
    kind: str,
    last: int,
    first: int,
    factor: int,
) -> Judged:
    """Return the judgement of Optuna's SuccessiveHalvingPruner.

    It ends a trial that at a rung (epoch `first`, then `factor` times as many) is not among the best of those that came
    there: one in `factor`, at least one. `others(rung)` are their values, of trials of the same bracket. At the trial's
    `last` epoch, when nothing is left to be saved, the trial is counted and not ended.
    """
    rungs, at = list(judged.rungs), 0
    while (at := max(at, bisect_left(epochs, first * factor ** len(rungs)))) < len(epochs):
        value, ends = values[at], math.isnan(values[at])
        if not ends:
            reached = sorted([*others(len(rungs)), value])
            ends = value > reached[max(len(reached) // factor, 1) - 1]
            rungs.append(value)
        if ends and epochs[at] < last:
            reason = f"pruned by {kind} at epoch {epochs[at]}"
            return Judged(epoch=epochs[at], value=None if math.isnan(value) else value, rungs=rungs, ends=reason)
        if math.isnan(value):
            break
    return Judged(epoch=epochs[-1], value=rungs[-1] if rungs else None, rungs=rungs)


def bracket(name: str, number: int, *, least: int, most: int, factor: int) -> int:
    """Return the number of the bracket that Hyperband puts a trial of the study `name` in.

    Its first rung comes `factor` times later in each bracket than in the one before.
    """
    count = math.floor(math.log(most / least, factor)) + 1
    shares = [math.ceil(count * factor**left / (left + 1)) for left in reversed(range(count))]
    place = crc32(f"{name}_{number}".encode()) % max(sum(shares), 1)
    return bisect_right(list(accumulate(shares)), place)


def _medians(values: np.ndarray) -> np.ndarray:
    """Return the median of each column without its NaN; NaN where there is none.

    The numbers are those of `numpy.nanpercentile` to the bit, which takes much longer.
    """
    ordered, count = np.sort(values, axis=0), (~np.isnan(values)).sum(axis=0)  # NaN come last
    columns = np.arange(values.shape[1])
    low, high = ordered[np.maximum(count - 1, 0) // 2, columns], ordered[count // 2 % len(values), columns]
    return high - (high - low) * 0.5
