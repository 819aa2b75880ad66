"""Whether a data set is good enough to train networks on it and to compare them."""

import numpy as np

from data_pipeline.dataset import Dataset

LEAST_SPREAD = 1e-5  # of a component, relative to its largest value; 32-bit networks cannot resolve much less
SMALLEST_LABEL = 1e-30  # of a component's largest; networks compute in single precision, which ends at 1e-38
TELLING = 5  # images of a split; with fewer its scores tell little
ENOUGH = 20  # cells; with fewer the validation split is too small for a comparison


def lacks(dataset: Dataset) -> str | None:
    """Return why networks cannot be trained and compared on a data set; None if they can."""
    if len(dataset.images) < ENOUGH:
        return f"expected at least {ENOUGH} images, found {len(dataset.images)}"
    learned = dataset.targets[dataset.split.train]
    alike = learned.std(axis=0) <= LEAST_SPREAD * np.abs(learned).max(axis=0)
    if (largest := np.abs(learned).max(axis=0).min()) < SMALLEST_LABEL and largest > 0:
        return f"a component has no label above {SMALLEST_LABEL:.0e}: single precision loses it; use a smaller unit"
    constant = [name for name, same in zip(dataset.target_names, alike, strict=True) if same]
    if constant:
        return f"{', '.join(constant)} is the same number for every training image, to five digits: nothing to learn"
    return None


def doubts(dataset: Dataset) -> list[str]:
    """Return what is doubtful about the split, in sentences: parts that are too small to tell anything, and scores that
    do not exist for some targets."""
    parts = dataset.split
    sentences = []
    for name, part in (("validation", parts.validation), ("test", parts.test)):
        if len(part) < TELLING:
            sentences.append(f"the {name} split has {len(part)} images: scores of so few tell little.")
        targets = dataset.targets[part]
        for score, undefined, why in (
            ("R²", targets.max(axis=0) == targets.min(axis=0), "its labels do not vary there"),
            ("MAPE", (targets == 0).any(axis=0), "one of its labels there is zero"),
        ):
            if undefined.any():
                names = ", ".join(target for target, no in zip(dataset.target_names, undefined, strict=True) if no)
                sentences.append(f"{names}: no {score} in the {name} split, for {why}.")
    return sentences
