"""What is trained and how, as frozen data: model and training specifications, their dict form, and the network."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is imported by `build` alone: planning and the command line do without its seconds
    from torch import nn

    from models.cnn import ConvNet
    from models.periodic import PeriodicNet
    from models.transfer import TransferNet


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


# The backbones without their tops: parameters, channels of the last activation, and multiply-adds of one image of
# 224x224 pixels (in proportion to the pixels for other sizes, but for rounding at the borders).
PARAMETERS = {"vgg16": 14_714_688, "resnet50": 23_508_032, "densenet121": 6_953_856}
CHANNELS = {"vgg16": 512, "resnet50": 2048, "densenet121": 1024}
MULTIPLY_ADDS = {"vgg16": 15_346_630_656, "resnet50": 4_087_136_256, "densenet121": 2_833_137_664}
HEAD_UNITS = 16

INDEPENDENT = 6  # numbers that determine the stiffness of an extruded two-phase cell: see models/physics.py


@dataclass(frozen=True, kw_only=True)
class TransferSpec:
    """A backbone without its top, global average pooling, 16 dense units (the protocol's transfer learning)."""

    backbone: str = field(metadata={"options": tuple(CHANNELS)})
    weights: str = field(default="imagenet", metadata={"options": ("imagenet", "none")})  # "none": at random
    trainable: str = field(default="head", metadata={"options": ("head", "all")})


@dataclass(frozen=True, kw_only=True)
class PeriodicSpec:
    """Stages of periodic convolutions with residuals, global average pooling, a small head; for periodic cells."""

    width: int = field(default=24, metadata={"low": 1, "high": 512})  # channels of the first stage; each next has twice
    depth: int = field(default=3, metadata={"low": 1, "high": 6})  # stages; each halves the sides
    kernel_size: int = field(default=3, metadata={"low": 1, "high": 31, "odd": True})  # pixels
    stride: int = field(default=2, metadata={"low": 1, "high": 8})  # of the first convolution; its kernel grows with it
    normalisation: str = field(default="batch", metadata={"options": ("batch", "group", "none")})
    activation: str = field(default="gelu", metadata={"options": ("relu", "gelu", "silu")})
    head: int = field(default=64, metadata={"low": 0, "high": 4096})  # units of a dense layer before the last; 0: none
    volume_fraction: bool = True  # whether the head sees each channel's mean grey value, too
    symmetric: bool = True  # whether predictions are the mean over the square's eight symmetries
    physics: str = field(default="none", metadata={"options": ("none", "hill", "bounded")})  # of the last layer


ModelSpec = BaselineSpec | CnnSpec | TransferSpec | PeriodicSpec
FAMILIES: dict[str, type[BaselineSpec] | type[CnnSpec] | type[TransferSpec] | type[PeriodicSpec]] = {
    "baseline": BaselineSpec,
    "cnn": CnnSpec,
    "transfer": TransferSpec,
    "periodic": PeriodicSpec,
}


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """Adam on the mean squared error over all targets, shuffled each epoch; defaults are the protocol's."""

    epochs: int = field(default=300, metadata={"low": 1, "high": 10**7})
    batch_size: int = field(default=32, metadata={"low": 1, "high": 2**31 - 1})  # images
    learning_rate: float = field(default=1e-3, metadata={"above": 0.0})
    target_scaling: str = field(default="standard", metadata={"options": ("standard", "none")})
    # Settings that came later: at their defaults they are left out of the dict form, so that it, and with it the
    # identity of every study that does not use them, stays what it was.
    # epochs without a new best; 0: never stop
    patience: int = field(default=0, metadata={"low": 0, "high": 10**7, "later": True})
    precision: str = field(default="fp32", metadata={"options": ("fp32", "bf16"), "later": True})
    augmentation: str = field(default="none", metadata={"options": ("none", "symmetry"), "later": True})
    weight_decay: float = field(default=0.0, metadata={"low": 0.0, "later": True})  # AdamW's; 0: plain Adam
    schedule: str = field(
        default="constant", metadata={"options": ("constant", "cosine", "one-cycle"), "later": True}
    )  # of the learning rate, which is its highest value
    gradient_clipping: float = field(default=0.0, metadata={"low": 0.0, "later": True})  # largest norm; 0: any
    ema: float = field(default=0.0, metadata={"low": 0.0, "below": 1.0, "later": True})  # decay a batch; 0: no average
    relative: float = field(default=0.0, metadata={"low": 0.0, "later": True})  # weight of relative errors in the loss
    threads: int = field(default=1, metadata={"low": 1, "high": 256, "later": True})  # of a trainer, which sets them


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
    return {
        f.name: getattr(spec, f.name)
        for f in fields(spec)
        if not (f.metadata.get("later") and getattr(spec, f.name) == f.default)
    }


def symmetric(spec: ModelSpec) -> bool:
    """Whether the model's predictions are means over the symmetries of the image."""
    return isinstance(spec, PeriodicSpec) and spec.symmetric


def physical(spec: ModelSpec) -> bool:
    """Whether the model's last layer knows the mechanics of two phases, and so needs their constants."""
    return isinstance(spec, PeriodicSpec) and spec.physics != "none"


def needs_symmetries(model: ModelSpec, training: TrainingSpec) -> bool:
    """Whether they make sense only where it is known how the targets move with the image."""
    return training.augmentation != "none" or symmetric(model)


def check_together(model: ModelSpec, training: TrainingSpec) -> None:
    """Raise SpecError if model and training do not go together."""
    if training.augmentation != "none" and isinstance(model, TransferSpec) and model.trainable == "head":
        raise SpecError(
            "training: augmentation: a frozen backbone sees each image but once, before the first epoch: expected "
            "'none', or model.trainable = 'all'."
        )


def model_keys(family: str) -> tuple[str, ...]:
    """The keys of a model family, without "family" itself. Raises SpecError if there is no such family."""
    if family not in FAMILIES:
        raise SpecError(f"family is {family!r}{_near(family, FAMILIES)}; there are: {', '.join(FAMILIES)}.")
    return tuple(f.name for f in fields(FAMILIES[family]))


def training_keys() -> tuple[str, ...]:
    return tuple(f.name for f in fields(TrainingSpec))


def build(spec: ModelSpec, image_shape: tuple[int, int, int], n_targets: int) -> "ConvNet | TransferNet | PeriodicNet":
    """A network from (batch, *image_shape) images in 0..1 to (batch, n_targets), weights from torch's generator.

    A backbone is at random, too: `models.weights.load` fills in pretrained ones. With physics there are INDEPENDENT
    outputs instead, from which the regressor makes the targets. Raises SpecError if the image is too small for the
    poolings.
    """
    check_image(spec, image_shape)
    if isinstance(spec, TransferSpec):
        from models.transfer import TransferNet

        return TransferNet(spec, n_targets)
    if isinstance(spec, PeriodicSpec):
        from models.periodic import PeriodicNet

        return PeriodicNet(spec, image_shape, INDEPENDENT if physical(spec) else n_targets)
    from models.cnn import ConvNet

    return ConvNet(image_shape=image_shape, n_targets=n_targets, **_layout(spec))


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a network is."""

    parameters: int
    trainable: int  # of the parameters
    multiply_adds: int  # of one image, forward, in an epoch: what a frozen backbone sees is computed but once


def size(spec: ModelSpec, image_shape: tuple[int, int, int], n_targets: int) -> Size:
    """The size of `build(spec, image_shape, n_targets)` in closed form, without torch. Raises SpecError as it does."""
    check_image(spec, image_shape)
    if isinstance(spec, TransferSpec):
        channels, frozen = CHANNELS[spec.backbone], spec.trainable == "head"
        head = (channels + 1) * HEAD_UNITS + (HEAD_UNITS + 1) * n_targets
        backbone = MULTIPLY_ADDS[spec.backbone] * image_shape[1] * image_shape[2] // 224**2
        return Size(
            parameters=PARAMETERS[spec.backbone] + head,
            trainable=head if frozen else PARAMETERS[spec.backbone] + head,
            multiply_adds=head if frozen else backbone + head,
        )
    if isinstance(spec, PeriodicSpec):
        return _periodic_size(spec, image_shape, INDEPENDENT if physical(spec) else n_targets)
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
    return Size(parameters=parameters, trainable=parameters, multiply_adds=multiply_adds)


def _periodic_size(spec: PeriodicSpec, image_shape: tuple[int, int, int], n_targets: int) -> Size:
    channels, height, width = image_shape
    beside = 1 if spec.normalisation == "none" else 2  # a bias, or the shift and scale of a normalisation
    parameters, multiply_adds = 0, 0
    height, width = height // spec.stride, width // spec.stride
    for stage in range(spec.depth):
        filters = spec.width * 2**stage
        inputs = channels if stage else channels * spec.stride**2  # the first kernel has so many times the pixels
        first, second = (filters * each * spec.kernel_size**2 for each in (inputs, filters))
        parameters += first + second + 2 * beside * filters
        multiply_adds += first * height * width
        height, width = math.ceil(height / 2), math.ceil(width / 2)
        multiply_adds += second * height * width
        channels = filters
    inputs = channels + (image_shape[0] if spec.volume_fraction else 0)
    for outputs in (spec.head, n_targets) if spec.head else (n_targets,):
        parameters, multiply_adds = parameters + (inputs + 1) * outputs, multiply_adds + inputs * outputs
        inputs = outputs
    return Size(parameters=parameters, trainable=parameters, multiply_adds=multiply_adds)


def _layout(spec: BaselineSpec | CnnSpec) -> dict[str, Any]:
    if isinstance(spec, BaselineSpec):
        return {"filters": (8, 16), "kernel_size": 3, "same": False, "dropout": 0.0, "units": 16}
    filters = (spec.filters, 2 * spec.filters)
    return {"filters": filters, "kernel_size": spec.kernel_size, "same": True, "dropout": spec.dropout, "units": 64}


def check_image(spec: ModelSpec, image_shape: Sequence[int]) -> None:
    """Raise SpecError if the model cannot be built for images of (channels, height, width)."""
    # pixels: one after the last pooling; of periodic ones two, and no fewer than the last convolution wraps around
    smallest = {"baseline": 10, "cnn": 4, "transfer": 32}.get(to_dict(spec)["family"], 0)
    if isinstance(spec, PeriodicSpec):
        smallest = ((max(2, spec.kernel_size // 2) - 1) * 2**spec.depth + 1) * spec.stride
        if any(side % spec.stride for side in image_shape[1:]):
            raise SpecError(
                f"periodic: stride = {spec.stride}: expected images whose sides are multiples of it, found "
                f"{image_shape[1]}x{image_shape[2]} pixels."
            )
    if min(image_shape[1:]) < smallest or min(image_shape) < 1:
        raise SpecError(
            f"{to_dict(spec)['family']}: expected images of at least {smallest}x{smallest} pixels, "
            f"found (channels, height, width) = {tuple(image_shape)}."
        )
    if isinstance(spec, TransferSpec) and image_shape[0] not in (1, 3):
        raise SpecError(f"transfer: expected images of one or three channels, found {image_shape[0]}.")


def least_batch(spec: ModelSpec, image_shape: Sequence[int]) -> int:
    """How many images a batch of the training must have: two where a trained batch-norm sees one pixel of each image,
    for of a single number there is no variance."""
    if not isinstance(spec, TransferSpec) or spec.trainable == "head" or spec.backbone == "vgg16":
        return 1
    last = {"resnet50": lambda side: math.ceil(side / 32), "densenet121": lambda side: math.ceil(side / 4) // 8}
    return 2 if {last[spec.backbone](side) for side in image_shape[1:]} == {1} else 1


def check_batches(spec: ModelSpec, training: TrainingSpec, image_shape: Sequence[int]) -> None:
    """Raise SpecError if batches of this size cannot be trained on; one that is left over joins the one before it."""
    if training.batch_size < (least := least_batch(spec, image_shape)):
        raise SpecError(
            f"training: batch_size = {training.batch_size}: of images of {image_shape[1]}x{image_shape[2]} pixels the "
            f"last batch-norm of this backbone sees one pixel each: expected at least {least} images in a batch, or "
            "larger images."
        )


def parameter_count(module: "nn.Module", *, trainable: bool = False) -> int:
    """How many numbers the parameters are, with `trainable` only those that training changes."""
    return sum(each.numel() for each in module.parameters() if each.requires_grad or not trainable)


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
    fits = isinstance(value, {int: Integral, float: Real, str: str, bool: bool}[kind])
    fits = fits and isinstance(value, bool) == (kind is bool)
    if fits:
        try:
            value = kind(value)
        except OverflowError:  # a whole number of hundreds of digits
            fits = False
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
    if f.type is bool:
        return "true or false"
    bounds = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
    text = {
        int: "an odd whole number" if "odd" in rule else "a whole number",
        float: "a number",
    }[f.type]  # type: ignore[index]
    return ", ".join(
        [
            text,
            " and ".join(f"{words} {_plain(rule[key])}" for key, words in bounds.items() if key in rule),
        ]
    )


def _plain(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _near(word: Any, words: Any) -> str:
    close = get_close_matches(str(word), list(words), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
