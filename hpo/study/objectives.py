"""What a search minimises beside the validation NMSE, and the bounds that its networks keep: sizes of a network."""

import math
from collections.abc import Mapping, Sequence

from hpo.errors import StudyError
from hpo.text import near_miss
from models.sizes import Size

NMSE = "nmse"  # validation NMSE, the mean over the repeats or folds: always the first objective
SIZES = {"parameters": "parameters", "multiply_adds": "multiply-adds"}  # of one network, and their words
OBJECTIVES = (NMSE, *SIZES)

NOT_TRAINED = "not trained"  # begins the reason of a trial whose network, when it was made, was beyond a bound

Bounds = Mapping[str, int]  # the highest value of a size, by its name


def check(label: str, objectives: Sequence[object], bounds: Bounds, *, family: object, pruner: object) -> None:
    """Raise StudyError, with `label` for the file, unless these objectives and bounds go together with the rest."""
    for name in objectives:
        if name not in OBJECTIVES:
            options, near = ", ".join(OBJECTIVES), near_miss(str(name), OBJECTIVES)
            raise StudyError(f"{label}: objectives: expected some of {options}, found {name!r}.{near}")
    if not objectives or objectives[0] != NMSE or len({*objectives}) < len(objectives):
        raise StudyError(
            f'{label}: objectives: expected each once and "{NMSE}" first, by which @champion is elected among all '
            f"studies on the data, found {list(objectives)!r}."
        )
    if len(objectives) > 1 and pruner != "none":
        raise StudyError(
            f"{label}: several objectives and a pruner do not go together: a pruner compares trials by one score. "
            'Remove one, as with pruner.name = "none".'
        )
    if family == "descriptors" and "multiply_adds" in (*objectives, *bounds):
        raise StudyError(
            f'{label}: multiply_adds: expected a family of networks, found model.family = "descriptors": what its '
            'descriptors cost are no multiply-adds of layers. Take "parameters".'
        )


def measured(names: Sequence[str], size: Size) -> dict[str, int]:
    """Return the sizes of a network by their names; 0 of one that is unknown before the network is made."""
    values = {"parameters": size.parameters, "multiply_adds": size.forward}
    return {name: values[name] for name in names}


def beyond(bounds: Bounds, values: Mapping[str, float]) -> str:
    """Say which of the sizes are beyond their bounds; empty if none is, as far as they are known."""
    return " and ".join(
        f"{values[name]:,.0f} {SIZES[name]}, at most {most:,} (bounds.{name})"
        for name, most in bounds.items()
        if values[name] > most
    )


def violations(bounds: Bounds, values: Mapping[str, float]) -> dict[str, float]:
    """Return the logarithm of each known size over its bound, as Optuna has constraints: above 0 it is beyond."""
    return {name: math.log(values[name] / most) for name, most in bounds.items() if values.get(name)}
