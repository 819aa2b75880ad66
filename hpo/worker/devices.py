"""The device of a worker's trainers: the GPUs that can train, or the CPU. Nothing here imports torch."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import IO

from hpo.worker import protocol
from hpo.worker.children import Pipes
from hpo.worker.processes import Process, visible_gpus

PATIENCE = 60.0  # seconds for a GPU's test; a driver that hangs never answers

Start = Callable[[IO[bytes], str], Pipes]


@dataclass(frozen=True, kw_only=True)
class Place:
    """The device of a worker's trainers."""

    device: str  # "cpu" or "cuda"
    gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them
    reason: str = ""  # of the choice, in words


CPU = Place(device="cpu")


def choose(wish: str, *, start: Start = lambda log, gpu: Process("gpu_test", log, gpu=gpu)) -> Place:
    """Return where to train: `cpu`; `cuda`, which insists on the visible GPUs; `auto`, the GPUs that pass a test.

    If no GPU passes it, `auto` is the CPU. A process of its own tests each GPU.
    """
    gpus = visible_gpus() if wish != "cpu" else []
    if wish != "auto":
        return Place(device=wish, gpus=tuple(gpus))
    if not gpus:
        return Place(device="cpu", reason="on the CPU: there is no NVIDIA GPU here, or none is visible")
    failures = _test(gpus, start)
    passed = tuple(gpu for gpu in gpus if gpu not in failures)
    failed = "; ".join(f"GPU {gpu} failed its test: {reason}" for gpu, reason in failures.items())
    if not passed:
        return Place(device="cpu", reason=f"on the CPU: {failed}")
    reason = f"on GPU{'s' * (len(passed) > 1)} {', '.join(passed)}, which passed a test" + (
        f" ({failed})" if failed else ""
    )
    return Place(device="cuda", gpus=passed, reason=reason)


def _test(gpus: Sequence[str], start: Start) -> dict[str, str]:
    """Return why each GPU that cannot train cannot."""
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("wb") as log:
        waiting = {gpu: start(log, gpu) for gpu in gpus}
        processes, deadline = list(waiting.values()), time.monotonic() + PATIENCE
        try:
            while waiting and (left := deadline - time.monotonic()) > 0:
                ready = connection.wait([*waiting.values()], left)  # type: ignore[list-item]
                for gpu, process in list(waiting.items()):
                    if process not in ready:
                        continue
                    for message in process.messages():
                        waiting.pop(gpu, None)
                        if isinstance(message, protocol.Failed):
                            failures[gpu] = message.reason
                    if process.closed and gpu in waiting:
                        del waiting[gpu]
                        failures[gpu] = f"its {process.obituary()}"
        finally:
            for process in processes:
                process.kill()
                process.close()
    return failures | dict.fromkeys(waiting, f"no answer within {PATIENCE:.0f} s")
