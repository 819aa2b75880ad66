"""The first block on distinct windows against the plain convolution and maximum on whole images."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.windows import distinct, first_block

SEED = 13


def blocks(n, channels, height, width):
    """Two-phase images of 4x4-pixel blocks."""
    random = np.random.default_rng(SEED)
    coarse = random.random((n, channels, -(-height // 4), -(-width // 4))) < random.random((n, 1, 1, 1))
    return torch.from_numpy(coarse.repeat(4, axis=2).repeat(4, axis=3)[..., :height, :width].astype(np.float32))


@pytest.mark.parametrize(
    ("channels", "height", "width", "kernel_size", "padding"),
    [(1, 64, 64, 3, 1), (1, 64, 64, 5, 2), (1, 64, 64, 3, 0), (1, 41, 22, 3, 1), (1, 30, 31, 5, 0), (2, 20, 20, 1, 0)],
)
def test_outputs_and_gradients_are_those_of_the_plain_block(channels, height, width, kernel_size, padding):
    torch.manual_seed(SEED)
    images = blocks(24, channels, height, width)
    windows = distinct(images, kernel_size=kernel_size, padding=padding)
    assert windows is not None
    assert len(windows) == 24
    weight = torch.randn(6, channels, kernel_size, kernel_size).to(memory_format=torch.channels_last).requires_grad_()
    bias = torch.randn(6).requires_grad_()
    batch = torch.tensor([5, 0, 23, 7])
    found = first_block(windows[batch], weight, bias)
    plain = F.conv2d(images[batch].double(), weight.double(), bias.double(), padding=padding)
    expected = F.max_pool2d(F.relu(plain), 2)  # in the order of the protocol
    assert torch.allclose(found.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item()), f"seed {SEED}"
    assert found.is_contiguous(memory_format=torch.channels_last)

    incoming = torch.randn_like(found)
    for ours, reference in zip(
        torch.autograd.grad(found, (weight, bias), incoming),
        torch.autograd.grad(expected, (weight, bias), incoming.double()),
        strict=True,
    ):
        assert torch.allclose(ours, reference, rtol=0, atol=1e-5 * reference.abs().max().item()), f"seed {SEED}"


def test_a_batch_holds_each_of_its_windows_once():
    windows = distinct(blocks(24, 1, 32, 32), kernel_size=3, padding=1)
    batch = windows[torch.tensor([3, 4])]
    assert len(batch.windows) < len(windows.windows)
    assert len(batch.windows.unique(dim=0)) == len(batch.windows) == batch.index.max() + 1
    assert torch.equal(batch.windows[batch.index], windows.windows[windows.index[[3, 4]]])


def test_images_whose_windows_do_not_repeat_are_left_as_they_are():
    noise = torch.from_numpy(np.random.default_rng(SEED).random((4, 1, 32, 32)).astype(np.float32))
    assert distinct(noise, kernel_size=3, padding=1) is None
