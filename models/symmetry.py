"""The symmetries of a periodic cell, eight of the square and all shifts: how they change images and targets.

The change of the targets comes as data: a permutation for some of the GENERATORS, in which ~i stands for the negative
of target i. Shifts change no target.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.specs import SpecError

# Rows reversed, columns reversed, rows and columns exchanged: together they make all eight symmetries of the square.
GENERATORS = ("flip_vertical", "flip_horizontal", "transpose")


@dataclass(frozen=True)
class Element:
    """One symmetry: flips first, then the transposition."""

    flips: tuple[int, ...]  # dimensions to reverse: -2 are the rows, -1 the columns
    transposed: bool
    order: tuple[int, ...]  # target i of the moved image is targets[order[i]], or -targets[~order[i]] if order[i] < 0

    def move(self, images: Tensor) -> Tensor:
        """Return the images (b, c, h, w) as this symmetry moves them."""
        flipped = images.flip(self.flips) if self.flips else images
        return flipped.transpose(-2, -1) if self.transposed else flipped

    def undo(self, targets: Tensor) -> Tensor:
        """Return the targets (b, k) of the original images, given those of the moved images."""
        places = [
            (self.order.index(place if place in self.order else ~place), place) for place in range(len(self.order))
        ]
        columns = [targets[:, index] if place in self.order else -targets[:, index] for index, place in places]
        return torch.stack(columns, dim=1)

    def moved(self, targets: np.ndarray) -> np.ndarray:
        """Return the targets (n, k) of the moved images, given those of the original images."""
        places = [max(place, ~place) for place in self.order]
        signs = np.where(np.array(self.order) < 0, -1.0, 1.0)
        return np.asarray(targets[:, places] * signs)


def unmoved(n_targets: int) -> Element:
    """Return the symmetry that changes nothing."""
    return Element((), False, tuple(range(n_targets)))


def elements(
    symmetries: Mapping[str, Sequence[int]] | None, image_shape: Sequence[int], n_targets: int
) -> tuple[Element, ...]:
    """Return all symmetries that the given generators make, the identity first: eight of a square, four of a rectangle.

    Raise SpecError if no generator is given, or one does not fit the image (channels, height, width) or the targets.
    """
    generators = {name: tuple(order) for name, order in (symmetries or {}).items() if name in GENERATORS}
    if not generators:
        raise SpecError(
            "nothing is known of how the targets of this data set change when the image is flipped, which augmentation "
            'and symmetric predictions need: set training.augmentation = "none" and, if the model has it, '
            "model.symmetric = false."
        )
    for name, order in generators.items():
        if any(type(place) is not int for place in order) or sorted(max(n, ~n) for n in order) != list(
            range(n_targets)
        ):
            raise SpecError(f"symmetries: {name}: expected a permutation of 0 to {n_targets - 1}, found {order!r:.80}.")
    height, width = image_shape[-2:]
    if "transpose" in generators and height != width:
        raise SpecError(f"symmetries: transpose: expected a square image, found {height}x{width} pixels.")
    moves = []
    for chosen in itertools.product((False, True), repeat=len(GENERATORS)):
        names = [name for name, used in zip(GENERATORS, chosen, strict=True) if used]
        if set(names) <= generators.keys():
            order = tuple(range(n_targets))
            for name in names:
                order = tuple(order[place] if place >= 0 else ~order[~place] for place in generators[name])
            flips = tuple(dim for dim, used in zip((-2, -1), chosen[:2], strict=True) if used)
            moves.append(Element(flips, chosen[2], order))
    return tuple(moves)


class Augmentation:
    """Moves each image of a batch by a symmetry and a periodic shift of its own, in one gather of pixels."""

    def __init__(
        self, moves: Sequence[Element], image_shape: Sequence[int], device: torch.device, *, shifts: bool = True
    ) -> None:
        """`shifts`: whether the images wrap around, so that a shift changes no target; else none is shifted."""
        self.moves, self.shifts = moves, shifts
        self.height, self.width = image_shape[-2:]
        self._flipped = torch.tensor([[-2 in move.flips, -1 in move.flips] for move in moves], device=device)
        self._transposed = torch.tensor([move.transposed for move in moves], device=device)

    def draw(self, n: int) -> Tensor:
        """Return for each of n images the number of its symmetry and its shift in pixels, down and right: (n, 3).

        Uniform, from torch's generator, on the CPU: the same numbers for every device that trains.
        """
        bounds = (len(self.moves), *((self.height, self.width) if self.shifts else (1, 1)))
        return torch.stack([torch.randint(bound, (n,)) for bound in bounds], dim=1)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return images (b, c, h, w) shifted periodically, then flipped, then transposed, as `draws` (b, 3) says."""
        number, down, right = draws.unbind(1)
        rows = self._source(self.height, down, self._flipped[number, 0])
        columns = self._source(self.width, right, self._flipped[number, 1])
        pixels = rows[:, :, None] * self.width + columns[:, None, :]
        if self.height == self.width:  # otherwise no symmetry transposes
            pixels = torch.where(self._transposed[number][:, None, None], pixels.transpose(1, 2), pixels)
        pixels = pixels.flatten(1)[:, None].expand(-1, images.shape[1], -1)
        return images.flatten(2).gather(2, pixels).view(images.shape)

    @staticmethod
    def _source(size: int, shift: Tensor, flipped: Tensor) -> Tensor:
        """Return for each image the source row (or column) of every new one: (b, size)."""
        place = torch.arange(size, device=shift.device)[None]
        return (torch.where(flipped[:, None], size - 1 - place, place) - shift[:, None]) % size
