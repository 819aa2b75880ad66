"""What every trial of the studies on one problem is elected by: decided from the rows of the queue alone.

All studies of one database on the same data, split and targets compete, whatever their data sets are called.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hpo.queue import Job, State, StudyRow
from hpo.scores import ranking


@dataclass(frozen=True, kw_only=True, order=True)
class Standing:
    """What a finished trial is elected by; the lowest comes first."""

    point: float  # mean validation NMSE of its configuration; infinity if another one is better, or a repeat diverged
    own: float  # validation NMSE of its network


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A study that competes, with its jobs."""

    row: StudyRow
    jobs: Sequence[Job]

    @property
    def closing(self) -> Job | None:
        """The job that closes the study; None if the study's planning was interrupted."""
        return next((job for job in self.jobs if job.kind == "closing"), None)

    @property
    def closing_attempt(self) -> tuple[State, int] | None:
        """State and fence of the closing: they change when a worker begins or ends it."""
        return (self.closing.state, self.closing.fence) if self.closing is not None else None

    @property
    def is_closed(self) -> bool:
        return self.closing is not None and self.closing.state == State.DONE

    @property
    def is_answering(self) -> bool:
        """Whether the study has been closed at least once: also while trials that came back are trained."""
        return self.is_closed or bool(self.row.facts.closed)

    def answers(self) -> dict[str, float]:
        """Return the mean validation NMSE that this study's repeats give to configurations of another study.

        The key is the run that the configuration was taken from; the value is infinity if a repeat diverged.
        """
        unstable, finished = ranking.diverged(self.jobs), ranking.repeats(self.jobs)
        scores: dict[str, float] = {}
        for job in self.jobs:
            origin = job.spec.best_of if job.spec and "share" not in job.spec.point else None  # no learning curve
            if origin is not None and job.number in unstable:
                scores[origin.run_id] = math.inf
            elif origin is not None and job.number in finished:
                scores[origin.run_id] = ranking.spread(finished[job.number])[0]
        return scores


def problem(row: StudyRow) -> tuple[str, ...]:
    """Return what must be the same for two studies' scores to be compared."""
    data = row.facts.data
    return (data.digest, data.split, *data.target_names)


def standings(rivals: Sequence[Rival], *, closing: str | None = None) -> dict[str, Standing]:
    """Return what every finished trial is elected by, by its MLflow run.

    A study may train the best configurations of another one with other seeds. Once it has been closed (or is the study
    `closing`) it answers for the other: the other's trials take the scores of these repeats, and infinity where their
    configuration was not trained again. Of several such studies the lowest score of a configuration counts.
    """
    answers = [rival.answers() for rival in rivals if rival.is_answering or rival.row.name == closing]
    result: dict[str, Standing] = {}
    for rival in rivals:
        runs: dict[int, set[str]] = {}  # of each configuration, by its number
        for job in rival.jobs:
            if job.run_id is not None:
                runs.setdefault(job.number, set()).add(job.run_id)
        responsible = [answer for answer in answers if answer.keys() & set().union(*runs.values())]
        unstable, refits = ranking.diverged(rival.jobs), ranking.refits(rival.jobs)
        for number, jobs in ranking.repeats(rival.jobs).items():
            point = math.inf if number in unstable else ranking.spread(jobs)[0]
            if responsible:
                means = [answer[run] for answer in responsible for run in answer.keys() & runs.get(number, set())]
                point = min(means, default=math.inf)
            finished = [job for job in (*jobs, refits.get(number)) if job is not None and job.result is not None]
            result |= {str(job.run_id): Standing(point=point, own=ranking.nmse(job)) for job in finished}
    return result
