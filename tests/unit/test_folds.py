"""Cross-validation: each image outside the test split validates in exactly one fold, groups and copies together."""

from dataclasses import replace

import numpy as np
import pytest

from data_pipeline import npz
from data_pipeline.dataset import DEFAULT, load
from data_pipeline.folds import digest, folds, whole
from data_pipeline.parts import SplitProblem
from models import metrics
from tests.support import folders


@pytest.fixture(scope="module")
def default():
    return load(DEFAULT)


@pytest.mark.parametrize("count", [2, 5, 442])
def test_each_image_outside_the_test_split_validates_in_exactly_one_fold(default, count):
    parts, outside = folds(default, count), np.r_[default.split.train, default.split.validation]
    assert sorted(np.concatenate([part.validation for part in parts])) == sorted(outside)
    for part in parts:
        assert sorted(np.r_[part.train, part.validation]) == sorted(outside)
    sizes = [len(part.validation) for part in parts]
    assert max(sizes) - min(sizes) <= 1 and len(parts) == count


def test_the_test_images_are_in_no_fold(default):
    for part in folds(default, 5):
        assert np.array_equal(part.test, default.split.test)
        assert not set(part.test) & set(np.r_[part.train, part.validation])
    assert np.array_equal(whole(default.split).test, default.split.test)
    assert len(whole(default.split).train) == 364 + 78 and not len(whole(default.split).validation)


def test_the_folds_are_the_same_again_and_others_for_another_number(default):
    assert digest(folds(default, 5)) == digest(folds(replace(default), 5)) != digest(folds(default, 4))


def test_no_group_is_in_two_folds_also_from_the_file_that_trainers_read(tmp_path):
    folders.simulations(tmp_path / "data")
    data = load(tmp_path / "data")
    npz.save_npz(data, tmp_path / "data.npz")
    again = npz.load_npz(tmp_path / "data.npz")
    parts, groups = folds(data, 5), np.array(data.groups)
    sides = [set(groups[part.validation]) for part in parts]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 5 == len(set(groups) - set(groups[data.split.test]))
    assert digest(folds(again, 5)) == digest(parts)
    with pytest.raises(SplitProblem, match="at most 5, the number of groups of images outside the test split, found 6"):
        folds(data, 6)


def test_equal_images_are_in_one_fold(default):
    outside = np.r_[default.split.train, default.split.validation]
    pairs = outside[:80].reshape(2, 40)
    images = default.images.copy()
    images[pairs[1]] = images[pairs[0]]
    for part in folds(replace(default, images=images), 5):
        assert np.array_equal(np.isin(pairs[0], part.validation), np.isin(pairs[1], part.validation))


def test_more_folds_than_images_are_refused_with_both_numbers(default):
    with pytest.raises(SplitProblem, match="at most 442, the number of images outside the test split, found 443"):
        folds(default, 443)


def test_the_mean_over_folds_is_none_where_a_fold_has_no_score():
    labels = [np.array([[1.0, 2.0], [3.0, 2.0]]), np.array([[1.0, 2.0], [2.0, 4.0]])]
    variance = np.array([2.0, 4.0])
    each = [metrics.scores(values + 1, values, train_variance=variance) for values in labels]
    mean = metrics.mean_of(each)
    assert mean.nmse == pytest.approx((1 / 2 + 1 / 4) / 2) and mean.mse == 1
    assert mean.per_target["r2"] == [pytest.approx((0 + 1 - 1 / 0.25) / 2), None], "a target that varies in one fold"
    assert metrics.mean_of(each[:1]).to_dict() == each[0].to_dict()
