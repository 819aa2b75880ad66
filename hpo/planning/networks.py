"""Which networks of the study `conv-search` fit a data set: settings that follow from images and labels alone."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipeline.dataset import Dataset
from hpo.errors import StudyError
from hpo.planning.physics import check_physics
from hpo.study.records import Point
from models import sizes, specs

STRIDES = (1, 2, 4, 8)  # pixels, of the first convolution
DEPTHS = (2, 3, 4)  # stages
SMALLEST_SIDE = 16  # pixels that a coarser first convolution leaves of a side
NARROW = [8, 12, 16]  # channels of the first stage, where nothing else makes networks fast enough


def fitting(data: Dataset, folder: Path, start: Point) -> list[dict[str, Any]]:
    """Return settings, by key of the study file, of networks that fit the data, the finest and slowest first.

    `start` is the configuration that the study begins with. What mechanics and the data set say of the targets is used:
    the bounds of two phases that can have made the labels, and symmetries. None if the images are too small.
    """
    common: dict[str, Any] = {"model.symmetric": bool(data.symmetries)}
    with suppress(StudyError):  # no phases, or they have not made these labels
        check_physics(data, folder)
        common["model.physics"] = "bounded"
    padding = "circular" if data.is_periodic else "reflect"
    shape = data.images.shape[1:]
    depths = {stride: [depth for depth in DEPTHS if _fits(stride, depth, padding, shape)] for stride in STRIDES}
    coarse = [stride for stride in STRIDES[1:] if depths[stride] and min(shape[1:]) / stride >= SMALLEST_SIDE]
    chosen = coarse or [stride for stride in STRIDES[:1] if depths[stride]]
    options = []
    for stride in chosen:
        point = start | {"depth": min(start["depth"], depths[stride][-1])}
        options.append(common | {"model.stride": stride, "space.depth": depths[stride], "start": [point]})
    if options:
        (point,) = options[-1]["start"]
        options.append(options[-1] | {"space.width": NARROW, "start": [point | {"width": NARROW[-1]}]})
    return options


def _fits(stride: int, depth: int, padding: str, shape: Sequence[int]) -> bool:
    """Return whether images (channels, height, width) fit such networks."""
    try:
        sizes.check_image(specs.ConvSpec(stride=stride, depth=depth, padding=padding), shape)
    except specs.SpecError:
        return False
    return True
