"""From a specification to the network it describes."""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.cnn import ConvNet
from models.descriptor_net import DescriptorNet
from models.sizes import check_image
from models.specs import (
    BY_DATA,
    BY_DATA_KEYS,
    INDEPENDENT,
    DescriptorsSpec,
    ModelSpec,
    PythonSpec,
    SpecError,
    StagesSpec,
    TransferSpec,
    layout,
    physical,
)
from models.stages import StageNet
from models.transfer import TransferNet
from models.user_net import UserNet

Network = ConvNet | TransferNet | StageNet | DescriptorNet | UserNet


def build(spec: ModelSpec, image_shape: tuple[int, int, int], n_targets: int, n_inputs: int = 0) -> Network:
    """Return a network from (batch, *image_shape) images in 0..1, and (batch, n_inputs) scalars if it takes any, to
    (batch, n_targets), weights from torch's generator.

    A backbone's weights are random as well: `models.weights.load` reads pretrained ones. A network with physics has
    INDEPENDENT outputs instead, from which the regressor computes the targets. Raise SpecError if the image is too
    small for the poolings, or code of the user's is not trusted or does not make a network.
    """
    check_image(spec, image_shape)
    for key in BY_DATA_KEYS:
        if getattr(spec, key, None) == BY_DATA:
            raise SpecError(f"model.{key} = '{BY_DATA}' stands for what the data say: expected that in its place.")
    if isinstance(spec, TransferSpec):
        return TransferNet(spec, n_targets, n_inputs)
    if isinstance(spec, DescriptorsSpec):
        return DescriptorNet(spec, image_shape, n_targets, n_inputs)
    if isinstance(spec, StagesSpec):
        return StageNet(spec, image_shape, INDEPENDENT if physical(spec) else n_targets, n_inputs)
    if isinstance(spec, PythonSpec):
        return UserNet(spec, image_shape, n_targets, n_inputs)
    return ConvNet(layout(spec), image_shape, n_targets, n_inputs)


def parameter_count(module: nn.Module, *, trainable: bool = False) -> int:
    """Return how many numbers the module's parameters hold; with `trainable` only those that training changes."""
    return sum(weights.numel() for weights in module.parameters() if weights.requires_grad or not trainable)


def multiply_adds(network: nn.Module, image_shape: Sequence[int], n_inputs: int = 0) -> int:
    """Return how many multiply-adds convolutions and matrix products of the network have, of one image, forward.

    Counted in a pass of a copy: neither the network nor torch's generators change.
    """
    counted, counter = copy.deepcopy(network).eval(), FlopCounterMode(display=False)
    device = next(counted.parameters()).device
    images = torch.full((1, *image_shape), 0.5, device=device)
    inputs = [torch.zeros(1, n_inputs, device=device)] if n_inputs else []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad(), counter:
        counted(images, *inputs)
    return counter.get_total_flops() // 2  # an operation each for the product and the sum
