"""The search space: parameters, and the configurations at its ends."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A parameter with a finite list of values, in the order the file gives."""

    values: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A parameter between two bounds, both included; whole numbers when both bounds are."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def top(self) -> float:
        """The highest value in reach: the steps need not come out even."""
        if self.step is None:
            return self.high
        if all(isinstance(number, int) for number in (self.low, self.high, self.step)):
            return self.high - (self.high - self.low) % self.step
        steps = (self.high - self.low) / self.step
        return self.high if abs(steps - round(steps)) < 1e-8 else self.low + math.floor(steps) * self.step


def corners(space: Mapping[str, Choices | Interval]) -> list[dict[str, Any]]:
    """Points at the lowest and the highest end of every parameter, one parameter at a time."""
    ends = {key: p.values if isinstance(p, Choices) else (p.low, p.top) for key, p in space.items()}
    first = {key: values[0] for key, values in ends.items()}
    return [first, *({**first, key: value} for key, values in ends.items() for value in values)]


def second_values(space: Mapping[str, Choices | Interval]) -> list[dict[str, Any]]:
    """Points at the second whole number of a parameter, the others at their lowest end: not each is odd, say."""
    first = corners(space)[0]
    return [
        {**first, key: p.low + (p.step or 1)}
        for key, p in space.items()
        if isinstance(p, Interval) and all(isinstance(bound, int) for bound in (p.low, p.high))
        if p.low + (p.step or 1) <= p.high
    ]


def highest(space: Mapping[str, Choices | Interval], *, all_of: str) -> list[dict[str, Any]]:
    """The points at the highest number of every parameter, of names the first, with each value of the whole number
    `all_of` if there is such a parameter."""
    ends = {key: p.values if isinstance(p, Choices) else (p.top,) for key, p in space.items()}
    point = {key: values[0] if isinstance(values[0], str) else max(values) for key, values in ends.items()}
    parameter = space.get(all_of)
    if parameter is None:
        return [point]
    values: Iterable[Any] = (
        range(int(parameter.low), int(parameter.high) + 1, int(parameter.step or 1))
        if isinstance(parameter, Interval)
        else parameter.values
    )
    return [point | {all_of: value} for value in values]


def as_json(parameter: Choices | Interval) -> Any:
    return list(parameter.values) if isinstance(parameter, Choices) else dict(parameter.__dict__)


def is_number(value: Any, *, whole: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return False
    return isinstance(value, int) or math.isfinite(value)
