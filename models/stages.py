"""Networks of convolution stages. Images are continued beyond their edges: periodically, reflected, or by zeros."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.scalars import Scalars, beside
from models.specs import StagesSpec


class StageNet(nn.Module):
    """Maps (batch, channels, height, width) images in 0..1, and (batch, n_inputs) scalars, to (batch, n_targets).

    `depth` stages, each of a convolution that doubles the channels (the first makes `width`), the mean over 2x2 pixels,
    and a convolution whose result is added to its input; every convolution is padded and followed by normalisation
    and activation. The first one moves by `stride` pixels, with a kernel `stride` times as wide. Then the mean over the
    image, beside it the mean grey value of each channel (the volume fraction of a two-phase image) and the scalars, and
    the head. With circular padding a periodic shift by multiples of stride * 2^depth pixels changes nothing if the
    sides are such multiples, too; other shifts change a little. Weights follow torch's own initialisation, from its
    generator.
    """

    def __init__(self, spec: StagesSpec, image_shape: tuple[int, int, int], n_targets: int, n_inputs: int = 0) -> None:
        super().__init__()
        self.volume_fraction = spec.volume_fraction
        channels = image_shape[0]
        self.stages = nn.Sequential()
        for stage in range(spec.depth):
            filters = spec.width * 2**stage
            self.stages.append(Stage(spec, channels, filters, stride=1 if stage else spec.stride))
            channels = filters
        inputs = channels + (image_shape[0] if spec.volume_fraction else 0) + n_inputs
        self.scalars = Scalars(n_inputs) if n_inputs else None
        self.dropout = nn.Dropout(spec.dropout) if spec.dropout else None
        self.dense = nn.Sequential(nn.Linear(inputs, spec.head), ACTIVATIONS[spec.activation]()) if spec.head else None
        self.head = nn.Linear(spec.head or inputs, n_targets)

    def prepare(self, images: Tensor, cache: Path | None, alive: Callable[[], object]) -> Tensor:
        """Return what is trained on: the images themselves."""
        return images

    def forward(self, images: Tensor, inputs: Tensor | None = None) -> Tensor:
        hidden = self.stages(images).mean((2, 3))
        if self.volume_fraction:
            hidden = torch.cat([hidden, images.mean((2, 3))], dim=1)
        hidden = beside(hidden, self.scalars, inputs)
        if self.dropout is not None:
            hidden = self.dropout(hidden)
        targets: Tensor = self.head(hidden if self.dense is None else self.dense(hidden))
        return targets


class Stage(nn.Module):
    """Changes the channels to `filters`, halves the sides, and adds a residual block."""

    def __init__(self, spec: StagesSpec, channels: int, filters: int, *, stride: int) -> None:
        super().__init__()
        self.first = Block(spec, channels, filters, stride=stride)
        self.second = Block(spec, filters, filters)

    def forward(self, images: Tensor) -> Tensor:
        # The last window of an odd side is narrower, so that every pixel counts.
        halved = F.avg_pool2d(self.first(images), 2, ceil_mode=True, count_include_pad=False)
        residual: Tensor = self.second(halved)
        return halved + residual


class Block(nn.Module):
    """A padded convolution that keeps the image's size, or divides it by the stride; normalisation, activation.

    A side that is no multiple of the stride is padded to one first, at its end.
    """

    def __init__(self, spec: StagesSpec, channels: int, filters: int, *, stride: int = 1) -> None:
        super().__init__()
        bias = spec.normalisation == "none"  # a normalisation cancels it, and has a shift of its own
        self.padding, self.pixels, self.stride = spec.padding, spec.kernel_size // 2 * stride, stride
        self.convolution = nn.Conv2d(channels, filters, spec.kernel_size * stride, stride=stride, bias=bias)
        self.normalisation = NORMALISATIONS[spec.normalisation](filters)
        self.activation = ACTIVATIONS[spec.activation]()

    def forward(self, images: Tensor) -> Tensor:
        beyond = (-images.shape[2] % self.stride, -images.shape[3] % self.stride)
        padded = PADDINGS[self.padding](images, self.pixels, *beyond)
        activations: Tensor = self.activation(self.normalisation(self.convolution(padded)))
        return activations


def wrap(images: Tensor, pixels: int, rows: int = 0, columns: int = 0) -> Tensor:
    """Return images (b, c, h, w) continued periodically by that many pixels on every side, at most h and w, and by so
    many more rows at the bottom and columns at the right.

    F.pad's mode "circular" gives the same numbers, but takes channels-last images out of their format: twice the time.
    """
    for dim, more in ((2, pixels + rows), (3, pixels + columns)):
        size = images.shape[dim]
        parts = (images.narrow(dim, size - pixels, pixels), images, images.narrow(dim, 0, more))
        images = _joined(parts, dim)
    return images


def reflect(images: Tensor, pixels: int, rows: int = 0, columns: int = 0) -> Tensor:
    """Return images as `wrap` does, but reflected at the centres of the pixels at their edges; fewer than h and w."""
    for dim, more in ((2, pixels + rows), (3, pixels + columns)):
        size = images.shape[dim]
        first, last = images.narrow(dim, 1, pixels), images.narrow(dim, size - 1 - more, more)
        images = _joined((first.flip(dim), images, last.flip(dim)), dim)
    return images


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Return tensors one after the other, in the memory format that they have; an empty part would change it."""
    whole = [part for part in parts if part.shape[dim]]
    return torch.cat(whole, dim=dim) if len(whole) > 1 else whole[0]


def zeros(images: Tensor, pixels: int, rows: int = 0, columns: int = 0) -> Tensor:
    """Return images as `wrap` does, but continued by zeros, however small they are."""
    return F.pad(images, (pixels, pixels + columns, pixels, pixels + rows))


PADDINGS: dict[str, Callable[[Tensor, int, int, int], Tensor]] = {"circular": wrap, "reflect": reflect, "zeros": zeros}


ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
NORMALISATIONS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda filters: nn.GroupNorm(math.gcd(8, filters), filters),  # eight groups, if they divide the channels
    "none": lambda filters: nn.Identity(),
}
