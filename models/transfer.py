"""The protocol's transfer networks: a torchvision backbone without its top, global average pooling, a dense head."""

from collections import OrderedDict
from collections.abc import Callable
from colorsys import hsv_to_rgb
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import features
from models.backbones import BACKBONES
from models.cnn import draw_glorot
from models.scalars import Scalars, beside
from models.specs import HEAD_UNITS, TransferSpec

# IMAGENET1K_V1 of all backbones was trained on images of this mean and standard deviation (channels red, green,
# blue, grey values 0..1).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class TransferNet(nn.Module):
    """Maps (batch, channels, height, width) images in 0..1, and (batch, n_inputs) scalars, to (batch, n_targets).

    A grey image is replicated to three channels, and three channels are red, green, blue. Others, such as phases, get
    a fixed colour each: what is pretrained takes no other. The normalisation of the weights happens inside. With
    `trainable` "head" the backbone is frozen and its batch-norm stays in inference mode, so that the features of an
    image never change: `prepare` computes them once. With "last:N" the blocks before the last N are frozen in this way.
    The head's weights are drawn Glorot-uniform from torch's generator before the backbone's, which follow torchvision's
    own initialisation: heads of one seed are equal on pretrained and other backbones.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: TransferSpec, n_targets: int, n_inputs: int = 0) -> None:
        super().__init__()
        self.dense = nn.Linear(BACKBONES[spec.backbone].channels + n_inputs, HEAD_UNITS)
        self.head = nn.Linear(HEAD_UNITS, n_targets)
        draw_glorot(self)
        self.scalars = Scalars(n_inputs) if n_inputs else None
        self.backbone = backbone(spec.backbone)
        names = [name for name, _ in self.backbone.named_children()]
        self.fixed = names.index(spec.trained[0].first) if spec.trained else len(names)  # children that are frozen
        self.frozen = self.fixed == len(names)
        for child in self._fixed_children():
            child.requires_grad_(False)
        for name, numbers in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(numbers).view(1, 3, 1, 1))

    def train(self, mode: bool = True) -> "TransferNet":
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        for child in self._fixed_children():
            child.eval()
        return self

    def _fixed_children(self) -> list[nn.Module]:
        return list(self.backbone.children())[: self.fixed]

    def prepare(self, images: Tensor, cache: Path | None, alive: Callable[[], object]) -> Tensor:
        """Return what is trained on: the images, or features (n, channels) of a frozen backbone, stored in `cache`.

        `alive` is called after every batch of features.
        """
        return features.compute(self, images, cache, alive) if self.frozen else images

    def extract(self, images: Tensor) -> Tensor:
        """Return the backbone's features of a batch of images, averaged over the image: (batch, channels)."""
        if (channels := images.shape[1]) not in (1, 3):
            images = torch.einsum("bchw,cr->brhw", images, torch.tensor(colours(channels)).to(images))
        activations: Tensor = self.backbone((images - self.mean) / self.std)  # broadcasting replicates a grey channel
        return activations.mean((2, 3))

    def forward(self, images: Tensor, inputs: Tensor | None = None) -> Tensor:
        hidden = self.extract(images) if images.ndim == 4 else images
        targets: Tensor = self.head(F.relu(self.dense(beside(hidden, self.scalars, inputs))))
        return targets


def colours(channels: int) -> list[tuple[float, float, float]]:
    """Return red, green, blue in 0..1 for each channel: hues in equal steps, none of them twice."""
    return [hsv_to_rgb(index / channels, 1.0, 1.0) for index in range(channels)]


def backbone(name: str) -> nn.Module:
    """Return the convolutional part of a torchvision network, initialised as torchvision does, from torch's generator.

    Its tensors have the names of torchvision's network without a leading "features."; ConvNeXt's "norm" is the
    "classifier.0" there.
    """
    from torchvision import models  # takes 1 s, and only these networks need it

    if name == "vgg16":  # not built as a whole: its classifier alone takes 0.5 GB
        layers: nn.Sequential = models.vgg.make_layers(models.vgg.cfgs["D"])
        for module in layers.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.get_parameter("bias"))
        return layers
    whole = models.get_model(name)
    if name.startswith("resnet"):
        del whole.avgpool, whole.fc
        return nn.Sequential(OrderedDict(whole.named_children()))
    layers = whole.features
    if name == "densenet121":
        layers.append(nn.ReLU())  # torchvision applies the last ReLU outside `features`
    elif name == "convnext_tiny":  # torchvision normalises the means, at the begin of its top
        layers.add_module("pool", nn.AdaptiveAvgPool2d(1))
        layers.add_module("norm", whole.classifier[0])
    return layers
