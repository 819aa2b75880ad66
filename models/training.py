"""Training as a loop that yields epochs: deterministic, and resumable to the bit. It knows no tracker."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models import losses
from models.checkpoint import Snapshots, State
from models.descriptor_net import DescriptorNet
from models.levels import levels_of
from models.networks import Network, build
from models.optimisation import adam, changing_tensors, generators, move_average, schedule
from models.physics import Phases, Physics
from models.regressor import Regressor
from models.scalars import Ranges
from models.sizes import check_batches, least_batch
from models.specs import (
    ModelSpec,
    SpecError,
    TrainingSpec,
    physical,
    symmetric,
    to_dict,
    training_to_dict,
)
from models.splits import (
    Scaling,
    Split,
    TrainingSet,
    ValidationSet,
    check_augmentation,
    check_splits,
    differences,
    inputs_of,
    tensor,
)
from models.symmetry import elements, unmoved
from models.together import check_together, needs_symmetries
from models.windows import WindowBatch

EVALUATION_BATCH = 128  # images; limits the memory of an evaluation
SCORES = ("best_nmse", "best_mse", "last_nmse", "last_mse")  # of a training, stored in its state


class Diverged(ArithmeticError):
    """A loss of this epoch is not a finite number, and no later one can be."""

    def __init__(self, epoch: int) -> None:
        super().__init__(f"the loss of epoch {epoch} is not a finite number: try a smaller learning rate.")
        self.epoch = epoch


class Interrupted(Exception):
    """`stop()` was true between two batches; `Training.state()` is that of the newest completed epoch."""


@dataclass(frozen=True)
class Epoch:
    """One completed pass over the training split."""

    number: int  # from 1
    metrics: dict[str, float]
    best: bool  # whether its val/nmse is the lowest so far


class Training:
    """One network being trained; `epochs()` does the work.

    Weights, order of the images and dropout follow from `seed` alone: every epoch draws from generators of its own,
    seeded with (seed, epoch), so no generator's state has to be stored, and torch's global generator stays unchanged.
    With `state` it goes on after the epoch of that state and gives the numbers of an uninterrupted training, to the
    bit on the same CPU model, thread count and library versions.

    `initial` are tensors of the network to begin with, by name: pretrained ones, or those of an earlier training;
    missing ones are drawn. A resumed training needs the same again. `cache` is a folder for prepared images. `alive`
    is called between the batches of everything else that takes long: preparing, and evaluating.

    `symmetries` maps names in `models.symmetry.GENERATORS` to the permutation of the targets when the image is flipped
    or transposed; needed for augmentation and symmetric models. `phases` and `target_names` (k) describe the labels to
    models with physics. `input_names` (m) are those of the inputs beside the images, which no symmetry changes.
    `variance` (k,) is that of all training labels, in which NMSE is measured, where `train` is a part of them.
    `periodic` images wrap around: augmentation shifts them.

    With a moving average (`training.ema`) of the weights and of batch-norms' averages, it is these averages that are
    evaluated, selected and returned. A symmetric model is evaluated as the mean over the symmetries.

    Without `validation` no epoch is selected: the best one is the newest. `last_epoch` ends the training before the
    specification's last epoch, which the schedule of the learning rate follows all the same.

    Raise SpecError if the arrays do not fit together, a target does not vary in the training split, symmetries or
    phases are needed but missing, or `state` belongs to another specification or seed.
    """

    def __init__(
        self,
        spec: ModelSpec,
        training: TrainingSpec,
        *,
        train: Split,
        validation: Split | None,
        seed: int = 0,
        device: str = "cpu",
        initial: Mapping[str, Tensor] | None = None,
        state: State | None = None,
        cache: Path | None = None,
        alive: Callable[[], object] = lambda: None,
        symmetries: Mapping[str, Sequence[int]] | None = None,
        phases: Phases | None = None,
        target_names: Sequence[str] = (),
        input_names: Sequence[str] = (),
        last_epoch: int | None = None,
        variance: np.ndarray | None = None,
        periodic: bool = True,
    ) -> None:
        check_splits(*(parts := (train,) if validation is None else (train, validation)))
        check_together(spec, training)
        self.spec, self.training, self.seed, self.device = spec, training, seed, torch.device(device)
        labels = np.asarray(train[1], np.float64)
        shape, n_targets = (train[0].shape[1], train[0].shape[2], train[0].shape[3]), labels.shape[1]
        check_batches(spec, training, shape)
        self._least_batch, self._alive = least_batch(spec, shape), alive
        self.scaling = Scaling.of(labels, training.target_scaling, variance)
        self._levels, self._contrast = levels_of([part[0] for part in parts])
        self._wrap = _wrapping(spec, train, self.scaling, shape, symmetries or {}, phases, target_names, input_names)
        check_augmentation(training, periodic=periodic)
        moves = elements(symmetries, shape, n_targets) if needs_symmetries(spec, training) else (unmoved(n_targets),)
        self.network = _begin(spec, train, len(input_names), initial or {}, seed, self.device)
        self._ranges = _learn_inputs(self.network, parts, input_names)
        self.network.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        # The network whose weights are evaluated and returned.
        evaluated = copy.deepcopy(self.network) if training.ema else self.network
        prepare = partial(self.network.prepare, cache=cache, alive=alive)
        self._train = TrainingSet(train, training, self.scaling, prepare, moves, self.device, periodic=periodic)
        # A symmetric or physical model is evaluated as a regressor in the label's unit, others with scaled targets.
        in_unit = symmetric(spec) or physical(spec)
        self._scored = self._wrap(evaluated).to(self.device) if in_unit else evaluated
        rows = EVALUATION_BATCH // (len(moves) if symmetric(spec) else 1)
        evaluate = partial(ValidationSet, scaling=self.scaling, device=self.device, in_unit=in_unit, rows=rows)
        self._validation = None if validation is None else evaluate(validation, prepare=prepare)
        self._last_epoch = min(last_epoch or training.epochs, training.epochs)
        self._shift, self._stretch = (tensor(x).to(self.device) for x in (self.scaling.mean, self.scaling.scale))
        self._terms = losses.terms(training)
        self._optimiser = None if isinstance(self.network, DescriptorNet) else adam(self.network, training)
        self._changing, self._weights = changing_tensors(self.network), changing_tensors(evaluated)
        self.epoch = self.best_epoch = 0  # completed; of the lowest val/nmse, 0: none yet
        self.best_nmse = self.best_mse = float("inf")
        self.last_nmse = self.last_mse = float("inf")  # of the newest completed epoch
        self._snapshots = Snapshots(self._live_tensors(), self._weights)
        if state is not None:
            self._restore(state)

    def epochs(self, stop: Callable[[], bool] | None = None) -> Iterator[Epoch]:
        """Train, and yield each epoch when it is done: from the one after the state to the specification's last, or
        until `patience` epochs in a row brought no new best.

        Metrics: "train/nmse" and "train/mse" are the running losses of the epoch, each batch with the weights it was
        trained with (and with dropout), weighted by its length, as in a Keras history. "val/nmse" and "val/mse" are
        evaluated after the epoch, if there is a validation split. nmse is the mean over the targets of MSE / variance
        of the training split; mse is the mean over all numbers, in the label's unit squared. Then "learning_rate", the
        last batch's, and "seconds".

        `stop` is called before every batch; when it returns true, Interrupted is raised. A loss that is not finite
        raises Diverged. After either, `state()` is still that of the newest completed epoch.
        """
        while self.epoch < self._last_epoch and not self._is_patience_over():
            yield self._run_epoch(stop)

    def _is_patience_over(self) -> bool:
        """Return whether the last `patience` epochs brought no new best. Depends on the state alone, so that a resumed
        training stops as well."""
        return 0 < self.training.patience <= self.epoch - self.best_epoch

    def state(self) -> State:
        """Return the state after the newest completed epoch, at any time; costs one copy of the tensors that change:
        trained weights, averages of batch-norms, Adam's averages, the best weights."""
        scores = {name: getattr(self, name) if self.epoch else None for name in SCORES}
        info = self._identity() | {"epoch": self.epoch, "best_epoch": self.best_epoch} | scores
        return State(self._snapshots.tensors(), info)

    def best_regressor(self) -> Regressor:
        """Return the network of the epoch with the lowest val/nmse, on the CPU, in eval mode."""
        return self._regressor(self._snapshots.best)

    def last_regressor(self) -> Regressor:
        """Return the network of the newest completed epoch, on the CPU, in eval mode."""
        kind = "ema" if self.training.ema else "network"
        return self._regressor({name: self._snapshots.newest[f"{kind}.{name}"] for name in self._weights})

    # --- the loop ---

    def _run_epoch(self, stop: Callable[[], bool] | None) -> Epoch:
        start = time.perf_counter()
        number = self.epoch + 1
        try:
            with generators(self.seed, number, self.device):
                train = self.scaling.errors(*self._train_one_epoch(number, stop))
            validation = train if self._validation is None else self._validation.errors(self._scored, self._alive)
            if not np.isfinite([*train, *validation]).all():
                raise Diverged(number)
        except BaseException:
            self._snapshots.roll_back()  # so that `epochs()` may be called again
            raise
        best = self._validation is None or validation[0] < self.best_nmse
        if best:
            self._snapshots.keep_best()
            self.best_nmse, self.best_mse, self.best_epoch = *validation, number
        self._snapshots.keep()
        self.epoch, self.last_nmse, self.last_mse = number, *validation
        sides = {"train": train} | ({} if self._validation is None else {"val": validation})
        metrics = {
            f"{side}/{name}": errors[i] for i, name in enumerate(("nmse", "mse")) for side, errors in sides.items()
        }
        if self._optimiser is not None:
            metrics["learning_rate"] = self._optimiser.param_groups[0]["lr"]
        metrics["seconds"] = time.perf_counter() - start
        return Epoch(number, metrics, best)

    def _train_one_epoch(self, number: int, stop: Callable[[], bool] | None) -> tuple[Tensor, Tensor]:
        """Return the sums of squared errors (k,) of the scaled targets, and of how many (k,)."""
        training, optimiser, network = self.training, self._optimiser, self.network.train()
        if optimiser is None:
            if stop is not None and stop():
                raise Interrupted("stopped before the fit")
            return _fit(network, self._train, self._alive)
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=training.precision == "bf16")
        squares = torch.zeros(len(self._shift), dtype=torch.float64, device=self.device)
        counts = torch.zeros_like(squares)
        batches, weights = self._train.shuffle(training.batch_size, self._least_batch), self._train.weights
        for step, batch in enumerate(batches, start=(number - 1) * len(batches)):
            if stop is not None and stop():
                raise Interrupted(f"stopped in epoch {number}")
            if training.schedule != "constant":  # the rate follows from the step, so nothing has to be stored
                rate = training.learning_rate * schedule(training.schedule, step / (len(batches) * training.epochs))
                for group in optimiser.param_groups:
                    group["lr"] = rate
            images, targets, inputs = self._train.take(batch)
            with half:  # training alone: the evaluation is in full precision, as later predictions are
                outputs = network(images, inputs)
            scaled = self._scaled(outputs.float(), images)
            difference, count = differences(scaled, targets)
            square = difference**2
            loss = square if self._terms is None else self._terms(scaled, targets)
            loss = loss if weights is None else loss * weights[batch.numbers][:, None]
            torch.autograd.backward(loss.sum() / count.sum().clamp(min=1))  # the mean over the labels that are there
            if training.gradient_clipping:
                nn.utils.clip_grad_norm_(network.parameters(), training.gradient_clipping)
            optimiser.step()
            optimiser.zero_grad()
            if training.ema:
                move_average(self._weights, self._changing, decay=training.ema, step=step)
            squares += square.detach().sum(0)
            counts += count
        return squares, counts

    def _scaled(self, outputs: Tensor, images: Tensor | WindowBatch) -> Tensor:
        """Return scaled targets (b, k) from the network's outputs for the images."""
        if not physical(self.spec):
            return outputs
        assert isinstance(images, Tensor) and isinstance(self._scored, Regressor)  # as in every periodic network
        return (self._scored.targets(outputs, images) - self._shift) / self._stretch

    # --- before and after it ---

    def _live_tensors(self) -> dict[str, Tensor]:
        tensors = {f"network.{name}": values for name, values in self._changing.items()}
        if self.training.ema:
            tensors |= {f"ema.{name}": values for name, values in self._weights.items()}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad and self._optimiser is not None:
                averages = self._optimiser.state[parameter]
                tensors |= {f"adam.{name}.{key}": values for key, values in averages.items()}
        return tensors

    def _identity(self) -> dict[str, Any]:
        return {"model": to_dict(self.spec), "training": training_to_dict(self.training), "seed": self.seed}

    def _restore(self, state: State) -> None:
        for key, expected in self._identity().items():
            if state.info.get(key) != expected:
                raise SpecError(f"the state's {key} is {state.info.get(key)}, this training's is {expected}.")
        self._snapshots.restore(state.tensors)
        self.epoch, self.best_epoch = state.info["epoch"], state.info["best_epoch"]
        if not self.epoch:
            return
        scores = {name: state.info[name] for name in SCORES if name in state.info}
        if len(scores) < len(SCORES):  # the state of an earlier version
            scores = self._evaluate_again() | scores
        for name, score in scores.items():
            setattr(self, name, score)

    def _evaluate_again(self) -> dict[str, float]:
        """Return SCORES, of the weights of the best and of the newest epoch."""
        assert self._validation is not None  # that version had no training without it
        scores = {}
        newest = {name: values.clone() for name, values in self._weights.items()}
        for kind, weights in (("best", self._snapshots.best), ("last", newest)):
            for name, values in weights.items():
                self._weights[name].copy_(values)
            scores[f"{kind}_nmse"], scores[f"{kind}_mse"] = self._validation.errors(self._scored, self._alive)
        return scores

    def _regressor(self, weights: Mapping[str, Tensor]) -> Regressor:
        network = copy.deepcopy(self.network).to(device="cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        _set_tensors(network, weights)
        regressor = self._wrap(network).eval()
        regressor.levels, regressor.contrast, regressor.ranges = self._levels, self._contrast, self._ranges
        return regressor


def _begin(
    spec: ModelSpec, train: Split, n_inputs: int, initial: Mapping[str, Tensor], seed: int, device: torch.device
) -> Network:
    """Return the network as the first epoch finds it."""
    images, labels = train[0], np.asarray(train[1])
    with generators(seed, 0, device):
        network = build(spec, (images.shape[1], images.shape[2], images.shape[3]), labels.shape[1], n_inputs)
    _set_tensors(network, initial)
    if isinstance(network, DescriptorNet):
        network.learn_levels(images)
    return network


def _fit(network: nn.Module, training_set: TrainingSet, alive: Callable[[], object]) -> tuple[Tensor, Tensor]:
    """Fit the network to all images at once; return the sums of its squared errors and their counts, (k,) each."""
    images, targets, inputs = training_set.unchanged()
    assert isinstance(network, DescriptorNet) and isinstance(images, Tensor)
    network.fit(images, targets, inputs, alive)
    difference, counts = differences(network(images, inputs).double(), targets)
    return (difference**2).sum(0), counts


def _wrapping(
    spec: ModelSpec,
    train: Split,
    scaling: Scaling,
    image_shape: tuple[int, int, int],
    symmetries: Mapping[str, Sequence[int]],
    phases: Phases | None,
    target_names: Sequence[str],
    input_names: Sequence[str],
) -> Callable[[Network], Regressor]:
    """Return what makes a regressor of a network whose outputs are scaled targets, or a physics layer's inputs."""
    physics, mean, scale = None, scaling.mean, scaling.scale
    if physical(spec):
        physics = Physics(spec.physics, phases, target_names, image_shape[0])
        whole = ~np.isnan(train[1]).any(axis=1)
        if whole.sum() < 2:
            raise SpecError(
                f"model.physics = {spec.physics!r}: expected two training images with all nine components, from which "
                f'its scales follow, found {whole.sum()}: set model.physics = "none".'
            )
        labels, fractions = np.asarray(train[1], np.float64), train[0].mean((1, 2, 3), dtype=np.float64)
        six = physics.six(labels[whole], fractions[whole])
        mean, scale = six.mean(axis=0), six.std(axis=0)
    return partial(
        Regressor,
        target_mean=torch.from_numpy(mean),
        target_scale=torch.from_numpy(scale),
        symmetries=symmetries if symmetric(spec) else None,
        image_shape=image_shape,
        physics=physics,
        input_names=input_names,
    )


def _learn_inputs(network: Network, parts: Sequence[Split], names: Sequence[str]) -> Ranges | None:
    """Let the network standardise its inputs by the first of the parts, the training split; return the range of each
    input in all of them."""
    learned = inputs_of(parts[0])
    if (0 if learned is None else learned.shape[1]) != len(names):
        raise SpecError(f"inputs: expected a column for each of {', '.join(names) or 'no names'}.")
    if learned is None or network.scalars is None:
        return None
    network.scalars.learn(tensor(learned))
    every = np.concatenate([numbers for numbers in map(inputs_of, parts) if numbers is not None])
    return tuple(zip(every.min(axis=0).tolist(), every.max(axis=0).tolist(), strict=True))


def _set_tensors(network: Network, tensors: Mapping[str, Tensor]) -> None:
    own = network.state_dict()
    for name, values in tensors.items():
        if name not in own or own[name].shape != values.shape:
            expected = tuple(own[name].shape) if name in own else "no such tensor"
            raise SpecError(f"the tensor {name} {tuple(values.shape)} to begin with does not fit: {expected}.")
        own[name].copy_(values)
