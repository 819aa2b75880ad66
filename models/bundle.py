"""A trained model as two plain files: weights.safetensors and spec.json. Never a pickle."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from models import hill, user
from models.levels import DEFAULT, Levels
from models.networks import build
from models.physics import Phases, Physics
from models.regressor import Regressor
from models.scalars import Ranges
from models.sizes import check_image
from models.specs import INDEPENDENT, ModelSpec, PythonSpec, SpecError, from_dict, physical, symmetric, wraps

WEIGHTS, SPEC = "weights.safetensors", "spec.json"
SOURCE = "source"  # folder of the code that makes the network, if it is the user's
FORMAT = 1
LARGEST_SPEC = 2**20  # bytes of spec.json; usual are a few thousand
LARGEST_HEADER = 2**20  # bytes of JSON before the weights; usual is a thousand, and 80 MB take 2 GB and 20 s to read
LARGEST_SIZE = 2**16  # channels, or pixels a side
INPUT_CONVENTION = "float32, (batch, channel, height, width), {}"  # and how the pixels of a file become numbers
MOST_INPUTS = 100
LARGEST_INPUT = 1e30  # single precision ends at 1e38
RESERVED = (  # keys of spec.json
    *("format", "model", "image_shape", "input", "levels", "contrast", "inputs"),
    *("target_names", "unit", "symmetries", "phases"),
)


@dataclass(frozen=True, kw_only=True)
class Description:
    """The content of spec.json: how the network is built, for which images, and what it predicts."""

    model: ModelSpec
    image_shape: tuple[int, int, int]  # channels, height, width
    target_names: tuple[str, ...]
    unit: str  # of all targets
    symmetries: Mapping[str, list[int]] | None  # of a symmetric model
    phases: Phases | None  # of a model with physics
    levels: Levels  # grey values
    contrast: float = 0.0  # the smallest within an image of training
    input_names: tuple[str, ...] = ()  # of the numbers beside the image
    ranges: Ranges = ()  # of these in training
    extra: Mapping[str, Any]  # every other key


def save(
    folder: Path,
    regressor: Regressor,
    *,
    model: Mapping[str, Any],
    image_shape: Sequence[int],
    target_names: Sequence[str],
    unit: str,
    pixels: str = "grey value / 255",
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write the two files into `folder`, which is created if missing; `extra` is added to spec.json at its top level.

    `model` is the specification's JSON form, `image_shape` (channels, height, width), `unit` that of all targets;
    `pixels` says how the pixels of a file become numbers in 0..1.
    Raise SpecError if `extra` has a reserved key.
    """
    extra = dict(extra or {})
    if taken := sorted(extra.keys() & set(RESERVED)):
        raise SpecError(f"extra: the keys {', '.join(taken)} of spec.json are taken.")
    spec: dict[str, Any] = {
        "format": FORMAT,
        "model": dict(model),
        "image_shape": [int(n) for n in image_shape],
        "input": INPUT_CONVENTION.format(pixels),
        "levels": list(regressor.levels or DEFAULT),
        "contrast": regressor.contrast,
        "target_names": list(target_names),
        "unit": unit,
    }
    if regressor.input_names:
        spec["inputs"] = dict(zip(regressor.input_names, map(list, regressor.ranges or ()), strict=True))
    if regressor.symmetries is not None:
        spec["symmetries"] = {name: list(order) for name, order in regressor.symmetries.items()}
    if regressor.physics is not None:
        spec["phases"] = regressor.physics.phases
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in regressor.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    if (code := model.get("code")) is not None:
        user.write(user.source_of(code), folder / SOURCE)
    text = json.dumps(spec | extra, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / SPEC).write_text(text + "\n", encoding="utf-8")


def load(folder: Path) -> tuple[Regressor, Description]:
    """Return the regressor, on the CPU in eval mode, and its description.

    Raise SpecError naming the file at fault, NotTrusted if the user's code that makes the network is not trusted here.
    """
    with _naming(folder / SPEC):
        try:
            description = _description(folder / SPEC)
            if isinstance(model := description.model, PythonSpec):
                user.keep(user.read(folder / SOURCE, model.code))
                if not user.is_trusted(model.code):
                    raise user.NotTrusted(model.code, folder / SOURCE)
            regressor = _outline(description)
        except user.NotTrusted:
            raise
        except RecursionError:  # in parsing a value, or in printing it
            raise SpecError(f"nested too deeply for a {SPEC}: download it again.") from None
        except Exception as error:
            if fault := user.fault(error):
                raise SpecError(fault) from None
            raise
    with _naming(folder / WEIGHTS):
        weights = _weights(folder / WEIGHTS)
        expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in regressor.state_dict().items()}
        stored = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
        if expected != stored:
            different = sorted({name for name, _ in expected.items() ^ stored.items()})
            first = different[0]
            difference = f"{first} expected {expected.get(first, 'none')}, found {stored.get(first, 'none')}"
            raise SpecError(f"its {len(different)} tensors do not fit {SPEC} ({difference}): download both again.")
    if not isinstance(description.model, PythonSpec):
        regressor.to_empty(device="cpu")
    regressor.load_state_dict(weights)
    return regressor.eval(), description


def misfits(
    regressor: Regressor, spec: ModelSpec, image_shape: tuple[int, int, int], n_targets: int, n_inputs: int
) -> list[str]:
    """Return which tensors of the network do not fit one of this specification, with what was expected and found."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        outline = build(spec, image_shape, n_targets, n_inputs)
    expected, present = (
        {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()} for net in (outline, regressor.network)
    )
    return [
        f"{name}: expected {expected.get(name, 'none')}, found {present.get(name, 'none')}"
        for name in expected | present
        if expected.get(name) != present.get(name)
    ]


@contextmanager
def _naming(what: object) -> Iterator[None]:
    """Put the name of a file before the message of any SpecError."""
    try:
        yield
    except user.NotTrusted:
        raise
    except SpecError as error:
        raise SpecError(f"{what}: {error}") from None


def check_shape(description: Description, image_shape: Sequence[int], where: str = "the image") -> None:
    """Raise SpecError unless the model predicts images of (channels, height, width).

    Every model predicts images of the shape it was trained on. A network that continues images periodically also
    predicts other cells with pixels of the same size; only square ones if it is symmetric and was trained on squares.
    """
    model, expected, (channels, height, width) = description.model, description.image_shape, image_shape
    if (channels, height, width) == expected:
        return
    if (
        wraps(model)
        and channels == expected[0]
        and (height == width or not symmetric(model) or expected[1] != expected[2])
    ):
        with _naming(where):
            return check_image(model, image_shape)
    raise SpecError(
        f"{where}: expected (channels, height, width) = {expected}, as the model was trained, "
        f"found {tuple(image_shape)}: resize it, or train on images of its size."
    )


def _outline(description: Description) -> Regressor:
    """Return the regressor without memory for its numbers: a false specification cannot ask for any amount of it.

    A network of the user's has memory, for it may hold more than its weights.
    """
    model, shape, names = description.model, description.image_shape, description.target_names
    physics = None
    if physical(model):
        physics = Physics(model.physics, description.phases, names, shape[0])
    outputs = len(names) if physics is None else INDEPENDENT
    with torch.device("cpu" if isinstance(model, PythonSpec) else "meta"), torch.random.fork_rng(devices=[]):
        network = build(model, shape, len(names), len(description.input_names))
        mean, scale = torch.zeros(outputs), torch.ones(outputs)
        return Regressor(
            network,
            mean,
            scale,
            symmetries=description.symmetries,
            image_shape=shape,
            physics=physics,
            levels=description.levels,
            contrast=description.contrast,
            input_names=description.input_names,
            ranges=description.ranges,
        )


# --- reading the two files ---


def _weights(path: Path) -> dict[str, torch.Tensor]:
    _check_there(path)
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > LARGEST_HEADER:
            raise ValueError(f"expected a header of at most {LARGEST_HEADER} bytes, found {header}")
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise SpecError(f"not a readable safetensors file ({error}): download it again.") from None


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise SpecError(f"no such file; a model's folder holds {WEIGHTS} and {SPEC}: download it again.")


def _json(path: Path) -> Any:
    _check_there(path)
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_SPEC + 1)
        if len(text) > LARGEST_SPEC:
            raise ValueError(f"it has more than {LARGEST_SPEC} bytes")
        return json.loads(text.decode())
    except (ValueError, OSError) as error:
        raise SpecError(f"not readable as JSON ({error}): download it again.") from None


def _description(path: Path) -> Description:
    spec = _json(path)
    if not isinstance(spec, dict) or spec.get("format") != FORMAT:
        version = spec.get("format") if isinstance(spec, dict) else type(spec).__name__
        raise SpecError(f'expected "format": {FORMAT}, found {version!r:.80}: written by another version?')
    shape, names = spec.get("image_shape"), spec.get("target_names")
    if not (
        isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and 0 < n <= LARGEST_SIZE for n in shape)
    ):
        raise SpecError(f'"image_shape": expected three whole numbers from 1 to {LARGEST_SIZE}, found {shape!r:.80}.')
    if not (isinstance(names, list) and names and all(map(_is_text, names)) and len(set(names)) == len(names)):
        raise SpecError(f'"target_names": expected a list of names, each once, found {names!r:.80}.')
    if not _is_text(spec.get("unit")):
        raise SpecError(f'"unit": expected a text such as "GPa", found {spec.get("unit")!r:.80}.')
    if not isinstance(spec.get("model"), dict):
        raise SpecError(f'"model": expected an object with "family", found {spec.get("model")!r:.80}.')
    model, inputs = from_dict(spec["model"]), _inputs(spec.get("inputs", {}))
    channels, height, width = shape
    return Description(
        model=model,
        image_shape=(channels, height, width),
        target_names=tuple(names),
        unit=spec["unit"],
        symmetries=_symmetries(spec.get("symmetries")) if symmetric(model) else None,
        phases=_phases(spec.get("phases")) if physical(model) else None,
        levels=_levels(spec.get("levels", list(DEFAULT))),
        contrast=_contrast(spec.get("contrast", 0.0)),
        input_names=tuple(inputs),
        ranges=tuple(inputs.values()),
        extra={key: value for key, value in spec.items() if key not in RESERVED},
    )


def _is_text(value: object) -> bool:
    """Return whether the value can head a column of a table."""
    return isinstance(value, str) and value != "" and value.isprintable()


def _levels(value: Any) -> Levels:
    """Return the lowest and the highest grey value that training saw."""
    if (
        isinstance(value, list)
        and [type(level) for level in value] == [float, float]
        and 0 <= value[0] <= value[1] <= 1
    ):
        return value[0], value[1]
    raise SpecError(f'"levels": expected two numbers, 0.0 to 1.0, the lower one first, found {value!r:.80}.')


def _contrast(value: Any) -> float:
    """Return the smallest contrast that training saw in an image; 0.0 if an earlier version did not write it."""
    if isinstance(value, float) and 0 <= value <= 1:
        return value
    raise SpecError(f'"contrast": expected a number, 0.0 to 1.0, found {value!r:.80}.')


def _inputs(value: Any) -> dict[str, tuple[float, float]]:
    """Return lowest and highest value that training saw of each input, by its name."""
    if isinstance(value, dict) and len(value) <= MOST_INPUTS and all(map(_is_text, value)):
        pairs = [pair for pair in value.values() if isinstance(pair, list) and [type(n) for n in pair] == [float] * 2]
        if len(pairs) == len(value) and all(-LARGEST_INPUT <= low <= high <= LARGEST_INPUT for low, high in pairs):
            return {name: (low, high) for name, (low, high) in value.items()}
    raise SpecError(f'"inputs": expected an object of names with lowest and highest number, found {value!r:.80}.')


def _symmetries(value: Any) -> dict[str, list[int]]:
    """Return the permutation of the targets under each symmetry, which the regressor checks further."""
    if not isinstance(value, dict) or not all(isinstance(order, list) for order in value.values()):
        raise SpecError(f'"symmetries": expected an object of lists, as the model needs it, found {value!r:.80}.')
    return value


def _phases(value: Any) -> Phases:
    """Return the elastic constants of the two phases."""
    if isinstance(value, dict) and value.keys() == {"matrix", "inclusion"} and all(map(_is_stable, value.values())):
        return value
    raise SpecError(
        '"phases": expected an object with matrix and inclusion, each with lame_lambda and lame_mu of a stable '
        f"material, as the model needs it, found {value!r:.80}."
    )


def _is_stable(phase: Any) -> bool:
    if not isinstance(phase, dict) or phase.keys() != {"lame_lambda", "lame_mu"}:
        return False
    if not all(type(number) is float and abs(number) <= hill.LARGEST for number in phase.values()):  # false for NaN
        return False
    return bool(phase["lame_mu"] > 0 and 3 * phase["lame_lambda"] + 2 * phase["lame_mu"] > 0)
