"""The order of a study's configurations by their validation scores, from the rows of its jobs alone.

A configuration that is trained with several seeds has one finished trial a seed: its repeats. They share a number.
"""

import statistics
from collections import Counter
from collections.abc import Sequence

from hpo.queue import Job, State
from hpo.study.records import SplitScores
from hpo.text import score_text


def nmse(job: Job) -> float:
    """Return the validation NMSE of a finished trial."""
    assert job.result is not None
    return float(job.result.best_val_nmse)


def repeats(jobs: Sequence[Job]) -> dict[int, list[Job]]:
    """Return the finished trials of each configuration, by its number."""
    by_number: dict[int, list[Job]] = {}
    for job in jobs:
        if job.kind == "trial" and job.state == State.DONE and job.result:
            by_number.setdefault(job.number, []).append(job)
    return by_number


def spread(repeats: Sequence[Job]) -> tuple[float, float | None]:
    """Return mean and standard deviation (None of a single one) of the validation NMSE of a configuration's repeats."""
    values = [nmse(job) for job in repeats]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def diverged(jobs: Sequence[Job]) -> set[int]:
    """Return the numbers of the configurations of which a repeat diverged."""
    return {job.number for job in jobs if job.kind == "trial" and job.state == State.DIVERGED}


def points(jobs: Sequence[Job]) -> list[tuple[Job, float]]:
    """Return the best finished trial of each configuration and the configuration's score, the best one first.

    The score is the mean validation NMSE of the finished repeats; repeats that are dead or cancelled are left out.
    Configurations of which a repeat diverged come behind all others, equal ones by their number.
    """
    unstable = diverged(jobs)
    scored = [(min(finished, key=nmse), spread(finished)[0]) for finished in repeats(jobs).values()]
    return sorted(scored, key=lambda entry: (entry[0].number in unstable, entry[1], entry[0].number))


def ranked(jobs: Sequence[Job]) -> list[Job]:
    """Return the best finished trial of each configuration, in the order of `points`."""
    return [job for job, _ in points(jobs)]


def winners(jobs: Sequence[Job], report_by: Sequence[str]) -> list[Job]:
    """Return the best trial of each combination of values of the `report_by` parameters, the best of all first."""
    best: dict[tuple[str, ...], Job] = {}
    for job in ranked(jobs):
        assert job.spec is not None
        best.setdefault(tuple(repr(job.spec.point.get(name)) for name in report_by), job)
    return list(best.values())


def incomplete(repeats: Sequence[Job]) -> str:
    """Say how many repeats of a configuration its score is the mean of, and what became of the others.

    `repeats` are all of them, in any state. Return an empty text if all are finished.
    """
    others = Counter(job.state for job in repeats if job.state != State.DONE)
    words = ", ".join(f"{count} {state}" for state, count in sorted(others.items()))
    return f"{len(repeats) - others.total()} of {len(repeats)} repeats, {words}" if words else ""


def check_same(scores: SplitScores, job: Job) -> None:
    """Raise ValueError unless the downloaded model gives the validation score its trial was recorded with."""
    assert job.result is not None
    recorded, computed = job.result.validation.nmse, scores.validation.nmse
    if computed is None or recorded is None or not abs(computed - recorded) <= 1e-4 * recorded:
        raise ValueError(
            f"trial {job.number}: its downloaded model has a validation NMSE of {score_text(computed, '.6g')}, "
            f"recorded is {score_text(recorded, '.6g')}"
        )
