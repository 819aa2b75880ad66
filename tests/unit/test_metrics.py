"""Scores and baseline predictors, against numbers worked out by hand and against their definitions."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from models.metrics import SCORES, mean_predictor, moments, scores, volume_fraction_predictor

SEED = 3


def test_scores_are_the_numbers_worked_out_by_hand():
    targets = np.array([[1.0, 10.0], [3.0, 30.0]])  # variance 1 and 100
    predictions = np.array([[2.0, 10.0], [3.0, 20.0]])  # errors 1, 0 and 0, -10
    found = scores(predictions, targets, train_variance=np.array([2.0, 400.0]))
    assert found.per_target == {
        "nmse": pytest.approx([0.25, 0.125]),
        "mse": pytest.approx([0.5, 50.0]),
        "r2": pytest.approx([0.5, 0.5]),
        "nrmse": pytest.approx([0.5, math.sqrt(50) / 20]),
        "mae": pytest.approx([0.5, 5.0]),
        "mape": pytest.approx([0.5, 1 / 6]),
    }
    assert found.mse == pytest.approx(25.25)  # pooled over all numbers
    assert found.nmse == pytest.approx(0.1875)
    assert found.nrmse == pytest.approx((0.5 + math.sqrt(50) / 20) / 2)


def test_the_mean_of_the_training_split_scores_nmse_1_and_r2_0_there():
    random = np.random.default_rng(SEED)
    images, targets = random.random((40, 1, 4, 4)), random.normal(5, [1, 10, 1e-7], (40, 3))
    predicted = mean_predictor(images, targets)(images)
    found = scores(predicted, targets, train_variance=targets.var(axis=0))
    assert found.nmse == pytest.approx(1, rel=1e-9), f"seed {SEED}"
    assert found.r2 == pytest.approx(0, abs=1e-9)


def test_r2_uses_the_mean_of_the_evaluated_split():
    train, test = np.array([[0.0], [2.0]]), np.array([[10.0], [12.0]])
    found = scores(np.full((2, 1), 11.0), test, train_variance=train.var(axis=0))
    assert found.r2 == pytest.approx(0)
    assert found.nmse == pytest.approx(1)


def test_the_volume_fraction_predictor_reproduces_a_cubic_law_and_sees_nothing_else():
    random = np.random.default_rng(SEED)
    images = (random.random((60, 1, 16, 16)) < random.random((60, 1, 1, 1))).astype(np.float32)

    def law(images):
        fraction = images.mean(axis=(1, 2, 3), dtype=np.float64)
        return np.column_stack([1 + 2 * fraction - 3 * fraction**2 + 4 * fraction**3, 1e-8 * fraction**3])

    predict = volume_fraction_predictor(images[:40], law(images[:40]))
    expected = law(images[40:])
    error = np.abs(predict(images[40:]) - expected).max(axis=0)
    assert (error < 1e-10 * expected.max(axis=0)).all(), f"seed {SEED}"
    shuffled = random.permuted(images[40:].reshape(20, -1), axis=1).reshape(20, 1, 16, 16)
    assert predict(shuffled) == pytest.approx(predict(images[40:]), rel=1e-9)


def test_a_score_that_does_not_exist_is_none_and_left_out_of_the_mean():
    found = scores(np.ones((2, 1)), np.ones((2, 1)), train_variance=np.zeros(1))
    assert found.nmse is None and found.r2 is None and found.mse == 0
    # 0.1 does not vary, though its variance comes out as 1.9e-34
    targets = np.column_stack([[0.1, 0.1, 0.1], [0.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    found = scores(targets + 0.5, targets, train_variance=np.ones(3))
    assert found.per_target["r2"] == [None, pytest.approx(1 - 0.25 / (2 / 3)), pytest.approx(1 - 0.25 / (2 / 3))]
    assert found.r2 == pytest.approx(1 - 0.25 / (2 / 3))
    assert found.per_target["mape"] == [pytest.approx(5), None, pytest.approx((0.5 + 0.25 + 1 / 6) / 3)]
    assert found.mape == pytest.approx((5 + (0.5 + 0.25 + 1 / 6) / 3) / 2)
    assert found.nmse == pytest.approx(0.25)
    assert scores(np.full((1, 1), np.inf), np.ones((1, 1)), train_variance=np.ones(1)).nmse is None
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("odd", [np.inf, np.nan, 1e200])
def test_an_infinite_error_of_one_target_is_not_left_out_of_the_means(odd):
    targets = np.array([[1.0, 2.0, 0.0], [2.0, 4.0, 1.0]])
    predictions = targets + 0.5
    predictions[0, 1] = odd  # whose square is infinite
    found = scores(predictions, targets, train_variance=np.array([1.0, 1.0, 0.0]))
    assert found.per_target["nmse"] == [0.25, None, None] and found.per_target["mse"] == [0.25, None, 0.25]
    assert [getattr(found, name) for name in ("nmse", "mse", "r2", "nrmse")] == [None] * 4
    assert scores(targets + 0.5, targets, train_variance=np.array([1.0, 1.0, 0.0])).nmse == 0.25
    json.dumps(found.to_dict(), allow_nan=False)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"expected predictions and targets"):
        scores(np.ones((2, 9)), np.ones((2, 1)), train_variance=np.ones(9))
    with pytest.raises(ValueError, match=r"n > 0"):
        scores(np.ones((0, 9)), np.ones((0, 9)), train_variance=np.ones(9))


def test_of_several_channels_the_second_baseline_is_linear_in_their_means():
    draw = np.random.default_rng(0)
    phases = np.eye(3, dtype=np.float32)[draw.integers(0, 3, (30, 8, 8)) * (draw.random((30, 1, 1)) < 0.7)]
    images = phases.transpose(0, 3, 1, 2)
    shares = images.mean(axis=(2, 3), dtype=np.float64)
    targets = np.stack([2 * shares[:, 1] + 5 * shares[:, 2], 1 - shares[:, 0]], axis=1)
    predicted = volume_fraction_predictor(images, targets)(images)
    assert np.allclose(predicted, targets)


NUMBERS = st.integers(-100, 100).map(float)


def near(value):
    return None if value is None else pytest.approx(value, rel=1e-9, abs=1e-9)


@given(st.data())
def test_missing_labels_count_in_no_score(data):
    shape = data.draw(st.tuples(st.integers(1, 8), st.integers(1, 4)))
    truth, predicted = (data.draw(arrays.arrays(np.float64, shape, elements=NUMBERS)) for _ in range(2))
    there = data.draw(arrays.arrays(bool, shape))
    variance = data.draw(arrays.arrays(np.float64, shape[1], elements=st.floats(0.1, 10)))
    found = scores(predicted, np.where(there, truth, np.nan), train_variance=variance)
    own = {name: [] for name in SCORES}
    for place in range(shape[1]):
        rows, here = there[:, place], slice(place, place + 1)
        if rows.any():
            alone = scores(predicted[rows, here], truth[rows, here], train_variance=variance[here])
            for name in SCORES:
                assert found.per_target[name][place] == near(alone.per_target[name][0])
                own[name] += [] if getattr(alone, name) is None else [getattr(alone, name)]
        else:
            assert {found.per_target[name][place] for name in SCORES} == {None}
    for name in SCORES:
        assert getattr(found, name) == near(np.mean(own[name]) if own[name] else None)
    assert found.per_target.get("n") == (None if there.all() else there.sum(axis=0).tolist())


@pytest.mark.parametrize("layout", [np.ascontiguousarray, np.asfortranarray, lambda values: values[::2]])
def test_moments_of_whole_columns_are_numpys_to_the_bit(layout):
    targets = layout(np.random.default_rng(SEED).normal(5, [1, 1e-7, 1e5], (53, 3)))
    mean, variance = moments(targets)
    assert mean.tobytes() == targets.mean(axis=0).tobytes() and variance.tobytes() == targets.var(axis=0).tobytes()


def test_baselines_learn_each_target_from_the_images_that_have_it():
    random = np.random.default_rng(SEED)
    images, targets = random.random((40, 1, 4, 4)), random.normal(5, 1, (40, 3))
    targets[::3, 1:] = targets[1, 2] = np.nan
    for fit in (mean_predictor, volume_fraction_predictor):
        predicted = fit(images, targets)(images)
        for place, there in enumerate(~np.isnan(targets).T):
            alone = fit(images[there], targets[there, place : place + 1])(images)
            assert predicted[:, place : place + 1] == pytest.approx(alone, rel=1e-9)
