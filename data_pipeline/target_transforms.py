"""Targets on another scale: trained, scored and selected there, and predicted in the label's unit."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Function = Callable[[np.ndarray], np.ndarray]


def _each(function: Callable[[float], float]) -> Function:
    """Return a function of arrays that has the same bits on every processor: the digest of the data depends on them.

    NumPy's own logarithm differs in the last bit between processors with and without AVX-512.
    """

    def apply_to(values: np.ndarray) -> np.ndarray:
        return np.array([math.nan if math.isnan(value) else function(value) for value in values.tolist()])

    return apply_to


TRANSFORMS: dict[str, tuple[Function, Function]] = {  # there and back
    "log10": (_each(math.log10), lambda values: 10.0**values),
    "log": (_each(math.log), np.exp),
    "sqrt": (np.sqrt, np.square),
}


class TransformProblem(ValueError):
    """A target cannot be transformed as asked; the message says why."""


def apply(
    targets: np.ndarray, names: Sequence[str], transforms: Mapping[str, str]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the targets (n, k) on their scales, and their names there, such as "log10 k". Raise TransformProblem."""
    if unknown := transforms.keys() - set(names):
        raise TransformProblem(f"transform: no target is called {min(unknown)}. There are: {', '.join(names)}.")
    targets = targets.copy()
    for place, name in enumerate(names):
        if kind := transforms.get(name):
            lowest = np.nanmin(targets[:, place])
            if lowest < 0 or (lowest == 0 and kind != "sqrt"):
                raise TransformProblem(f"transform: {kind} needs positive numbers, found {lowest:g} in {name}.")
            targets[:, place] = TRANSFORMS[kind][0](targets[:, place])
    return targets, tuple(scaled_name(name, transforms) for name in names)


def undo(
    targets: np.ndarray, names: Sequence[str], transforms: Mapping[str, str]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return targets (n, k) in the label's unit and under its names, from those that `apply` gives."""
    originals = {scaled_name(name, transforms): name for name in transforms}
    targets = targets.copy()
    for place, name in enumerate(names):
        if name in originals:
            with np.errstate(over="ignore"):  # 10 to the power of what a bad network predicts
                targets[:, place] = TRANSFORMS[transforms[originals[name]]][1](targets[:, place])
    return targets, tuple(originals.get(name, name) for name in names)


def scaled_name(name: str, transforms: Mapping[str, str]) -> str:
    """Return the name of a target on its scale."""
    return f"{transforms[name]} {name}" if name in transforms else name
