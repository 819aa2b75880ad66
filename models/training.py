"""Training as a loop that yields: deterministic, resumable to the bit, and knowing nothing of who tracks it."""

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.cnn import ConvNet
from models.networks import build
from models.periodic import PeriodicNet
from models.physics import Phases, Physics
from models.regressor import Regressor
from models.sizes import check_batches, least_batch
from models.specs import (
    ADAM_BETAS,
    ADAM_EPSILON,
    ModelSpec,
    SpecError,
    TrainingSpec,
    check_together,
    needs_symmetries,
    physical,
    symmetric,
    to_dict,
    training_to_dict,
)
from models.symmetry import Augmentation, Element, elements
from models.transfer import TransferNet
from models.windows import WindowBatch, Windows

Split = tuple[np.ndarray, np.ndarray]  # images (n, c, h, w) in 0..1 and targets (n, k) in the label's unit

EVALUATION_BATCH = 128  # images; bounds the memory of an evaluation
SCORES = ("best_nmse", "best_mse", "last_nmse", "last_mse")  # of a training, kept in its state
CYCLE_WARMUP = 0.3  # of the training, in which "one-cycle" raises the learning rate to its highest
CYCLE_START, CYCLE_END = 1 / 25, 1e-4 / 25  # of the highest rate: where it comes from, and where it falls to


class Diverged(ArithmeticError):
    """A loss of this epoch is not a finite number; nothing that follows can be."""

    def __init__(self, epoch: int) -> None:
        super().__init__(f"the loss of epoch {epoch} is not a finite number: try a smaller learning rate.")
        self.epoch = epoch


class Interrupted(Exception):
    """`stop()` was true at a batch boundary; `Training.state()` is that of the newest completed epoch."""


@dataclass(frozen=True)
class Epoch:
    """One completed pass over the training split."""

    number: int  # from 1
    metrics: dict[str, float]
    best: bool  # whether its val/nmse is the lowest so far


@dataclass(frozen=True)
class State:
    """All that a training needs to go on from a completed epoch."""

    tensors: dict[str, Tensor]  # on the CPU, contiguous, shared with nothing
    info: dict[str, Any]  # JSON-able; "epoch" is the number of completed epochs


class Training:
    """One network being trained; `epochs()` does the work.

    Weights, order of the images and dropout follow from `seed` alone: every epoch draws from generators of its own,
    seeded with (seed, epoch), so no generator's state has to be carried over an interruption, and torch's global
    generator is left as it was found. With `state` it goes on after the epoch that state was taken at, and gives the
    numbers an uninterrupted training gives, to the bit on the same CPU model, thread count and library versions.

    `initial` are tensors of the network to begin with, by name: pretrained ones, or those of an earlier training;
    those it lacks are drawn. Whoever resumes gives the same again. `cache` is a folder for what is dear to prepare.
    `alive` is called between the batches of whatever else takes long: preparing, and evaluating.

    `symmetries` has where the targets go when the image is flipped or transposed, a permutation by each name of
    `models.symmetry.GENERATORS` that is known: for augmentation and symmetric models alone. `phases` and
    `target_names` (k) are what models with physics need to know of the labels.

    With a moving average (`training.ema`) of the weights, batch-norms' averages among them, it is these averages that
    are evaluated, selected and handed out. What is evaluated of a symmetric model is the mean over the symmetries.

    Raises SpecError if the arrays do not fit together, a target does not vary in the training split, symmetries or
    phases are needed that are not known, or `state` belongs to another specification or seed.
    """

    def __init__(
        self,
        spec: ModelSpec,
        training: TrainingSpec,
        *,
        train: Split,
        validation: Split,
        seed: int = 0,
        device: str = "cpu",
        initial: Mapping[str, Tensor] | None = None,
        state: State | None = None,
        cache: Path | None = None,
        alive: Callable[[], object] = lambda: None,
        symmetries: Mapping[str, Sequence[int]] | None = None,
        phases: Phases | None = None,
        target_names: Sequence[str] = (),
        channels_last: bool = True,
        fused: bool = True,
    ) -> None:
        _check(train, "training")
        _check(validation, "validation", like=train)
        check_together(spec, training)
        self.spec, self.training, self.seed = spec, training, seed
        self.device = torch.device(device)
        self._image_shape = (train[0].shape[1], train[0].shape[2], train[0].shape[3])
        check_batches(spec, training, self._image_shape)
        labels = np.asarray(train[1], np.float64)
        self.train_variance = labels.var(axis=0)  # (k,), unit²
        constant = np.flatnonzero(labels.max(axis=0) == labels.min(axis=0)).tolist()
        if constant:
            raise SpecError(f"targets {constant} (from 0) do not vary in the training split: leave them out.")
        standard = training.target_scaling == "standard"
        self.target_mean = labels.mean(axis=0) if standard else np.zeros(len(self.train_variance))
        self.target_scale = np.sqrt(self.train_variance) if standard else np.ones(len(self.train_variance))
        self._cache, self._alive = cache, alive
        self._symmetries = symmetries or {}
        # Mean and scale of what the network gives: the targets, or the numbers that physics makes them of.
        self._physics, self._six = None, (self.target_mean, self.target_scale)
        if physical(spec):
            self._physics = Physics(to_dict(spec)["physics"], phases, target_names, self._image_shape[0])
            six = self._physics.six(labels, train[0].mean((1, 2, 3), dtype=np.float64))
            self._six = six.mean(axis=0), six.std(axis=0)
        moves: tuple[Element, ...] = ()
        if needs_symmetries(spec, training):
            moves = elements(self._symmetries, self._image_shape, len(self.target_mean))
        augmented = training.augmentation != "none"
        self._augmentation = Augmentation(moves, self._image_shape, self.device) if augmented else None
        with _generators(seed, 0, self.device):
            self.network = self._build()
        self._begin_with(initial or {})
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.network.to(device=self.device, memory_format=layout)  # type: ignore[call-overload]
        self._train = self._prepare(train[0], raw=augmented), self._targets(labels)
        # How much each image counts in the loss; None: all the same.
        weights = relative_weights(labels / np.sqrt(self.train_variance), training.relative)
        self._weights = self._tensor(weights) if training.relative else None
        # The targets of the training split as each symmetry moves them.
        self._moved = [self._targets(labels[:, move.order]) for move in moves] if augmented else []
        # The network whose weights are evaluated and handed out.
        self._evaluated = copy.deepcopy(self.network) if training.ema else self.network
        # A symmetric or physical model is evaluated as it is handed out, in the label's unit; others in the network's.
        self._scored: torch.nn.Module = self._evaluated
        self._in_unit = symmetric(spec) or physical(spec)
        images, targets = self._prepare(validation[0]), self._targets(validation[1])
        rows = EVALUATION_BATCH
        if self._in_unit:
            self._scored = self._wrap(self._evaluated).to(self.device)
            targets = torch.from_numpy(np.asarray(validation[1], np.float64)).to(self.device)
            rows //= len(moves) if symmetric(spec) else 1
        self._validation = [(images[batch], targets[batch]) for batch in torch.arange(len(targets)).split(rows)]
        self._sizes = len(self._train[1]), len(targets)
        self._shift, self._stretch = self._tensor(self.target_mean), self._tensor(self.target_scale)
        self._parameters: list[Tensor] = [each for each in self.network.parameters() if each.requires_grad]
        self._changing = _changing_tensors(self.network)
        self._handed = _changing_tensors(self._evaluated)
        self._optimiser = self._make_optimiser(fused)
        # Adam fills these in at its first step; here they stand from the start, so that fresh and resumed are alike.
        # Each has its parameter's memory format: with another one, fused Adam pairs the wrong numbers silently.
        for parameter in self._parameters:
            self._optimiser.state[parameter] = {
                "step": torch.zeros((), device=self.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
        self.epoch = 0  # completed
        self.best_epoch = 0  # of the lowest val/nmse; 0: none yet
        self.best_nmse = self.best_mse = float("inf")
        self.last_nmse = self.last_mse = float("inf")  # of the newest completed epoch
        self._live = self._live_tensors()
        # What state() gives while the live tensors are in the middle of an epoch, and the best epoch's weights.
        self._kept = {name: tensor.clone() for name, tensor in self._live.items()}
        self._best = [tensor.clone() for tensor in self._handed.values()]
        if state is not None:
            self._restore(state)

    def epochs(self, stop: Callable[[], bool] | None = None) -> Iterator[Epoch]:
        """Train, and yield each epoch as it is done, from the one after the state to the specification's last, or
        until `patience` epochs in a row brought no new best.

        Metrics: "train/nmse" and "train/mse" are the running losses of the epoch, each batch with the weights it was
        trained with (and with dropout), weighed by its length: what a Keras history shows. "val/nmse" and "val/mse"
        are evaluated after the epoch. nmse is the mean over the targets of MSE / variance of the training split; mse
        is the mean over all numbers, in the label's unit squared. Then "learning_rate", the last batch's, and
        "seconds".

        `stop` is asked before every batch; once it says true, Interrupted is raised. A loss that is not finite raises
        Diverged. After either, `state()` is still that of the newest completed epoch.
        """
        while self.epoch < self.training.epochs and not self._patience_over():
            yield self._run_epoch(stop)

    def _patience_over(self) -> bool:
        """Whether the last `patience` epochs brought no new best. It follows from the state, so resuming asks again."""
        return 0 < self.training.patience <= self.epoch - self.best_epoch

    def state(self) -> State:
        """The state after the newest completed epoch, at any time; costs one copy of what changes: the weights
        that are trained, the averages of batch-norms, Adam, the best."""
        tensors = self._kept | self._best_by_name()
        return State(
            # clone(contiguous_format): files hold contiguous tensors, and training goes on in the originals
            {name: t.to("cpu", copy=True, memory_format=torch.contiguous_format) for name, t in tensors.items()},
            self._identity()
            | {
                "epoch": self.epoch,
                "best_epoch": self.best_epoch,
                **{name: getattr(self, name) if self.epoch else None for name in SCORES},
            },
        )

    def best_regressor(self) -> Regressor:
        """The network of the epoch with the lowest val/nmse, on the CPU, in eval mode."""
        return self._regressor(self._best)

    def last_regressor(self) -> Regressor:
        """The network of the newest completed epoch, on the CPU, in eval mode."""
        kind = "ema" if self.training.ema else "network"
        return self._regressor([self._kept[f"{kind}.{name}"] for name in self._handed])

    def _run_epoch(self, stop: Callable[[], bool] | None) -> Epoch:
        start = time.perf_counter()
        number = self.epoch + 1
        try:
            with _generators(self.seed, number, self.device):
                squares = self._train_one_epoch(number, stop)
            train = self._metrics(squares, self._sizes[0])
            validation = self._metrics(self._evaluate(), self._sizes[1])
            if not np.isfinite([*train, *validation]).all():
                raise Diverged(number)
        except BaseException:
            self._copy(self._kept, self._live)  # back to the completed epoch, so that `epochs()` may be called again
            raise
        best = validation[0] < self.best_nmse
        if best:
            with torch.no_grad():
                torch._foreach_copy_(self._best, list(self._handed.values()))
            self.best_nmse, self.best_mse, self.best_epoch = *validation, number
        self._copy(self._live, self._kept)
        self.epoch, self.last_nmse, self.last_mse = number, *validation
        metrics = {
            "train/nmse": train[0],
            "val/nmse": validation[0],
            "train/mse": train[1],
            "val/mse": validation[1],
            "learning_rate": self._optimiser.param_groups[0]["lr"],
            "seconds": time.perf_counter() - start,
        }
        return Epoch(number, metrics, best)

    def _train_one_epoch(self, number: int, stop: Callable[[], bool] | None) -> Tensor:
        images, targets = self._train
        network, optimiser = self.network.train(), self._optimiser
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.training.precision == "bf16")
        squares = torch.zeros(targets.shape[1], dtype=torch.float64, device=self.device)
        batches = list(torch.randperm(len(targets)).to(self.device).split(self.training.batch_size))
        if len(batches) > 1 and len(batches[-1]) < least_batch(self.spec, self._image_shape):
            batches[-2:] = [torch.cat(batches[-2:])]  # a batch-norm needs more than one number
        augmentation = self._augmentation
        if augmentation is not None:
            draws, moved = augmentation.draw(len(targets)).to(self.device), torch.stack(self._moved)
        for step, batch in enumerate(batches, start=(number - 1) * len(batches)):
            if stop is not None and stop():
                raise Interrupted(f"stopped in epoch {number}")
            self._set_learning_rate(step / (len(batches) * self.training.epochs))
            seen, wanted = images[batch], targets[batch]
            if augmentation is not None:
                assert isinstance(seen, Tensor)  # prepared raw
                seen, wanted = augmentation(seen, draws[batch]), moved[draws[batch, 0], batch]
            with half:  # training alone: what is evaluated is what is handed out, in full precision
                predicted = network(seen)
            square = (self._standard(predicted.float(), seen) - wanted) ** 2
            loss = square if self._weights is None else square * self._weights[batch][:, None]
            loss.mean().backward()
            if self.training.gradient_clipping:
                torch.nn.utils.clip_grad_norm_(self._parameters, self.training.gradient_clipping)
            optimiser.step()
            optimiser.zero_grad()
            if self.training.ema:
                self._average(step)
            squares += square.detach().sum(0)
        return squares

    def _set_learning_rate(self, done: float) -> None:
        """The learning rate after that part, 0..1, of the training: it follows from the batch, so nothing is kept."""
        if self.training.schedule == "constant":
            return
        for group in self._optimiser.param_groups:
            group["lr"] = self.training.learning_rate * schedule(self.training.schedule, done)

    def _average(self, step: int) -> None:
        """Move the average towards the weights just trained; faster in the first steps, when they come from afar."""
        decay = min(self.training.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, now in zip(self._handed.values(), self._changing.values(), strict=True):
                if now.is_floating_point():
                    average.lerp_(now, 1 - decay)
                else:
                    average.copy_(now)  # a batch-norm's count of batches

    def _standard(self, outputs: Tensor, images: Tensor | WindowBatch) -> Tensor:
        """Standardised targets (b, k) from what the network gives of the images."""
        if self._physics is None:
            return outputs
        assert isinstance(images, Tensor) and isinstance(self._scored, Regressor)  # of a periodic network
        return (self._scored.targets(outputs, images) - self._shift) / self._stretch

    def _evaluate(self) -> Tensor:
        network = self._scored.eval()
        squares = torch.zeros(len(self.target_mean), dtype=torch.float64, device=self.device)
        with torch.inference_mode():
            for images, targets in self._validation:
                squares += ((network(images) - targets) ** 2).sum(0)
                self._alive()
        if self._in_unit:
            squares /= torch.from_numpy(self.target_scale**2).to(self.device)
        return squares

    def _metrics(self, squares: Tensor, n: int) -> tuple[float, float]:
        """(nmse, mse in unit²) from sums of squared errors (k,) in the network's units."""
        mse = squares.cpu().numpy() / n * self.target_scale**2
        return float((mse / self.train_variance).mean()), float(mse.mean())

    def _build(self) -> ConvNet | TransferNet | PeriodicNet:
        return build(self.spec, self._image_shape, len(self.target_mean))

    def _prepare(self, images: np.ndarray, *, raw: bool = False) -> Tensor | Windows:
        """The images in the form that is trained on fastest, or as they are: they can be moved in that form alone."""
        tensor = torch.from_numpy(np.ascontiguousarray(images, np.float32)).to(self.device)
        return tensor if raw else self.network.prepare(tensor, self._cache, self._alive)

    def _targets(self, labels: np.ndarray) -> Tensor:
        targets = (np.asarray(labels, np.float64) - self.target_mean) / self.target_scale
        return self._tensor(targets)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(self.device)

    def _make_optimiser(self, fused: bool) -> torch.optim.Optimizer:
        """Adam, or AdamW: the decay takes hold of weights, not of biases nor of a normalisation's shift and scale."""
        options: dict[str, Any] = {"lr": self.training.learning_rate, "betas": ADAM_BETAS, "eps": ADAM_EPSILON}
        if not self.training.weight_decay:
            return torch.optim.Adam(self._parameters, fused=fused, **options)
        groups = [
            {
                "params": [each for each in self._parameters if each.ndim > 1],
                "weight_decay": self.training.weight_decay,
            },
            {"params": [each for each in self._parameters if each.ndim == 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, fused=fused, **options)

    def _begin_with(self, initial: Mapping[str, Tensor]) -> None:
        own = self.network.state_dict()
        for name, tensor in initial.items():
            if name not in own or own[name].shape != tensor.shape:
                found = tuple(own[name].shape) if name in own else "no such tensor"
                raise SpecError(f"the tensor {name} {tuple(tensor.shape)} to begin with does not fit: {found}.")
            own[name].copy_(tensor)

    def _live_tensors(self) -> dict[str, Tensor]:
        tensors = {f"network.{name}": tensor for name, tensor in self._changing.items()}
        if self.training.ema:
            tensors |= {f"ema.{name}": tensor for name, tensor in self._handed.items()}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                tensors |= {f"adam.{name}.{key}": each for key, each in self._optimiser.state[parameter].items()}
        return tensors

    def _best_by_name(self) -> dict[str, Tensor]:
        return {f"best.{name}": best for name, best in zip(self._handed, self._best, strict=True)}

    @staticmethod
    def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
        torch._foreach_copy_(list(target.values()), list(source.values()))

    def _identity(self) -> dict[str, Any]:
        return {
            "model": to_dict(self.spec),
            "training": training_to_dict(self.training),
            "seed": self.seed,
        }

    def _restore(self, state: State) -> None:
        for key, expected in self._identity().items():
            if state.info.get(key) != expected:
                raise SpecError(f"the state's {key} is {state.info.get(key)}, this training's is {expected}.")
        wanted = self._live | self._best_by_name()
        expected = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.tensors.items()}
        if expected != found:
            odd = sorted(name for name, _ in expected.items() ^ found.items())
            raise SpecError(f"the state's tensors do not fit this training: {', '.join(odd[:5])}.")
        for name, tensor in wanted.items():
            tensor.copy_(state.tensors[name])  # into the existing memory, whose format is right
        self._copy(self._live, self._kept)
        self.epoch, self.best_epoch = state.info["epoch"], state.info["best_epoch"]
        scores = {name: state.info[name] for name in SCORES if name in state.info}
        if self.epoch and len(scores) < len(SCORES):  # the state of an earlier version
            scores = self._score_again() | scores
        for name in SCORES:
            setattr(self, name, scores[name] if self.epoch else float("inf"))

    def _score_again(self) -> dict[str, float]:
        """SCORES, of the weights of the best and of the newest epoch."""
        found = {}
        newest = [tensor.clone() for tensor in self._handed.values()]
        for kind, weights in (("best", self._best), ("last", newest)):
            with torch.no_grad():
                torch._foreach_copy_(list(self._handed.values()), weights)
            found[f"{kind}_nmse"], found[f"{kind}_mse"] = self._metrics(self._evaluate(), self._sizes[1])
        return found

    def _regressor(self, weights: list[Tensor]) -> Regressor:
        network = copy.deepcopy(self.network).to(device="cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        own = network.state_dict()
        for name, weight in zip(self._handed, weights, strict=True):
            own[name].copy_(weight)
        return self._wrap(network).eval()

    def _wrap(self, network: ConvNet | TransferNet | PeriodicNet) -> Regressor:
        return Regressor(
            network,
            torch.from_numpy(self._six[0]),
            torch.from_numpy(self._six[1]),
            symmetries=self._symmetries if symmetric(self.spec) else None,
            image_shape=self._image_shape,
            physics=self._physics,
        )


def relative_weights(labels: np.ndarray, relative: float) -> np.ndarray:
    """How much each image counts in the loss, (n,), mean 1: 1 + relative / s^2, s^2 the mean square of its labels.

    So the loss adds to the squared errors of the labels (n, k), given in units of the training split's scale,
    `relative` times the squared errors relative to the image's own labels: those of soft cells count, too.
    """
    weights = 1 + relative / (labels**2).mean(axis=1).clip(1e-6)
    return weights / weights.mean()


def schedule(name: str, done: float) -> float:
    """The learning rate over its highest value, after that part, 0..1, of all batches.

    "cosine" falls to 0 along half a wave. "one-cycle" (Smith & Topin 2018) rises from 1/25 over the first 30 % and
    then falls to 1/250,000, both along half a wave.
    """
    if name == "cosine":
        return _half_wave(1.0, 0.0, done)
    if name == "one-cycle":
        if done < CYCLE_WARMUP:
            return _half_wave(CYCLE_START, 1.0, done / CYCLE_WARMUP)
        return _half_wave(1.0, CYCLE_END, (done - CYCLE_WARMUP) / (1 - CYCLE_WARMUP))
    return 1.0


def _half_wave(begin: float, end: float, done: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * done)) / 2


def _changing_tensors(network: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the modules that have something to train: the averages of a batch-norm change
    along with its weights, and those of a frozen one do not."""
    trained = {name.rpartition(".")[0] for name, each in network.named_parameters() if each.requires_grad}
    return {
        name: tensor.detach()
        for name, tensor in network.state_dict(keep_vars=True).items()
        if name.rpartition(".")[0] in trained
    }


def save_state(state: State, path: Path) -> None:
    """Write one safetensors file, `info` as JSON in its metadata; `path` is either the whole file or what it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(state.tensors, temporary, metadata={"info": json.dumps(state.info)})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, outlives a power cut
    finally:
        os.close(folder)


def load_state(path: Path) -> State:
    """Read what `save_state` wrote. Raises SpecError naming a file that is missing, cut short or something else."""
    try:
        with safe_open(path, framework="pt") as file:
            info = json.loads((file.metadata() or {})["info"])
            if not isinstance(info, dict) or not isinstance(info.get("epoch"), int):
                raise ValueError("its info has no number of epochs")
            return State({name: file.get_tensor(name) for name in file.keys()}, info)  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        raise SpecError(f"{path}: not a readable training state ({error!r}).") from None


@contextmanager
def _generators(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Inside, torch draws from generators seeded with (seed, epoch); after it, from what it drew from before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
        yield


def _check(split: Split, name: str, like: Split | None = None) -> None:
    images, targets = split
    if images.ndim != 4 or targets.ndim != 2 or len(images) != len(targets) or not len(images):
        raise SpecError(
            f"{name} split: expected images (n, c, h, w) and targets (n, k) with n > 0, "
            f"found {images.shape} and {targets.shape}."
        )
    if like is not None and (images.shape[1:], targets.shape[1]) != (
        like[0].shape[1:],
        like[1].shape[1],
    ):
        raise SpecError(f"{name} split: its shapes {images.shape}, {targets.shape} differ from the training split's.")
    if not np.isfinite(targets).all():
        raise SpecError(f"{name} split: expected finite targets, found NaN or infinity.")
