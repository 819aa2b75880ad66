"""How large the networks of a study are on a data set, and whether they are within its bounds."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hpo.study import objectives
from hpo.study.records import DataFacts
from hpo.study.space import Choices
from hpo.text import counted
from models import sizes
from models.specs import ModelSpec

if TYPE_CHECKING:
    from hpo.study.specification import Study


def size(network: ModelSpec, data: DataFacts) -> sizes.Size:
    """Return how large a network is on a data set."""
    return sizes.size(network, data.image_shape, len(data.target_names), len(data.inputs or ()))


def measures(study: "Study") -> tuple[str, ...]:
    """Return the sizes of its networks that a study's objectives or bounds name."""
    return tuple(name for name in objectives.SIZES if name in (*study.objectives, *study.bounds))


def left_out(study: "Study") -> int:
    """Return how many configurations of a grid are not planned, for their networks are beyond the bounds."""
    axes = [len(parameter.values) for parameter in study.space.values() if isinstance(parameter, Choices)]
    return math.prod(axes) - study.trials if study.bounds and study.sampler == "grid" else 0


def extent(study: "Study") -> str:
    """Return how many trials a study has, and how many configurations its grid leaves out, in words."""
    count = left_out(study)
    out = f" ({counted(count, 'more configuration', 'are')} beyond the bounds)" if count else ""
    return counted(study.trials, "trial") + out


def beyond(study: "Study", point: Mapping[str, Any], data: DataFacts) -> str:
    """Say which sizes of the network at one point of a study are beyond its bounds; empty if none is, as far as that is
    known before the network is made."""
    if not study.bounds:
        return ""
    network, _ = study.specifications(point)
    return objectives.beyond(study.bounds, objectives.measured(tuple(study.bounds), size(network, data)))
