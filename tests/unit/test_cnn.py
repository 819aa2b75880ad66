"""The networks against an independent statement of the protocol's layers."""

import math

import pytest
import torch
from torch.nn import functional as F

from models.networks import build
from models.specs import BaselineSpec, CnnSpec
from models.windows import Windows

SEED = 7


def protocol_forward(network, images, *, padding):
    """Convolution, ReLU, maximum, in the source's order, on contiguous tensors, in double precision."""
    w = {name: p.detach().contiguous().double() for name, p in network.named_parameters()}
    hidden = images.double()
    for layer in ("first", "second"):
        hidden = F.max_pool2d(F.relu(F.conv2d(hidden, w[f"{layer}.weight"], w[f"{layer}.bias"], padding=padding)), 2)
    hidden = hidden.permute(0, 2, 3, 1).reshape(len(images), -1)
    hidden = F.relu(F.linear(hidden, w["dense.weight"], w["dense.bias"]))
    return F.linear(hidden, w["head.weight"], w["head.bias"])


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("spec", "padding"),
    [
        (BaselineSpec(), 0),
        (CnnSpec(filters=8, kernel_size=3, dropout=0.2), 1),
        (CnnSpec(filters=4, kernel_size=5, dropout=0.0), 2),
    ],
)
def test_the_network_computes_the_layers_of_the_protocol_in_both_memory_formats(spec, padding, channels_last):
    torch.manual_seed(SEED)
    network = build(spec, (1, 20, 24), 9).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases, too, must count
    images = torch.rand(5, 1, 20, 24)
    expected = protocol_forward(network, images, padding=padding)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    found = network(images)
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()), f"seed {SEED}"


def test_weights_are_glorot_uniform_and_biases_zero():
    torch.manual_seed(SEED)
    network = build(CnnSpec(filters=32, kernel_size=5, dropout=0.0), (1, 32, 32), 9)
    fans = {"first": (25, 32 * 25), "second": (32 * 25, 64 * 25), "dense": (8 * 8 * 64, 64), "head": (64, 9)}
    for name, (fan_in, fan_out) in fans.items():
        layer = getattr(network, name)
        limit = math.sqrt(6 / (fan_in + fan_out))
        weights = layer.weight.detach()
        assert not layer.bias.any()
        assert weights.abs().max() <= limit
        # A uniform distribution's variance is limit²/3; its sample variance scatters by sqrt(0.8 / n).
        assert weights.var().item() == pytest.approx(limit**2 / 3, rel=5 * math.sqrt(0.8 / weights.numel())), SEED


def test_dropout_acts_in_training_only_and_keeps_the_expectation():
    torch.manual_seed(SEED)
    network = build(CnnSpec(filters=8, kernel_size=3, dropout=0.2), (1, 16, 16), 9)
    images = torch.rand(2, 1, 16, 16)
    assert torch.equal(network.eval()(images), network(images))
    network.train()
    assert not torch.equal(network(images), network(images))
    hidden = torch.ones(64, 4096)
    dropped = network.dropout(hidden)
    kept = (dropped != 0).float().mean().item()
    deviation = math.sqrt(0.8 * 0.2 / hidden.numel())
    assert kept == pytest.approx(0.8, abs=5 * deviation), f"seed {SEED}"
    assert dropped.max().item() == pytest.approx(1 / 0.8, rel=1e-4)


@pytest.mark.parametrize("spec", [BaselineSpec(), CnnSpec(filters=8, kernel_size=5, dropout=0.2)])
def test_prepared_images_give_the_outputs_of_the_images(spec):
    torch.manual_seed(SEED)
    network = build(spec, (1, 32, 32), 9).eval().to(memory_format=torch.channels_last)
    images = (torch.rand(30, 1, 8, 8) < 0.5).float().repeat_interleave(4, 2).repeat_interleave(4, 3)
    prepared = network.prepare(images, None, lambda: None)
    assert isinstance(prepared, Windows)
    batch = torch.tensor([3, 29, 0])
    expected = network(images[batch])
    assert torch.allclose(network(prepared[batch]), expected, rtol=0, atol=1e-5 * expected.abs().max().item()), SEED


def test_images_that_do_not_repeat_are_trained_on_as_they_are():
    noise = torch.rand(3, 1, 32, 32)
    network = build(BaselineSpec(), (1, 32, 32), 9)
    assert network.prepare(noise, None, lambda: None) is noise
