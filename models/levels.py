"""Grey values that a model takes: those on the scale that it was trained on."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Levels = tuple[float, float]  # lowest and highest grey value that training saw

DEFAULT: Levels = (0.0, 1.0)  # of a model that an earlier version wrote: all images are read as grey value / 255
BRIGHTER = 8.0  # times the highest grey value that training saw; a mistaken scale is 255 times off
OVERSHOOT = 0.25  # of the highest value expected; resampling an edge overshoots by less


class GreyValueError(ValueError):
    """Images whose grey values are on another scale than those that the model was trained on."""


def contrast(images: np.ndarray) -> float:
    """Return the smallest difference of grey values within one of the images (n, c, h, w) that are not plain; 0 if all
    are."""
    spans = images.max(axis=(1, 2, 3)) - images.min(axis=(1, 2, 3))
    return float(spans[spans > 0].min()) if (spans > 0).any() else 0.0


def levels_of(images: Sequence[np.ndarray]) -> tuple[Levels, float]:
    """Return the lowest and the highest grey value of the splits' images, and the lower of their contrasts."""
    levels = min(float(part.min()) for part in images), max(float(part.max()) for part in images)
    return levels, min(filter(None, map(contrast, images)), default=0.0)


def check(images: Tensor, levels: Levels, least: float) -> None:
    """Raise GreyValueError if images have values that no image on the scale of training has, or NaN.

    Images between black and eight times the highest value of training, at most 1, are on its scale. A quarter of that
    is allowed beyond both ends, where resampling puts values. An image whose contrast is under an eighth of `least`,
    the smallest of training, is refused as well: 0 and 1 in place of 0 and 255, for example. Exported by
    `torch.export`, the check is part of the graph and raises RuntimeError.
    """
    top = min(1.0, BRIGHTER * levels[1]) or 1.0  # 0: training saw nothing but black
    low, high = -OVERSHOOT * top, (1 + OVERSHOOT) * top
    inside = ((images >= low) & (images <= high)).all()
    expected = f"Expected grey values from 0 to {top:g} as in training, found"
    if torch.compiler.is_compiling():  # a graph cannot put numbers into a message
        whole = ((images >= low) & (images <= 255)).all()
        torch._assert_async(whole, f"{expected} values below 0, above 255 or not a number.")
        torch._assert_async(inside, f"{expected} values up to 255: divide 8-bit pixels by 255.")
    elif not inside:
        lowest, highest = images.aminmax()
        hint = " Divide 8-bit pixels by 255." if lowest >= 0 and 1 < highest <= 255 else ""
        if images.isnan().any():
            raise GreyValueError(f"{expected} NaN.")
        raise GreyValueError(f"{expected} {lowest:g} to {highest:g}.{hint}")
    spans = images.amax((1, 2, 3)) - images.amin((1, 2, 3))
    is_faint = (spans > 0) & (spans < least / BRIGHTER)
    expected = f"Expected an image whose grey values differ by {least:.3g} or more, as in training, found"
    if torch.compiler.is_compiling():
        torch._assert_async(~is_faint.any(), f"{expected} far less: is it on another scale?")
    elif is_faint.any():
        raise GreyValueError(f"{expected} {spans[is_faint][0]:.3g}. Is it on another scale, such as 0 and 1?")
