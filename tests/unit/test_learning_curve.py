"""What more data would bring: nested parts of the training images, and the power law of the errors."""

import itertools

import numpy as np
import pytest

from data_pipeline.parts import share_of

SHARES = (0.01, 0.125, 0.25, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("case", range(40))
def test_a_smaller_share_is_part_of_every_larger_one(case):
    draw = np.random.default_rng(case)
    n = int(draw.integers(4, 300))
    train = draw.permutation(n)[: max(2, int(0.7 * n))]
    groups = tuple(map(str, draw.integers(0, draw.integers(1, n), n))) if case % 2 else None
    parts = [share_of(train, groups, share, seed=case) for share in SHARES]
    for smaller, larger in itertools.pairwise(parts):
        assert set(smaller) <= set(larger)
    assert np.array_equal(parts[-1], train), "all, in their order: the training is that without a share"
    labels = train if groups is None else np.array(groups)[train]
    largest = np.unique(labels, return_counts=True)[1].max()
    for share, part in zip(SHARES, parts, strict=True):
        assert round(share * len(train)) <= len(part) < max(1, round(share * len(train))) + largest
        if groups is not None:
            kept, left = ({groups[index] for index in side} for side in (part, set(train) - set(part)))
            assert not kept & left, "groups are whole"


def test_another_seed_draws_another_share():
    train = np.arange(100)
    first, again, other = (share_of(train, None, 0.25, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and len(first) == len(other) == 25 and set(first) != set(other)
