"""Random changes of training images that leave their targets alone, because the settings say that they may."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from models.specs import TrainingSpec


class Distortion:
    """Turns, magnifies and brightens each image of a batch by numbers of its own, and adds noise."""

    def __init__(self, training: TrainingSpec) -> None:
        self.training = training

    @staticmethod
    def draw(n: int) -> Tensor:
        """Return for each of n images its angle, magnification, place (right, down) and brightness: (n, 5) in -1..1.

        From torch's generator, on the CPU: the same numbers for every device that trains.
        """
        return 2 * torch.rand(n, 5) - 1

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return images (b, c, h, w) in 0..1 changed as `draws` (b, 5) says; the noise comes from torch's generator."""
        if self.training.rotation or self.training.crop < 1:
            images = self._moved(images, draws)
        if self.training.brightness:
            images = images + self.training.brightness * draws[:, 4, None, None, None]
        if self.training.noise:
            images = images + self.training.noise * torch.randn_like(images)
        return images.clamp(0, 1)

    def _moved(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return a part of each image, turned: its sides are `crop` to 1 of the image's, and it fills the image."""
        height, width = images.shape[-2:]
        angle = draws[:, 0] * math.radians(self.training.rotation)
        share = 1 - (1 - self.training.crop) * (1 + draws[:, 1]) / 2
        right, down = ((1 - share) * draws[:, place] for place in (2, 3))
        cosine, sine = share * angle.cos(), share * angle.sin()
        rows = [
            torch.stack([cosine, -sine * (height / width), right], dim=1),
            torch.stack([sine * (width / height), cosine, down], dim=1),
        ]
        grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
