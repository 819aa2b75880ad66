"""Timing of a few batches of each trial, for an estimate of what a study costs."""

import resource
import sys
import time
from threading import Event

import torch

from data_pipeline.dataset import Dataset
from data_pipeline.split import Split
from hpo.study.records import TrialSpec
from hpo.worker import inputs, protocol
from hpo.worker.channel import Send
from models import networks, specs
from models.training import Training

PROBE_BATCHES = 4  # timed


def probe(request: protocol.Probe, send: Send, stop: Event) -> protocol.ProbesEnded:
    """Send a Probed for each trial. Weights that are not on this machine are replaced by random ones, as costly."""
    dataset, parts = inputs.load_data(request.data)
    device = inputs.device(request.device)
    torch.zeros(1, device=device)  # a GPU's start is no network's cost
    for index, spec in enumerate(request.specs):
        send(_measure(index, spec, dataset, parts, device))
    return protocol.ProbesEnded()


def _measure(index: int, spec: TrialSpec, dataset: Dataset, parts: Split, device: str) -> protocol.Probed:
    settings = specs.training_from_dict({**spec.training, "epochs": 2})
    torch.set_num_threads(settings.threads)
    count = min(len(parts.train), PROBE_BATCHES * settings.batch_size)
    share = count / len(parts.train)
    train, validation = parts.train[:count], parts.validation[: max(1, round(share * len(parts.validation)))]
    initial = inputs.initial_tensors(spec, None) if spec.weights and spec.weights.sha256 else None
    begin = time.monotonic()
    training = Training(
        specs.from_dict(spec.model),
        settings,
        train=(dataset.images[train], dataset.targets[train]),
        validation=(dataset.images[validation], dataset.targets[validation]),
        seed=spec.seed,
        initial=initial,
        symmetries=dataset.symmetries,
        phases=spec.phases,
        target_names=dataset.target_names,
        device=device,
    )
    once = (time.monotonic() - begin) / share
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
