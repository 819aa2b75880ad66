"""What is trained and how, as frozen data: model and training specifications, their dict form, and the network."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is imported by `build` alone: planning and the command line do without its seconds
    from torch import nn

    from models.cnn import ConvNet


class SpecError(ValueError):
    """A specification, or a file that holds one, is not what was expected; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class BaselineSpec:
    """The protocol's baseline: two valid 3x3 convolutions with 8 and 16 filters, 16 dense units; nothing to choose."""


@dataclass(frozen=True, kw_only=True)
class CnnSpec:
    """Two convolution blocks and a dense head of 64 units (the protocol's tunable CNN)."""

    filters: int = field(metadata={"low": 1, "high": 1024})  # of the first block; the second has twice as many
    kernel_size: int = field(metadata={"low": 1, "high": 31, "odd": True})  # pixels
    dropout: float = field(metadata={"low": 0.0, "below": 1.0})  # probability, before the dense head


ModelSpec = BaselineSpec | CnnSpec
FAMILIES: dict[str, type[BaselineSpec] | type[CnnSpec]] = {
    "baseline": BaselineSpec,
    "cnn": CnnSpec,
}


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """Adam on the mean squared error over all targets, shuffled each epoch; defaults are the protocol's."""

    epochs: int = field(default=300, metadata={"low": 1})
    batch_size: int = field(default=32, metadata={"low": 1})  # images
    learning_rate: float = field(default=1e-3, metadata={"above": 0.0})
    target_scaling: str = field(default="standard", metadata={"options": ("standard", "none")})


ADAM_BETAS = (0.9, 0.999)  # decay of the mean and of the square
ADAM_EPSILON = 1e-7  # as in the source's framework; PyTorch's own default is 1e-8


def from_dict(values: Mapping[str, Any]) -> ModelSpec:
    """The model specification that `{"family": "cnn", "filters": 8, ...}` stands for.

    Raises SpecError naming the key, what it held, what it may hold, and the near miss of a misspelt one.
    """
    family = values.get("family")
    if not isinstance(family, str) or family not in FAMILIES:
        given = "is missing" if family is None else f"is {family!r}"
        raise SpecError(f"model.family {given}{_near(family, FAMILIES)}; there are: {', '.join(FAMILIES)}.")
    return _parse(
        FAMILIES[family],
        {k: v for k, v in values.items() if k != "family"},
        f"model ({family})",
    )


def to_dict(spec: ModelSpec) -> dict[str, Any]:
    """The JSON-able form that `from_dict` reads, "family" first."""
    family = next(name for name, kind in FAMILIES.items() if isinstance(spec, kind))
    return {"family": family} | {f.name: getattr(spec, f.name) for f in fields(spec)}


def training_from_dict(values: Mapping[str, Any]) -> TrainingSpec:
    """Like `from_dict`, for the training specification; missing keys take the protocol's values."""
    return _parse(TrainingSpec, values, "training")


def training_to_dict(spec: TrainingSpec) -> dict[str, Any]:
    """The JSON-able form that `training_from_dict` reads."""
    return {f.name: getattr(spec, f.name) for f in fields(spec)}


def model_keys(family: str) -> tuple[str, ...]:
    """The keys of a model family, without "family" itself. Raises SpecError if there is no such family."""
    if family not in FAMILIES:
        raise SpecError(f"family is {family!r}{_near(family, FAMILIES)}; there are: {', '.join(FAMILIES)}.")
    return tuple(f.name for f in fields(FAMILIES[family]))


def training_keys() -> tuple[str, ...]:
    return tuple(f.name for f in fields(TrainingSpec))


def build(spec: ModelSpec, image_shape: tuple[int, int, int], n_targets: int) -> "ConvNet":
    """A network from (batch, *image_shape) images in 0..1 to (batch, n_targets), Glorot-uniform from torch's generator.

    Raises SpecError if the image is too small for the two poolings.
    """
    _check_image(spec, image_shape)
    from models.cnn import ConvNet

    return ConvNet(image_shape=image_shape, n_targets=n_targets, **_layout(spec))


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a network is."""

    parameters: int
    multiply_adds: int  # of one image, forward


def size(spec: ModelSpec, image_shape: tuple[int, int, int], n_targets: int) -> Size:
    """The size of `build(spec, image_shape, n_targets)` in closed form, without torch. Raises SpecError as it does."""
    _check_image(spec, image_shape)
    layout = _layout(spec)
    channels, height, width = image_shape
    kernel, parameters, multiply_adds = layout["kernel_size"], 0, 0
    lost = 0 if layout["same"] else kernel - 1  # pixels a valid convolution takes off each side length
    for filters in layout["filters"]:
        height, width = height - lost, width - lost
        weights = filters * channels * kernel**2
        parameters, multiply_adds = parameters + weights + filters, multiply_adds + weights * height * width
        channels, height, width = filters, height // 2, width // 2
    inputs = channels * height * width
    for outputs in (layout["units"], n_targets):
        parameters, multiply_adds = parameters + (inputs + 1) * outputs, multiply_adds + inputs * outputs
        inputs = outputs
    return Size(parameters=parameters, multiply_adds=multiply_adds)


def _layout(spec: ModelSpec) -> dict[str, Any]:
    if isinstance(spec, BaselineSpec):
        return {"filters": (8, 16), "kernel_size": 3, "same": False, "dropout": 0.0, "units": 16}
    filters = (spec.filters, 2 * spec.filters)
    return {"filters": filters, "kernel_size": spec.kernel_size, "same": True, "dropout": spec.dropout, "units": 64}


def _check_image(spec: ModelSpec, image_shape: tuple[int, int, int]) -> None:
    smallest = 10 if isinstance(spec, BaselineSpec) else 4  # pixels: leaves one after the second pooling
    if min(image_shape[1:]) < smallest or min(image_shape) < 1:
        raise SpecError(
            f"{to_dict(spec)['family']}: expected images of at least {smallest}x{smallest} pixels, "
            f"found (channels, height, width) = {tuple(image_shape)}."
        )


def parameter_count(module: "nn.Module") -> int:
    """Numbers that training may change."""
    return sum(parameter.numel() for parameter in module.parameters())


def _parse(kind: type, values: Mapping[str, Any], where: str) -> Any:
    known = {f.name: f for f in fields(kind)}
    for key in values:
        if key not in known:
            valid = f"valid keys: {', '.join(known)}" if known else "it takes none"
            raise SpecError(f"{where}: unknown key {key!r}{_near(key, known)}; {valid}.")
    missing = [name for name, f in known.items() if name not in values and f.default is MISSING]
    if missing:
        raise SpecError(f"{where}: {missing[0]} is missing; expected {_rule(known[missing[0]])}.")
    return kind(**{name: _value(known[name], value, where) for name, value in values.items()})


def _value(f: Field, value: Any, where: str) -> Any:
    kind: Any = f.type
    fits = isinstance(value, {int: Integral, float: Real, str: str}[kind]) and not isinstance(value, bool)
    if fits:
        value = kind(value)
    rule = f.metadata
    if (
        not fits
        or (kind is float and not math.isfinite(value))
        or ("low" in rule and value < rule["low"])
        or ("high" in rule and value > rule["high"])
        or ("above" in rule and value <= rule["above"])
        or ("below" in rule and value >= rule["below"])
        or ("odd" in rule and value % 2 == 0)
        or ("options" in rule and value not in rule["options"])
    ):
        near = _near(value, rule.get("options", ()))
        raise SpecError(f"{where}: {f.name} = {value!r}{near}; expected {_rule(f)}.")
    return value


def _rule(f: Field) -> str:
    rule = f.metadata
    if "options" in rule:
        return "one of " + ", ".join(repr(option) for option in rule["options"])
    bounds = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
    text = {
        int: "an odd whole number" if "odd" in rule else "a whole number",
        float: "a number",
    }[f.type]  # type: ignore[index]
    return ", ".join(
        [
            text,
            " and ".join(f"{words} {rule[key]:g}" for key, words in bounds.items() if key in rule),
        ]
    )


def _near(word: Any, words: Any) -> str:
    close = get_close_matches(str(word), list(words), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
