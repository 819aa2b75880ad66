"""What a model and a training ask for together, and whether they fit. Imports no torch."""

from dataclasses import fields

from models.specs import (
    DescriptorsSpec,
    ModelSpec,
    PythonSpec,
    SpecError,
    TrainingSpec,
    TransferSpec,
    distorts,
    physical,
    symmetric,
    wraps,
)

FIT_KEYS = ("epochs", "share", "threads")  # settings that a fit has


def needs_periodic_images(model: ModelSpec, training: TrainingSpec) -> bool:
    """Return whether images that do not wrap around make no sense to this training."""
    is_periodic = wraps(model) or (isinstance(model, DescriptorsSpec) and model.edges == "periodic")
    return is_periodic or training.augmentation == "shift"


def needs_symmetries(model: ModelSpec, training: TrainingSpec) -> bool:
    """Return whether the training needs to know how the targets change when the image is flipped or transposed."""
    return training.augmentation == "symmetry" or symmetric(model)


def check_together(model: ModelSpec, training: TrainingSpec) -> None:
    """Raise SpecError if this model cannot be trained in this way."""
    if isinstance(model, DescriptorsSpec):
        _check_fit(training)
    if training.loss == "relative" and training.relative:
        raise SpecError("training: loss = 'relative' takes relative errors alone: expected relative = 0.")
    if ":" in training.loss and not training.loss_code:
        raise SpecError(f"training: loss = {training.loss!r}: expected the source of this function.")
    if isinstance(model, PythonSpec) and training.start_from:
        raise SpecError("training: start_from: model.family = 'python': expected networks that begin at random.")
    changes = ["augmentation"] * (training.augmentation != "none") + distorts(training)
    if changes and isinstance(model, TransferSpec) and not model.trained:
        raise SpecError(
            f"training: {', '.join(changes)}: the features of a frozen backbone are computed once, before the first "
            "epoch: expected no change of the images, or model.trainable = 'all'."
        )
    if physical(model) and (changes := distorts(training)):
        raise SpecError(
            f"training: {', '.join(changes)}: model.physics computes with the phases of each pixel: expected images "
            'that stay as they are, or model.physics = "none".'
        )


def _check_fit(training: TrainingSpec) -> None:
    """Raise SpecError if the training has settings that a fit does not know."""
    wrong = [f.name for f in fields(TrainingSpec) if f.name not in FIT_KEYS and getattr(training, f.name) != f.default]
    if wrong or training.epochs != 1:
        raise SpecError(
            f"training: {', '.join(wrong or ['epochs'])}: model.family = 'descriptors' is fitted once, not trained: "
            f"expected none but epochs = 1, share and threads."
        )
