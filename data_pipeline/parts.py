"""The split of a data set whose folder says something about it: by group, as given, or as in the set it extends."""

from collections.abc import Sequence

import numpy as np
import scipy  # whose modules are imported at their first use

from data_pipeline.split import SEED, SMALLEST, Split, split


class SplitProblem(ValueError):
    """The split that the data ask for does not exist; the message says why."""


def by_group(groups: Sequence[str]) -> Split:
    """Return the source's split of the groups, in the order in which they first occur, as images. No group is on two
    sides. Raise SplitProblem for fewer than four groups."""
    names = list(dict.fromkeys(groups))
    if len(names) < SMALLEST:
        raise SplitProblem(f"split: expected at least {SMALLEST} groups, found {len(names)}: {', '.join(names[:3])}.")
    parts = split(len(names))
    place = {name: index for index, name in enumerate(names)}
    numbers = np.array([place[group] for group in groups])
    return Split(*(np.flatnonzero(np.isin(numbers, part)) for part in (parts.train, parts.validation, parts.test)))


def joined(groups: Sequence[str] | None, same: np.ndarray) -> Sequence[str] | None:
    """Return the groups, of which those with an equal image are one; `same` is for each image the first that is equal,
    (n,). Return the groups as they are if no images are equal, or too few differ to be split."""
    doubled = np.flatnonzero(same != np.arange(len(same)))
    if not len(doubled) or len(same) - len(doubled) < SMALLEST:
        return groups
    first: dict[str, int] = {}
    names = [first.setdefault(group, index) for index, group in enumerate(groups or map(str, range(len(same))))]
    links = scipy.sparse.coo_array(
        (np.ones(2 * len(same)), (np.tile(np.arange(len(same)), 2), np.r_[same, names])), (len(same),) * 2
    )
    return tuple(map(str, scipy.sparse.csgraph.connected_components(links, directed=False)[1].tolist()))


def given(parts: Sequence[str], groups: Sequence[str] | None, same: np.ndarray | None = None) -> Split:
    """Return the split of images that name their part; validation, if none does, is drawn from the training images,
    whole groups if there are any, and equal images together: `same` as in `joined`.

    Raise SplitProblem if a part is missing, or a group is on two sides.
    """
    words = np.array(parts)
    train, validation, test = (np.flatnonzero(words == part) for part in ("training", "validation", "test"))
    if not len(train) or not len(test):
        raise SplitProblem("split: expected images for training and for test, found none of one of them.")
    labels = np.array(groups if groups is not None else range(len(parts))).astype(str)
    if not len(validation):
        together = groups if same is None else joined(groups, same)
        units = labels if together is None else np.array(together).astype(str)
        names = np.array(list(dict.fromkeys(units[train])))
        order = np.random.RandomState(SEED).permutation(len(names))
        drawn = names[order[: max(1, round(0.15 / 0.85 * len(names)))]]
        is_drawn = np.isin(units[train], drawn)
        train, validation = train[~is_drawn], train[is_drawn]
        if not len(train):
            raise SplitProblem("split: expected more than one group for training and validation.")
    sides = [set(labels[part].tolist()) for part in (train, validation, test)]
    if shared := sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2]:
        raise SplitProblem(f"split: the group {sorted(shared)[0]} is on two sides of the given split.")
    return Split(train, validation, test)


def extending(keys: Sequence[bytes], earlier: Sequence[bytes], parts: Split) -> Split:
    """Return the split of images, each with a key of its pixels, of which those of an earlier data set stay on their
    side, also in copies; the others are split among themselves, equal ones together, or train if they are fewer than
    four. No earlier image is missing."""
    sides = dict.fromkeys(earlier, "training")
    for name, part in (("training", parts.train), ("validation", parts.validation), ("test", parts.test)):
        sides |= {earlier[index]: name for index in part.tolist()}  # of equal images the test image decides
    new = [key for key in dict.fromkeys(keys) if key not in sides]
    if len(new) >= SMALLEST:
        more = split(len(new))
        for name, part in (("validation", more.validation), ("test", more.test)):
            sides |= {new[index]: name for index in part.tolist()}
    words = np.array([sides.get(key, "training") for key in keys], dtype="U10")
    return Split(*(np.flatnonzero(words == name) for name in ("training", "validation", "test")))
