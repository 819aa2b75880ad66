"""The training of one trial in a trainer process: epochs, checkpoints, and the packaged model."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch

from data_pipeline.dataset import Dataset
from hpo import crash
from hpo.files import sha256_of, sha256_of_files
from hpo.recording.trained import FINISHED, Trained
from hpo.study.objectives import beyond
from hpo.study.records import TrialSpec, version_key
from hpo.text import for_markdown, in_unit_text
from hpo.worker import inputs, protocol, trained_on
from hpo.worker.channel import Send, signs_of_life
from hpo.worker.scoring import prediction_table, write_table
from models import checkpoint, metrics, networks, specs, training
from models.regressor import Regressor, predict

CHECKPOINT_SHARE = 0.01  # of the time may go into checkpoints


def train(
    request: protocol.Train, send: Send, stop: Event
) -> Trained | protocol.Returned | protocol.Diverged | protocol.TooLarge:
    """Train one trial and leave its model in `folder`/model, and beside it what that predicts of the validation split.

    Send Started, Alive, EpochDone and CheckpointWritten. Return how it ended: stopped (a checkpoint was sent before if
    there is an epoch to keep), diverged, too large to be trained, or trained.
    """
    dataset = inputs.trial_data(request.data, request.spec)
    alive = signs_of_life(send)
    request.folder.mkdir(parents=True, exist_ok=True)
    run = _begin(request, dataset, alive)
    sizes = _sizes(request.spec, run, dataset)
    send(protocol.Started(epoch=run.epoch, parameters=sizes["parameters"]))
    if reason := beyond(request.spec.bounds or {}, sizes):
        return protocol.TooLarge(reason=reason)
    checkpoints = _Checkpoints(run, request.folder, send, interval=request.checkpoint_interval)

    def asked_to_stop() -> bool:
        if checkpoints.newest:
            crash.at("batch")
        alive()
        return stop.is_set()

    try:
        for epoch in run.epochs(asked_to_stop):
            at = time.time_ns() // 1_000_000
            send(protocol.EpochDone(number=epoch.number, at=at, metrics=dict(epoch.metrics)))
            if epoch.number < request.spec.epochs:
                checkpoints.write_if_due()
    except training.Interrupted:
        if run.epoch > checkpoints.newest:
            checkpoints.write()
        return protocol.Returned(epoch=run.epoch)
    except training.Diverged as error:
        return protocol.Diverged(epoch=error.epoch)
    parameters = None if request.spec.parameters else sizes["parameters"]  # the plan has them
    trained = _package(request, run, dataset, alive)
    return replace(trained, parameters=parameters, multiply_adds=sizes.get("multiply_adds"))


def _sizes(spec: TrialSpec, run: training.Training, dataset: Dataset) -> dict[str, int]:
    """Return the sizes of the network by their names: its parameters, and what the study asks for and cannot know."""
    values = {"parameters": networks.parameter_count(run.network)}
    if spec.multiply_adds == 0:  # unknown to the plan
        shape, inputs = dataset.images.shape[1:], len(dataset.input_names)
        values["multiply_adds"] = networks.multiply_adds(run.network, shape, inputs)
    return values


def _begin(request: protocol.Train, dataset: Dataset, alive: Callable[[], None]) -> training.Training:
    """Return the training, at its checkpoint if that fits."""
    spec, parts = request.spec, dataset.split
    settings = specs.training_from_dict(spec.training)
    torch.set_num_threads(settings.threads)
    initial = inputs.initial_tensors(spec, request.start)
    model, part = specs.from_dict(spec.model), inputs.trained_part(dataset, parts.train, spec)
    if not isinstance(model, specs.DescriptorsSpec):
        part = np.resize(part, len(parts.train))  # as many steps, whatever the share

    def begin(state: checkpoint.State | None) -> training.Training:
        return training.Training(
            model,
            settings,
            train=dataset.part(part),
            validation=dataset.part(parts.validation) if spec.refit is None else None,
            last_epoch=spec.epochs,
            seed=spec.seed,
            initial=initial,
            state=state,
            cache=request.cache,
            alive=alive,
            symmetries=dataset.symmetries,
            phases=spec.phases,
            target_names=dataset.target_names,
            input_names=dataset.input_names,
            variance=metrics.moments(dataset.targets[parts.train])[1],
            periodic=dataset.is_periodic,
            device=inputs.device(request.device),
        )

    if request.checkpoint is None:
        return begin(None)
    try:
        return begin(checkpoint.load_state(request.checkpoint))
    except specs.SpecError as error:  # a checkpoint of another version, for example
        print(f"starting again from epoch 0: {error}")
        return begin(None)


class _Checkpoints:
    """Writes checkpoints of a training, so seldom that they take at most CHECKPOINT_SHARE of the time."""

    def __init__(self, run: training.Training, folder: Path, send: Send, *, interval: float) -> None:
        """`interval`: seconds between two checkpoints, at least."""
        self._run, self._folder, self._send, self._interval = run, folder, send, interval
        self.newest = run.epoch
        self._pause, self._last = interval, time.monotonic()  # seconds

    def write_if_due(self) -> None:
        if time.monotonic() - self._last >= self._pause:
            begin = time.monotonic()
            self.write()
            self._last = time.monotonic()
            self._pause = max(self._interval, (self._last - begin) / CHECKPOINT_SHARE)

    def write(self) -> None:
        self.newest = self._run.epoch
        path = self._folder / f"checkpoint-{self.newest:06d}.safetensors"
        checkpoint.save_state(self._run.state(), path)
        sha256 = sha256_of(path)
        self._send(protocol.CheckpointWritten(path=path, epoch=self.newest, sha256=sha256))


def _origin(
    request: protocol.Train, run: training.Training, dataset: Dataset, scores: metrics.Scores, *, images: int
) -> dict[str, Any]:
    """Return what `spec.json` says of the training, which had so many images, and of its data."""
    return {
        "trial": request.spec.to_json(),
        "validation": scores.to_dict(),
        "best_epoch": run.best_epoch,
        "data": {"name": dataset.name, "digest": request.spec.data} | _reading(dataset),
        trained_on.KEY: trained_on.describe(dataset) | {"images": images},
    }


def _reading(dataset: Dataset) -> dict[str, Any]:
    """Return how images are read for the model, if not in the form of the course."""
    layout = dataset.description.layout.of_images()
    return {"layout": layout.to_dict()} if layout.set() else {}


def _package(request: protocol.Train, run: training.Training, dataset: Dataset, alive: Callable[[], None]) -> Trained:
    """Write the best epoch's model and its predictions of the validation split; return the scores.

    Those of a refit on the validation split are its folds'; it predicts the images that it was trained on.
    """
    from hpo.worker.packaging import package  # MLflow takes a second, which probes and scores do not need

    refit, parts = request.spec.refit, dataset.split
    part, indices = ("validation", parts.validation) if refit is None else ("training", parts.train)
    images, targets, *numbers = dataset.part(indices)

    def evaluate(regressor: Regressor) -> tuple[np.ndarray, metrics.Scores]:
        predicted = predict(regressor, images, *numbers, alive=alive)
        learned = dataset.targets[dataset.split.train]
        return predicted, metrics.scores_of_part(predicted, targets, learned=learned, in_unit=dataset.in_unit)

    best, share = run.best_regressor(), inputs.trained_part(dataset, dataset.split.train, request.spec)
    predicted, best_scores = evaluate(best)
    _, last_scores = evaluate(run.last_regressor())
    of_training = None
    if refit is not None:
        of_training, best_scores, last_scores = best_scores, refit.validation, refit.validation
    predictions, folder = request.folder / f"{part}.csv", request.folder / "model"
    write_table(prediction_table(dataset, indices, predicted), predictions)
    crash.at("packaging")
    shutil.rmtree(folder, ignore_errors=True)
    package(
        folder,
        best,
        spec=request.spec.model,
        image_shape=tuple(dataset.images.shape[1:]),
        target_names=dataset.target_names,
        unit=dataset.unit,
        example_images=images[:2],
        example_inputs=numbers[0][:2] if numbers else None,
        pixels=dataset.description.layout.pixels(),
        in_unit=for_markdown(in_unit_text(best_scores.in_unit)),
        extra=_origin(request, run, dataset, best_scores, images=len(share)),
    )
    files = {f"{folder.name}/{path}": sha256 for path, sha256 in sha256_of_files(folder).items() if path != "MLmodel"}
    (request.folder / FINISHED).touch()
    gpu = inputs.gpu_name(run.device)
    return Trained(
        folder=folder,
        predictions=predictions,
        epochs=run.epoch,
        best_epoch=run.best_epoch,
        best_val_nmse=run.best_nmse if refit is None else refit.nmse,
        best_val_mse=run.best_mse if refit is None else refit.mse,
        last_val_nmse=run.last_nmse if refit is None else refit.nmse,
        last_val_mse=run.last_mse if refit is None else refit.mse,
        training=of_training,
        validation=best_scores,
        last_validation=last_scores,
        files=files | {predictions.name: sha256_of(predictions)},
        device=f"cuda: {gpu}" if gpu else None,
        images=len(share) if "share" in request.spec.point | request.spec.training else None,
        common=_common(dataset, predicted) if refit is None else refit.common,
    )


def _common(dataset: Dataset, predicted: np.ndarray) -> dict[str, float] | None:
    """Return the NMSE of predictions of the validation split (n, k) on those images that each earlier data set has.

    The variance is that of the training labels that it has. None if there is no earlier data set.
    """
    parts, scores = dataset.split, dict[str, float]()
    for earlier in dataset.earlier:
        own, learned = earlier.within(parts.validation), dataset.targets[earlier.within(parts.train)]
        if len(own):
            chosen, variance = np.isin(parts.validation, own), metrics.moments(learned)[1]
            nmse = metrics.scores(predicted[chosen], dataset.targets[own], train_variance=variance).nmse
            scores |= {} if nmse is None else {version_key(earlier.digest, earlier.split): nmse}
    return scores or None
