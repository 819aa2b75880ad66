"""Shares of the training images: what a learning curve is trained on."""

from collections.abc import Sequence

import numpy as np

from data_pipeline.dataset import Dataset
from data_pipeline.image_checks import copies
from data_pipeline.parts import joined


def training_share(dataset: Dataset, train: np.ndarray, share: float, *, seed: int) -> np.ndarray:
    """Return a share of the data set's training images: their indices, as `share_of` draws them. A group, and so equal
    images, is in it as a whole or not at all."""
    if share == 1:
        return train
    groups = joined(dataset.groups, copies(dataset.images, dataset.inputs))
    return share_of(train, groups, share, seed=seed)


def share_of(train: np.ndarray, groups: Sequence[str] | None, share: float, *, seed: int) -> np.ndarray:
    """Return a share of the training images, whole groups, in their order: as few drawn groups as have at least
    `share` of the images. With one seed every smaller share is part of every larger one; 1 is all."""
    labels = train if groups is None else np.array(groups)[train]
    _, first, numbers = np.unique(labels, return_index=True, return_inverse=True)
    order = np.random.RandomState(seed).permutation(len(first))
    reached = np.cumsum(np.bincount(numbers)[order])
    count = 1 + int(np.searchsorted(reached, min(round(share * len(train)), len(train))))
    return train[np.isin(numbers, order[:count])]
