"""The split is the protocol's: scikit-learn's, index by index."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from data_pipeline.checks import lacks
from data_pipeline.dataset import DatasetError, load
from data_pipeline.parts import extending, given
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


def sides(parts, names) -> dict[str, set[int]]:
    """The parts, by number, that images of each name are in."""
    places: dict[str, set[int]] = {}
    for number, part in enumerate((parts.train, parts.validation, parts.test)):
        for index in part.tolist():
            places.setdefault(names[index], set()).add(number)
    return places


@pytest.mark.parametrize("with_groups", [False, True])
def test_copies_stay_together_when_validation_is_drawn_from_a_given_training_part(with_groups):
    images, same = [f"i{index // 2}" for index in range(60)], np.arange(60) // 2 * 2  # each twice
    words = ["training"] * 50 + ["test"] * 10
    groups = [f"g{index % 10}" for index in range(50)] + ["t"] * 10 if with_groups else None
    parts = given(words, groups, same)
    places = sides(parts, images)
    assert all(len(own) == 1 for own in places.values()) and {1} in places.values()
    if groups:
        assert all(len(own) == 1 for own in sides(parts, groups).values())
        return
    words[49] = "test"  # its copy trains: so the folder says
    places = sides(given(words, None, same), images)
    assert places.pop("i24") in ({0, 2}, {1, 2}) and all(len(own) == 1 for own in places.values())


def test_a_given_split_and_one_that_grows_stay_what_they_were_without_copies():
    words, alone = ["training"] * 50 + ["test"] * 10, np.arange(60)
    assert given(words, None, alone).digest == given(words, None).digest
    keys, more = [bytes([index]) for index in range(60)], split(20)
    grown = extending(keys, keys[:40], split(40))
    assert set(grown.test) == {*split(40).test, *(40 + more.test)}
    assert set(grown.validation) == {*split(40).validation, *(40 + more.validation)}


def test_copies_among_the_images_of_a_set_that_grows_stay_on_one_side():
    old = [bytes([index]) for index in range(40)]
    keys = [*old, *old[:5], *(bytes([100 + index // 2]) for index in range(40))]
    places = sides(extending(keys, old, split(40)), keys)
    assert all(len(own) == 1 for own in places.values()) and len(places) == 60
    assert {side for key, own in places.items() if key[0] >= 100 for side in own} == {0, 1, 2}
