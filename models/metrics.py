"""Scores of predictions, and the baseline predictors that every model is compared with (numpy only)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

InUnit = Mapping[str, np.ndarray]  # labels or predictions (n,) by their target's name and unit


class Predictor(Protocol):
    """Maps images (n, c, h, w) in 0..1, and inputs (n, m) if there are any, to targets (n, k) in the label's unit."""

    def __call__(self, images: np.ndarray, inputs: np.ndarray | None = None) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of predictions for one split: means over the targets, and one number a target.

    A score that does not exist is None: R² of a target that does not vary in the split, MAPE of a target with a label
    of zero, every score of a target without any label, every number that is not finite. A mean covers the targets for
    which the score exists and is None if there is none. An infinite error is not left out of the mean: that mean is
    None as well. Missing labels count in no score; "n" in `per_target` says how many count, where that differs.
    """

    nmse: float | None  # MSE / variance of the training split
    mse: float | None  # unit²
    r2: float | None  # against the mean of the split that is scored, not of the training split
    nrmse: float | None  # RMSE / standard deviation of the training split
    mae: float | None  # unit
    mape: float | None  # fraction, not per cent
    per_target: Mapping[str, list[float | None]]  # of each score, by its name
    # Of each target with a transform, by its name and unit: rmse (unit), nrmse and r2 with the transform undone.
    in_unit: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: every mean by its name, "per_target", and "in_unit" if there is any."""
        means = {name: getattr(self, name) for name in SCORES} | {"per_target": dict(self.per_target)}
        return means | ({"in_unit": dict(self.in_unit)} if self.in_unit else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Scores":
        """Return the scores in JSON form; a score unknown to an earlier version is None."""
        means = {name: values.get(name) for name in SCORES}
        return cls(**means, per_target=values.get("per_target", {}), in_unit=values.get("in_unit", {}))


BLOCK = 256  # images that are converted to double precision together
SCORES = ("nmse", "mse", "r2", "nrmse", "mae", "mape")


def scores(predictions: np.ndarray, targets: np.ndarray, *, train_variance: np.ndarray) -> Scores:
    """Return the scores of predictions (n, k) against targets (n, k), both in the label's unit; a NaN is no target.

    `train_variance` (k,) is the variance of the training split, unit². Raise ValueError on shapes that do not fit.
    """
    predictions, targets = np.asarray(predictions, np.float64), np.asarray(targets, np.float64)
    variance = np.asarray(train_variance, np.float64)
    fits = targets.ndim == 2 and predictions.shape == targets.shape and variance.shape == targets.shape[1:]
    if not fits or not len(targets):
        raise ValueError(
            "expected predictions and targets (n, k) with n > 0 and train_variance (k,), "
            f"found {predictions.shape}, {targets.shape} and {variance.shape}."
        )
    present = ~np.isnan(targets)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # the result is None
        error = np.where(present, predictions - targets, 0)
        share = len(targets) / present.sum(axis=0)  # exactly 1 if nothing is missing
        mse = (error**2).mean(axis=0) * share
        per_target = {
            "nmse": _ratio(mse, variance),
            "mse": mse,
            "r2": 1 - _ratio(mse, spread(targets)),
            "nrmse": _ratio(np.sqrt(mse), np.sqrt(variance)),
            "mae": np.abs(error).mean(axis=0) * share,
            "mape": np.where(present, _ratio(np.abs(error), np.abs(targets)), 0).mean(axis=0) * share,
        }
    anywhere = present.any(axis=0)
    exists = {name: anywhere for name in SCORES}
    exists["nmse"] = exists["nrmse"] = anywhere & (variance > 0)
    exists["r2"], exists["mape"] = spread(targets) > 0, anywhere & (targets != 0).all(axis=0)
    means: dict[str, float | None] = {}
    for name, values in per_target.items():
        existing = values[exists[name]]
        means[name] = float(existing.mean()) if existing.size and np.isfinite(existing).all() else None
    numbers = {name: [x if np.isfinite(x) else None for x in values.tolist()] for name, values in per_target.items()}
    if not present.all():
        numbers["n"] = present.sum(axis=0).tolist()
    return Scores(**means, per_target=numbers, in_unit={})


def scores_of_part(
    predictions: np.ndarray, targets: np.ndarray, *, learned: np.ndarray, in_unit: Callable[[np.ndarray], InUnit]
) -> Scores:
    """Return the scores of predictions (n, k) against targets (n, k) by the variance of those `learned` (m, k).

    `in_unit` gives the targets with a transform in the label's unit, which are scored there as well.
    """
    predicted, true, trained = (in_unit(values) for values in (predictions, targets, learned))
    unit: dict[str, dict[str, float | None]] = {}
    for name, values in predicted.items():
        variance = moments(trained[name][:, None])[1]
        alone = scores(values[:, None], true[name][:, None], train_variance=variance)
        unit[name] = {"rmse": None if alone.mse is None else alone.mse**0.5, "nrmse": alone.nrmse, "r2": alone.r2}
    return replace(scores(predictions, targets, train_variance=moments(learned)[1]), in_unit=unit)


def mean_of(folds: Sequence[Scores]) -> Scores:
    """Return the mean of the scores of each fold; None where one of them is None. "n" is a sum."""

    def mean(values: Sequence[float | None]) -> float | None:
        present = [value for value in values if value is not None]
        return sum(present) / len(values) if len(present) == len(values) else None

    per_target = {
        name: [mean(values) for values in zip(*(fold.per_target[name] for fold in folds), strict=True)]
        for name in folds[0].per_target
        if name in SCORES
    }
    counts = [fold.per_target["n"] for fold in folds if "n" in fold.per_target]
    if len(counts) == len(folds):
        per_target["n"] = [sum(filter(None, values)) for values in zip(*counts, strict=True)]
    in_unit = {
        name: {score: mean([fold.in_unit[name][score] for fold in folds]) for score in scores}
        for name, scores in folds[0].in_unit.items()
    }
    means = {name: mean([getattr(fold, name) for fold in folds]) for name in SCORES}
    return Scores(**means, per_target=per_target, in_unit=in_unit)


def moments(targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance (k,) of the targets (n, k) that are not missing; NaN where all are.

    To the bit those of numpy where nothing is missing."""
    present = ~np.isnan(targets)
    with np.errstate(invalid="ignore"):
        mean = np.where(present, targets, 0).sum(axis=0) / present.sum(axis=0)
        deviation = np.where(present, targets - mean, 0)
        return mean, (deviation * deviation).sum(axis=0) / present.sum(axis=0)


def varies(targets: np.ndarray) -> np.ndarray:
    """Return whether each of the targets (n, k) has two different labels, (k,)."""
    missing = np.isnan(targets)
    ends = np.where(missing, np.inf, targets).min(axis=0), np.where(missing, -np.inf, targets).max(axis=0)
    return np.asarray(ends[0] < ends[1])


def spread(targets: np.ndarray) -> np.ndarray:
    """Return the variance (k,) of targets (n, k), unit²; exactly 0 of a target that does not vary, despite rounding."""
    return np.where(varies(targets), moments(targets)[1], 0.0)


def mean_predictor(
    train_images: np.ndarray, train_targets: np.ndarray, train_inputs: np.ndarray | None = None
) -> Predictor:
    """Return a predictor of the training targets' mean for every image; its training NMSE is 1 and its R² is 0."""
    mean, _ = moments(np.asarray(train_targets, np.float64))
    return lambda images, inputs=None: np.tile(mean, (len(images), 1))


def volume_fraction_predictor(
    train_images: np.ndarray, train_targets: np.ndarray, train_inputs: np.ndarray | None = None
) -> Predictor:
    """Return a cubic polynomial in the mean pixel, fitted to each target by least squares on the training split.

    Of images with several channels, such as phases, it is linear in the mean of each channel. It is linear in the
    inputs as well."""
    train_targets = np.asarray(train_targets, np.float64)
    centre, _ = moments(train_targets)  # subtracted before the fit: labels with a large offset keep their digits
    middle, width = (np.zeros(0), np.ones(0)) if train_inputs is None else moments(train_inputs)
    width = np.sqrt(width) + (width == 0)

    def terms(images: np.ndarray, inputs: np.ndarray | None) -> np.ndarray:
        return _fractions(images) if inputs is None else np.hstack([_fractions(images), (inputs - middle) / width])

    learned, present = terms(train_images, train_inputs), ~np.isnan(train_targets)
    coefficients = np.empty((learned.shape[1], len(centre)))
    for rows in np.unique(present, axis=1).T:  # one fit for all targets that have the same labels
        own = (present == rows[:, None]).all(axis=0)
        coefficients[:, own] = np.linalg.lstsq(learned[rows], (train_targets - centre)[rows][:, own], rcond=None)[0]

    def predict(images: np.ndarray, inputs: np.ndarray | None = None) -> np.ndarray:
        targets: np.ndarray = terms(images, inputs) @ coefficients + centre
        return targets

    return predict


PREDICTORS: dict[str, Callable[..., Predictor]] = {
    "mean": mean_predictor,
    "volume fraction": volume_fraction_predictor,
}  # the baseline predictors by name: each learns from the training images and targets


DESCRIPTORS = "descriptors"  # one more of them, that only trainers fit: models/ridge_baseline.py


def _fractions(images: np.ndarray) -> np.ndarray:
    blocks = np.split(images, range(BLOCK, len(images), BLOCK))
    means = np.concatenate([np.asarray(block, np.float64).mean(axis=(2, 3)) for block in blocks])
    if images.shape[1] > 1:
        return np.column_stack([np.ones(len(means)), means])
    return np.polynomial.legendre.legvander(2 * means[:, 0] - 1, 3)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return the quotient; NaN where the denominator is not positive."""
    denominator = np.broadcast_to(denominator, numerator.shape)
    quotient: np.ndarray = np.divide(
        numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0
    )
    return quotient
