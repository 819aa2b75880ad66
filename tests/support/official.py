"""Weight files of torchvision's layout, made on the spot: random numbers under the official kind of name."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from models import transfer, weights
from models.backbones import BACKBONES


def make(folder: Path, backbone: str, monkeypatch, *, change=None) -> Path:
    """Write a file as torchvision's are (top included, DenseNet with its old names) and let `weights` know its name.

    The official hash is a constant of the real files, so the table of names is patched to this one's.
    """
    torch.manual_seed(1)
    prefix = "" if backbone.startswith("resnet") else "features."
    tensors: dict[str, Tensor] = {}
    for name, tensor in transfer.backbone(backbone).state_dict().items():
        if backbone == "densenet121":
            name = name.replace("norm1.", "norm.1.").replace("norm2.", "norm.2.")
            name = name.replace("conv1.", "conv.1.").replace("conv2.", "conv.2.")
        if not name.endswith("num_batches_tracked"):
            tensors[name.replace("norm.", "classifier.0.") if name.startswith("norm.") else prefix + name] = tensor
    tensors[BACKBONES[backbone].top[0] + "weight"] = torch.zeros(2, 3)
    if change is not None:
        change(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "new.pth"
    # VGG16's file is of the old format, before zip files
    torch.save(tensors, path, _use_new_zipfile_serialization=backbone != "vgg16")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    named = path.rename(folder / f"{backbone}-{digest[:8]}.pth")
    monkeypatch.setitem(weights.FILES, backbone, named.name)
    return named


def microscopy(path: Path, backbone: str = "resnet18", *, change=None, seed=1) -> Path:
    """Write a file as NASA's pretrained-microscopy-models are: torchvision's state dict, of 54 classes."""
    from torchvision import models

    torch.manual_seed(seed)
    tensors = dict(models.get_model(backbone, num_classes=54).state_dict())
    if change is not None:
        change(tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path
