"""The bounds of a study on a data set: which configurations of a grid are planned, and whether a search has any."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hpo.errors import StudyError
from hpo.study import Study
from hpo.study.records import DataFacts, Point
from hpo.study.sizing import beyond, size
from hpo.text import point_text


def within_bounds(chosen: Study, data: DataFacts) -> list[int]:
    """Return the config numbers of a grid whose networks are within its bounds, as far as their sizes are known."""
    return [config for config, point in enumerate(chosen.grid()) if not beyond(chosen, point, data)]


def bounded(chosen: Study, data: DataFacts, folder: Path) -> Study:
    """Return the study with the number of trials that are within its bounds on this data, and so the one it follows.

    Raise StudyError, with `folder` for the data set, if there are none, or a point to start from is beyond a bound.
    """
    starts_from, best_of = (
        None if earlier is None else bounded(earlier, data, folder) for earlier in (chosen.starts_from, chosen.best_of)
    )
    chosen = replace(chosen, starts_from=starts_from, best_of=best_of)
    if not chosen.bounds:
        return chosen
    if chosen.sampler == "grid":
        configs = within_bounds(chosen, data)
        if not configs:
            raise _none(chosen, data, folder)
        return replace(chosen, trials=len(configs))
    for number, point in enumerate(chosen.start):
        if excess := beyond(chosen, point, data):
            raise StudyError(f"{folder}: {chosen.name}: start[{number}]: the network has {excess}. Remove the point.")
    try:
        example(chosen, data)
    except StudyError:
        raise _none(chosen, data, folder) from None
    return chosen


def example(chosen: Study, data: DataFacts) -> Point:
    """Return a point of a search within its bounds. Raise StudyError if there is none among many."""
    from hpo.search import foreign, sampling  # Optuna takes a second, and few studies have bounds

    def accepts(point: Mapping[str, object]) -> bool:
        return not beyond(chosen, point, data)

    space = sampling.distributions(chosen)
    return foreign.draw_at_random(space, chosen.space, seed=chosen.seed, accepts=accepts)


def _none(chosen: Study, data: DataFacts, folder: Path) -> StudyError:
    def parameters(point: Point) -> int:
        return size(chosen.specifications(point)[0], data).parameters

    smallest = min(chosen.corners(), key=parameters)
    return StudyError(
        f"{folder}: {chosen.name}: expected configurations within [bounds], found none: at "
        f"{point_text(smallest) or 'its one point'} the network has {beyond(chosen, smallest, data)}. Give the study "
        "wider bounds, or a space of smaller networks."
    )
