"""Statistics of the report against closed forms, the solver and models.metrics."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.components import COMPONENTS, tensor, vector
from data_pipeline.homogenize import homogenize, reuss, voigt
from data_pipeline.phase import Phase
from hpo.scores import analysis
from models import metrics

SEED = 11
PHASES = {"matrix": Phase(3.5, 0.35), "inclusion": Phase(70.0, 0.22)}


def test_the_resample_that_draws_every_cell_once_has_the_scores_of_the_metrics():
    random = np.random.default_rng(SEED)
    truth = random.normal(50, 5, (40, 3)) * [1, 1e-3, 1e3]
    predicted = truth + random.normal(0, 1, (40, 3)) * [1, 1e-3, 1e3]
    variance = random.uniform(10, 20, 3)
    once = np.ones((1, 40))
    samples = analysis.score_samples(truth, predicted, train_variance=variance, drawn=once)
    expected = metrics.scores(predicted, truth, train_variance=variance)
    for score, values in samples.items():
        assert values == pytest.approx(getattr(expected, score), rel=1e-9), score


def test_a_resample_is_the_score_of_the_cells_it_drew():
    random = np.random.default_rng(SEED)
    truth, predicted = random.normal(size=(9, 2)), random.normal(size=(9, 2))
    drawn = analysis.resamples(9)[:5]
    samples = analysis.score_samples(truth, predicted, train_variance=np.ones(2), drawn=drawn)
    for index, counts in enumerate(drawn):
        cells = np.repeat(np.arange(9), counts)
        expected = metrics.scores(predicted[cells], truth[cells], train_variance=np.ones(2))
        assert samples["r2"][index] == pytest.approx(expected.r2)
        assert samples["nmse"][index] == pytest.approx(expected.nmse)
        assert samples["mape"][index] == pytest.approx(expected.mape)


def test_intervals_of_95_per_cent_hold_the_truth_about_95_times_in_a_hundred():
    """Errors of variance 1, so that the true MSE is 1; the percentile interval is a little too short at n = 100."""
    drawn = analysis.resamples(100)
    random = np.random.default_rng(SEED)
    inside = 0
    for _ in range(300):
        error = random.normal(size=(100, 1))
        samples = analysis.score_samples(np.zeros((100, 1)), error, train_variance=np.ones(1), drawn=drawn)
        low, high = analysis.interval(samples["mse"])
        inside += low <= 1 <= high
    assert 0.88 <= inside / 300 <= 0.98, f"seed {SEED}"


def test_a_resample_of_cells_without_some_labels_is_the_score_of_the_labels_it_drew():
    random = np.random.default_rng(SEED)
    truth, predicted = random.normal(size=(12, 2)), random.normal(size=(12, 2))
    truth[::3, 1] = np.nan
    drawn = analysis.resamples(12)[:5]
    samples = analysis.score_samples(truth, predicted, train_variance=np.ones(2), drawn=drawn)
    for index, counts in enumerate(drawn):
        cells = np.repeat(np.arange(12), counts)
        expected = metrics.scores(predicted[cells], truth[cells], train_variance=np.ones(2))
        for score, values in samples.items():
            assert values[index] == pytest.approx(getattr(expected, score)), score


DRAWN = analysis.resamples(30)


def test_what_is_undefined_in_too_many_resamples_gets_no_interval():
    truth = np.column_stack([np.full(30, 4.2), np.arange(30.0)])
    samples = analysis.score_samples(truth, truth + 0.1, train_variance=np.ones(2), drawn=DRAWN)
    alone = analysis.score_samples(truth[:, 1:], truth[:, 1:] + 0.1, train_variance=np.ones(1), drawn=DRAWN)
    assert analysis.interval(samples["r2"]) == analysis.interval(alone["r2"]), "a component that does not vary"
    still = analysis.score_samples(truth[:, :1], truth[:, :1] + 0.1, train_variance=np.ones(1), drawn=DRAWN)
    assert all(math.isnan(end) for end in analysis.interval(still["r2"])), "none that varies"
    zero = analysis.score_samples(truth - truth[0], truth - truth[0] + 0.1, train_variance=np.ones(2), drawn=DRAWN)
    assert all(math.isnan(end) for end in analysis.interval(zero["mape"])), "each has a label of zero"
    assert analysis.interval(samples["mse"]) == pytest.approx((0.01, 0.01))
    few = analysis.score_samples(truth[:3, 1:], truth[:3, 1:], train_variance=np.ones(1), drawn=analysis.resamples(3))
    assert np.isnan(few["r2"]).any() and not np.isinf(few["r2"]).any(), "one cell drawn three times"


def points(**axes):
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def test_effects_of_a_product_are_found_exactly_on_a_full_grid():
    grid = points(filters=(8, 16, 32), kernel_size=(3, 5), dropout=(0.0, 0.2))
    scores = [{8: 4, 16: 2, 32: 1}[p["filters"]] * {3: 1, 5: 3}[p["kernel_size"]] for p in grid]
    assert analysis.is_factorial(grid)
    assert analysis.main_effects(grid, scores)[:3] == [
        ("filters", 8, 8.0, 4),
        ("filters", 16, 4.0, 4),
        ("filters", 32, 2.0, 4),
    ]
    found = {(c.parameter, c.low, c.high): c for c in analysis.contrasts(grid, scores)}
    assert found["filters", 8, 16].ratio == pytest.approx(0.5) and found["filters", 8, 16].pairs == 4
    assert found["filters", 8, 16].better == 16
    assert found["kernel_size", 3, 5].ratio == pytest.approx(3) and found["kernel_size", 3, 5].better == 3
    assert found["dropout", 0.0, 0.2].ratio == pytest.approx(1) and found["dropout", 0.0, 0.2].better is None


def test_what_lies_within_the_noise_is_not_called_better():
    grid = points(filters=(8, 16), kernel_size=(3, 5, 7), dropout=(0.0, 0.2))
    random = np.random.default_rng(SEED)
    (contrast,) = [
        each for each in analysis.contrasts(grid, np.exp(random.normal(size=len(grid)))) if each.parameter == "filters"
    ]
    assert contrast.better is None and contrast.interval[0] < 1 < contrast.interval[1]
    alone = analysis.contrast(points(filters=(8, 16)), [1.0, 0.1], "filters", 8, 16)
    assert alone.better is None and math.isinf(alone.interval[1]), "one pair says nothing of its spread"


def test_a_grid_with_a_point_missing_or_twice_is_not_full():
    grid = points(a=(1, 2), b=(1, 2))
    assert analysis.is_factorial(grid)
    assert not analysis.is_factorial(grid[:-1])
    assert not analysis.is_factorial([*grid, grid[0]])
    assert not analysis.is_factorial([])
    assert analysis.contrast(grid[:1], [1.0], "a", 1, 2) is None


def test_converged_is_the_first_epoch_within_five_per_cent_of_the_lowest():
    assert analysis.converged({1: 3.0, 2: 1.06, 3: 1.05, 4: 1.2, 5: 1.0}) == 3
    assert analysis.converged({1: 1.0}) == 1


@pytest.fixture(scope="module")
def labelled():
    """Volume fractions (n,) and effective tensors (n, 9) of random cells, by the solver."""
    random = np.random.default_rng(SEED)
    images = [random.random((8, 8)) < random.uniform(0.2, 0.8) for _ in range(6)]
    targets = np.stack([vector(homogenize(image, **PHASES, subdivisions=2)) for image in images])
    return np.array([image.mean() for image in images]), targets


def test_labels_of_the_solver_violate_nothing(labelled):
    fractions, targets = labelled
    found = analysis.physics(targets, COMPONENTS, fractions, PHASES)
    assert (found["not_positive_definite"], found["above_voigt"], found["below_reuss"]) == (0, 0, 0)
    assert found["hill"] < 1e-9
    assert np.abs(analysis.hill_residuals(targets, COMPONENTS, fractions, PHASES)).max() < 1e-9


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.floats(0.05, 0.95), st.floats(0.01, 0.5))
def test_beyond_a_bound_is_found_and_the_bound_itself_is_not(fraction, excess):
    for bound, name, beyond in ((voigt, "above_voigt", 1 + excess), (reuss, "below_reuss", 1 - excess)):
        at = vector(bound(fraction, **PHASES))[None]
        found = analysis.physics(np.concatenate([at, at * beyond]), COMPONENTS, np.full(2, fraction), PHASES)
        assert found[name] == 0.5


def test_an_indefinite_tensor_is_counted_and_order_of_the_names_does_not_matter(labelled):
    fractions, targets = labelled
    broken = targets.copy()
    broken[0, COMPONENTS.index("C12")] = 10 * targets[0].max()
    assert np.linalg.eigvalsh(tensor(broken[0]))[0] < 0
    order = np.random.default_rng(SEED).permutation(9)
    names = tuple(COMPONENTS[index] for index in order)
    found = analysis.physics(broken[:, order], names, fractions, PHASES)
    assert found["not_positive_definite"] == pytest.approx(1 / 6)
    assert found == analysis.physics(broken, COMPONENTS, fractions, PHASES)


def test_what_cannot_be_judged_is_not_measured(labelled):
    fractions, targets = labelled
    found = analysis.physics(targets, COMPONENTS, fractions, None)
    assert found["not_positive_definite"] == 0 and found["hill"] is None and found["above_voigt"] is None
    assert set(analysis.physics(targets[:, :2], ("a", "b"), fractions, PHASES).values()) == {None}


def test_intervals_of_many_images_hold_few_numbers_at_once(monkeypatch):
    random = np.random.default_rng(2)
    truth = np.where(random.random((500, 3)) < 0.1, np.nan, random.normal(size=(500, 3)))
    arguments = {"train_variance": np.ones(3), "drawn": analysis.resamples(500)}
    whole = analysis.score_samples(truth, truth + 0.1, **arguments)
    monkeypatch.setattr(analysis, "BLOCK", 500 * 70)  # 58 blocks, the last one smaller
    assert (analysis.resamples(500) == arguments["drawn"]).all()
    tracemalloc.start()
    parts = analysis.score_samples(truth, truth + 0.1, **arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000, "4000 x 500 numbers of eight bytes are four times that"
    for name, values in whole.items():
        assert parts[name] == pytest.approx(values, rel=1e-12), name
