"""Budgets of `hpo run` and raised numbers of trials: what is refused, and when a study ends."""

import pytest
import records

from hpo import study
from hpo.errors import SettingsError, StudyError
from hpo.operations import budgets, work
from hpo.operations.budgets import Budget, Spending, wishes
from hpo.operations.compute import Compute
from hpo.queue import BudgetEnd, DatabaseLost, Stop
from hpo.queue.closing_result import ClosingResult
from hpo.report import promotion, words

SEARCH = records.canonical(sampler={"name": "random", "trials": 20}, space=[["filters", [2, 4]]])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_hours": -1}, "--max-hours: expected at least 0, found -1"),
        ({"max_hours": float("nan")}, "--max-hours: expected at least 0, found nan"),
        ({"until": "nmes=0.1"}, "found the score 'nmes'. Did you mean 'nmse'?"),
        ({"until": "r2=0.9"}, "expected nmse=NUMBER, such as nmse=0.001, found the score 'r2'"),
        ({"until": "nmse"}, "expected a number above 0, as in nmse=0.001, found ''"),
        ({"until": "nmse=0,1"}, "expected a number above 0, as in nmse=0.001, found '0,1'"),
        ({"until": "nmse=nan"}, "expected a number above 0"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(SettingsError, match=message.replace("?", r"\?")):
        Budget(**values)


@pytest.mark.parametrize(
    ("sampler", "trials", "message"),
    [
        ({"name": "random", "trials": 20}, 19, "expected a number from 20, the present one of mine, to 100000"),
        ({"name": "random", "trials": 20}, 100_001, "expected a number from 20, the present one of mine, to 100000"),
        ({"name": "grid", "trials": 20}, 30, "are all points of a grid: expected a search"),
    ],
)
def test_a_number_of_trials_that_a_study_cannot_have_is_refused(sampler, trials, message):
    chosen = study.restore("mine", records.canonical(sampler=sampler))
    with pytest.raises(StudyError, match=message):
        wishes([chosen], retry=False, trials=trials, budget=Budget(), is_here=True)


def test_trials_are_raised_of_one_study_and_budgets_are_spent_here():
    chosen = study.restore("mine", SEARCH)
    with pytest.raises(SettingsError, match="--trials: expected one study, found 2"):
        wishes([chosen, chosen], retry=False, trials=30, budget=Budget(), is_here=True)
    with pytest.raises(SettingsError, match="expected no --on beside them"):
        wishes([chosen], retry=False, trials=30, budget=Budget(max_hours=1), is_here=False)
    assert wishes([chosen], retry=False, trials=20, budget=Budget(), is_here=False).trials == 20


def test_a_study_with_more_trials_keeps_its_identity_and_a_changed_file_is_told_how():
    row = records.study_row("mine", canonical=SEARCH, trials=30)
    assert row.specification.trials == 30 and row.canonical == SEARCH
    more = SEARCH | {"sampler": {"name": "random", "trials": 30}}
    hint = "Or raise its number of trials alone: `hpo run --study mine --trials N`"
    assert hint in str(study.conflict("mine", SEARCH, more))
    assert hint not in str(study.conflict("mine", SEARCH, more | {"seed": 1}))


class Scores:
    """A queue that knows of one score."""

    def __init__(self, nmse: float | None) -> None:
        self.nmse, self.ends, self.lifted, self.is_away = nmse, [], 0, False

    def best_complete(self, name: str) -> tuple[int, float] | None:
        if self.is_away:
            raise DatabaseLost("away")
        return None if self.nmse is None else (7, self.nmse)

    def end_by_budget(self, name: str, end: BudgetEnd) -> bool:
        self.ends.append(end)
        return True

    def jobs(self, name: str) -> list:
        return []

    def lift_budget(self, name: str) -> None:
        self.lifted += 1


def test_a_score_that_is_good_enough_ends_a_study_once_and_it_is_not_opened_again(monkeypatch):
    monkeypatch.setattr(budgets, "INTERVAL", 0.0)
    queue, spending = Scores(None), Spending(Budget(until="nmse=0.01"))
    spending.resume(queue, "s")
    assert queue.lifted == 1
    for queue.nmse in (None, 0.5, 0.011):
        spending.look(queue, "s")
    queue.is_away = True
    spending.look(queue, "s")
    assert queue.ends == [] and spending.ended == ""
    queue.is_away, queue.nmse = False, 0.0099
    for _ in range(2):
        spending._next_look = 0.0
        spending.look(queue, "s")
    assert queue.ends == [BudgetEnd(budget="--until nmse=0.01", reached="validation NMSE 0.0099, trial 7")]
    assert spending.ended == "s" and not spending.is_out_of_time
    spending.resume(queue, "s")
    assert queue.lifted == 1, "it has what is asked for"


def test_time_that_is_over_ends_the_study_that_is_trained(monkeypatch):
    queue, spending = Scores(0.5), Spending(Budget(max_hours=1.5))
    spending.look(queue, "s")
    assert queue.ends == []
    spending._begin -= 1.6 * 3600
    spending._next_look = 0.0
    spending.look(queue, "s")
    (end,) = queue.ends
    assert (end.budget, end.reached) == ("--max-hours 1.5", "1 h 36 min") and spending.is_out_of_time


def test_a_run_closes_a_study_that_the_budget_of_another_run_has_ended(monkeypatch):
    """It would leave with what was said of a `hpo stop` otherwise, and nobody close the study."""
    begun = work.Begun(row=records.study_row("s"), queue=Scores(0.5), links={})
    stop = Stop(by="the budget --max-hours 1", at=0.0, is_budget=True)
    left = work.Outcome(row=begun.row, closed=False, stopped=True, stop=stop)
    said, outcomes = [], [left, work.Outcome(row=begun.row, closed=True)]
    monkeypatch.setattr(work, "_place", lambda *_: work.CPU)
    monkeypatch.setattr(work, "_work", lambda *_: outcomes.pop(0))
    monkeypatch.setattr(work.Watch, "say", lambda _, line: said.append(line))
    outcome = work._run(begun, None, Compute(), None, Spending(Budget()), work.Watch())
    assert outcome.closed and not outcome.stopped and outcomes == []
    assert said == ["s closes with the best so far: the budget --max-hours 1 is spent."]


def test_a_result_says_which_budget_ended_it_and_how_often_test_data_were_seen():
    end = BudgetEnd(budget="--max-hours 8", reached="8 h 01 min", left=23)
    text = promotion.budget("mine", end)
    assert text.startswith("Ended by --max-hours 8 at 8 h 01 min; 23 trials wait. `hpo run --study mine` trains them")
    result = ClosingResult(budget=end, openings=3)
    assert ClosingResult.from_json(result.to_json()) == result and words.openings(result) == "opened 3 times"
    assert words.openings(ClosingResult()) == "opened once" and "openings" not in ClosingResult().to_json()
