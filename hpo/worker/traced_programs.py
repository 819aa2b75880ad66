"""Programs that torch has exported, for networks that differ in their weights alone.

torch traces a network for 0.2 s, whatever its size. A study trains many networks of one structure; they are one
program, whose weights are replaced. Runs in the trainer, in one thread.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

MOST = 4  # programs that are kept, the newest
LARGEST = 16_000_000  # bytes of the weights of a program that is kept; a larger network trains for longer anyway

_programs: OrderedDict[bytes, ExportedProgram] = OrderedDict()  # by structure


@contextmanager
def export_once() -> Iterator[None]:
    """Have `torch.export.export` return a program of the same structure with the new weights where there is one."""
    export = torch.export.export

    def exported(network: nn.Module, example: tuple[Any, ...], **arguments: Any) -> ExportedProgram:
        weights = network.state_dict(keep_vars=True)
        key = _structure(network, weights, (example, arguments))
        program = _programs.pop(key, None) if key is not None else None
        if program is None:
            program = export(network, example, **arguments)
        else:
            with torch.no_grad():
                for name, tensor in program.state_dict.items():
                    tensor.copy_(weights[name])
        is_small = sum(tensor.nbytes for tensor in weights.values()) <= LARGEST
        if key is not None and is_small and program.state_dict.keys() == weights.keys():
            _programs[key] = program
            if len(_programs) > MOST:
                _programs.popitem(last=False)
        return program

    torch.export.export = exported  # type: ignore[assignment]  # what MLflow calls inside `save_model`
    try:
        yield
    finally:
        torch.export.export = export


def _structure(network: nn.Module, weights: dict[str, torch.Tensor], call: Any) -> bytes | None:
    """Return all that the exported program depends on but the values of the weights; None if it cannot be told.

    That is the network as pickle writes it, with names and shapes in place of the weights; other tensors, such as
    constants and the example, count with their values.
    """
    names = {id(tensor): name for name, tensor in weights.items()}

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return None
            facts = (type(value).__name__, str(value.dtype), tuple(value.shape), value.stride(), value.requires_grad)
            content = names.get(id(value)) or value.detach().cpu().contiguous().numpy().tobytes()
            return (content, *facts)

    file = io.BytesIO()
    try:
        Pickler(file).dump((network, call))
    except (pickle.PicklingError, AttributeError, TypeError):  # it holds a function that has no name, for example
        return None
    return file.getvalue()
