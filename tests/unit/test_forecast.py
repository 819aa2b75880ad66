"""How long a study still takes, told of recorded runs at every second."""

import math

import pytest
from replay import Recorded

from hpo.report.forecast import _halving

RUNS = ["grid", "protocol", "tpe", "first-phase", "second-phase"]


def times(run: Recorded, begin: float = 0.0) -> list[float]:
    return [begin + second / 2 for second in range(math.ceil(2 * (run.ended - begin)))]


@pytest.mark.parametrize("name", RUNS)
def test_the_length_of_a_run_is_told_within_a_fifth_from_a_tenth_of_its_epochs_on(name):
    run = Recorded(name)
    told = {}
    for now in times(run):
        progress = run.at(now)
        if progress.share >= 0.1:
            left = progress.seconds_left
            assert left is not None, f"at {now} s"
            told[now] = (now + left) / run.ended - 1
    wrong = {now: f"{error:+.0%}" for now, error in told.items() if abs(error) > 0.2}
    assert len(told) > 50 and not wrong


@pytest.mark.parametrize("name", [*RUNS, "single"])
def test_no_time_is_left_only_when_the_study_is_closed(name):
    run = Recorded(name)
    for now in times(run):
        left = run.at(now).seconds_left
        assert left is None or left >= 1.0, f"at {now} s recording or closing goes on"
    assert run.at(run.ended + 0.1).seconds_left == 0.0


@pytest.mark.parametrize("name", RUNS)
def test_epochs_a_second_are_those_of_the_trials_that_are_trained(name):
    run = Recorded(name)
    epochs = sorted(time for job in run.facts["jobs"] for time in job["epochs"])
    fastest = max(sum(now - 2 < time <= now for time in epochs) / 2 for now in times(run, 2.0))
    rates = [run.at(now).rate for now in times(run)]
    assert 0 < max(rates) <= 2 * fastest, "a first look knows no more than the epochs themselves"


def test_under_successive_halving_one_of_three_goes_beyond_each_rung():
    assert _halving(0, 90, 20, 3) == pytest.approx(20 + 40 / 3 + 30 / 9)
    assert _halving(30, 90, 20, 3) == pytest.approx(30 + 30 / 3)
    assert _halving(80, 90, 20, 3) == 10 and _halving(90, 90, 20, 3) == 0
