"""Training a head on features computed once against the plain loop that runs the frozen backbone every epoch.

    python bench/frozen_features.py [BACKBONE ...]

The default data set, one thread, weights at random (they cost what pretrained ones do). A plain epoch is timed once;
300 of them are extrapolated. Ours is the one pass over the images and 300 epochs, all timed.
"""

import argparse
import time

import torch
from machine import machine
from torch.nn import functional as F

from data_pipeline import dataset as data_sets
from data_pipeline.split import split
from models.networks import build
from models.specs import TrainingSpec, TransferSpec
from models.training import Training

EPOCHS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbones", nargs="*", default=["vgg16", "resnet50", "densenet121"], metavar="BACKBONE")
    torch.set_num_threads(1)
    data = data_sets.load(data_sets.DEFAULT)
    parts = split(len(data.images))
    train = (data.images[parts.train], data.targets[parts.train])
    validation = (data.images[parts.validation], data.targets[parts.validation])
    print(f"{machine()}; torch {torch.__version__}, one thread; {len(train[0])} training images")
    print(f"{'backbone':12} {'one pass, s':>12} {'300 epochs, s':>14} {'plain epoch, s':>15} {'plain / ours':>13}")
    for backbone in parser.parse_args().backbones:
        spec = TransferSpec(backbone=backbone, weights="none")
        begin = time.perf_counter()
        training = Training(spec, TrainingSpec(epochs=EPOCHS), train=train, validation=validation)
        once = time.perf_counter() - begin
        begin = time.perf_counter()
        for _ in training.epochs():
            pass
        epochs = time.perf_counter() - begin
        plain = plain_epoch(spec, train, validation)
        ratio = EPOCHS * plain / (once + epochs)
        print(f"{backbone:12} {once:12.1f} {epochs:14.1f} {plain:15.1f} {ratio:13.0f}", flush=True)


def plain_epoch(spec: TransferSpec, train, validation) -> float:
    """Seconds of one epoch as a plain loop runs it: forward through the frozen backbone, backward through the head."""
    network = build(spec, train[0].shape[1:], train[1].shape[1]).to(memory_format=torch.channels_last).train()
    images, targets = torch.from_numpy(train[0]), torch.from_numpy(train[1]).float()
    optimiser = torch.optim.Adam([each for each in network.parameters() if each.requires_grad])
    begin = time.perf_counter()
    for batch in torch.randperm(len(images)).split(32):
        optimiser.zero_grad()
        F.mse_loss(network(images[batch]), targets[batch]).backward()
        optimiser.step()
    with torch.inference_mode():
        for batch in torch.from_numpy(validation[0]).split(128):
            network(batch)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
