"""A network together with the scaling of its targets: what is stored, handed out and asked for predictions."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from models.physics import Physics
from models.symmetry import elements


class Regressor(nn.Module):
    """Maps images in 0..1, (b, c, h, w), to targets in the label's unit, (b, k): network(images) * scale + mean.

    With `physics` that makes the targets of what the network gives, and mean and scale are those of its six numbers.

    With `symmetries` (the permutation of the targets under each flip and the transposition of the image) that is done
    for the image in all its positions, eight if it is square; the targets are put back, and their mean is the answer:
    it moves with the image exactly, but for rounding. `image_shape` is needed with them alone; SpecError if they do not
    fit.
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
    ) -> None:
        super().__init__()
        self.symmetries, self.physics = symmetries, physics
        self.n_targets = len(target_mean) if physics is None else len(physics.target_names)
        self.positions = () if symmetries is None else elements(symmetries, image_shape, self.n_targets)
        self.network = network
        self.register_buffer("target_mean", target_mean.to(torch.float32))
        self.register_buffer("target_scale", target_scale.to(torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        if not self.positions:
            return self.targets(self.network(images), images)
        moved = torch.cat([position.move(images) for position in self.positions])
        targets = self.targets(self.network(moved), moved).view(len(self.positions), -1, self.n_targets)
        return torch.stack([each.undo(targets[i]) for i, each in enumerate(self.positions)]).mean(0)

    def targets(self, outputs: Tensor, images: Tensor) -> Tensor:
        """Targets (b, k) in the label's unit from what the network gives of the images."""
        scaled = outputs * self.target_scale + self.target_mean
        return scaled if self.physics is None else self.physics(scaled, images)


def predict(
    regressor: Regressor, images: np.ndarray, *, batch_size: int = 64, alive: Callable[[], object] = lambda: None
) -> np.ndarray:
    """Targets (n, k) in the label's unit, float64, for images (n, c, h, w) in 0..1; leaves it in eval mode. `alive` is
    called after every batch."""
    regressor.eval()
    device = regressor.target_mean.device
    batches = []
    with torch.inference_mode():
        for i in range(0, len(images), batch_size):
            batch = torch.from_numpy(np.ascontiguousarray(images[i : i + batch_size], np.float32))
            batches.append(regressor(batch.to(device)))
            alive()
    if not batches:
        return np.zeros((0, regressor.n_targets))
    return torch.cat(batches).cpu().numpy().astype(np.float64)
