"""A network together with the scaling of its targets: what is stored, handed out and asked for predictions."""

import numpy as np
import torch
from torch import Tensor, nn


class Regressor(nn.Module):
    """Maps images in 0..1, (b, c, h, w), to targets in the label's unit, (b, k): network(images) * scale + mean."""

    target_mean: Tensor  # (k,), label's unit
    target_scale: Tensor  # (k,), label's unit

    def __init__(self, network: nn.Module, target_mean: Tensor, target_scale: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("target_mean", target_mean.to(torch.float32))
        self.register_buffer("target_scale", target_scale.to(torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images) * self.target_scale + self.target_mean


def predict(regressor: Regressor, images: np.ndarray, *, batch_size: int = 64) -> np.ndarray:
    """Targets (n, k) in the label's unit, float64, for images (n, c, h, w) in 0..1; leaves it in eval mode."""
    regressor.eval()
    device = regressor.target_mean.device
    with torch.inference_mode():
        batches = [
            regressor(torch.from_numpy(np.ascontiguousarray(images[i : i + batch_size], np.float32)).to(device))
            for i in range(0, len(images), batch_size)
        ]
    if not batches:
        return np.zeros((0, len(regressor.target_mean)))
    return torch.cat(batches).cpu().numpy().astype(np.float64)
