"""Pauses: when trial after trial fails, wherever it runs, a study stops before it has lost them all."""

from collections.abc import Sequence

from hpo.queue.attempts import Attempt, AttemptOutcome

IN_A_ROW = 4  # different trials that failed without an epoch finished in between


def doubtful_since(attempts: Sequence[Attempt], *, resumed_at: float = 0.0) -> float | None:
    """Return when the fourth different trial of a study failed in a row; None if fewer have.

    From then on the cheapest trial alone is tried. `attempts`: of all trials of the study; `resumed_at`: when its last
    pause ended. Both times are seconds since 1970, server clock.
    """
    jobs: set[int] = set()
    for failure in _failures(attempts, resumed_at):
        jobs.add(failure.job)
        if len(jobs) == IN_A_ROW:
            return failure.ended
    return None


def is_tried(attempts: Sequence[Attempt], since: float) -> bool:
    """Return whether a trial that was claimed after that time runs now."""
    return any(attempt.outcome is None and attempt.began > since for attempt in attempts)


def pause_reason(attempts: Sequence[Attempt], *, resumed_at: float = 0.0) -> str | None:
    """Return why a study is to pause: the cheapest trial, claimed after four had failed in a row, failed too."""
    since = doubtful_since(attempts, resumed_at=resumed_at)
    if since is None:
        return None
    failures = _failures(attempts, resumed_at)
    last = next((failure for failure in failures if failure.began > since), None)
    if last is None:
        return None
    count = len({failure.job for failure in failures})
    return f"{count} trials in a row failed without an epoch finished in between, at last the cheapest: {last.reason}"


def _failures(attempts: Sequence[Attempt], resumed_at: float) -> list[Attempt]:
    """Return the failures since the last finished epoch, in their order; those of faulty places say nothing."""
    since = max([resumed_at, *(attempt.epoch_at or 0.0 for attempt in attempts)])
    return sorted(
        (
            attempt
            for attempt in attempts
            if attempt.outcome is not None
            and attempt.outcome.failed
            and attempt.outcome is not AttemptOutcome.PLACE_FAILED
            and (attempt.ended or 0.0) > since
        ),
        key=lambda attempt: attempt.ended or 0.0,
    )
