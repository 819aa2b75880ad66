"""Two-phase images repeat themselves: compute a first convolution block once per distinct window.

A KxK convolution followed by a 2x2 maximum looks, for each of its outputs, at one window of (K+1)x(K+1) pixels. Of the
373,000 windows in 364 binary cells of 64x64 pixels some 4,000 (K = 3) or 45,000 (K = 5) are distinct, and a batch of 32
holds a twenty-fifth (K = 3) or a fifth (K = 5) as many distinct windows as windows. The block gives the same output for
equal windows, so outputs and gradients are the same but for the order of summation.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

MOST_DISTINCT = 0.25  # of the windows; with more, the plain convolution is as fast
PART = 512  # images that are looked at together: of 64 x 64 pixels they take 100 MB


@dataclass(frozen=True)
class WindowBatch:
    """A batch of images as its distinct windows and their places."""

    windows: Tensor  # (u, channels * (K + 1)²)
    index: Tensor  # (batch, rows, columns) int64, into the windows
    places: Tensor  # (4, channels * K², channels * (K + 1)²), 0 or 1: puts a kernel on each of a window's four places


@dataclass(frozen=True)
class Windows:
    """A set of images in the same form; the index of image numbers (b,) gives a WindowBatch."""

    windows: Tensor
    index: Tensor  # (n, rows, columns)
    places: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, images: Tensor) -> WindowBatch:
        index = self.index[images]
        present = torch.zeros(len(self.windows), dtype=torch.bool)
        present[index.view(-1)] = True
        numbers = present.nonzero().squeeze(1)
        rank = torch.empty(len(present), dtype=torch.int64)
        rank[numbers] = torch.arange(len(numbers))
        return WindowBatch(self.windows.index_select(0, numbers), rank[index], self.places)


def first_block(batch: WindowBatch, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ReLU of the 2x2 maximum of the convolution: (batch, f, rows, columns); weight (f, channels, K, K)."""
    kernels = (weight.reshape(len(weight), -1) @ batch.places).view(-1, batch.windows.shape[1])  # (4 f, window)
    four = (batch.windows @ kernels.t()).view(len(batch.windows), 4, len(weight))
    # Bias and ReLU after the maximum: both are monotonous, rounding included, so the numbers are the same.
    table = F.relu(four.amax(1) + bias)
    return table.index_select(0, batch.index.view(-1)).view(*batch.index.shape, -1).permute(0, 3, 1, 2)


def distinct(images: Tensor, *, kernel_size: int, padding: int) -> Windows | None:
    """Return the windows of images (n, c, h, w) under that convolution; None if too few windows repeat to gain time.

    Equal windows are found by a 64-bit hash and then compared pixel by pixel, so the result is exact.
    """
    n, channels, height, width = images.shape
    rows, columns = ((side + 2 * padding - kernel_size + 1) // 2 for side in (height, width))
    size, count = kernel_size + 1, n * rows * columns
    index = torch.empty(n, rows, columns, dtype=torch.int64)  # first the hashes, then their places among the values
    values = torch.empty(0, dtype=torch.int64)
    parts = list(zip(torch.split(images, PART), torch.split(index, PART), strict=True))
    for part, places in parts:
        places[:] = _hashes(F.pad(part, [padding] * 4), size, rows, columns)
        values = torch.unique(torch.cat([values, torch.unique(places)]))
        if len(values) > MOST_DISTINCT * count:
            return None
    windows = torch.empty(len(values), channels * size**2)
    filled = torch.zeros(len(values), dtype=torch.bool)
    for part, places in parts:
        places[:] = torch.searchsorted(values, places)
        numbers, pixels = places.view(-1), _pixels(F.pad(part, [padding] * 4), size, rows, columns)
        example = torch.full((len(values),), -1).scatter_(0, numbers, torch.arange(len(numbers)))
        first = (example >= 0) & ~filled
        windows[first] = pixels[example[first]]
        filled |= first
        if not torch.equal(windows[numbers], pixels):
            return None  # two different windows have the same hash: practically never
    unit = torch.eye(channels * size**2).view(-1, channels, size, size)
    return Windows(windows, index, places=F.unfold(unit, kernel_size).permute(2, 1, 0).contiguous())


def _hashes(padded: Tensor, size: int, rows: int, columns: int) -> Tensor:
    """Return a hash (b, rows, columns) of every window of the images (b, c, h, w)."""
    n, channels, height, _ = padded.shape
    # Any odd 64-bit numbers will do; the hash is linear in the pixels' bits, and separable in y and x.
    factors = torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63, (channels, 2, size))) | 1
    hashes = torch.zeros(n, rows, columns, dtype=torch.int64)
    bits = padded.contiguous().view(torch.int32).to(torch.int64)
    for c in range(channels):
        across = torch.zeros(n, height, columns, dtype=torch.int64)
        for x in range(size):
            across += factors[c, 0, x] * bits[:, c, :, x : x + 2 * columns - 1 : 2]
        for y in range(size):
            hashes += factors[c, 1, y] * across[:, y : y + 2 * rows - 1 : 2]
    return hashes


def _pixels(padded: Tensor, size: int, rows: int, columns: int) -> Tensor:
    """Return the pixels of every window of the images (b, c, h, w): (b * rows * columns, c * size²)."""
    down, right, places = 2 * rows - 1, 2 * columns - 1, range(size)
    pixels = [
        padded[:, c, y : y + down : 2, x : x + right : 2]
        for c in range(padded.shape[1])
        for y in places
        for x in places
    ]
    return torch.stack(pixels, dim=-1).flatten(0, 2)
