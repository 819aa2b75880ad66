"""What `hpo run` is asked for beyond training studies to their end: other numbers of trials, and budgets.

A study that has spent its budget closes with the best that it has, and can be continued.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from hpo import settings
from hpo.errors import SettingsError
from hpo.planning.preparation import check_trials
from hpo.queue import BudgetEnd, DatabaseLost, Queue
from hpo.study import Study
from hpo.text import duration, near_miss

INTERVAL = 1.0  # seconds between two looks at the scores, at least
SHARE = 0.05  # of the time that looking may take
HOUR = 3600.0  # seconds
UNTIL = "nmse"  # the score that ends a study


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a run may spend. Raise SettingsError for a number that makes no sense."""

    max_hours: float | None = None  # from the call of `run` on, for all its studies
    until: str | None = None  # "nmse=0.001": end a study whose best configuration has this validation NMSE

    def __post_init__(self) -> None:
        settings.at_least("--max-hours", self.max_hours, 0)
        _score(self.until)

    @property
    def nmse(self) -> float | None:
        """The validation NMSE that ends a study."""
        return _score(self.until)


def _score(until: str | None) -> float | None:
    """Return the number of `nmse=NUMBER`. Raise SettingsError if it is something else."""
    if until is None:
        return None
    name, _, text = until.partition("=")
    if name.strip() != UNTIL:
        raise SettingsError(
            f"--until {until}: expected {UNTIL}=NUMBER, such as {UNTIL}=0.001, found the score "
            f"'{name}'.{near_miss(name, [UNTIL])} It is the validation NMSE of the best configuration."
        )
    with suppress(ValueError):
        if 0 < (value := float(text)) < float("inf"):
            return value
    raise SettingsError(f"--until {until}: expected a number above 0, as in {UNTIL}=0.001, found '{text}'.")


class Spending:
    """The budget of one run while it is spent."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self.ended = budget, ""  # ended: the study that it ended last
        self._begin, self._next_look = time.monotonic(), 0.0

    @property
    def hours(self) -> float:
        """Hours since the run began."""
        return (time.monotonic() - self._begin) / HOUR

    @property
    def is_out_of_time(self) -> bool:
        return self.budget.max_hours is not None and self.hours >= self.budget.max_hours

    def resume(self, queue: Queue, study: str) -> None:
        """Let a study that an earlier budget ended go on, unless it has what this one asks for."""
        if self._reached(queue, study) is None:
            queue.lift_budget(study)

    def look(self, queue: Queue, study: str) -> None:
        """End the study if its budget is spent: its workers hand back their trials and leave."""
        now = time.monotonic()
        if self.ended == study or now < self._next_look:
            return
        with suppress(DatabaseLost):  # the worker says so, and we look again
            end = self._reached(queue, study)
            if end is None and self.is_out_of_time:
                end = BudgetEnd(budget=f"--max-hours {self.budget.max_hours:g}", reached=duration(HOUR * self.hours))
            if end is not None and queue.end_by_budget(study, end):
                self.ended = study
        self._next_look = now + max(INTERVAL, (time.monotonic() - now) / SHARE)

    def _reached(self, queue: Queue, study: str) -> BudgetEnd | None:
        """Return the end of a study whose best configuration is good enough."""
        wanted = self.budget.nmse
        best = queue.best_complete(study) if wanted is not None else None
        if wanted is None or best is None or best[1] > wanted:
            return None
        return BudgetEnd(
            budget=f"--until {UNTIL}={wanted:g}", reached=f"validation NMSE {best[1]:.4g}, trial {best[0]}"
        )


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What is asked of the studies of a run."""

    retry: bool  # train dead trials again
    priority: int | None  # the pool claims trials of the highest one first; None: as it is
    trials: int | None  # to which the number of a search's configurations is raised
    spending: Spending


def wishes(
    studies: Sequence[Study],
    *,
    retry: bool = False,
    priority: int | None = None,
    trials: int | None = None,
    budget: Budget | None = None,
    is_here: bool = True,
) -> Wishes:
    """Return what is asked of these studies, trained here or not. Raise SettingsError or StudyError if it cannot be."""
    settings.require_priority(priority)
    if trials is not None:
        if len(studies) > 1:
            raise SettingsError(f"--trials: expected one study, found {len(studies)}. Raise them one by one.")
        check_trials(trials, studies[0], studies[0].name)
    budget = budget or Budget()
    if not is_here and budget != Budget():
        raise SettingsError(
            "--max-hours and --until: expected no --on beside them. Only the workers of this machine end by them."
        )
    return Wishes(retry=retry, priority=priority, trials=trials, spending=Spending(budget))
