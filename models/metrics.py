"""Scores of predictions, and the baseline predictors that every model is compared with (numpy only)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Predictor = Callable[[np.ndarray], np.ndarray]  # images (n, c, h, w) in 0..1 -> targets (n, k) in the label's unit


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of predictions for one split: means over the targets, and one number a target.

    A score that does not exist is None: R² of a target that does not vary in the split, MAPE of a target with a label
    of zero, every number that is not finite. A mean covers the targets for which the score exists and is None if there
    is none. An infinite error is not left out of the mean: that mean is None as well.
    """

    nmse: float | None  # MSE / variance of the training split
    mse: float | None  # unit²
    r2: float | None  # against the mean of the split that is scored, not of the training split
    nrmse: float | None  # RMSE / standard deviation of the training split
    mae: float | None  # unit
    mape: float | None  # fraction, not per cent
    per_target: Mapping[str, list[float | None]]  # of each score, by its name

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: every mean by its name, and "per_target"."""
        return {name: getattr(self, name) for name in SCORES} | {"per_target": dict(self.per_target)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Scores":
        """Return the scores in JSON form; a score unknown to an earlier version is None."""
        return cls(**{name: values.get(name) for name in SCORES}, per_target=values.get("per_target", {}))


SCORES = ("nmse", "mse", "r2", "nrmse", "mae", "mape")


def scores(predictions: np.ndarray, targets: np.ndarray, *, train_variance: np.ndarray) -> Scores:
    """Return the scores of predictions (n, k) against targets (n, k), both in the label's unit.

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
    with np.errstate(over="ignore", invalid="ignore"):  # the result is None
        error = predictions - targets
        mse = (error**2).mean(axis=0)
        per_target = {
            "nmse": _ratio(mse, variance),
            "mse": mse,
            "r2": 1 - _ratio(mse, spread(targets)),
            "nrmse": _ratio(np.sqrt(mse), np.sqrt(variance)),
            "mae": np.abs(error).mean(axis=0),
            "mape": _ratio(np.abs(error), np.abs(targets)).mean(axis=0),
        }
    everywhere = np.ones(len(mse), dtype=bool)
    exists = {name: everywhere for name in SCORES}
    exists["nmse"] = exists["nrmse"] = variance > 0
    exists["r2"], exists["mape"] = spread(targets) > 0, (targets != 0).all(axis=0)
    means: dict[str, float | None] = {}
    for name, values in per_target.items():
        existing = values[exists[name]]
        means[name] = float(existing.mean()) if existing.size and np.isfinite(existing).all() else None
    numbers = {name: [x if np.isfinite(x) else None for x in values.tolist()] for name, values in per_target.items()}
    return Scores(**means, per_target=numbers)


def spread(targets: np.ndarray) -> np.ndarray:
    """Return the variance (k,) of targets (n, k), unit²; exactly 0 of a target that does not vary, despite rounding."""
    return np.where(targets.max(axis=0) == targets.min(axis=0), 0.0, targets.var(axis=0))


def mean_predictor(train_images: np.ndarray, train_targets: np.ndarray) -> Predictor:
    """Return a predictor of the training targets' mean for every image; its training NMSE is 1 and its R² is 0."""
    mean = np.asarray(train_targets, np.float64).mean(axis=0)
    return lambda images: np.tile(mean, (len(images), 1))


def volume_fraction_predictor(train_images: np.ndarray, train_targets: np.ndarray) -> Predictor:
    """Return a cubic polynomial in the mean pixel, fitted to each target by least squares on the training split.

    Of images with several channels, such as phases, it is linear in the mean of each channel."""
    train_targets = np.asarray(train_targets, np.float64)
    centre = train_targets.mean(axis=0)  # subtracted before the fit: labels with a large offset keep their digits
    coefficients, *_ = np.linalg.lstsq(_fractions(train_images), train_targets - centre, rcond=None)

    def predict(images: np.ndarray) -> np.ndarray:
        targets: np.ndarray = _fractions(images) @ coefficients + centre
        return targets

    return predict


PREDICTORS: dict[str, Callable[[np.ndarray, np.ndarray], Predictor]] = {
    "mean": mean_predictor,
    "volume fraction": volume_fraction_predictor,
}  # the baseline predictors by name: each learns from the training images and targets


def _fractions(images: np.ndarray) -> np.ndarray:
    if images.shape[1] > 1:
        means = np.asarray(images, np.float64).mean(axis=(2, 3))
        return np.column_stack([np.ones(len(means)), means])
    fraction = np.asarray(images, np.float64).mean(axis=(1, 2, 3))
    return np.polynomial.legendre.legvander(2 * fraction - 1, 3)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return the quotient; NaN where the denominator is not positive."""
    denominator = np.broadcast_to(denominator, numerator.shape)
    quotient: np.ndarray = np.divide(
        numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0
    )
    return quotient
