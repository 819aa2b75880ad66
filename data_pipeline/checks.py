"""Whether a data set is good enough to train networks on it and to compare them."""

from collections.abc import Iterator, Sequence

import numpy as np

from data_pipeline import image_checks, label_checks
from data_pipeline.dataset import Dataset
from data_pipeline.findings import Finding
from data_pipeline.messages import counted
from data_pipeline.split import SMALLEST, Split

LEAST_SPREAD = 1e-5  # of a component, relative to its largest value; 32-bit networks cannot resolve much less
SMALLEST_LABEL = 1e-30  # of a component's largest; networks compute in single precision, which ends at 1e-38
TELLING = 5  # images of a split; with fewer its scores tell little
ENOUGH = 20  # cells; with fewer the validation split is too small for a comparison


def lacks(dataset: Dataset) -> str | None:
    """Return why networks cannot be trained and compared on a data set; None if they can."""
    if len(dataset.images) < ENOUGH:
        return f"expected at least {ENOUGH} images, found {len(dataset.images)}"
    learned, parts = dataset.targets[dataset.split.train], dataset.split
    for part, indices in (("training", parts.train), ("validation", parts.validation), ("test", parts.test)):
        if empty := _named(dataset, np.isnan(dataset.targets[indices]).all(axis=0)):
            return f"{empty} has no label in the {part} split: leave it out of targets, or give another split"
    alike = np.nanstd(learned, axis=0) <= LEAST_SPREAD * np.nanmax(np.abs(learned), axis=0)
    if (largest := np.nanmax(np.abs(learned), axis=0).min()) < SMALLEST_LABEL and largest > 0:
        return f"a component has no label above {SMALLEST_LABEL:.0e}: single precision loses it; use a smaller unit"
    if constant := _named(dataset, alike):
        return f"{constant} is the same number for every training image, to five digits: nothing to learn"
    if dataset.inputs is not None:
        beside = dataset.inputs[dataset.split.train]
        alike = beside.std(axis=0) <= LEAST_SPREAD * np.abs(beside).max(axis=0)
        if constant := ", ".join(name for name, same in zip(dataset.input_names, alike, strict=True) if same):
            return f"inputs: {constant} is the same number for every training image, to five digits"
    return None


def look(dataset: Dataset, where: Sequence[str]) -> Iterator[Finding]:
    """Yield what is wrong or doubtful with images and labels, but for what mechanics knows of stiffness; `where` names
    each image and its row."""
    images, targets = dataset.images, dataset.targets
    parts = dataset.split if len(images) >= SMALLEST else None
    same = image_checks.copies(images, dataset.inputs)
    yield from image_checks.of_copies(same, targets, parts, where)
    yield from image_checks.of_levels(images, where)
    if parts is not None:
        yield from image_checks.of_near(images, same, parts, where)
        yield from _of_parts(dataset, parts)
    for name, labels in zip(dataset.target_names, targets.T, strict=True):
        yield from label_checks.of_column(name, labels, where)
    yield from label_checks.of_rows(images, targets)


def _of_parts(dataset: Dataset, parts: Split) -> Iterator[Finding]:
    """Yield parts of the split that are too small to tell anything, and scores that do not exist for some targets."""
    for name, part in (("validation", parts.validation), ("test", parts.test)):
        if len(part) < TELLING:
            sentence = f"the {name} split has {counted(len(part), 'image')}: scores of so few tell little."
            yield Finding(name="small-split", sentence=sentence)
        targets = dataset.targets[part]
        if np.isnan(targets).all(axis=0).any():
            continue  # `lacks` says so
        few = (~np.isnan(targets)).sum(axis=0) < min(TELLING, len(part))
        for finding, what, doubtful, why in (
            ("few-labels", "few labels", few, "scores of fewer than five tell little"),
            (
                "constant-labels",
                "no R²",
                np.nanmax(targets, axis=0) == np.nanmin(targets, axis=0),
                "for its labels do not vary there",
            ),
            ("zero-labels", "no MAPE", (targets == 0).any(axis=0), "for one of its labels there is zero"),
        ):
            if doubtful.any():
                sentence = f"{_named(dataset, doubtful)}: {what} in the {name} split, {why}."
                yield Finding(name=finding, sentence=sentence)


def _named(dataset: Dataset, chosen: np.ndarray) -> str:
    return ", ".join(name for name, is_chosen in zip(dataset.target_names, chosen, strict=True) if is_chosen)
