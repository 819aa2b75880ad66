"""A network together with the scaling of its targets: the model that is stored and predicts."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from models import scalars
from models.levels import Levels, check
from models.physics import Physics
from models.scalars import Ranges
from models.symmetry import elements


class Regressor(nn.Module):
    """Maps images in 0..1, (b, c, h, w), to targets in the label's unit, (b, k): network(images) * scale + mean.

    With `input_names` it takes inputs (b, m) beside the images, which no symmetry changes.

    With `physics`, that layer computes the targets from the network's six outputs; mean and scale are of these six.

    With `symmetries` (the permutation of the targets under each flip and the transposition of the image) the targets
    are predicted for the image in all its positions, eight if it is square, permuted back, and averaged: the mean
    changes with the image exactly, except for rounding. Only then `image_shape` is needed. Raise SpecError if they do
    not fit.

    With `levels`, images on another scale, such as 0..255, raise GreyValueError, and so do images of far less contrast
    than `contrast`. With `ranges`, inputs far outside them raise InputError. All may be set later. Inputs that are
    missing, or too many, always raise InputError.
    """

    target_mean: Tensor  # (k,), label's unit; with physics (6,)
    target_scale: Tensor  # as target_mean

    def __init__(
        self,
        network: nn.Module,
        target_mean: Tensor,
        target_scale: Tensor,
        *,
        symmetries: Mapping[str, Sequence[int]] | None = None,
        image_shape: Sequence[int] = (),
        physics: Physics | None = None,
        levels: Levels | None = None,
        contrast: float = 0.0,
        input_names: Sequence[str] = (),
        ranges: Ranges | None = None,
    ) -> None:
        super().__init__()
        self.symmetries, self.physics, self.levels = symmetries, physics, levels
        self.contrast, self.input_names, self.ranges = contrast, tuple(input_names), ranges
        self.n_targets = len(target_mean) if physics is None else len(physics.target_names)
        self.positions = () if symmetries is None else elements(symmetries, image_shape, self.n_targets)
        self.network = network
        self.register_buffer("target_mean", target_mean.to(torch.float32))
        self.register_buffer("target_scale", target_scale.to(torch.float32))

    def forward(self, images: Tensor, inputs: Tensor | None = None) -> Tensor:
        if self.levels is not None:
            check(images, self.levels, self.contrast)
        scalars.check(inputs, self.input_names, self.ranges, images)
        if not self.positions:
            return self.targets(self.network(images, inputs), images)
        moved = torch.cat([position.move(images) for position in self.positions])
        outputs = self.network(moved, None if inputs is None else inputs.repeat(len(self.positions), 1))
        targets = self.targets(outputs, moved).view(len(self.positions), -1, self.n_targets)
        return torch.stack([position.undo(targets[i]) for i, position in enumerate(self.positions)]).mean(0)

    def targets(self, outputs: Tensor, images: Tensor) -> Tensor:
        """Return targets (b, k) in the label's unit from the network's outputs for the images."""
        scaled = outputs * self.target_scale + self.target_mean
        if self.physics is None:
            return scaled
        targets: Tensor = self.physics(scaled, images)
        return targets


def predict(
    regressor: Regressor,
    images: np.ndarray,
    inputs: np.ndarray | None = None,
    *,
    batch_size: int = 64,
    alive: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """Return targets (n, k) in the label's unit, float64, for images (n, c, h, w) in 0..1 and inputs (n, m).

    The regressor stays in eval mode. `alive` is called after every batch.
    """
    regressor.eval()
    device = regressor.target_mean.device
    batches = []
    with torch.inference_mode():
        for i in range(0, len(images), batch_size):
            parts = [part[i : i + batch_size] for part in (images, inputs) if part is not None]
            tensors = [torch.from_numpy(np.ascontiguousarray(part, np.float32)).to(device) for part in parts]
            batches.append(regressor(*tensors))
            alive()
    if not batches:
        return np.zeros((0, regressor.n_targets))
    return torch.cat(batches).cpu().numpy().astype(np.float64)
