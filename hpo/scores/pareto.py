"""The Pareto front of a study with several objectives: the configurations that no other one beats."""

from collections.abc import Sequence
from dataclasses import dataclass

from hpo.queue import Job, StudyRow
from hpo.scores import ranking


@dataclass(frozen=True, kw_only=True)
class Place:
    """A finished configuration among the others."""

    job: Job  # its best trial
    values: dict[str, float]  # by objective, the first one first: validation NMSE (mean over the repeats), then sizes
    is_on_front: bool


def of_study(row: StudyRow, jobs: Sequence[Job]) -> list[Place]:
    """Return the finished configurations of a study with several objectives, in the order of the first objective; none
    of another study.

    Configurations of which a repeat diverged, or a fold has no score, are none of them.
    """
    objectives = row.specification.objectives
    if len(objectives) == 1:
        return []
    unstable = ranking.diverged(jobs)
    points = [(job, score) for job, score in ranking.points(jobs) if job.number not in unstable]
    values = [{objectives[0]: score, **job.sizes(objectives[1:])} for job, score in points]
    on_front = front([tuple(own.values()) for own in values])
    return [
        Place(job=job, values=own, is_on_front=is_on_front)
        for (job, _), own, is_on_front in zip(points, values, on_front, strict=True)
    ]


def front(values: Sequence[tuple[float, ...]]) -> list[bool]:
    """Return whether each tuple of values, of which the lowest are best, is on the Pareto front: no other one is at
    least as good in each value and better in one. Of equal ones all are on it, or none."""
    best: list[tuple[float, ...]] = []  # on the front: of sorted ones no later one is better than an earlier one
    for own in sorted(set(values)):
        if not any(all(a <= b for a, b in zip(other, own, strict=True)) for other in best):
            best.append(own)
    chosen = set(best)
    return [own in chosen for own in values]


def marks(row: StudyRow, jobs: Sequence[Job]) -> dict[int, bool]:
    """Return whether each finished configuration is on the front of its study, by its number; empty of a study with one
    objective."""
    return {place.job.number: place.is_on_front for place in of_study(row, jobs)}
