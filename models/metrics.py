"""Scores of predictions, and the trivial predictors every model is compared with (numpy only)."""

from collections.abc import Callable
from typing import Any

import numpy as np

Predictor = Callable[[np.ndarray], np.ndarray]  # images (n, c, h, w) in 0..1 -> targets (n, k) in the label's unit


def scores(predictions: np.ndarray, targets: np.ndarray, *, train_variance: np.ndarray) -> dict[str, Any]:
    """Scores of predictions (n, k) against targets (n, k), both in the label's unit.

    Means over the targets under "nmse" (MSE / variance of the training split, which is `train_variance` (k,)), "mse"
    (unit²), "r2" (against the mean of the split evaluated, not of the training split), "nrmse" (RMSE / standard
    deviation of the training split), "mae" (unit) and "mape" (fraction, not per cent); each as a list, one number a
    target, under "per_target".

    A score that does not exist is None, here and wherever it is kept: R² of a target that does not vary in the split
    evaluated, MAPE of one with a label of zero, whatever is not a finite number. A mean is that of the targets that
    have the score, None if none has; an infinite error is not left out of it: then the mean is None, too. Raises
    ValueError on shapes that do not fit.
    """
    predictions, targets = (
        np.asarray(predictions, np.float64),
        np.asarray(targets, np.float64),
    )
    variance = np.asarray(train_variance, np.float64)
    if (
        targets.ndim != 2
        or not len(targets)
        or predictions.shape != targets.shape
        or variance.shape != targets.shape[1:]
    ):
        raise ValueError(
            "expected predictions and targets (n, k) with n > 0 and train_variance (k,), "
            f"found {predictions.shape}, {targets.shape} and {variance.shape}."
        )
    with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is no score
        error = predictions - targets
        mse = (error**2).mean(axis=0)
        mae = np.abs(error).mean(axis=0)
        per_target = {
            "nmse": _ratio(mse, variance),
            "mse": mse,
            "r2": 1 - _ratio(mse, spread(targets)),
            "nrmse": _ratio(np.sqrt(mse), np.sqrt(variance)),
            "mae": mae,
            "mape": _ratio(np.abs(error), np.abs(targets)).mean(axis=0),
        }
    known = {name: np.isfinite(values) for name, values in per_target.items()}
    everywhere = np.ones(len(mse), dtype=bool)
    varies = variance > 0
    exists = {
        "nmse": varies,
        "mse": everywhere,
        "r2": spread(targets) > 0,
        "nrmse": varies,
        "mae": everywhere,
        "mape": (targets != 0).all(axis=0),
    }
    means: dict[str, Any] = {
        name: float(values[exists[name]].mean()) if exists[name].any() and known[name][exists[name]].all() else None
        for name, values in per_target.items()
    }
    lists = {
        name: [value if there else None for value, there in zip(values.tolist(), known[name], strict=True)]
        for name, values in per_target.items()
    }
    return means | {"per_target": lists}


def spread(targets: np.ndarray) -> np.ndarray:
    """Variance (k,) of targets (n, k), in the label's unit squared; exactly 0 of one that does not vary, whatever the
    rounding."""
    return np.where(targets.max(axis=0) == targets.min(axis=0), 0.0, targets.var(axis=0))


def mean_predictor(train_images: np.ndarray, train_targets: np.ndarray) -> Predictor:
    """Answers every image with the mean of the training targets; its training NMSE is 1 and its R² is 0."""
    mean = np.asarray(train_targets, np.float64).mean(axis=0)
    return lambda images: np.tile(mean, (len(images), 1))


def volume_fraction_predictor(train_images: np.ndarray, train_targets: np.ndarray) -> Predictor:
    """A cubic polynomial in the mean pixel, fitted to each target by least squares on the training split."""
    train_targets = np.asarray(train_targets, np.float64)
    centre = train_targets.mean(axis=0)  # fitted without it: labels of a large offset keep their digits
    coefficients, *_ = np.linalg.lstsq(_cubic(train_images), train_targets - centre, rcond=None)
    return lambda images: _cubic(images) @ coefficients + centre


PREDICTORS: dict[str, Callable[[np.ndarray, np.ndarray], Predictor]] = {
    "mean": mean_predictor,
    "volume fraction": volume_fraction_predictor,
}  # the trivial ones, by name: each learns from the training images and targets


def _cubic(images: np.ndarray) -> np.ndarray:
    fraction = np.asarray(images, np.float64).mean(axis=(1, 2, 3))
    return np.polynomial.legendre.legvander(2 * fraction - 1, 3)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    denominator = np.broadcast_to(denominator, numerator.shape)
    return np.divide(
        numerator,
        denominator,
        out=np.full(numerator.shape, np.nan),
        where=denominator > 0,
    )
