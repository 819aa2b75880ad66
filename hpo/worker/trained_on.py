"""What is known of the images that a model was trained on: the yardsticks for what it predicts of others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.dataset import Dataset
from hpo.errors import ModelError
from models import metrics
from models.metrics import Predictor

KEY = "training"  # of spec.json


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """Facts of a training split, and the baseline predictors that were fitted to it."""

    images: int
    variance: np.ndarray  # (k,) of the labels, label's unit squared
    fractions: tuple[tuple[float, float], ...]  # lowest and highest mean pixel of an image, for each channel
    predictors: Mapping[str, Predictor]  # by name


def describe(dataset: Dataset) -> dict[str, Any]:
    """Return the facts of the training split in JSON form.

    A baseline predictor sees no more of an image than the mean of each channel, and the inputs beside it. It is stored
    as what it predicts for images of one pixel: fitted to these, it is the same polynomial again.
    """
    train = dataset.split.train
    means = dataset.images.mean(axis=(2, 3), dtype=np.float64)[train]
    inputs = None if dataset.inputs is None else dataset.inputs[train]
    learned = _part(means, dataset.targets[train], inputs)
    nodes = _nodes(means.shape[1], inputs)
    pixels, _, *beside = _part(
        nodes[:, : means.shape[1]], np.empty(0), None if inputs is None else nodes[:, means.shape[1] :]
    )
    return {
        "images": len(train),
        "variance": metrics.moments(dataset.targets[train])[1].tolist(),
        "fractions": np.column_stack([means.min(axis=0), means.max(axis=0)]).tolist(),
        "nodes": nodes.tolist(),
        "predictors": {name: fit(*learned)(pixels, *beside).tolist() for name, fit in metrics.PREDICTORS.items()},
    }


def restore(content: Any, *, channels: int, inputs: int, targets: int, where: str) -> TrainedOn:
    """Return the facts in JSON form, with those baseline predictors that were known when they were written. Raise
    ModelError if they are not those of a model with so many channels, inputs beside the image and targets."""
    try:
        variance, fractions, nodes = (np.array(content[key], np.float64) for key in ("variance", "fractions", "nodes"))
        stored = {name: fit for name, fit in metrics.PREDICTORS.items() if name in content["predictors"]}
        predicted = {name: np.array(content["predictors"][name], np.float64) for name in stored}
        shapes = [variance.shape, fractions.shape, nodes.shape[1:], *(values.shape for values in predicted.values())]
        expected = [(targets,), (channels, 2), (channels + inputs,), *[(len(nodes), targets)] * len(predicted)]
        if shapes != expected or not all(
            np.isfinite(values).all() for values in (fractions, nodes, *predicted.values())
        ):
            raise ValueError(f"found {shapes}, expected {expected}")
        images = int(content["images"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(
            f'{where}: "{KEY}": expected the facts of the training split as they were written, found something else '
            f"({type(error).__name__}: {error}). Download the model again."
        ) from None
    beside = nodes[:, channels:] if inputs else None
    return TrainedOn(
        images=images,
        variance=variance,
        fractions=tuple((low, high) for low, high in fractions.tolist()),
        predictors={
            name: stored[name](*_part(nodes[:, :channels], values, beside)) for name, values in predicted.items()
        },
    )


def _part(means: np.ndarray, targets: np.ndarray, inputs: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """Return images of one pixel, targets, and the inputs if there are any."""
    return (means[:, :, None, None], targets) if inputs is None else (means[:, :, None, None], targets, inputs)


def _nodes(channels: int, inputs: np.ndarray | None) -> np.ndarray:
    """Return pixels and inputs (p, channels + m) that determine a predictor: cubic in the pixel of a single channel,
    linear in those of several and in the inputs."""
    pixels = np.linspace(0, 1, 4)[:, None] if channels == 1 else np.vstack([np.zeros(channels), np.eye(channels)])
    if inputs is None:
        return pixels
    low, high = inputs.min(axis=0), inputs.max(axis=0)
    several = np.hstack([pixels, np.tile(low, (len(pixels), 1))])
    raised = np.hstack([np.zeros((len(low), channels)), np.where(np.eye(len(low)) > 0, high, low)])
    return np.vstack([several, raised])
