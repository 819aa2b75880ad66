"""A package of a user's, called like one of hpo's own, with networks that keep the contract or break it."""

from pathlib import Path

from models import user
from models.specs import PythonSpec

FILES = {
    "models/__init__.py": "",
    "models/blocks.py": """
import torch
from torch import nn


class Block(nn.Sequential):
    def __init__(self, channels, width):
        super().__init__(nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU())
""",
    "models/net.py": """
import models.blocks
from models.blocks import Block
from torch import nn

from . import blocks as same


class Net(nn.Module):
    def __init__(self, channels, width, targets, scalars):
        super().__init__()
        assert Block is same.Block is models.blocks.Block
        self.first = Block(channels, width)
        self.dropout = nn.Dropout(0.1)
        self.last = nn.Linear(width + scalars, targets)

    def forward(self, images, scalars=None):
        hidden = self.dropout(self.first(images).mean((2, 3)))
        if scalars is not None:
            hidden = same.torch.cat([hidden, scalars], dim=1)
        return self.last(hidden)


def build(options, image_shape, n_targets, n_scalars):
    return Net(image_shape[0], options["width"], n_targets, n_scalars)


def cubes(outputs, targets):
    return (outputs - targets).abs() ** 3
""",
}

STUDY = """
[data]
path = "{data}"
[model]
family = "python"
build = "models.net:build"
[training]
epochs = {epochs}
batch_size = 16
{training}
[space]
width = [2, 4]
"""


def write(folder: Path, *, data: Path | str = "default", name: str, epochs: int = 2, training: str = "") -> Path:
    """Write the package and a study that uses it; return the study's file."""
    for path, text in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    (folder / f"{name}.toml").write_text(STUDY.format(data=data, epochs=epochs, training=training))
    return folder / f"{name}.toml"


def spec(files: dict[str, str] = FILES, build: str = "models.net:build", **options: object) -> PythonSpec:
    """Keep the source of a package; return the specification of a network of it."""
    digest = user.keep({path: text.encode() for path, text in files.items()})
    return PythonSpec(build=build, code=digest, options=options)
