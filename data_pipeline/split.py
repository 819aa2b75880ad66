"""The protocol's seeded split into training, validation and test."""

import hashlib
from dataclasses import dataclass
from math import ceil

import numpy as np

from data_pipeline.dataset import Dataset, DatasetError

SEED = 42  # of the source study
SMALLEST = 4  # cells: below that one of the three parts is empty
LEAST_SPREAD = 1e-5  # of a component, relative to its largest value; 32-bit networks cannot tell apart much less
SMALLEST_LABEL = 1e-30  # of a component's largest; networks reckon in single precision, which ends at 1e-38
ENOUGH = 20  # cells; fewer leave a validation split that says nothing


@dataclass(frozen=True, eq=False)
class Split:
    """Three arrays of int64 indices that have no index in common, in the order in which the source study gets them."""

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
    `test_size=0.50` on the 30 %. DatasetError when n is below four.
    """
    if n < SMALLEST:
        raise DatasetError(f"A data set needs at least {SMALLEST} cells to be split 70/15/15; found {n}. Add cells.")
    train, rest = _two_parts(np.arange(n, dtype=np.int64), 0.30, seed)
    validation, test = _two_parts(rest, 0.50, seed)
    return Split(train, validation, test)


def lacks(dataset: Dataset) -> str | None:
    """What a data set lacks for networks to be trained and compared on it; None if nothing."""
    if len(dataset.images) < ENOUGH:
        return f"expected at least {ENOUGH} images, found {len(dataset.images)}"
    learned = dataset.targets[split(len(dataset.images)).train]
    alike = learned.std(axis=0) <= LEAST_SPREAD * np.abs(learned).max(axis=0)
    if (largest := np.abs(learned).max(axis=0).min()) < SMALLEST_LABEL and largest > 0:
        return f"a component has no label above {SMALLEST_LABEL:.0e}: single precision loses it; use a smaller unit"
    constant = [name for name, same in zip(dataset.target_names, alike, strict=True) if same]
    if constant:
        return f"{', '.join(constant)} is the same number for every training image, to five digits: nothing to learn"
    return None


def unscored(dataset: Dataset) -> list[str]:
    """Which scores of the validation and the test split do not exist, as sentences: they are left out of the means."""
    parts = split(len(dataset.images))
    found = []
    for name, part in (("validation", parts.validation), ("test", parts.test)):
        targets = dataset.targets[part]
        for score, none, why in (
            ("R²", targets.max(axis=0) == targets.min(axis=0), "its labels do not vary there"),
            ("MAPE", (targets == 0).any(axis=0), "one of its labels there is zero"),
        ):
            if none.any():
                names = ", ".join(target for target, each in zip(dataset.target_names, none, strict=True) if each)
                found.append(f"{names}: no {score} in the {name} split, for {why}.")
    return found


def _two_parts(indices: np.ndarray, test_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    # scikit-learn draws from the legacy generator, whose streams NumPy has frozen, and gives the test part first.
    order = np.random.RandomState(seed).permutation(len(indices))
    n_test = ceil(test_size * len(indices))
    return indices[order[n_test:]], indices[order[:n_test]]
