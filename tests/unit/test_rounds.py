"""Successive halving by the clock: rounds in closed form."""

import pytest

from hpo.planning import rounds
from hpo.planning.rounds import FACTOR, MARGIN, Round, Speed

EXACT = 1 / MARGIN  # times as long: what is left of it for training is whole


def speed(**changes) -> Speed:
    return Speed(**{"trainers": 2, "epoch_seconds": 1.0, "batches": 12} | changes)


def test_each_round_takes_the_same_time_for_a_third_of_the_trainings():
    planned = rounds.rounds(3 * 900 * EXACT + 1e-6, speed())
    assert [(one.trainings, one.epochs) for one in planned] == [(18, 100), (6, 300), (2, 900)]
    assert {one.trainings * one.epochs for one in planned} == {2 * 900}, "all trainers are busy to the end"
    assert [one.seconds for one in planned] == pytest.approx([900 * EXACT] * 3)


@pytest.mark.parametrize(
    ("seconds", "epochs"),
    [
        (4 * 1350, [50, 150, 450, 1350]),  # 50 epochs of 12 batches are the shortest
        (3 * 1500, [166, 500, 1500]),  # a fourth would have 1125 // 27 = 41
        (2 * 150, [50, 150]),
        (2 * 149, [298]),
        (1, [1]),
    ],
)
def test_there_are_as_many_rounds_as_leave_the_shortest_trainings_long_enough(seconds, epochs):
    assert [one.epochs for one in rounds.rounds(seconds * EXACT + 1e-6, speed())] == epochs


def test_longer_trainings_than_are_of_use_become_more_trainings():
    planned = rounds.rounds(2 * 5000 * EXACT + 1e-6, speed(batches=100, epoch_seconds=10.0))
    # 20,000 batches are 200 epochs, 2,000 s: two of them in turn fill 4 of the 5 thousand seconds of four rounds
    assert planned[-1].epochs == 200 and rounds.next_round(5000 * EXACT, 1, speed(batches=100, epoch_seconds=10.0)) == (
        Round(seconds=5000 * EXACT, trainings=4, epochs=200)
    )


def test_what_a_round_spends_on_other_things_is_not_trained():
    plain, burdened = (
        rounds.next_round(100 * EXACT + 1e-6, 1, speed()),
        rounds.next_round(120 * EXACT, 1, speed(overhead=21.1)),
    )
    assert plain.epochs == 100 and burdened.epochs == 99  # 0.95 (126.3 - 21.1) = 99.96
    assert rounds.next_round(10.0, 1, speed(overhead=30.0)).epochs == 1, "there is always a training"


@pytest.mark.parametrize(("trainings", "repeats"), [(1, 1), (2, 2), (3, 3), (4, 2), (5, 1), (9, 3), (16, 2)])
def test_the_last_round_trains_each_configuration_with_several_seeds_if_it_can(trainings, repeats):
    assert Round(seconds=1.0, trainings=trainings, epochs=1).repeats == repeats


@pytest.mark.parametrize("trainers", [1, 2, 7, 16])
@pytest.mark.parametrize("seconds", [30.0, 900.0, 3600.0, 36_000.0])
@pytest.mark.parametrize("epoch_seconds", [0.01, 0.9, 40.0])
def test_no_round_is_longer_than_its_share_unless_one_epoch_is(trainers, seconds, epoch_seconds):
    pace = speed(trainers=trainers, epoch_seconds=epoch_seconds)
    planned = rounds.rounds(seconds, pace)
    for one, after in zip(planned, [*planned[1:], None], strict=True):
        assert one.trainings % trainers == 0
        assert one.trainings / trainers * one.epochs * epoch_seconds <= one.seconds or one.epochs == 1
        assert after is None or (one.trainings >= after.trainings and one.epochs <= after.epochs / FACTOR)
