"""A trained model as two plain files: weights.safetensors and spec.json. Never a pickle."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from models.regressor import Regressor
from models.specs import SpecError, build, from_dict

WEIGHTS, SPEC = "weights.safetensors", "spec.json"
FORMAT = 1
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
    if taken := sorted(spec.keys() & (extra or {}).keys()):
        raise SpecError(f"extra: the keys {', '.join(taken)} of spec.json are taken.")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in regressor.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    text = json.dumps(spec | (extra or {}), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / SPEC).write_text(text + "\n", encoding="utf-8")


def load(folder: Path) -> tuple[Regressor, dict[str, Any]]:
    """The regressor, on the CPU in eval mode, and all of spec.json. Raises SpecError naming the file and its fault."""
    spec = _read_spec(folder / SPEC)
    shape, names = tuple(spec["image_shape"]), spec["target_names"]
    try:
        with torch.random.fork_rng(devices=[]):
            network = build(from_dict(spec["model"]), shape, len(names))
    except SpecError as error:
        raise SpecError(f"{folder / SPEC}: {error}") from None
    regressor = Regressor(network, torch.zeros(len(names)), torch.ones(len(names)))
    path = folder / WEIGHTS
    if not path.is_file():
        raise SpecError(f"{path}: no such file; a model's folder holds {WEIGHTS} and {SPEC}: download it again.")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise SpecError(f"{path}: not a readable safetensors file ({error}): download it again.") from None
    expected = {name: (tuple(t.shape), t.dtype) for name, t in regressor.state_dict().items()}
    found = {name: (tuple(t.shape), t.dtype) for name, t in weights.items()}
    if expected != found:
        odd = sorted({name for name, _ in expected.items() ^ found.items()})
        first = f"{odd[0]} expected {expected.get(odd[0], 'none')}, found {found.get(odd[0], 'none')}"
        raise SpecError(f"{path}: its {len(odd)} tensors do not fit {SPEC} ({first}): download both again.")
    regressor.load_state_dict(weights)
    return regressor.eval(), spec


def check_shape(spec: dict[str, Any], image_shape: Sequence[int], where: str = "the image") -> None:
    """Raise SpecError unless (channels, height, width) are those the model of `spec` was trained on."""
    if list(image_shape) != spec["image_shape"]:
        raise SpecError(
            f"{where}: expected (channels, height, width) = {tuple(spec['image_shape'])}, as the model was trained, "
            f"found {tuple(image_shape)}: resize it, or train on images of its size."
        )


def _read_spec(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SpecError(f"{path}: no such file; a model's folder holds {WEIGHTS} and {SPEC}: download it again.")
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise SpecError(f"{path}: not readable as JSON ({error}): download it again.") from None
    if not isinstance(spec, dict) or spec.get("format") != FORMAT:
        found = spec.get("format") if isinstance(spec, dict) else type(spec).__name__
        raise SpecError(f'{path}: expected "format": {FORMAT}, found {found!r}: written by another version?')
    shape, names = spec.get("image_shape"), spec.get("target_names")
    if not (isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)):
        raise SpecError(f'{path}: "image_shape": expected three whole numbers above 0, found {shape!r}.')
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise SpecError(f'{path}: "target_names": expected a list of names, found {names!r}.')
    if not isinstance(spec.get("model"), dict):
        raise SpecError(f'{path}: "model": expected an object with "family", found {spec.get("model")!r}.')
    return spec
