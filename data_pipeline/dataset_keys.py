"""What dataset.toml says about how images and labels lie in a folder and belong together; every key may be left out."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline.findings import DOUBTS, ERRORS
from data_pipeline.messages import near_miss
from data_pipeline.target_moves import MOVES
from data_pipeline.target_transforms import TRANSFORMS

MOST_TARGETS = 100
MOST_PHASES = 16
MOST_INPUTS = 100
LEVELS = ("grey", "rgb", "phases")
MATCHES = ("column", "number")

Check = Callable[[Any], Any]  # returns the value of a key, or raises ValueError


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _moves(value: Any) -> dict[str, dict[str, str]]:
    if not isinstance(value, dict) or not set(value) <= set(MOVES):
        raise ValueError
    return {move: _by_name(_text)(changes) if changes != {} else {} for move, changes in value.items()}


def _text(value: Any) -> str:
    if not isinstance(value, str) or not 1 <= len(value.strip()) <= 200 or not value.isprintable():
        raise ValueError
    return value.strip()


def _texts(value: Any) -> tuple[str, ...]:
    texts = tuple(_text(text) for text in (value if isinstance(value, list) else [value]))
    if len(set(texts)) < len(texts) or not texts:
        raise ValueError
    return texts


def _findings(value: Any) -> tuple[str, ...]:
    names = _texts(value)
    if unknown := [name for name in names if name not in ERRORS | DOUBTS]:
        raise _Unknown(near_miss(unknown[0], ERRORS | DOUBTS))
    return names


class _Unknown(ValueError):
    """The message is the near miss."""


def _files(value: Any) -> tuple[str, ...]:
    files = _texts(value)
    if any(file.startswith(("/", "\\")) or ".." in file.replace("\\", "/").split("/") for file in files):
        raise ValueError  # a data set of a stranger reads no files outside its folder
    return files


def _relative(value: Any) -> str:
    path = _text(value)
    if path.startswith(("/", "\\")) or ":" in path:
        raise ValueError
    return path


def _one_of(*words: str) -> Check:
    def check(value: Any) -> Any:
        if value not in words:
            raise ValueError
        return value

    return check


def _by_name(check: Check) -> Check:
    def checked(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            raise ValueError
        return {_text(name): check(member) for name, member in value.items()}

    return checked


def _match(value: Any) -> tuple[str, str]:
    if value == "row":
        return "row", ""
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in MATCHES:
        raise ValueError
    return next((kind, _text(column)) for kind, column in value.items())


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) not in (2, 3) or any(type(n) is not int or n < 1 for n in value):
        raise ValueError
    return tuple(value)


def _range(value: Any) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2 or any(type(n) not in (int, float) for n in value):
        raise ValueError
    low, high = map(float, value)
    if not -math.inf < low < high < math.inf:
        raise ValueError
    return low, high


def _colours(value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list) or not 2 <= len(value) <= MOST_PHASES:
        raise ValueError
    colours = tuple(tuple(colour) if isinstance(colour, list) else (colour,) for colour in value)
    if any(type(n) is not int for colour in colours for n in colour) or len(set(map(len, colours))) > 1:
        raise ValueError
    if len(set(colours)) < len(colours):
        raise ValueError
    return colours


def _axes(value: Any) -> str:
    if not isinstance(value, str) or sorted(value) not in (sorted("nhw"), sorted("nhwc")):
        raise ValueError
    return value


@dataclass(frozen=True)
class Key:
    """A key of the file: how its value is checked, what an error says was expected, the comment behind it."""

    check: Check
    expected: str
    comment: str


KEYS = {
    "images": Key(_files, "a file or pattern in this folder, or a list of them", "pictures, or arrays (FILE:KEY)"),
    "shape": Key(_shape, "[height, width]", "of the images in a text file of numbers"),
    "axes": Key(_axes, 'the letters n, h, w and, for colours, c, as in "nhw"', "of an array of images"),
    "table": Key(_files, "a file in this folder, or a list of them", "of the targets"),
    "decimal": Key(_one_of(".", ","), '"." or ","', "the mark of the table's numbers"),
    "match": Key(_match, '{column = "…"}, {number = "…"} or "row"', "how a row names its image"),
    "targets": Key(_texts, "a list of columns, each once", "what is predicted"),
    "units": Key(_by_name(_text), 'a table such as {E = "Pa"}', "of targets and inputs"),
    "inputs": Key(_texts, "a list of columns, each once", "numbers that the networks see beside the image"),
    "levels": Key(_one_of(*LEVELS), '"grey", "rgb" or "phases"', "what a pixel means; phases: a channel each"),
    "range": Key(_range, "[lowest, highest]", "the pixels that become 0 and 1"),
    "colours": Key(_colours, "a list of 2 to 16 pixel values or [red, green, blue]", "of the phases, in order"),
    "transform": Key(_by_name(_one_of(*TRANSFORMS)), f"targets with one of {', '.join(TRANSFORMS)}", "trained there"),
    "missing": Key(_one_of("mask", "drop"), '"mask" or "drop"', "targets: count them nowhere, or leave out their row"),
    "group": Key(_text, "a column", "its rows are never on two sides of the split"),
    "symmetry": Key(_moves, f"tables of targets for {', '.join(MOVES)}", "of the targets when the image moves"),
    "periodic": Key(_truth, "true or false", "whether the images wrap around"),
    "extends": Key(_relative, "the path of another data set, relative to this folder", "whose split stays"),
    "split": Key(_text, "a column", "holds training, validation or test"),
    "accept": Key(_findings, f"a list of {', '.join((*ERRORS, *DOUBTS))}", "findings that are as they should be"),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The keys of dataset.toml beside name, unit and phases; None is what is to be found out."""

    images: tuple[str, ...] | None = None
    shape: tuple[int, ...] | None = None
    axes: str | None = None
    table: tuple[str, ...] | None = None
    decimal: str | None = None
    match: tuple[str, str] | None = None
    targets: tuple[str, ...] | None = None
    units: dict[str, str] | None = None
    inputs: tuple[str, ...] | None = None
    levels: str | None = None
    range: tuple[float, float] | None = None
    colours: tuple[tuple[int, ...], ...] | None = None
    transform: dict[str, str] | None = None
    missing: str | None = None
    group: str | None = None
    symmetry: dict[str, dict[str, str]] | None = None
    periodic: bool | None = None
    extends: str | None = None
    split: str | None = None
    accept: tuple[str, ...] | None = None

    def to_toml(self) -> list[str]:
        """Return the lines of the keys that are set, each with a comment."""
        return [f"{name} = {_toml(value)}  # {KEYS[name].comment}" for name, value in self.to_dict().items()]

    def to_dict(self) -> dict[str, Any]:
        """Return the keys that are set in the form of the file."""
        values = self.set()
        if self.match:
            values["match"] = {self.match[0]: self.match[1]} if self.match[1] else self.match[0]
        return values

    def pixels(self) -> str:
        """Return how the pixels of a file become the numbers in 0..1 that a network takes."""
        if self.levels == "phases":
            colours = ", ".join(str(colour[0] if len(colour) == 1 else list(colour)) for colour in self.colours or ())
            if len(self.colours or ()) == 2:
                return f"one channel: 0 and 1 where the pixel is {colours}"
            return f"a channel a phase, 1 where the pixel is {colours}, else 0"
        low, high = self.range or (0.0, 255.0)
        scale = f"pixel / {high:g}" if low == 0 else f"(pixel - {low:g}) / {high - low:g}"
        return f"{'colours' if self.levels == 'rgb' else 'grey values'} 0..1 ({scale})"

    def of_images(self) -> "Layout":
        """Return what is needed to read further images as these, and to name the units of what they predict."""
        kept = ("shape", "axes", "levels", "range", "colours", "units", "transform")
        return Layout(**{name: value for name, value in self.set().items() if name in kept})

    def like(self, other: "Layout", problems: list[str]) -> "Layout":
        """Return this layout with all that another one says of pixels, targets, their scales and inputs.

        Add a key that says something else here to `problems`. Targets beyond those of the other one are left out, and
        labels that are missing count nowhere.
        """
        values: dict[str, Any] = {"missing": self.missing or "mask"}
        for name in ("levels", "range", "colours", "targets", "transform", "inputs"):
            own, values[name] = getattr(self, name), getattr(other, name)
            is_same = own == values[name] or (name == "targets" and set(own or ()) >= set(values[name] or ()))
            if own is not None and not is_same:
                expected = "nothing" if values[name] is None else _toml(values[name])
                problems.append(f"dataset.toml: {name}: expected {expected}, found {_toml(own)}. Remove the key.")
        return replace(self, **values)

    def set(self) -> dict[str, Any]:
        """Return the keys that are set with their values."""
        return {name: value for name in KEYS if (value := getattr(self, name)) is not None}


UNSTATED = Layout()


def parse(content: Mapping[str, Any], file: str, problems: list[str]) -> Layout:
    """Return the layout in the content of a file, without its invalid keys; add what is wrong to `problems`."""
    values = {}
    for name in KEYS.keys() & content.keys():
        try:
            values[name] = KEYS[name].check(content[name])
        except (ValueError, TypeError) as error:
            near = error if isinstance(error, _Unknown) else ""
            problems.append(f"{file}: {name}: expected {KEYS[name].expected}, found {content[name]!r:.60}.{near}")
    return Layout(**values)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(key)} = {_toml(member)}" for key, member in value.items()) + "}"
    if isinstance(value, tuple):
        return _toml(value[0]) if len(value) == 1 and isinstance(value[0], int) else f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float) and value.is_integer():
        return str(int(value)) if abs(value) < 2**53 else repr(value)
    return json.dumps(value, ensure_ascii=False)


def _toml_key(key: str) -> str:
    return key if key.isascii() and key.replace("_", "").replace("-", "").isalnum() else _toml(key)
