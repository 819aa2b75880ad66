"""Folds for cross-validation: the training and validation images, each of which validates once."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data_pipeline.dataset import Dataset
from data_pipeline.image_checks import copies
from data_pipeline.parts import SplitProblem, joined
from data_pipeline.split import SEED, Split


def folds(dataset: Dataset, count: int) -> tuple[Split, ...]:
    """Return the split of each of `count` folds. Its test images are those of the data set's split.

    The training and validation images of that split are drawn into folds of about one size; the images of a fold
    validate, the others train. A group, and so equal images, are in one fold. Raise SplitProblem if there are fewer
    groups than folds.
    """
    outside = outside_test(dataset.split)
    groups = joined(dataset.groups, copies(dataset.images, dataset.inputs)) or range(len(dataset.images))
    _, members = np.unique(np.array(groups)[outside], return_inverse=True)
    sizes = np.bincount(members)
    if len(sizes) < count:
        kind = "groups of images" if len(sizes) < len(outside) else "images"
        raise SplitProblem(
            f"data.folds: expected at most {len(sizes)}, the number of {kind} outside the test split, found {count}."
        )
    drawn = np.random.RandomState(SEED).permutation(len(sizes))
    fold_of, filled = np.empty(len(sizes), np.int64), np.zeros(count, np.int64)
    for group in drawn[np.argsort(-sizes[drawn], kind="stable")]:  # the largest first: the folds get one size
        fold_of[group] = np.argmin(filled)
        filled[fold_of[group]] += sizes[group]
    number = fold_of[members]
    return tuple(Split(outside[number != fold], outside[number == fold], dataset.split.test) for fold in range(count))


def outside_test(parts: Split) -> np.ndarray:
    """Return the indices of the training and validation images, ascending."""
    return np.sort(np.r_[parts.train, parts.validation])


def whole(parts: Split) -> Split:
    """Return the split whose training images are all outside the test split; none is left to validate."""
    return Split(outside_test(parts), np.empty(0, np.int64), parts.test)


def with_split(dataset: Dataset, parts: Split) -> Dataset:
    """Return the data set with another split."""
    return replace(dataset, given_split=parts)


def digest(parts: Sequence[Split]) -> str:
    """SHA-256 (hex) over the splits of all folds."""
    return hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest()
