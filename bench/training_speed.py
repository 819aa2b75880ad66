"""Seconds per epoch of our training beside a plain PyTorch loop, for each size of the grid, on one thread.

    python bench/training_speed.py [--data FOLDER] [--epochs 7]

Both train the same networks on the same split of the same data, one epoch of each in turn, so that a noisy machine is
noisy for both. The plain loop is what a tutorial shows: DataLoader, contiguous tensors, ReLU before pooling, torch's
dropout, Adam not fused, `.item()` for every batch. The first epoch of each is left out; medians of the rest.

The last column says how well our loop uses the core: the operations of the second convolution a second (forwards, its
two gradients, and the validation), over what torch reaches in a large convolution alone, measured after each epoch.
What else an epoch takes counts as lost.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from machine import machine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from data_pipeline.dataset import DEFAULT, load
from data_pipeline.split import split
from models.specs import CnnSpec, TrainingSpec
from models.training import Training

Arrays = tuple[np.ndarray, np.ndarray]  # images (n, c, h, w), targets (n, k)
DROPOUT = 0.2
LARGE = 32 * 32, 5, 64, 64  # a convolution in which torch is at its fastest: pixels, kernel, channels in and out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=DEFAULT, help="folder of images and a CSV (default: the shipped set)"
    )
    parser.add_argument("--epochs", type=int, default=7, help="epochs of each loop, the first one left out (default 7)")
    arguments = parser.parse_args()
    if arguments.epochs < 2:
        parser.error("--epochs: expected at least 2, as the first one is left out.")
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first one imports for seconds: not our set-up
    dataset = load(arguments.data)
    parts = split(len(dataset.images))
    train, validation = ((dataset.images[i], dataset.targets[i]) for i in (parts.train, parts.validation))
    print(f"{machine()}; torch {torch.__version__}, one thread; {len(train[0])} training images; ms per epoch, median")
    print(
        f"{'filters':>8}{'kernel':>8}{'plain':>10}{'ours':>10}{'ratio':>8}{'ours: set-up':>15}{'ours: of the peak':>19}"
    )
    for filters, kernel_size in itertools.product((8, 16, 32), (3, 5)):
        start = time.perf_counter()
        spec = CnnSpec(filters=filters, kernel_size=kernel_size, dropout=DROPOUT)
        ours = Training(spec, TrainingSpec(epochs=arguments.epochs), train=train, validation=validation)
        set_up = time.perf_counter() - start
        pairs = zip(plain_epochs(filters, kernel_size, train, validation), ours.epochs(), strict=False)
        seconds = [(plain, epoch.metrics["seconds"], convolution()) for plain, epoch in pairs][1:]
        plain, our, alone = (1e3 * statistics.median(each) for each in zip(*seconds, strict=True))
        images = 3 * len(train[0]) + len(validation[0])  # forwards, and as much again for each gradient
        pixels = train[0].shape[2] // 2 * (train[0].shape[3] // 2)
        work = images * operations(pixels, kernel_size, filters, 2 * filters) / operations(*LARGE)
        share = f"{100 * work * alone / our:.0f} %"
        times = f"{plain:>10.1f}{our:>10.1f}{plain / our:>8.2f}{1e3 * set_up:>12.0f} ms"
        print(f"{filters:>8}{kernel_size:>8}{times}{share:>19}", flush=True)


def operations(pixels: int, kernel_size: int, inputs: int, outputs: int) -> int:
    """Return the multiplications and additions of a convolution of one image."""
    return 2 * pixels * kernel_size**2 * inputs * outputs


def convolution() -> float:
    """Return the seconds that a large convolution of one image takes."""
    _, size, inputs, outputs = LARGE
    weight = torch.randn(outputs, inputs, size, size).contiguous(memory_format=torch.channels_last)
    images = torch.randn(32, inputs, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        nn.functional.conv2d(images, weight, padding="same")
        start = time.perf_counter()
        nn.functional.conv2d(images, weight, padding="same")
        return (time.perf_counter() - start) / len(images)


def plain_epochs(filters: int, kernel_size: int, train: Arrays, validation: Arrays) -> Iterator[float]:
    """Train the same network in the usual way, without end; yield the seconds of each epoch."""
    (_, channels, height, width), targets = train[0].shape, train[1].shape[1]
    network = nn.Sequential(
        nn.Conv2d(channels, filters, kernel_size, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(filters, 2 * filters, kernel_size, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(DROPOUT),
        nn.Linear(2 * filters * (height // 4) * (width // 4), 64),
        nn.ReLU(),
        nn.Linear(64, targets),
    )
    mean, scale = train[1].mean(axis=0), train[1].std(axis=0)
    loaders = [
        DataLoader(
            TensorDataset(torch.from_numpy(images), torch.from_numpy(((labels - mean) / scale).astype(np.float32))),
            batch_size=32,
            shuffle=shuffle,
        )
        for (images, labels), shuffle in ((train, True), (validation, False))
    ]
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3, eps=1e-7)
    loss_function = nn.MSELoss()
    while True:
        start = time.perf_counter()
        network.train()
        total = 0.0
        for images, labels in loaders[0]:
            optimiser.zero_grad()
            loss = loss_function(network(images), labels)
            loss.backward()
            optimiser.step()
            total += loss.item() * len(images)
        network.eval()
        with torch.no_grad():
            for images, labels in loaders[1]:
                total += loss_function(network(images), labels).item() * len(images)
        yield time.perf_counter() - start


if __name__ == "__main__":
    main()
