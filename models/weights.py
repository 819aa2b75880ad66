"""Pretrained weights: torchvision's files, under its names, in torch hub's folder; checked at every use.

Importing this module or looking up a file does not import torch.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from models.backbones import BACKBONES
from models.specs import SpecError

if TYPE_CHECKING:
    from torch import Tensor

FILES = {name: backbone.file for name, backbone in BACKBONES.items()}
MOST_LISTED = 8  # tensors that an error names
SOURCE = "https://download.pytorch.org/models/"


def folder() -> Path:
    """Return the folder of torchvision's files: `$TORCH_HOME/hub/checkpoints`, by default under ~/.cache/torch."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))).expanduser() / "hub" / "checkpoints"


def absent(name: str) -> bool:
    """Return whether there is no file of that name. One that is there may still be damaged."""
    return not (folder() / name).is_file()


def find(name: str) -> tuple[Path, str]:
    """Return the file of that name (a value of FILES) and its SHA-256. Raise SpecError if it is missing or damaged."""
    path = folder() / name
    if absent(name):
        raise SpecError(
            f"The pretrained weights {name} are not on this machine: expected {path}. `hpo weights` fetches them from "
            f"{SOURCE}{name}; without a connection, bring that file and run `hpo weights FILE` (or copy it to "
            f'{folder()}). Nothing is trained on random weights unless the study says weights = "none".'
        )
    return path, check(path)


def check(path: Path) -> str:
    """Return the file's SHA-256. Raise SpecError unless it begins with the digits in the file's name."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    expected = path.stem.rpartition("-")[2]
    if not sha256.startswith(expected):
        raise SpecError(
            f"{path}: expected a SHA-256 that begins with {expected}, as its name says, found {sha256[:16]}…: it is "
            f"cut short or changed. Delete it and get it again from {SOURCE}{path.name}."
        )
    return sha256


def backbone_of(path: Path) -> str:
    """Return the backbone whose weights a file of this name holds. Raise SpecError naming the valid names."""
    for backbone, name in FILES.items():
        if name == path.name:
            return backbone
    raise SpecError(
        f"{path}: expected a file named {', '.join(FILES.values())} (torchvision's names). A study names other weights "
        "by their path: model.weights."
    )


def fetch(backbone: str) -> Path:
    """Download the file as torchvision does, and check its hash. Raise SpecError, without leaving part of a file."""
    from torch import hub

    name, target = FILES[backbone], folder() / FILES[backbone]
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = target.stem.rpartition("-")[2]
    try:
        hub.download_url_to_file(SOURCE + name, str(target), hash_prefix=prefix, progress=False)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        raise SpecError(
            f"{SOURCE}{name} could not be fetched ({error}). Get it on a machine with a connection, bring it here and "
            f"run `hpo weights FILE`; or copy it to {target.parent}. Nothing is trained on random weights unless the "
            'study says weights = "none".'
        ) from None
    return target


def adopt(path: Path) -> Path:
    """Check hash and tensors of a file brought by hand, copy it to torchvision's folder, and return its path."""
    backbone = backbone_of(path)
    if not path.is_file():
        raise SpecError(f"{path}: no such file.")
    check(path)
    load(path, backbone)
    target = folder() / path.name
    if path.absolute() != target.absolute():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        try:
            shutil.copyfile(path, temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    return target


def load(path: Path, backbone: str) -> "dict[str, Tensor]":
    """Return the backbone's tensors in a file of torchvision's layout, by their names in models.transfer.TransferNet.

    Those of the top are left out. No code in the file is run. Raise SpecError if it holds no tensors by name, or others
    than the backbone's.
    """
    import torch

    from models import transfer

    top = BACKBONES[backbone].top
    tensors = {_name(name): tensor for name, tensor in _stored(path).items() if not name.startswith(top)}
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        expected = transfer.backbone(backbone).state_dict()
    wrong = []
    for name in expected | tensors:
        shapes = [tuple(group[name].shape) if name in group else "none" for group in (expected, tensors)]
        # Files of some age have no count of batches, and inference does not use it.
        if shapes[0] != shapes[1] and not (shapes[1] == "none" and name.endswith("num_batches_tracked")):
            wrong.append(f"{name}: expected {shapes[0]}, found {shapes[1]}")
    if wrong:
        more = f"; and {len(wrong) - MOST_LISTED} more" if len(wrong) > MOST_LISTED else ""
        raise SpecError(
            f"{path}: {backbone}'s {'; '.join(wrong[:MOST_LISTED])}{more}. Expected the "
            f"tensors of torchvision's {backbone}; those of its top ({top[0]}…) may be missing, or of any shape."
        )
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise SpecError(f"{path}: expected finite numbers, found others in {', '.join(broken[:MOST_LISTED])}.")
    return {f"backbone.{name}": tensor for name, tensor in tensors.items()}


def _stored(path: Path) -> "dict[str, Tensor]":
    """Return the tensors of a file by their names there. Raise SpecError if it holds none by name."""
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise SpecError(f"{path}: not a readable file of weights ({first}).") from None
    if isinstance(stored, Mapping) and isinstance(stored.get("state_dict"), Mapping):  # PyTorch's own training script
        stored = stored["state_dict"]
    if not isinstance(stored, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in stored.values()):
        raise SpecError(f"{path}: expected tensors by name, found {type(stored).__name__}.")
    return {name.removeprefix("module."): tensor for name, tensor in stored.items()}  # that of several GPUs


def _name(stored: str) -> str:
    """Return the name in our backbones of a tensor in torchvision's files; DenseNet's have `norm.1` for `norm1`."""
    renamed = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", stored)
    return renamed.removeprefix("features.").replace("classifier.0.", "norm.")
