"""The optimiser, its learning rate, the moving average of the weights, and what an epoch draws from."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.specs import ADAM_BETAS, ADAM_EPSILON, TrainingSpec

CYCLE_WARMUP = 0.3  # of the training: in this part "one-cycle" raises the learning rate to its highest value
CYCLE_START, CYCLE_END = 1 / 25, 1e-4 / 25  # of the highest learning rate: its first and its last value


def adam(network: nn.Module, training: TrainingSpec) -> torch.optim.Optimizer:
    """Return Adam, or AdamW, whose decay acts on weights, not on biases nor on a normalisation's shift and scale.

    Its state is complete from the start, so that fresh and resumed trainings are equal.
    """
    parameters: list[Tensor] = [values for values in network.parameters() if values.requires_grad]
    options: dict[str, Any] = {"lr": training.learning_rate, "betas": ADAM_BETAS, "eps": ADAM_EPSILON, "fused": True}
    optimiser: torch.optim.Optimizer
    if training.weight_decay:
        weights = [values for values in parameters if values.ndim > 1]
        others = [values for values in parameters if values.ndim == 1]
        groups = [{"params": weights, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW(groups, **options)
    else:
        optimiser = torch.optim.Adam(parameters, **options)
    for values in parameters:
        # The averages have the parameter's memory format: with another one, fused Adam silently pairs wrong numbers.
        optimiser.state[values] = {
            "step": torch.zeros((), device=values.device),
            "exp_avg": torch.zeros_like(values, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(values, memory_format=torch.preserve_format),
        }
    return optimiser


def schedule(name: str, done: float) -> float:
    """Return the learning rate over its highest value after the part `done`, 0..1, of all batches.

    "cosine" falls to 0 along half a wave. "one-cycle" (Smith & Topin 2018) rises from 1/25 over the first 30 % and
    then falls to 1/250,000, both along half a wave.
    """
    if name == "constant":
        return 1.0
    if name == "cosine":
        return _half_wave(1.0, 0.0, done)
    if name == "one-cycle":
        if done < CYCLE_WARMUP:
            return _half_wave(CYCLE_START, 1.0, done / CYCLE_WARMUP)
        return _half_wave(1.0, CYCLE_END, (done - CYCLE_WARMUP) / (1 - CYCLE_WARMUP))
    raise ValueError(f"no schedule of the learning rate is called {name}")


def _half_wave(begin: float, end: float, done: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * done)) / 2


def move_average(averages: dict[str, Tensor], weights: dict[str, Tensor], *, decay: float, step: int) -> None:
    """Move the averages towards the weights of step 0, 1, …; faster in the first steps, when they start far away."""
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for average, values in zip(averages.values(), weights.values(), strict=True):
            if values.is_floating_point():
                average.lerp_(values, 1 - decay)
            else:
                average.copy_(values)  # a batch-norm's count of batches


def changing_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of the modules that are trained.

    The averages of a batch-norm change along with its weights; those of a frozen one do not. Of a network without
    trained parameters all are returned: it is fitted.
    """
    trained = {name.rpartition(".")[0] for name, values in network.named_parameters() if values.requires_grad}
    return {
        name: tensor.detach()
        for name, tensor in network.state_dict(keep_vars=True).items()
        if not trained or name.rpartition(".")[0] in trained
    }


@contextmanager
def generators(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Inside, torch draws from generators seeded with (seed, epoch); afterwards from those it had before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
        yield
