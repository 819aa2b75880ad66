"""The data sets that a data set extends, one after the other: which of its images are theirs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data_pipeline.split import Split


@dataclass(frozen=True, kw_only=True, eq=False)
class Earlier:
    """A data set that another one extends, perhaps through others."""

    name: str
    digest: str  # of pixels and labels
    split: str  # digest of its split
    images: np.ndarray  # (m,) of each of its images the index in the data set that extends it

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**vars(self), "images": self.images.tolist()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], count: int) -> "Earlier":
        """Return the record of its JSON form, beside a data set of `count` images. Raise ValueError if it is none."""
        images, words = values["images"], {name: values[name] for name in ("name", "digest", "split")}
        if not all(isinstance(word, str) for word in words.values()):
            raise ValueError("an earlier data set whose name or digests are no texts")
        if not images or any(type(index) is not int or not 0 <= index < count for index in images):
            raise ValueError("an earlier data set with images that are none of these")
        return cls(**words, images=np.array(images, dtype=np.int64))

    def within(self, part: np.ndarray) -> np.ndarray:
        """Return those indices of a part that are images of this data set."""
        return part[np.isin(part, self.images)]


def places(keys: Sequence[bytes], earlier: Sequence[bytes]) -> np.ndarray:
    """Return for each image of an earlier data set its index among all, (m,), by the keys of their pixels."""
    indices: dict[bytes, list[int]] = {}
    for index, key in reversed(list(enumerate(keys))):
        indices.setdefault(key, []).append(index)
    return np.array([one.pop() if len(one := indices[key]) > 1 else one[0] for key in earlier], dtype=np.int64)


def line(earlier: Earlier, before: Sequence[Earlier]) -> tuple[Earlier, ...]:
    """Return a data set's predecessors, the oldest first: `before` are those of `earlier`, the nearest one."""
    return (*(replace(one, images=earlier.images[one.images]) for one in before), earlier)


def relabelled(targets: np.ndarray, before: np.ndarray, parts: Split) -> int:
    """Return how many images outside the test split have other labels than before; both are (n, k), `parts` is their
    split."""
    outside = np.r_[parts.train, parts.validation]
    new, old = targets[outside], before[outside]
    return int((~((new == old) | (np.isnan(new) & np.isnan(old)))).any(axis=1).sum())
