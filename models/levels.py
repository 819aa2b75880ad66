"""Grey values that a model takes: those on the scale that it was trained on."""

import torch
from torch import Tensor

Levels = tuple[float, float]  # lowest and highest grey value that training saw

DEFAULT: Levels = (0.0, 1.0)  # of a model that an earlier version wrote: all images are read as grey value / 255
BRIGHTER = 8.0  # times the highest grey value that training saw; a mistaken scale is 255 times off
OVERSHOOT = 0.25  # of the highest value expected; resampling an edge overshoots by less


class GreyValueError(ValueError):
    """Images whose grey values are on another scale than those that the model was trained on."""


def check(images: Tensor, levels: Levels) -> None:
    """Raise GreyValueError if images have values that no image on the scale of training has, or NaN.

    Images between black and eight times the highest value of training, at most 1, are on its scale. A quarter of that
    is allowed beyond both ends, where resampling puts values. Exported by `torch.export`, the check is part of the
    graph and raises RuntimeError.
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
        raise GreyValueError(f"{expected} {lowest:g} to {highest:g}.{hint}")
