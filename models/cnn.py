"""The protocol's convolutional networks: two convolution blocks and a dense head."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.scalars import Scalars, beside
from models.specs import Layout
from models.windows import WindowBatch, Windows, distinct, first_block


class ConvNet(nn.Module):
    """Maps (batch, channels, height, width) images in 0..1, and (batch, n_inputs) scalars, to (batch, n_targets).

    Convolution, ReLU, 2x2 maximum, twice; then flatten, dropout, the scalars, dense with ReLU, dense. Weights are drawn
    Glorot-uniform from torch's generator, biases are zero. The result does not depend on the memory format.
    """

    def __init__(self, layout: Layout, image_shape: tuple[int, int, int], n_targets: int, n_inputs: int = 0) -> None:
        super().__init__()
        channels, height, width = image_shape
        first, second = layout.filters
        for _ in layout.filters:
            height, width = (height - layout.lost) // 2, (width - layout.lost) // 2
        self.padding = layout.kernel_size // 2 if layout.same else 0
        self.first = nn.Conv2d(channels, first, layout.kernel_size, padding=self.padding)
        self.second = nn.Conv2d(first, second, layout.kernel_size, padding=self.padding)
        self.dropout = Dropout(layout.dropout)
        self.dense = nn.Linear(height * width * second + n_inputs, layout.units)
        self.head = nn.Linear(layout.units, n_targets)
        draw_glorot(self)
        self.scalars = Scalars(n_inputs) if n_inputs else None

    def prepare(self, images: Tensor, cache: Path | None, alive: Callable[[], object]) -> Tensor | Windows:
        """Return the images (n, c, h, w) in the form that trains fastest; `forward` takes either, indexed by a batch.

        This is fast, so nothing is stored in the folder `cache`.
        """
        if images.device.type != "cpu":
            return images
        return distinct(images, kernel_size=self.first.weight.shape[-1], padding=self.padding) or images

    def forward(self, images: Tensor | WindowBatch, inputs: Tensor | None = None) -> Tensor:
        # The maximum before the ReLU gives the same numbers and gradients with a quarter of the ReLU's work.
        if isinstance(images, WindowBatch):
            hidden = first_block(images, self.first.weight, self.first.get_parameter("bias"))
        else:
            hidden = F.relu(F.max_pool2d(self.first(images), 2))
        hidden = F.relu(F.max_pool2d(self.second(hidden), 2))
        # Flattened as (height, width, filter): a view, not a copy, of channels-last activations.
        hidden = self.dropout(hidden.permute(0, 2, 3, 1).flatten(1))
        targets: Tensor = self.head(F.relu(self.dense(beside(hidden, self.scalars, inputs))))
        return targets


def draw_glorot(module: nn.Module) -> None:
    """Draw all weights Glorot-uniform from torch's generator, and set all biases to zero."""
    for name, values in module.named_parameters():
        (nn.init.zeros_ if name.endswith("bias") else nn.init.xavier_uniform_)(values)


class Dropout(nn.Module):
    """Dropout with 16 random bits a number; torch's own draws 32 bits and takes six times as long on a CPU.

    The probability is rounded to 1/65536. The numbers kept are scaled by the rounded one, so the expectation is exact.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.dropped = min(round(probability * 65536), 65535)  # of the 65536 values of 16 bits

    def forward(self, values: Tensor) -> Tensor:
        if not self.training or not self.dropped:
            return values
        words = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device=values.device)
        bits = words.random_(-(2**63), None).view(torch.int16)[: values.numel()].view(values.shape)
        return values * ((bits >= self.dropped - 32768) * (65536 / (65536 - self.dropped)))
