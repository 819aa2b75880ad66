"""The split is the protocol's: scikit-learn's, index by index."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from data_pipeline.checks import lacks
from data_pipeline.dataset import DatasetError, load
from data_pipeline.split import split


@pytest.mark.parametrize("n", [4, 5, 7, 10, 13, 100, 519, 520, 521, 1000])
@pytest.mark.parametrize("seed", [42, 0])
def test_the_indices_are_those_of_scikit_learn_applied_twice(n, seed):
    train, rest = train_test_split(np.arange(n), test_size=0.30, random_state=seed, shuffle=True)
    validation, test = train_test_split(rest, test_size=0.50, random_state=seed)
    ours = split(n, seed=seed)
    assert np.array_equal(ours.train, train)
    assert np.array_equal(ours.validation, validation)
    assert np.array_equal(ours.test, test)
    assert {part.dtype for part in (ours.train, ours.validation, ours.test)} == {np.dtype(np.int64)}


def test_520_cells_are_split_364_78_78_without_overlap():
    parts = split(520)
    assert [len(parts.train), len(parts.validation), len(parts.test)] == [364, 78, 78]
    assert sorted(np.concatenate([parts.train, parts.validation, parts.test])) == list(range(520))


def test_the_digest_depends_on_the_seed_and_the_number_of_cells_only():
    assert split(520).digest == split(520, seed=42).digest
    assert len({split(520).digest, split(520, seed=43).digest, split(521).digest}) == 3


def test_a_set_too_small_to_split_is_refused_with_the_number_it_has():
    with pytest.raises(DatasetError, match=r"at least 4 cells .* found 3"):
        split(3)


def test_a_component_that_is_the_same_but_for_rounding_is_nothing_to_learn(data):
    dataset = load(data)
    assert lacks(dataset) is None
    alike = dataset.targets.copy()
    alike[:, 2] = 1e6 + 1e-6 * alike[:, 2]
    assert lacks(replace(dataset, targets=alike)).startswith("C33 is the same number for every training image")
    assert lacks(replace(dataset, targets=dataset.targets * 1e-14)) is None, "a tiny unit is no matter"
