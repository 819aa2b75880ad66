"""A trainer: a long-lived process that imports torch once and does what its supervisor asks, one thing at a time.

It talks to no database and no server.
"""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.errors import DatasetError
from hpo.errors import disk_is_full
from hpo.text import first_line
from hpo.worker import protocol
from hpo.worker.channel import Channel, serve
from models import user


def answer_requests(channel: Channel) -> None:
    """Train, score and probe as the supervisor asks."""
    import torch

    from hpo.worker import code_check, probing, scoring, train_trial

    torch.use_deterministic_algorithms(True)
    actions: dict[type, Callable[..., Any]] = {
        protocol.Train: train_trial.train,
        protocol.Score: scoring.answer,
        protocol.Probe: probing.probe,
        protocol.Prove: probing.prove,
        protocol.Check: code_check.check,
    }
    channel.send(protocol.Ready())
    while True:
        request = channel.requests.get()
        torch.set_num_threads(1)  # a trial that asks for more sets its own number
        try:
            channel.send(actions[type(request)](request, channel.send, channel.stop))
        except Exception as error:
            traceback.print_exc()
            channel.send(failure(error))
        channel.stop.clear()


def failure(error: Exception) -> protocol.Message:
    """Return the message that says why a request could not be done."""
    if disk_is_full(error):
        return protocol.DiskFull(reason=f"no room on the disk ({error})")
    if isinstance(error, DatasetError):
        return protocol.DataDamaged(reason=str(error))
    reason = user.fault(error) or f"{type(error).__name__}: {first_line(error)}"
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
    if is_memory or "can't allocate memory" in str(error):  # torch's on a CPU
        return protocol.OutOfMemory(reason=reason)
    return protocol.Failed(reason=reason)


if __name__ == "__main__":
    if sys.argv[2:]:  # nothing but this command line says which code of users may run here
        user.look_in(Path(sys.argv[2]))
    with user.trusting(sys.argv[3:]):
        serve(answer_requests)
