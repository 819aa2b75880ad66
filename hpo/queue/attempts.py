"""Attempts: what became of each claim of a job, and the rules by which they count against it.

A failure may be the trial's fault or its place's. It counts only where the place is known to be sound, and never where
the trial made progress. Nothing here touches the database: SQL stores attempts, these functions judge them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

COUNTED_LIMIT = 3  # attempts that count against a job before it is dead
LIMIT = 6  # failures of any kind without progress before it is dead


class AttemptOutcome(StrEnum):
    """How an attempt ended."""

    RECORDED = "recorded"  # done, diverged or pruned
    HANDED_BACK = "handed back"
    CANCELLED = "cancelled"
    FAILED = "failed"  # and its place passed the proof afterwards
    PLACE_FAILED = "place failed"  # and its place failed the proof, too
    OUT_OF_MEMORY = "out of memory"
    LOST = "lost"  # its lease expired
    NOT_RECORDED = "not recorded"  # trained to its end, but its result alone cannot be recorded

    @property
    def failed(self) -> bool:
        """Nobody asked for this end."""
        return self not in (AttemptOutcome.RECORDED, AttemptOutcome.HANDED_BACK, AttemptOutcome.CANCELLED)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One row of the attempt table: one claim of a job."""

    job: int
    fence: int  # of the claim
    host: str
    device: str  # "cpu", or the card
    began: float  # seconds since 1970, server clock
    ended: float | None = None  # likewise; None while it runs
    epochs: int = 0  # the last epoch finished in it; 0 for none
    epoch_at: float | None = None  # when an epoch of it was stored last
    checkpoint: int | None = None  # epoch of the newest checkpoint committed in it
    outcome: AttemptOutcome | None = None  # None while it runs
    alone: bool = True  # the trial had its card or host for itself
    forgiven: bool = False  # before `hpo run --retry`: it counts no more
    reason: str | None = None

    @property
    def place(self) -> tuple[str, str]:
        return self.host, self.device


def without_progress(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Return the failures of a job that committed no newer checkpoint than the attempts before them, by fence."""
    failures, newest = [], 0
    for attempt in sorted(attempts, key=lambda attempt: attempt.fence):
        has_progress = (attempt.checkpoint or 0) > newest
        newest = max(newest, attempt.checkpoint or 0)
        if attempt.outcome is not None and attempt.outcome.failed and not attempt.forgiven and not has_progress:
            failures.append(attempt)
    return failures


def counted(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Return the failures that count against a job.

    An expired lease counts once for each place, out of memory only where the trial ran alone, a failure only where the
    place passed the proof afterwards.
    """
    counting, lost_at = [], set()
    for attempt in without_progress(attempts):
        if attempt.outcome is AttemptOutcome.LOST:
            counts = attempt.place not in lost_at
            lost_at.add(attempt.place)
        elif attempt.outcome is AttemptOutcome.OUT_OF_MEMORY:
            counts = attempt.alone
        else:
            counts = attempt.outcome is not AttemptOutcome.PLACE_FAILED
        if counts:
            counting.append(attempt)
    return counting


def is_exhausted(attempts: Sequence[Attempt]) -> bool:
    """Return whether a job with these attempts is tried no more."""
    if any(attempt.outcome is AttemptOutcome.NOT_RECORDED and not attempt.forgiven for attempt in attempts):
        return True  # another attempt would come to the same
    return len(counted(attempts)) >= COUNTED_LIMIT or len(without_progress(attempts)) >= LIMIT
