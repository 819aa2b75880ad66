"""What a training minimises: the mean of a term for each label."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from models import user
from models.specs import SpecError, TrainingSpec

Terms = Callable[[Tensor, Tensor], Tensor]  # of outputs and scaled targets, (b, k) each

SHIPPED: dict[str, Terms] = {
    "mae": lambda outputs, targets: (outputs - targets).abs(),
    "huber": lambda outputs, targets: F.huber_loss(outputs, targets, reduction="none"),
}


def terms(training: TrainingSpec) -> Terms | None:
    """Return what computes the terms (b, k) of the loss; None if they are the squared errors.

    Outputs and targets are in units of the training split's deviation, unless targets are not scaled. Where the target
    is missing (NaN), the term is 0, and so is its gradient. A function of the user's gets the output in its place.
    """
    if training.loss in ("mse", "relative"):  # the latter weighs the images
        return None
    function = SHIPPED.get(training.loss) or user.function(training.loss_code, training.loss)

    def of_labels(outputs: Tensor, targets: Tensor) -> Tensor:
        is_there = ~targets.isnan()
        values = function(outputs, torch.where(is_there, targets, outputs.detach()))
        if not isinstance(values, Tensor) or values.shape != outputs.shape:
            what = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise SpecError(
                f"training.loss = {training.loss!r}: expected a term for each target of each image, "
                f"{tuple(outputs.shape)}, found {what}."
            )
        return torch.where(is_there, values, 0.0)

    return of_labels
