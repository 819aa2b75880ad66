"""Pretrained weights on this machine; nothing here needs a service, nor its client."""

from collections.abc import Iterator
from dataclasses import dataclass

from models import weights as pretrained
from models.specs import SpecError
from models.weights import adopt as adopt_weights
from models.weights import folder as weights_folder

__all__ = ["PretrainedWeights", "adopt_weights", "weights", "weights_folder"]


@dataclass(frozen=True, kw_only=True)
class PretrainedWeights:
    """One file of pretrained weights on this machine."""

    backbone: str
    name: str  # of the file
    state: str
    problem: str | None  # a message, if it is missing or damaged


def weights(*, fetch: bool = True) -> Iterator[PretrainedWeights]:
    """Yield the state of each file of pretrained weights; with `fetch` download those that are missing."""
    for backbone, name in pretrained.FILES.items():
        state, problem = "here, its hash is right", None
        try:
            if not pretrained.absent(name):
                pretrained.find(name)
            elif fetch:
                pretrained.fetch(backbone)
                state = "fetched, its hash is right"
            else:
                state = "missing"
        except SpecError as error:  # the other files are checked all the same
            state, problem = "missing or damaged", str(error)
        yield PretrainedWeights(backbone=backbone, name=name, state=state, problem=problem)
