"""Scalar inputs: numbers that a network sees beside the image, such as a load ratio."""

import torch
from torch import Tensor, nn

Ranges = tuple[tuple[float, float], ...]  # lowest and highest value of each input that training saw

OVERSHOOT = 1.0  # of a range's width, by which inputs may lie beyond it


class InputError(ValueError):
    """Scalar inputs are missing, too many, not finite, or far from those that the model was trained on."""


class Scalars(nn.Module):
    """Appends inputs (b, m) to features (b, f), standardised by the mean and deviation of the training split."""

    mean: Tensor  # (m,)
    scale: Tensor  # (m,)

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("scale", torch.ones(count))

    def learn(self, inputs: Tensor) -> None:
        """Take mean and deviation of the training split's inputs (n, m)."""
        deviation = inputs.double().std(0, correction=0)
        self.mean.copy_(inputs.double().mean(0))
        self.scale.copy_(torch.where(deviation > 0, deviation, 1.0))  # one that is constant stays so

    def forward(self, features: Tensor, inputs: Tensor) -> Tensor:
        return torch.cat([features, (inputs - self.mean) / self.scale], dim=1)


def beside(features: Tensor, scalars: Scalars | None, inputs: Tensor | None) -> Tensor:
    """Return the features (b, f), with the inputs (b, m) appended if the network takes some."""
    if scalars is None:
        return features
    if inputs is None:
        raise InputError("expected the scalar inputs beside the images, found none.")
    appended: Tensor = scalars(features, inputs)
    return appended


def check(inputs: Tensor | None, names: tuple[str, ...], ranges: Ranges | None, images: Tensor) -> None:
    """Raise InputError unless there is a number for each of the named inputs of each image, at most OVERSHOOT beyond
    what training saw.

    Exported by `torch.export`, the check of the numbers is part of the graph and raises RuntimeError.
    """
    if not torch.compiler.is_compiling():  # a size that a graph has asked for is frozen in it
        shape = None if inputs is None else tuple(inputs.shape)
        if shape != (expected := (len(images), len(names)) if names else None):
            raise InputError(f"expected inputs {', '.join(names) or 'none'} of the shape {expected}, found {shape}.")
    for place, (name, (low, high)) in enumerate(zip(names, ranges or (), strict=ranges is not None)):
        assert inputs is not None
        values, slack = inputs[:, place], OVERSHOOT * (high - low)
        span = f"Expected {name} from {low:g} to {high:g} as in training"
        inside = ((values >= low - slack) & (values <= high + slack)).all()  # false for NaN
        if torch.compiler.is_compiling():  # a graph cannot put numbers into a message
            torch._assert_async(inside, f"{span}, found a number far outside or none.")
        elif not inside:
            wrong = values[~((values >= low - slack) & (values <= high + slack))][0]
            raise InputError(f"{span}, found {wrong:g}. Is it in another unit?")
