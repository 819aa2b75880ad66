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

from models.specs import SpecError

if TYPE_CHECKING:
    from torch import Tensor

# IMAGENET1K_V1 of torchvision; the eight hexadecimal digits begin the file's SHA-256.
FILES = {
    "vgg16": "vgg16-397923af.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "densenet121": "densenet121-a639ec97.pth",
}
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
    raise SpecError(f"{path}: expected a file named {', '.join(FILES.values())} (torchvision's names).")


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
    """Return the backbone's tensors in one of torchvision's files, by their names in models.transfer.TransferNet.

    No code in the file is run. Raise SpecError if it holds no tensors by name, or one is missing or of another shape.
    """
    import pickle

    import torch

    from models import transfer

    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise SpecError(f"{path}: not a readable file of weights ({first}).") from None
    if not isinstance(stored, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in stored.values()):
        raise SpecError(f"{path}: expected tensors by name, found {type(stored).__name__}.")
    tensors = {_name(name): tensor for name, tensor in stored.items()}
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        expected = transfer.backbone(backbone).state_dict()
    weights = {}
    for name, like in expected.items():
        tensor = tensors.get(name)
        if tensor is None and name.endswith("num_batches_tracked"):
            continue  # files of that age have none, and inference does not use it
        if tensor is None or tensor.shape != like.shape:
            shape = "none" if tensor is None else tuple(tensor.shape)
            raise SpecError(f"{path}: {backbone}'s {name}: expected {tuple(like.shape)}, found {shape}.")
        weights[f"backbone.{name}"] = tensor
    return weights


def _name(stored: str) -> str:
    """Return the name in our backbones of a tensor in torchvision's files; DenseNet's have `norm.1` for `norm1`."""
    renamed = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", stored)
    return renamed.removeprefix("features.")
