"""The protocol's seeded split into training, validation and test."""

import hashlib
from dataclasses import dataclass
from math import ceil

import numpy as np

from data_pipeline.errors import DatasetError

SEED = 42  # of the source study
SMALLEST = 4  # cells: below that one of the three parts is empty


@dataclass(frozen=True, eq=False)
class Split:
    """Three arrays of int64 indices without a common index, in the order of the source study."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over the three lists of indices."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            digest.update(len(part).to_bytes(8, "little") + part.astype("<i8").tobytes())
        return digest.hexdigest()


def split(n: int, *, seed: int = SEED) -> Split:
    """Return 70 % / 15 % / 15 % of the indices 0..n-1.

    These are the indices of scikit-learn's `train_test_split(test_size=0.30, random_state=seed)`, then of the same with
    `test_size=0.50` on the 30 %. Raise DatasetError if n is below four.
    """
    if n < SMALLEST:
        raise DatasetError(f"A data set needs at least {SMALLEST} cells to be split 70/15/15; found {n}. Add cells.")
    train, rest = _two_parts(np.arange(n, dtype=np.int64), 0.30, seed)
    validation, test = _two_parts(rest, 0.50, seed)
    return Split(train, validation, test)


def _two_parts(indices: np.ndarray, test_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    # scikit-learn draws from the legacy generator, whose streams NumPy has frozen, and gives the test part first.
    order = np.random.RandomState(seed).permutation(len(indices))
    n_test = ceil(test_size * len(indices))
    return indices[order[n_test:]], indices[order[:n_test]]
