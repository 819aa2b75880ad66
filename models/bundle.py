"""A trained model as two plain files: weights.safetensors and spec.json. Never a pickle."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from models import hill
from models.physics import Physics
from models.regressor import Regressor
from models.specs import (
    INDEPENDENT,
    ModelSpec,
    PeriodicSpec,
    SpecError,
    build,
    check_image,
    from_dict,
    physical,
    symmetric,
    to_dict,
)

WEIGHTS, SPEC = "weights.safetensors", "spec.json"
FORMAT = 1
LARGEST_SPEC = 2**20  # bytes of spec.json, which has a few thousand
LARGEST_HEADER = 2**20  # bytes of JSON before the weights, which has a thousand; 80 MB of it take 2 GB and 20 s to read
LARGEST_SIZE = 2**16  # channels, or pixels a side
INPUT_CONVENTION = "float32, (batch, channel, height, width), grey value / 255"


def save(
    folder: Path,
    regressor: Regressor,
    *,
    model: dict[str, Any],
    image_shape: Sequence[int],
    target_names: Sequence[str],
    unit: str,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write the two files into `folder` (made if need be); `extra` is added to spec.json at its top level.

    `model` is the specification's dict form, `image_shape` (channels, height, width), `unit` that of all targets.
    Raises SpecError if `extra` has a key that is taken.
    """
    spec: dict[str, Any] = {
        "format": FORMAT,
        "model": model,
        "image_shape": [int(n) for n in image_shape],
        "input": INPUT_CONVENTION,
        "target_names": list(target_names),
        "unit": unit,
    }
    if taken := sorted((spec.keys() | {"symmetries", "phases"}) & (extra or {}).keys()):
        raise SpecError(f"extra: the keys {', '.join(taken)} of spec.json are taken.")
    if regressor.symmetries is not None:
        spec["symmetries"] = {name: list(order) for name, order in regressor.symmetries.items()}
    if regressor.physics is not None:
        spec["phases"] = regressor.physics.phases
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in regressor.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    text = json.dumps(spec | (extra or {}), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / SPEC).write_text(text + "\n", encoding="utf-8")


def load(folder: Path) -> tuple[Regressor, dict[str, Any]]:
    """The regressor, on the CPU in eval mode, and all of spec.json. Raises SpecError naming the file and its fault."""
    try:
        spec = _read_spec(folder / SPEC)
        regressor = _outline(spec, folder / SPEC)
    except RecursionError:  # in reading a value, or in showing it
        raise SpecError(f"{folder / SPEC}: nested too deeply for a {SPEC}: download it again.") from None
    path = folder / WEIGHTS
    weights = _read_weights(path)
    expected = {name: (tuple(t.shape), t.dtype) for name, t in regressor.state_dict().items()}
    found = {name: (tuple(t.shape), t.dtype) for name, t in weights.items()}
    if expected != found:
        odd = sorted({name for name, _ in expected.items() ^ found.items()})
        first = f"{odd[0]} expected {expected.get(odd[0], 'none')}, found {found.get(odd[0], 'none')}"
        raise SpecError(f"{path}: its {len(odd)} tensors do not fit {SPEC} ({first}): download both again.")
    regressor.to_empty(device="cpu").load_state_dict(weights)
    return regressor.eval(), spec


def check_shape(spec: dict[str, Any], image_shape: Sequence[int], where: str = "the image") -> None:
    """Raise SpecError unless the model of `spec` predicts images of (channels, height, width): those it was trained on;
    of a periodic network with pixels of the same size other cells, too, square ones if those were and it is symmetric.
    """
    if list(image_shape) == spec["image_shape"]:
        return
    model, (channels, height, width) = from_dict(spec["model"]), image_shape
    other = isinstance(model, PeriodicSpec) and channels == spec["image_shape"][0]
    if other and symmetric(model) and spec["image_shape"][1] == spec["image_shape"][2]:
        other = height == width
    if other:
        try:
            check_image(model, image_shape)
        except SpecError as error:
            raise SpecError(f"{where}: {error}") from None
    else:
        raise SpecError(
            f"{where}: expected (channels, height, width) = {tuple(spec['image_shape'])}, as the model was trained, "
            f"found {tuple(image_shape)}: resize it, or train on images of its size."
        )


def _outline(spec: dict[str, Any], path: Path) -> Regressor:
    """The regressor without memory for its numbers: whatever a specification asks for, the weights must bring it."""
    count, shape = len(spec["target_names"]), tuple(spec["image_shape"])
    try:
        model = from_dict(spec["model"])
        symmetries = _symmetries(spec) if symmetric(model) else None
        physics = _physics(spec, model) if physical(model) else None
        outputs = count if physics is None else INDEPENDENT
        with torch.device("meta"):
            network = build(model, shape, count)
            mean, scale = torch.zeros(outputs), torch.ones(outputs)
            return Regressor(network, mean, scale, symmetries=symmetries, image_shape=shape, physics=physics)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None


def _symmetries(spec: dict[str, Any]) -> dict[str, list[Any]]:
    """Where the targets go under each symmetry, which the regressor checks further."""
    found = spec.get("symmetries")
    if not isinstance(found, dict) or not all(isinstance(order, list) for order in found.values()):
        raise SpecError(f'"symmetries": expected an object of lists, as the model needs it, found {found!r:.80}.')
    return found


def _physics(spec: dict[str, Any], model: ModelSpec) -> Physics:
    """The last layer, from the phases' constants."""
    phases = spec.get("phases")
    constants = {"lame_lambda", "lame_mu"}
    if not (
        isinstance(phases, dict)
        and phases.keys() == {"matrix", "inclusion"}
        and all(isinstance(each, dict) and each.keys() == constants for each in phases.values())
        and all(
            type(value) is float and abs(value) <= hill.LARGEST  # NaN is not
            for each in phases.values()
            for value in each.values()
        )
        and all(each["lame_mu"] > 0 and 3 * each["lame_lambda"] + 2 * each["lame_mu"] > 0 for each in phases.values())
    ):
        raise SpecError(
            '"phases": expected an object with matrix and inclusion, each with lame_lambda and lame_mu of a stable '
            f"material, as the model needs it, found {phases!r:.80}."
        )
    return Physics(to_dict(model)["physics"], phases, spec["target_names"], spec["image_shape"][0])


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise SpecError(f"{path}: no such file; a model's folder holds {WEIGHTS} and {SPEC}: download it again.")
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > LARGEST_HEADER:
            raise ValueError(f"expected a header of at most {LARGEST_HEADER} bytes, found {header}")
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise SpecError(f"{path}: not a readable safetensors file ({error}): download it again.") from None


def _read_spec(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SpecError(f"{path}: no such file; a model's folder holds {WEIGHTS} and {SPEC}: download it again.")
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_SPEC + 1)
        if len(text) > LARGEST_SPEC:
            raise ValueError(f"it has more than {LARGEST_SPEC} bytes")
        spec = json.loads(text.decode())
    except (ValueError, OSError) as error:
        raise SpecError(f"{path}: not readable as JSON ({error}): download it again.") from None
    if not isinstance(spec, dict) or spec.get("format") != FORMAT:
        found = spec.get("format") if isinstance(spec, dict) else type(spec).__name__
        raise SpecError(f'{path}: expected "format": {FORMAT}, found {found!r:.80}: written by another version?')
    shape, names = spec.get("image_shape"), spec.get("target_names")
    if not (
        isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and 0 < n <= LARGEST_SIZE for n in shape)
    ):
        raise SpecError(
            f'{path}: "image_shape": expected three whole numbers from 1 to {LARGEST_SIZE}, found {shape!r:.80}.'
        )
    if not (isinstance(names, list) and names and all(map(_is_text, names)) and len(set(names)) == len(names)):
        raise SpecError(f'{path}: "target_names": expected a list of names, each once, found {names!r:.80}.')
    if not _is_text(spec.get("unit")):
        raise SpecError(f'{path}: "unit": expected a text such as "GPa", found {spec.get("unit")!r:.80}.')
    if not isinstance(spec.get("model"), dict):
        raise SpecError(f'{path}: "model": expected an object with "family", found {spec.get("model")!r:.80}.')
    return spec


def _is_text(value: Any) -> bool:
    """Whether it can head a column of a table."""
    return isinstance(value, str) and value != "" and value.isprintable()
