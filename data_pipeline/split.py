"""The protocol's seeded split into training, validation and test."""

import hashlib
from dataclasses import dataclass
from math import ceil

import numpy as np

from data_pipeline.dataset import Dataset, DatasetError

SEED = 42  # of the source study
SMALLEST = 4  # cells: below that one of the three parts is empty
LEAST_SPREAD = 1e-5  # of a component, relative to its largest value; 32-bit networks cannot resolve much less
SMALLEST_LABEL = 1e-30  # of a component's largest; networks compute in single precision, which ends at 1e-38
ENOUGH = 20  # cells; with fewer the validation split is too small for a comparison


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


def lacks(dataset: Dataset) -> str | None:
    """Return why networks cannot be trained and compared on a data set; None if they can."""
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
    """Return one sentence for every score of the validation and test split that does not exist for some targets."""
    parts = split(len(dataset.images))
    sentences = []
    for name, part in (("validation", parts.validation), ("test", parts.test)):
        targets = dataset.targets[part]
        for score, undefined, why in (
            ("R²", targets.max(axis=0) == targets.min(axis=0), "its labels do not vary there"),
            ("MAPE", (targets == 0).any(axis=0), "one of its labels there is zero"),
        ):
            if undefined.any():
                names = ", ".join(target for target, no in zip(dataset.target_names, undefined, strict=True) if no)
                sentences.append(f"{names}: no {score} in the {name} split, for {why}.")
    return sentences


def _two_parts(indices: np.ndarray, test_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    # scikit-learn draws from the legacy generator, whose streams NumPy has frozen, and gives the test part first.
    order = np.random.RandomState(seed).permutation(len(indices))
    n_test = ceil(test_size * len(indices))
    return indices[order[n_test:]], indices[order[:n_test]]
