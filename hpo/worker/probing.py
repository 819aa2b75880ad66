"""A few batches of a trial: timed, for an estimate of what a study costs, or as the proof that this place can train."""

import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from threading import Event
from typing import Any

import numpy as np
import torch

from data_pipeline.dataset import Dataset, Part
from data_pipeline.split import Split
from hpo.files import write_atomically
from hpo.study.records import TrialSpec
from hpo.worker import inputs, protocol
from hpo.worker.channel import Send
from models import networks, specs
from models.checkpoint import State
from models.training import Diverged, Training

PROBE_BATCHES = 4  # timed
PROOF_IMAGES = 2  # that prove a place: as many as a batch-norm needs
PROOF_BYTES = 2**20  # that are written and removed again


def probe(request: protocol.Probe, send: Send, stop: Event) -> protocol.ProbesEnded:
    """Send a Probed for each trial. Weights that are not on this machine are replaced by random ones, as costly."""
    dataset, parts = inputs.load_data(request.data)
    device = inputs.device(request.device)
    torch.zeros(1, device=device)  # a GPU's start is no network's cost
    for index, spec in enumerate(request.specs):
        send(_measure(index, spec, dataset, parts, device))
    return protocol.ProbesEnded()


def prove(request: protocol.Prove, send: Send, stop: Event) -> protocol.Proved:
    """Do once, small, what a trial does here: read the data set, train on the device, write files.

    The network begins at random. Raise what a trial would raise.
    """
    dataset, parts = inputs.load_data(request.data)
    training = dict(request.spec.training) | {"epochs": 1}
    device = inputs.device(request.device)
    run = begin(request.spec, training, dataset, parts, device, images=PROOF_IMAGES, initial=None)
    with suppress(Diverged):  # the fault of the trial: the place has trained it
        next(run.epochs())
    request.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(request.folder / "proof", bytes(PROOF_BYTES))
    (request.folder / "proof").unlink()
    return protocol.Proved(device=inputs.gpu_name(run.device))


def begin(
    spec: TrialSpec,
    settings: Mapping[str, Any],
    dataset: Dataset,
    parts: Split,
    device: str,
    *,
    images: int,
    initial: dict[str, torch.Tensor] | None,
    state: State | None = None,
) -> Training:
    """Return the trial's training on so many images of the training split, and as large a share for validation."""
    chosen = specs.training_from_dict(settings)
    torch.set_num_threads(chosen.threads)
    share = images / len(parts.train)
    train, validation = parts.train[:images], parts.validation[: max(1, round(share * len(parts.validation)))]
    return Training(
        specs.from_dict(spec.model),
        chosen,
        train=_labelled(dataset.part(train)),
        validation=_labelled(dataset.part(validation)),
        seed=spec.seed,
        initial=initial,
        state=state,
        symmetries=dataset.symmetries,
        phases=spec.phases,
        target_names=dataset.target_names,
        input_names=dataset.input_names,
        periodic=dataset.is_periodic,
        device=device,
    )


def _labelled(part: Part) -> Part:
    """Return images whose targets (n, k) have all labels and vary: those of so few images may not."""
    labels = np.nan_to_num(part[1], nan=0.0)
    is_constant = labels.max(axis=0) == labels.min(axis=0)
    labels[0, is_constant] += 1 + abs(labels[0, is_constant])
    return (part[0], labels) if len(part) == 2 else (part[0], labels, part[2])


def _measure(index: int, spec: TrialSpec, dataset: Dataset, parts: Split, device: str) -> protocol.Probed:
    settings = dict(spec.training) | {"epochs": 2} | specs.training_defaults(spec.model["family"])
    count = min(len(parts.train), PROBE_BATCHES * specs.training_from_dict(settings).batch_size)
    share = count / len(parts.train)
    is_here = spec.weights is not None and spec.weights.sha256 and spec.own_weights is None
    initial = inputs.initial_tensors(spec, None) if is_here else None
    start = time.monotonic()
    training = begin(spec, settings, dataset, parts, device, images=count, initial=initial)
    once = (time.monotonic() - start) / share
    seconds = [epoch.metrics["seconds"] for epoch in training.epochs()][-1]  # the first one warms up
    parameters = networks.parameter_count(training.network)
    training.state()  # the memory that a checkpoint needs counts, too
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    return protocol.Probed(
        index=index,
        parameters=parameters,
        seconds=seconds / share,
        once=once,
        memory=peak,
        device=inputs.gpu_name(training.device),
    )
