"""Statistics behind the report: intervals, main effects, convergence, physical consistency. Plain arrays in and out."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # whose modules are imported at their first use

from data_pipeline.components import COMPONENTS, tensor
from data_pipeline.homogenize import reuss, voigt
from data_pipeline.phase import Phase
from models import hill, metrics

RESAMPLES = 4000
BLOCK = 2**24  # numbers that are held at once as eight bytes each
CONFIDENCE = 0.95
NEAR = 0.05  # of the best: from the first epoch so near to it on, a network counts as converged
END = 0.05  # of the epochs: a curve that is lowest in so many of its last ones may go on falling
ROUNDING = 1e-6  # of the largest component: what single precision may violate a bound by

PHYSICS = ("not_positive_definite", "above_voigt", "below_reuss", "hill")

Interval = tuple[float, float]  # of 95 %, lower and upper end


# Intervals of scores


def resamples(n: int) -> np.ndarray:
    """Return how often each of n cells is drawn, (RESAMPLES, n) bytes: bootstrap samples with replacement."""
    random, drawn = np.random.default_rng(0), np.empty((RESAMPLES, n), np.uint8)  # hardly ever more than ten times
    for rows in _blocks(drawn):
        drawn[rows] = random.multinomial(n, np.full(n, 1 / n), size=len(drawn[rows]))
    return drawn


def _blocks(drawn: np.ndarray) -> Iterator[slice]:
    """Yield the resamples in blocks: numbers of eight bytes for all of 100,000 cells would take gigabytes."""
    size = max(1, BLOCK // drawn.shape[1])
    yield from (slice(start, start + size) for start in range(0, len(drawn), size))


def score_samples(
    truth: np.ndarray, predicted: np.ndarray, *, train_variance: np.ndarray, drawn: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the scores of every resample, (count,), by their names in models.metrics; NaN where one does not exist.

    "nmse", "mse", "r2", "nrmse" and "mape" are means over the targets that have them in the whole split.

    `truth` (n, k), NaN where missing, and `predicted` (n, k) in the label's unit; `drawn` as `resamples` gives it, the
    same for models that are compared.
    """
    means = {}
    counts = _labelled(drawn, ~np.isnan(truth)) > 0  # a target without a drawn label is left out of that mean
    samples = target_samples(truth, predicted, train_variance=train_variance, drawn=drawn)
    with np.errstate(invalid="ignore"):
        for name, values in samples.items():
            exists = _existing(truth)[name]
            total = np.where(counts, values, 0)[:, exists].sum(axis=1)
            means[name] = total / counts[:, exists].sum(axis=1)
    return means


def target_samples(
    truth: np.ndarray, predicted: np.ndarray, *, train_variance: np.ndarray, drawn: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the scores of every resample for each target, (count, k); all else as `score_samples` has it."""
    present = ~np.isnan(truth)
    error, centred = predicted - truth, truth - metrics.moments(truth)[0]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        values = [np.where(present, own, 0) for own in (error**2, centred**2, centred, np.abs(error / truth))]
        blocks = [_means(drawn[rows], values) for rows in _blocks(drawn)]
        labelled = _labelled(drawn, present)
        mse, square, mean, mape = (np.concatenate(own) / labelled for own in zip(*blocks, strict=True))
        variance = square - mean**2
        variance[variance <= 1e-12 * square] = np.nan  # one cell drawn again and again, or labels that do not vary
        return {
            "nmse": mse / train_variance,
            "mse": mse,
            "r2": 1 - mse / variance,
            "nrmse": np.sqrt(mse / train_variance),
            "mape": mape,
        }


def _labelled(drawn: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Return which share of the drawn cells has each label, (count, k)."""
    present = present.astype(np.float64)  # whole numbers: exact in any order
    counts = np.concatenate([drawn[rows].astype(np.float64) @ present for rows in _blocks(drawn)])
    share: np.ndarray = counts / drawn.sum(axis=1, keepdims=True)
    return share


def _means(drawn: np.ndarray, values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the means of values (n, k) over the drawn cells, (count, k) each."""
    share = drawn / drawn.sum(axis=1, keepdims=True)
    return [share @ own for own in values]


def _existing(truth: np.ndarray) -> dict[str, np.ndarray]:
    """Return which targets have each score in the whole split, (k,)."""
    anywhere = ~np.isnan(truth).all(axis=0)
    exists = dict.fromkeys(("nmse", "mse", "nrmse"), anywhere)
    return exists | {"r2": metrics.spread(truth) > 0, "mape": anywhere & (truth != 0).all(axis=0)}


def interval(samples: np.ndarray, *, among: int = 1) -> Interval:
    """Return the percentile interval of resampled scores; (NaN, NaN) if more of them are undefined than it leaves out.

    Where `among` intervals are looked at together, all of them hold with 95 % confidence (Bonferroni).
    """
    defined, confidence = samples[np.isfinite(samples)], 1 - (1 - CONFIDENCE) / among
    if len(defined) < confidence * len(samples):
        return float("nan"), float("nan")
    low, high = np.percentile(defined, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)


# Hyperparameters


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Two values of a parameter compared over all pairs of configurations that differ in nothing else."""

    parameter: str
    low: Any
    high: Any
    ratio: float  # geometric mean of score(high) / score(low); below 1: `high` is better
    interval: Interval  # of the ratio, from Student's t over the pairs' logarithms
    pairs: int

    @property
    def better(self) -> Any:
        """The better value; None if the interval leaves it open."""
        if self.interval[1] < 1:
            return self.high
        return self.low if self.interval[0] > 1 else None


def main_effects(points: Sequence[Mapping[str, Any]], scores: Sequence[float]) -> list[tuple[str, Any, float, int]]:
    """Return (parameter, value, mean score of the configurations with it, how many), in the order of appearance."""
    by_value: dict[str, dict[Any, list[float]]] = {}
    for point, score in zip(points, scores, strict=True):
        for name, value in point.items():
            by_value.setdefault(name, {}).setdefault(value, []).append(score)
    return [
        (name, value, float(np.mean(own)), len(own)) for name, axis in by_value.items() for value, own in axis.items()
    ]


def is_factorial(points: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the configurations are all combinations of their values, once each: then main effects are exact."""
    if not points or len({tuple(point) for point in points}) > 1:
        return False
    axes = [list(dict.fromkeys(point[name] for point in points)) for name in points[0]]
    wanted = set(itertools.product(*axes))
    return len(points) == len(wanted) and {tuple(point.values()) for point in points} == wanted


def contrasts(points: Sequence[Mapping[str, Any]], scores: Sequence[float]) -> list[Contrast]:
    """Return the comparisons of neighbouring values of each parameter, in ascending order, all else equal."""
    pairs = []
    for name in points[0] if points else ():
        sides = _sides(points, scores, name)
        values = sorted(sides, key=lambda value: (isinstance(value, str), value))
        pairs += [_contrast(sides, name, low, high) for low, high in itertools.pairwise(values)]
    return [pair for pair in pairs if pair is not None]


def apart(point: Mapping[str, Any], name: str) -> tuple[tuple[str, Any], ...]:
    """Return a configuration without its parameter `name`: two that are the same here are a pair."""
    return tuple((key, value) for key, value in point.items() if key != name)


def contrast(
    points: Sequence[Mapping[str, Any]], scores: Sequence[float], name: str, low: Any, high: Any
) -> Contrast | None:
    """Return two values of the parameter `name` compared; None if no pair of configurations differs in them alone."""
    return _contrast(_sides(points, scores, name), name, low, high)


Sides = dict[Any, dict[tuple[tuple[str, Any], ...], float]]  # value of a parameter -> the other parameters -> score


def _sides(points: Sequence[Mapping[str, Any]], scores: Sequence[float], name: str) -> Sides:
    sides: Sides = {}
    for point, score in zip(points, scores, strict=True):
        if name in point:
            sides.setdefault(point[name], {})[apart(point, name)] = score
    return sides


def _contrast(sides: Sides, name: str, low: Any, high: Any) -> Contrast | None:
    others = sides.get(high, {})
    ratios = [others[rest] / score for rest, score in sides.get(low, {}).items() if rest in others]
    if not ratios:
        return None
    logs = np.log(ratios)
    mean, half = float(logs.mean()), float("inf")
    if len(logs) > 1:
        half = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5)
    with np.errstate(over="ignore"):
        ends = (float(np.exp(mean - half)), float(np.exp(mean + half)))
    return Contrast(parameter=name, low=low, high=high, ratio=float(np.exp(mean)), interval=ends, pairs=len(ratios))


def converged(curve: Mapping[int, float]) -> int:
    """Return the first epoch whose score is within 5 % of the lowest of the curve {epoch: score}."""
    limit = min(curve.values()) * (1 + NEAR)
    return next(epoch for epoch, value in sorted(curve.items()) if value <= limit)


def falling(curve: Mapping[int, float]) -> bool:
    """Whether the lowest value lies at the end of the curve: then `converged` is no more than a lower limit."""
    return min(curve, key=lambda epoch: curve[epoch]) > (1 - END) * max(curve)


# Physics


def hill_residuals(targets: np.ndarray, names: Sequence[str], fractions: np.ndarray, phases: Mapping[str, Phase]):
    """Return what C13, C23 and C33 miss of Hill's relations (models.hill), (n, 3), label's unit; NaN of phases whose
    plane-strain bulk moduli nearly agree. `fractions` (n,) of the inclusion."""
    lambdas, mus = (
        (getattr(phases["matrix"], name), getattr(phases["inclusion"], name)) for name in ("lame_lambda", "lame_mu")
    )
    ks = lambdas[0] + mus[0], lambdas[1] + mus[1]
    c11, c22, c33, c12, c23, c13 = (targets[:, list(names).index(name)] for name in COMPONENTS[:6])
    if not hill.apart(ks):
        return np.full((len(targets), 3), np.nan)
    expected = hill.out_of_plane(*hill.parts(c11, c22, c12, fractions, ks), fractions, lambdas, mus)
    return np.column_stack((c13, c23, c33)) - np.column_stack(expected)


def physics(
    targets: np.ndarray, names: Sequence[str], fractions: np.ndarray, phases: Mapping[str, Phase] | None
) -> dict[str, float | None]:
    """Return how far tensors (n, k) in the label's unit are from what an elastic two-phase cell can have.

    "not_positive_definite", "above_voigt", "below_reuss": shares of cells, in the matrix sense (the entries that are no
    targets count as zero: leaving couplings out keeps a semi-definite matrix so); "hill": root mean square of
    `hill_residuals`, in the label's unit. The last three are None without `phases`, all if the targets are others than
    the nine components, or no cell has all of them as finite numbers; cells that have not are left out.
    """
    whole = np.isfinite(targets).all(axis=1)
    if set(names) != set(COMPONENTS) or not whole.any():
        return dict.fromkeys(PHYSICS)
    targets, fractions = targets[whole], fractions[whole]
    full = tensor(targets, tuple(names))
    shares: dict[str, float | None] = dict.fromkeys(PHYSICS)
    shares["not_positive_definite"] = float((np.linalg.eigvalsh(full)[:, 0] <= 0).mean())
    if phases is not None:
        for name, excess in beyond_bounds(targets, names, fractions, phases).items():
            shares[name] = float((excess > ROUNDING).mean())
        residuals = hill_residuals(targets, names, fractions, phases)
        shares["hill"] = float(np.sqrt((residuals**2).mean()))
    return shares


def beyond_bounds(
    targets: np.ndarray, names: Sequence[str], fractions: np.ndarray, phases: Mapping[str, Phase]
) -> dict[str, np.ndarray]:
    """Return how far each tensor lies "above_voigt" and "below_reuss", (n,), as a share of its largest component.

    That is the least eigenvalue of bound - tensor and of tensor - bound, with the other sign: at most 0 within.
    """
    full, size = tensor(targets, tuple(names)), np.abs(targets).max(axis=1)
    size[size == 0] = 1.0  # of an empty cell
    upper, lower = (bound(fractions[:, None, None], **phases) for bound in (voigt, reuss))
    gaps = {"above_voigt": upper - full, "below_reuss": full - lower}
    return {name: -np.linalg.eigvalsh(gap)[:, 0] / size for name, gap in gaps.items()}
