"""Specifications: which network is trained and how, as frozen data with a JSON form. Imports no torch."""

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, ClassVar, TypeGuard, TypeVar

from models.backbones import BACKBONES, Block


class SpecError(ValueError):
    """A specification, or a file that holds one, is not as expected; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class BaselineSpec:
    """The protocol's baseline: two valid 3x3 convolutions with 8 and 16 filters, 16 dense units; no free parameter."""


@dataclass(frozen=True, kw_only=True)
class CnnSpec:
    """Two convolution blocks and a dense head of 64 units (the protocol's tunable CNN)."""

    filters: int = field(metadata={"low": 1, "high": 1024})  # of the first block; the second has twice as many
    kernel_size: int = field(metadata={"low": 1, "high": 31, "odd": True})  # pixels
    dropout: float = field(metadata={"low": 0.0, "below": 1.0})  # probability, before the dense head


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The layers of a network of two convolution blocks and a dense head."""

    filters: tuple[int, int]  # of the two blocks
    kernel_size: int  # pixels
    same: bool  # whether the convolutions pad the image with zeros to keep its size
    dropout: float  # probability, before the dense head
    units: int  # of the dense head

    @property
    def lost(self) -> int:
        """Pixels that a convolution takes off each side length."""
        return 0 if self.same else self.kernel_size - 1


def layout(spec: BaselineSpec | CnnSpec) -> Layout:
    """Return the layers that the specification stands for."""
    if isinstance(spec, BaselineSpec):
        return Layout(filters=(8, 16), kernel_size=3, same=False, dropout=0.0, units=16)
    filters = (spec.filters, 2 * spec.filters)
    return Layout(filters=filters, kernel_size=spec.kernel_size, same=True, dropout=spec.dropout, units=64)


HEAD_UNITS = 16  # of the dense head on a backbone


@dataclass(frozen=True, kw_only=True)
class Form:
    """Texts that a setting takes beside its options."""

    pattern: str
    words: str


WEIGHTS = ("imagenet", "none")
FILE = Form(
    pattern=r"[A-Za-z0-9_.+-]+\.(pth|pt|pth\.tar|safetensors)",
    words="the path of a file .pth, .pth.tar, .pt or .safetensors, whose name has letters, digits and _.+- only",
)
FUNCTION = Form(
    pattern=r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*",
    words="'MODULE:FUNCTION', a function in a module or package beside the study file",
)
DIGEST = Form(pattern="[0-9a-f]{64}", words="the SHA-256 that hpo computes of the source")
LAST = Form(pattern=r"last:[1-9][0-9]?", words="'last:N', for the last N blocks of the backbone")


@dataclass(frozen=True, kw_only=True)
class TransferSpec:
    """A backbone without its top, global average pooling, 16 dense units (the protocol's transfer learning)."""

    backbone: str = field(metadata={"options": tuple(BACKBONES)})
    weights: str = field(default="imagenet", metadata={"options": WEIGHTS, "form": FILE})  # "none": random
    trainable: str = field(default="head", metadata={"options": ("head", "all"), "form": LAST})

    def __post_init__(self) -> None:
        count = len(BACKBONES[self.backbone].blocks)
        if self._last >= count:
            raise SpecError(
                f"model (transfer): trainable = {self.trainable!r}: {self.backbone} has {count} blocks: expected "
                f"'last:1' to 'last:{count - 1}', or 'all'."
            )

    @property
    def _last(self) -> int:
        """How many blocks are the last that are trained; 0 if `trainable` does not count them."""
        return int(self.trainable.partition(":")[2] or 0)

    @property
    def trained(self) -> tuple[Block, ...]:
        """The blocks of the backbone that are trained, beside the head."""
        blocks = BACKBONES[self.backbone].blocks
        return blocks if self.trainable == "all" else blocks[len(blocks) - self._last :]


INDEPENDENT = 6  # numbers that determine the stiffness of an extruded two-phase cell: see models/physics.py

# What the data decide: a padding is circular if their images wrap around, else reflect; the augmentation is symmetry if
# they say how flips change the targets, else shift if their images wrap around, else none.
BY_DATA = "data"
BY_DATA_KEYS = {"padding": ("circular", "reflect"), "edges": ("periodic", "open")}  # of a model: if they do, if not


@dataclass(frozen=True, kw_only=True)
class _Stages:
    """Stages of convolutions with residuals, global average pooling, a small head."""

    width: int = field(default=24, metadata={"low": 1, "high": 512})  # channels of the first stage; doubled by the next
    depth: int = field(default=3, metadata={"low": 1, "high": 6})  # stages; each halves the sides
    kernel_size: int = field(default=3, metadata={"low": 1, "high": 31, "odd": True})  # pixels
    stride: int = field(default=2, metadata={"low": 1, "high": 8})  # of the first convolution; also scales its kernel
    normalisation: str = field(default="batch", metadata={"options": ("batch", "group", "none")})
    activation: str = field(default="gelu", metadata={"options": ("relu", "gelu", "silu")})
    head: int = field(default=64, metadata={"low": 0, "high": 4096})  # units of a dense layer before the last; 0: none
    volume_fraction: bool = True  # whether the head gets the mean grey value of each channel as well
    symmetric: bool = False  # whether predictions are the mean over the square's eight symmetries
    physics: str = field(default="none", metadata={"options": ("none", "hill", "bounded")})  # of the last layer


@dataclass(frozen=True, kw_only=True)
class PeriodicSpec(_Stages):
    """The stages for periodic cells: predictions of the moved image are the moved predictions."""

    symmetric: bool = True
    padding: ClassVar[str] = "circular"
    dropout: ClassVar[float] = 0.0


@dataclass(frozen=True, kw_only=True)
class ConvSpec(_Stages):
    """The stages for images of any kind."""

    # how a convolution sees the image continued beyond its edges
    padding: str = field(default=BY_DATA, metadata={"options": (BY_DATA, "circular", "reflect", "zeros")})
    dropout: float = field(default=0.0, metadata={"low": 0.0, "below": 1.0})  # probability, before the dense head


StagesSpec = PeriodicSpec | ConvSpec


@dataclass(frozen=True, kw_only=True)
class DescriptorsSpec:
    """Descriptors of the image (models/descriptors.py), and a classical regressor that is fitted to them."""

    regressor: str = field(default="ridge", metadata={"options": ("ridge", "gaussian-process", "trees")})
    # Which descriptors there are beside the mean grey value of each channel, its square and its cube:
    two_point: bool = True  # principal components of the two-point statistics
    lineal_path: bool = True
    chords: bool = True  # mean chord lengths
    grey: bool = False  # deviation, skewness and kurtosis of the grey values
    patterns: bool = False  # local binary patterns
    components: int = field(default=20, metadata={"low": 1, "high": 500})  # of the two-point statistics
    reach: int = field(default=32, metadata={"low": 1, "high": 64})  # pixels; at most half a side
    # whether images wrap around beyond their edges
    edges: str = field(default=BY_DATA, metadata={"options": (BY_DATA, "periodic", "open")})
    # ridge's penalty, the Gaussian process's variance of noise, the trees' penalty of leaves; of standardised targets
    alpha: float = field(default=1e-2, metadata={"above": 0.0})
    kernel: str = field(default="matern-5/2", metadata={"options": ("rbf", "matern-3/2", "matern-5/2")})
    length: float = field(default=2.0, metadata={"above": 0.0})  # of the kernel, in root mean square distances
    images: int = field(default=1000, metadata={"low": 2, "high": 5000})  # at most, to which a process is fitted
    trees: int = field(default=200, metadata={"low": 1, "high": 1000})  # of each target
    tree_depth: int = field(default=3, metadata={"low": 1, "high": 6})
    shrinkage: float = field(default=0.1, metadata={"above": 0.0, "high": 1.0})  # of each tree's part


@dataclass(frozen=True, kw_only=True)
class PythonSpec:
    """A network that a function of the user's makes (models/user.py)."""

    build: str = field(metadata={"options": (), "form": FUNCTION})
    code: str = field(default="", metadata={"options": ("",), "form": DIGEST})  # of its source
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict)  # for the function


LOSSES = ("mse", "mae", "huber", "relative")


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """Adam on the mean squared error over all targets, shuffled each epoch; defaults are the protocol's."""

    epochs: int = field(default=300, metadata={"low": 1, "high": 10**7})
    batch_size: int = field(default=32, metadata={"low": 1, "high": 2**31 - 1})  # images
    learning_rate: float = field(default=1e-3, metadata={"above": 0.0})
    target_scaling: str = field(default="standard", metadata={"options": ("standard", "none")})
    # Settings added later. A later setting at its default is left out of the JSON form, so that the identity of every
    # study that does not use it stays the same.
    # epochs without a new best; 0: never stop
    patience: int = field(default=0, metadata={"low": 0, "high": 10**7, "later": True})
    precision: str = field(default="fp32", metadata={"options": ("fp32", "bf16"), "later": True})
    augmentation: str = field(
        default="none", metadata={"options": ("none", "symmetry", "shift", BY_DATA), "later": True}
    )  # shift: periodic shifts alone
    # Random changes of each training image, which assume that its targets stay the same:
    rotation: float = field(default=0.0, metadata={"low": 0.0, "high": 180.0, "later": True})  # degrees, either way
    # the smallest part of the sides that is seen, magnified to the whole image
    crop: float = field(default=1.0, metadata={"above": 0.0, "high": 1.0, "later": True})
    brightness: float = field(default=0.0, metadata={"low": 0.0, "high": 1.0, "later": True})  # of 0..1, either way
    noise: float = field(default=0.0, metadata={"low": 0.0, "high": 1.0, "later": True})  # its deviation, of 0..1
    weight_decay: float = field(default=0.0, metadata={"low": 0.0, "later": True})  # AdamW's; 0: plain Adam
    schedule: str = field(
        default="constant", metadata={"options": ("constant", "cosine", "one-cycle"), "later": True}
    )  # of the learning rate; `learning_rate` is its highest value
    gradient_clipping: float = field(default=0.0, metadata={"low": 0.0, "later": True})  # largest norm; 0: no limit
    ema: float = field(default=0.0, metadata={"low": 0.0, "below": 1.0, "later": True})  # decay a batch; 0: no average
    loss: str = field(default="mse", metadata={"options": LOSSES, "form": FUNCTION, "later": True})  # models/losses.py
    loss_code: str = field(default="", metadata={"options": ("",), "form": DIGEST, "later": True})  # of a loss's source
    relative: float = field(default=0.0, metadata={"low": 0.0, "later": True})  # weight of relative errors in the loss
    # of the training images, whole groups, drawn by the seed; an epoch has as many steps as with all
    share: float = field(default=1.0, metadata={"above": 0.0, "high": 1.0, "later": True})
    start_from: str = field(default="", metadata={"later": True})  # a model whose weights it begins with; "": none
    threads: int = field(default=1, metadata={"low": 1, "high": 256, "later": True})  # set by the trainer process


DISTORTIONS = ("rotation", "crop", "brightness", "noise")
ADAM_BETAS = (0.9, 0.999)  # decay of the mean and of the square
ADAM_EPSILON = 1e-7  # as in the source study's framework; PyTorch's own default is 1e-8

ModelSpec = BaselineSpec | CnnSpec | TransferSpec | PeriodicSpec | ConvSpec | DescriptorsSpec | PythonSpec
PYTHON = "python"  # the family that takes keys beside its own: options
FAMILIES: dict[str, type[ModelSpec]] = {
    "baseline": BaselineSpec,
    "cnn": CnnSpec,
    "transfer": TransferSpec,
    "periodic": PeriodicSpec,
    "conv": ConvSpec,
    "descriptors": DescriptorsSpec,
    PYTHON: PythonSpec,
}


def from_dict(values: Mapping[str, Any]) -> ModelSpec:
    """Return the model specification that `{"family": "cnn", "filters": 8, ...}` stands for.

    Raise SpecError naming the key, its value, the values allowed and, of a misspelt key, the closest valid one.
    """
    name = values.get("family")
    if name is None:
        raise SpecError(f"model.family is missing; there are: {', '.join(FAMILIES)}.")
    family, where = _family(name, "model.family"), f"model ({name})"
    settings = {key: value for key, value in values.items() if key != "family"}
    if family is PythonSpec:
        own = {key: settings.pop(key) for key in [*settings] if key not in ("build", "code")}
        for key, value in own.items():
            if not isinstance(value, bool | int | str | float) or (type(value) is float and not math.isfinite(value)):
                raise SpecError(f"{where}: {key} = {value!r}: expected a number, text in quotes, true or false.")
        return replace(_parse(PythonSpec, settings, where), options=own)
    return _parse(family, settings, where)


def to_dict(spec: ModelSpec) -> dict[str, Any]:
    """Return the JSON form that `from_dict` reads, "family" first."""
    values = {f.name: getattr(spec, f.name) for f in fields(spec)}
    options = values.pop("options", {})
    return {"family": family_name(spec), **values, **options}


def family_name(spec: ModelSpec) -> str:
    """Return the name of the specification's family in FAMILIES."""
    return next(name for name, family in FAMILIES.items() if isinstance(spec, family))


def training_from_dict(values: Mapping[str, Any]) -> TrainingSpec:
    """Return the training specification; missing keys take the protocol's values. Raise SpecError as `from_dict`."""
    return _parse(TrainingSpec, values, "training")


def training_to_dict(spec: TrainingSpec) -> dict[str, Any]:
    """Return the JSON form that `training_from_dict` reads, without later settings at their defaults."""
    return {
        f.name: getattr(spec, f.name)
        for f in fields(spec)
        if not (f.metadata.get("later") and getattr(spec, f.name) == f.default)
    }


def model_keys(family: str) -> tuple[str, ...]:
    """Return the keys of a model family, without "family" itself. Raise SpecError if there is no such family."""
    return tuple(f.name for f in fields(_family(family, "family")) if f.name != "options")


def training_keys() -> tuple[str, ...]:
    """Return the keys of a training specification."""
    return tuple(f.name for f in fields(TrainingSpec))


def symmetric(spec: ModelSpec) -> bool:
    """Return whether the model's predictions are means over the symmetries of the image."""
    return isinstance(spec, StagesSpec) and spec.symmetric


def physical(spec: ModelSpec) -> TypeGuard[StagesSpec]:
    """Return whether the model's last layer computes with the elastic constants of two phases."""
    return isinstance(spec, StagesSpec) and spec.physics != "none"


def wraps(spec: ModelSpec) -> bool:
    """Return whether the model continues images periodically beyond their edges."""
    return isinstance(spec, StagesSpec) and spec.padding == "circular"


def distorts(training: TrainingSpec) -> list[str]:
    """Return the settings that change training images though their targets stay."""
    return [name for name in DISTORTIONS if getattr(training, name) != TrainingSpec.__dataclass_fields__[name].default]


def training_defaults(family: object) -> dict[str, Any]:
    """Return the training settings of a model family that differ from the protocol's: a fit is one epoch."""
    return {"epochs": 1} if family == "descriptors" else {}


def _family(name: object, key: str) -> type[ModelSpec]:
    if not isinstance(name, str) or name not in FAMILIES:
        raise SpecError(f"{key} is {name!r}{_near(name, FAMILIES)}; there are: {', '.join(FAMILIES)}.")
    return FAMILIES[name]


# --- from a table of values to a specification ---

Spec = TypeVar("Spec")
RULES: dict[str, Callable[[Any, Any], bool]] = {
    "low": operator.ge,
    "above": operator.gt,
    "high": operator.le,
    "below": operator.lt,
    "odd": lambda value, _: bool(value % 2),
}  # rule in a field's metadata -> whether a value keeps to it
BOUNDS = {"low": "at least", "above": "above", "high": "at most", "below": "below"}


def _parse(kind: type[Spec], values: Mapping[str, Any], where: str) -> Spec:
    rules: dict[str, Field[Any]] = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]  # a dataclass
    for key in values:
        if key not in rules:
            valid = f"valid keys: {', '.join(rules)}" if rules else "it takes none"
            raise SpecError(f"{where}: unknown key {key!r}{_near(key, rules)}; {valid}.")
    missing = [name for name, f in rules.items() if name not in values and f.default is f.default_factory is MISSING]
    if missing:
        what = " ".join(f"{name} is missing; expected {_expected(rules[name])}." for name in missing)
        raise SpecError(f"{where}: {what}")
    return kind(**{name: _value(rules[name], value, where) for name, value in values.items()})


def _value(rule: Field[Any], value: Any, where: str) -> Any:
    """Return the value in the field's type. Raise SpecError if it has another type or breaks one of the rules."""
    kind: Any = rule.type
    fits = isinstance(value, {int: Integral, float: Real, str: str, bool: bool}[kind])
    if fits and isinstance(value, bool) == (kind is bool):
        try:
            value = kind(value)
            finite = kind is not float or math.isfinite(value)
            limits = [RULES[name](value, bound) for name, bound in rule.metadata.items() if name in RULES]
            if finite and all(limits) and _is_option(rule, value):
                return value
        except OverflowError:  # a whole number of hundreds of digits, too large for a float
            pass
    near = _near(value, rule.metadata.get("options", ()))
    raise SpecError(f"{where}: {rule.name} = {value!r}{near}; expected {_expected(rule)}.")


def _is_option(rule: Field[Any], value: Any) -> bool:
    """Return whether the value is one of the field's options, or of its form, if it has any."""
    options, form = rule.metadata.get("options"), rule.metadata.get("form")
    return options is None or value in options or (form is not None and bool(re.fullmatch(form.pattern, value)))


def _expected(rule: Field[Any]) -> str:
    """Return what the field may hold, in words."""
    limits = rule.metadata
    if "options" in limits:
        form = [limits["form"].words] if "form" in limits else []
        options = ["one of " + ", ".join(map(repr, limits["options"]))] if any(limits["options"]) else []
        return ", or ".join([*options, *form])
    if rule.type in (bool, str):
        return "true or false" if rule.type is bool else "text in quotes"
    number = "a number" if rule.type is float else "an odd whole number" if "odd" in limits else "a whole number"
    bounds = [f"{words} {_plain(limits[name])}" for name, words in BOUNDS.items() if name in limits]
    return f"{number}, {' and '.join(bounds)}"


def _plain(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _near(word: object, words: Iterable[str]) -> str:
    close = get_close_matches(str(word), list(words), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
