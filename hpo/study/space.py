"""The search space: parameters, and the configurations at its ends."""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

When = Mapping[str, tuple[Any, ...]]  # a parameter is there only where others, of a list, have one of these values


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A parameter with a finite list of values, in the order the file gives."""

    values: tuple[Any, ...]
    when: When | None = None


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A parameter between two bounds, both included; whole numbers when both bounds are."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    when: When | None = None

    @property
    def top(self) -> float:
        """The highest value in reach: the steps need not come out even."""
        if self.step is None:
            return self.high
        if all(isinstance(number, int) for number in (self.low, self.high, self.step)):
            return self.high - (self.high - self.low) % self.step
        steps = (self.high - self.low) / self.step
        return self.high if abs(steps - round(steps)) < 1e-8 else self.low + math.floor(steps) * self.step


Space = Mapping[str, Choices | Interval]
Point = dict[str, Any]


def has_place(parameter: Choices | Interval, point: Mapping[str, Any]) -> bool:
    """Return whether a parameter is one of a configuration, by the values of those before it."""
    return all(point.get(name) in values for name, values in (parameter.when or {}).items())


def pruned(space: Space, values: Mapping[str, Any]) -> Point:
    """Return the configuration that has these values: without parameters whose condition does not hold."""
    point: Point = {}
    for key, parameter in space.items():
        if has_place(parameter, point):
            point[key] = values[key]
    return point


def _wanted(space: Space, key: str) -> Point:
    """Return the first values of other parameters with which one has a place."""
    wanted: Point = {}
    for name, values in (space[key].when or {}).items():
        wanted |= _wanted(space, name) | {name: values[0]}
    return wanted


def branches(space: Space, point: Mapping[str, Any]) -> list[Point]:
    """Return configurations like a point, one for each way in which conditions hold; without conditions itself."""
    names = [name for name in space if any(name in (parameter.when or {}) for parameter in space.values())]
    axes = [parameter.values for parameter in map(space.get, names) if isinstance(parameter, Choices)]
    points = [pruned(space, {**point, **dict(zip(names, values, strict=True))}) for values in itertools.product(*axes)]
    return list({repr(one): one for one in points}.values())


def corners(space: Space) -> list[Point]:
    """Points at the lowest and the highest end of every parameter, one parameter at a time."""
    ends = {key: p.values if isinstance(p, Choices) else (p.low, p.top) for key, p in space.items()}
    first = {key: values[0] for key, values in ends.items()}
    points = [{**first, **_wanted(space, key), key: value} for key, values in ends.items() for value in values]
    return [pruned(space, point) for point in (first, *points)]


def second_values(space: Space) -> list[Point]:
    """Points at the second whole number of a parameter, the others at their lowest end: not each is odd, say."""
    first = {key: p.values[0] if isinstance(p, Choices) else p.low for key, p in space.items()}
    return [
        pruned(space, {**first, **_wanted(space, key), key: p.low + (p.step or 1)})
        for key, p in space.items()
        if isinstance(p, Interval) and all(isinstance(bound, int) for bound in (p.low, p.high))
        if p.low + (p.step or 1) <= p.high
    ]


def highest(space: Space, *, all_of: str) -> list[Point]:
    """The points at the highest number of every parameter, of names the first, with each value of the whole number
    `all_of` if there is such a parameter, and each way in which conditions hold."""
    ends = {key: p.values if isinstance(p, Choices) else (p.top,) for key, p in space.items()}
    point = {key: values[0] if isinstance(values[0], str) else max(values) for key, values in ends.items()}
    parameter = space.get(all_of)
    if parameter is None:
        return branches(space, point)
    values: Iterable[Any] = (
        range(int(parameter.low), int(parameter.high) + 1, int(parameter.step or 1))
        if isinstance(parameter, Interval)
        else parameter.values
    )
    points = [branch for value in values for branch in branches(space, point | {all_of: value})]
    return list({repr(one): one for one in points}.values())


def as_json(parameter: Choices | Interval) -> Any:
    """Return what a study file says of a parameter; a list, or the bounds."""
    when = {"when": {name: list(values) for name, values in parameter.when.items()}} if parameter.when else {}
    if isinstance(parameter, Choices):
        return {"values": list(parameter.values)} | when if when else list(parameter.values)
    return {key: value for key, value in parameter.__dict__.items() if key != "when"} | when


def from_json(value: Any) -> Choices | Interval:
    """Return the parameter that `as_json` was given."""
    if isinstance(value, list):
        return Choices(values=tuple(value))
    when = {name: tuple(values) for name, values in value["when"].items()} if "when" in value else None
    if "values" in value:
        return Choices(values=tuple(value["values"]), when=when)
    return Interval(**value | {"when": when})


def is_number(value: Any, *, whole: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return False
    return isinstance(value, int) or math.isfinite(value)
