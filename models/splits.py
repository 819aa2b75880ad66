"""The two splits as a training uses them: checked, with scaled targets, in batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models import metrics
from models.distortion import Distortion
from models.specs import BY_DATA, SpecError, TrainingSpec, distorts
from models.symmetry import Augmentation, Element
from models.windows import WindowBatch, Windows

# Images (n, c, h, w) in 0..1 and targets (n, k) in the label's unit, NaN where missing; then inputs (n, m), if the
# network sees any.
Split = tuple[np.ndarray, np.ndarray] | tuple[np.ndarray, np.ndarray, np.ndarray]


class Batch(NamedTuple):
    """Numbers (b,) of its images, and what was drawn to change each of them, if anything."""

    numbers: Tensor
    moves: Tensor | None  # (b, 3)
    distortions: Tensor | None  # (b, 5)


def check_splits(train: Split, *validation: Split) -> None:
    """Raise SpecError if the arrays do not fit together, a target is infinite, without a label in the validation split,
    or constant in the training split."""
    for name, split in (("training", train), *(("validation", part) for part in validation)):
        images, targets = split[:2]
        _check_inputs(name, inputs_of(split), len(images), None if len(train) == 2 else train[2].shape[1])
        if images.ndim != 4 or targets.ndim != 2 or len(images) != len(targets) or not len(images):
            raise SpecError(
                f"{name} split: expected images (n, c, h, w) and targets (n, k) with n > 0, "
                f"found {images.shape} and {targets.shape}."
            )
        if (images.shape[1:], targets.shape[1]) != (train[0].shape[1:], train[1].shape[1]):
            raise SpecError(
                f"{name} split: its shapes {images.shape}, {targets.shape} differ from the training split's."
            )
        if np.isinf(targets).any():
            raise SpecError(f"{name} split: expected finite targets, found infinity.")
        if np.isnan(targets).all(axis=1).any():
            raise SpecError(f"{name} split: expected a target for every image, found NaN alone: leave such images out.")
        if empty := np.flatnonzero(np.isnan(targets).all(axis=0)).tolist():
            raise SpecError(f"{name} split: targets {empty} (from 0) have no label there: leave them out.")
    if constant := np.flatnonzero(~metrics.varies(np.asarray(train[1], np.float64))).tolist():
        raise SpecError(f"targets {constant} (from 0) do not vary in the training split: leave them out.")


def inputs_of(split: Split) -> np.ndarray | None:
    """Return the scalar inputs (n, m) of a split; None if it has none."""
    return None if len(split) == 2 else split[2]


def _check_inputs(name: str, inputs: np.ndarray | None, count: int, width: int | None) -> None:
    if (None if inputs is None else inputs.shape) != (None if width is None else (count, width)):
        shape = "none" if inputs is None else inputs.shape
        raise SpecError(f"{name} split: expected inputs of {count} images, as in the training split, found {shape}.")
    if inputs is not None and not np.isfinite(inputs).all():
        raise SpecError(f"{name} split: expected finite inputs, found NaN or infinity.")


def check_augmentation(training: TrainingSpec, *, periodic: bool) -> None:
    """Raise SpecError if the images cannot be moved so."""
    if training.augmentation == BY_DATA:
        raise SpecError(
            f"training.augmentation = '{BY_DATA}' stands for what the data say: expected that in its place."
        )
    if training.augmentation == "shift" and not periodic:
        raise SpecError("training.augmentation = 'shift': expected images that wrap around.")


@dataclass(frozen=True)
class Scaling:
    """How labels become the targets of a network: (labels - mean) / scale."""

    mean: np.ndarray  # (k,), unit
    scale: np.ndarray  # (k,), unit
    variance: np.ndarray  # (k,) of the training split, unit²

    @classmethod
    def of(cls, labels: np.ndarray, kind: str, variance: np.ndarray | None = None) -> "Scaling":
        """Return the scaling by the mean and deviation of training labels (n, k), float64; none if `kind` is "none".

        `variance` (k,) is that of all training labels where these are a part of them.
        """
        mean, own = metrics.moments(labels)
        variance = own if variance is None else variance
        if kind == "standard":
            return cls(mean, np.sqrt(own), variance)
        return cls(np.zeros(len(own)), np.ones(len(own)), variance)

    def apply(self, labels: np.ndarray) -> Tensor:
        """Return the targets (n, k) as float32."""
        return tensor((np.asarray(labels, np.float64) - self.mean) / self.scale)

    def errors(self, squares: Tensor, counts: Tensor) -> tuple[float, float]:
        """Return (nmse, mse in unit²) from sums (k,) of squared errors of scaled targets over so many labels (k,)."""
        mse = squares.cpu().numpy() / counts.cpu().numpy() * self.scale**2
        return float((mse / self.variance).mean()), float(mse.mean())


def tensor(values: np.ndarray) -> Tensor:
    """Return the numbers as float32."""
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


def differences(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs - targets (b, k) and how many targets are there (k,).

    A difference is 0, and so is its gradient, where the target is missing (NaN).
    """
    present = ~targets.isnan()
    return torch.where(present, outputs - targets, 0.0), present.sum(0)


def relative_weights(labels: np.ndarray, relative: float) -> np.ndarray:
    """Return how much each image counts in the loss, (n,), mean 1: 1 + relative / s^2, s^2 its labels' mean square.

    So the loss adds to the squared errors of the labels (n, k), given in units of the training split's scale,
    `relative` times the squared errors relative to the image's own labels: errors of soft cells count as well. If it is
    infinite, these alone count.
    """
    squares = np.nanmean(labels**2, axis=1).clip(1e-6)
    weights: np.ndarray = 1 / squares if np.isinf(relative) else 1 + relative / squares
    normalised: np.ndarray = weights / weights.mean()
    return normalised


class TrainingSet:
    """The training split, on the device that trains.

    `prepare` returns images (n, c, h, w) in the form that trains fastest; `moves` are the symmetries for augmentation.
    This and distortion need the images as they are. `periodic`: the images wrap around, so augmentation shifts them.
    """

    def __init__(
        self,
        split: Split,
        training: TrainingSpec,
        scaling: Scaling,
        prepare: Callable[[Tensor], Tensor | Windows],
        moves: Sequence[Element],
        device: torch.device,
        *,
        periodic: bool = True,
    ) -> None:
        images, labels = tensor(split[0]).to(device), np.asarray(split[1], np.float64)
        self.targets = scaling.apply(labels).to(device)  # (n, k)
        self.weights: Tensor | None = None  # (n,) in the loss; None: all 1
        relative = np.inf if training.loss == "relative" else training.relative
        if relative:
            weights = relative_weights(labels / np.sqrt(scaling.variance), relative)
            self.weights = tensor(weights).to(device)
        self._images: Tensor | Windows = images
        inputs = inputs_of(split)
        self._inputs = None if inputs is None else tensor(inputs).to(device)  # (n, m)
        self._augmentation: Augmentation | None = None
        self._distortion = Distortion(training) if distorts(training) else None
        if training.augmentation != "none":
            self._augmentation = Augmentation(moves, images.shape, device, shifts=periodic)
            moved = [scaling.apply(move.moved(labels)) for move in moves]
            self._moved = torch.stack(moved).to(device)  # the targets under each symmetry, (symmetries, n, k)
        elif self._distortion is None:
            self._images = prepare(images)

    def shuffle(self, batch_size: int, least: int) -> list[Batch]:
        """Return an epoch's batches in random order; a last one of fewer than `least` images joins the one before."""
        device, count = self.targets.device, len(self.targets)
        batches = list(torch.split(torch.randperm(count).to(device), batch_size))
        if len(batches) > 1 and len(batches[-1]) < least:
            batches[-2:] = [torch.cat(batches[-2:])]
        moves = None if self._augmentation is None else self._augmentation.draw(count).to(device)
        changes = None if self._distortion is None else self._distortion.draw(count).to(device)
        return [
            Batch(numbers, *(None if draws is None else draws[numbers] for draws in (moves, changes)))
            for numbers in batches
        ]

    def take(self, batch: Batch) -> tuple[Tensor | WindowBatch, Tensor, Tensor | None]:
        """Return the images, the scaled targets (b, k) and the inputs (b, m) of a batch."""
        numbers, moves, changes = batch
        images, inputs = self._images[numbers], None if self._inputs is None else self._inputs[numbers]
        targets = self.targets[numbers]
        if self._augmentation is not None and moves is not None:
            assert isinstance(images, Tensor)  # because they are not prepared
            images, targets = self._augmentation(images, moves), self._moved[moves[:, 0], numbers]
        if self._distortion is not None and changes is not None:
            assert isinstance(images, Tensor)
            images = self._distortion(images, changes)
        return images, targets, inputs

    def unchanged(self) -> tuple[Tensor | WindowBatch, Tensor, Tensor | None]:
        """Return all images, scaled targets and inputs in their order, as `take` does, nothing drawn."""
        return self.take(Batch(torch.arange(len(self.targets)), None, None))


class ValidationSet:
    """The validation split, on the device that trains.

    With `in_unit` it evaluates networks that predict in the label's unit, otherwise those that predict scaled targets.
    """

    def __init__(
        self,
        split: Split,
        scaling: Scaling,
        prepare: Callable[[Tensor], Tensor | Windows],
        device: torch.device,
        *,
        in_unit: bool,
        rows: int,
    ) -> None:
        targets = torch.from_numpy(np.asarray(split[1], np.float64)) if in_unit else scaling.apply(split[1])
        self._images, self._targets = prepare(tensor(split[0]).to(device)), targets.to(device)
        inputs = inputs_of(split)
        self._inputs = None if inputs is None else tensor(inputs).to(device)
        self._scaling, self._in_unit, self._rows = scaling, in_unit, rows

    def errors(self, network: nn.Module, alive: Callable[[], object]) -> tuple[float, float]:
        """Return (nmse, mse in unit²) of the network, which stays in eval mode. `alive` is called after every batch."""
        network.eval()
        squares = torch.zeros(self._targets.shape[1], dtype=torch.float64, device=self._targets.device)
        counts = torch.zeros_like(squares)
        with torch.inference_mode():
            for batch in torch.split(torch.arange(len(self._targets)), self._rows):
                inputs = None if self._inputs is None else self._inputs[batch]
                difference, count = differences(network(self._images[batch], inputs), self._targets[batch])
                squares += (difference**2).sum(0)
                counts += count
                alive()
        if self._in_unit:
            squares /= torch.from_numpy(self._scaling.scale**2).to(squares.device)
        return self._scaling.errors(squares, counts)
