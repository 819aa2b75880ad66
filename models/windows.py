"""Two-phase images repeat themselves: compute what a first convolution block sees once per distinct window.

A KxK convolution followed by a 2x2 maximum looks, for each of its outputs, at one window of (K+1)x(K+1) pixels. Of the
373,000 windows in 364 binary cells of 64x64 pixels some 4,000 (K = 3) or 45,000 (K = 5) differ, and a batch of 32 holds
a few per cent (K = 3) or a fifth (K = 5) of its windows in distinct form. The block is the same function of each, so its
outputs and gradients are the same numbers but for the order of summation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

WORTH_IT = 0.25  # of the windows may be distinct; with more, the plain convolution is as fast


@dataclass(frozen=True)
class WindowBatch:
    """A batch of images as its distinct windows and where each stands."""

    windows: Tensor  # (u, channels, K + 1, K + 1)
    index: Tensor  # (batch, rows, columns) int64, into the windows


@dataclass(frozen=True)
class Windows:
    """A set of images in the same form; indexed by image numbers it gives a WindowBatch."""

    windows: Tensor  # (u, channels, K + 1, K + 1)
    index: Tensor  # (n, rows, columns) int64

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, images: Tensor) -> WindowBatch:
        index = self.index[images]
        present = torch.zeros(len(self.windows), dtype=torch.int64, device=index.device)
        present[index.flatten()] = 1
        return WindowBatch(self.windows[present.nonzero().squeeze(1)], (present.cumsum(0) - 1)[index])


def distinct(images: Tensor, *, kernel_size: int, padding: int) -> Windows | None:
    """The windows of images (n, c, h, w) for a convolution and a 2x2 maximum; None if too few of them repeat.

    Windows are told apart by 64-bit hashes and then compared pixel by pixel, so the answer is exact.
    """
    bits = F.pad(images, [padding] * 4).contiguous().view(torch.int32).to(torch.int64)
    n, channels, height, width = bits.shape
    size = kernel_size + 1
    rows, columns = (height - kernel_size + 1) // 2, (width - kernel_size + 1) // 2

    def pixel(channel: int, y: int, x: int) -> Tensor:
        """That pixel of every window, (n * rows * columns,)."""
        return bits[:, channel, y : y + 2 * rows - 1 : 2, x : x + 2 * columns - 1 : 2].reshape(-1)

    places = [(c, y, x) for c in range(channels) for y in range(size) for x in range(size)]
    hashes = torch.zeros(n * rows * columns, dtype=torch.int64, device=bits.device)
    for place in places:
        hashes = (hashes * 6364136223846793005 + pixel(*place)) ^ (hashes >> 29)
    values, index = hashes.unique(return_inverse=True)
    if len(values) > WORTH_IT * len(hashes):
        return None
    of_each = torch.empty_like(values).index_copy_(0, index, torch.arange(len(index), device=bits.device))
    found = torch.stack([pixel(*place)[of_each] for place in places], dim=1)
    if any((pixel(*place) != found[index, i]).any() for i, place in enumerate(places)):
        return None  # two windows share a hash: as good as never
    windows = found.to(torch.int32).view(torch.float32).view(-1, channels, size, size)
    return Windows(windows, index.view(n, rows, columns))
