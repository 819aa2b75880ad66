"""What a training needs to go on after an interruption: copies of its tensors in memory, and one file."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.specs import SpecError


@dataclass(frozen=True)
class State:
    """All that a training needs to go on after a completed epoch."""

    tensors: dict[str, Tensor]  # on the CPU, contiguous, in memory of their own
    info: dict[str, Any]  # JSON; "epoch" is the number of completed epochs


class Snapshots:
    """Copies of the tensors that a training changes: after the newest completed epoch, and the best epoch's weights.

    `live` are all of these tensors by name, changed in place by the training; `weights` those of the model it returns.
    """

    def __init__(self, live: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        self._live, self._weights = live, weights
        self.newest = {name: tensor.clone() for name, tensor in live.items()}
        self.best = {name: tensor.clone() for name, tensor in weights.items()}

    def keep(self) -> None:
        """Copy the live tensors: they are those of a completed epoch."""
        _copy(self._live, self.newest)

    def keep_best(self) -> None:
        """Copy the model's weights: they are the best so far."""
        _copy(self._weights, self.best)

    def roll_back(self) -> None:
        """Set the live tensors to those of the newest completed epoch."""
        _copy(self.newest, self._live)

    def tensors(self) -> dict[str, Tensor]:
        """Return a copy of all of them, on the CPU and contiguous, as files need them."""
        tensors = self.newest | self._best_by_name()
        return {name: t.to("cpu", copy=True, memory_format=torch.contiguous_format) for name, t in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with what `tensors` returned earlier. Raise SpecError if they are of another training."""
        targets = self._live | self._best_by_name()
        expected = {name: tuple(tensor.shape) for name, tensor in targets.items()}
        stored = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if expected != stored:
            different = sorted(name for name, _ in expected.items() ^ stored.items())
            raise SpecError(f"the state's tensors do not fit this training: {', '.join(different[:5])}.")
        for name, tensor in targets.items():
            tensor.copy_(tensors[name])  # into the existing memory, whose format is right
        self.keep()

    def _best_by_name(self) -> dict[str, Tensor]:
        return {f"best.{name}": tensor for name, tensor in self.best.items()}


def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_copy_(list(target.values()), list(source.values()))


def save_state(state: State, path: Path) -> None:
    """Write one safetensors file, `info` as JSON in its metadata; `path` always holds a whole file, old or new."""
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
        os.fsync(folder)  # so that the new name survives a power cut
    finally:
        os.close(folder)


def load_state(path: Path) -> State:
    """Return what `save_state` wrote. Raise SpecError if the file is missing, cut short or something else."""
    try:
        with safe_open(path, framework="pt") as file:
            info = json.loads((file.metadata() or {})["info"])
            if not isinstance(info, dict) or not isinstance(info.get("epoch"), int):
                raise ValueError("its info has no number of epochs")
            return State({name: file.get_tensor(name) for name in file.keys()}, info)  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        raise SpecError(f"{path}: not a readable training state ({error!r}).") from None
