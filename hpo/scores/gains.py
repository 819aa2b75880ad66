"""What the best network of a study gains over the baseline predictors on the validation split, and how certain that is.

The best of many networks looks better than it is, and so does any network on few images. The interval takes both into
account: a bootstrap-t over the images, in which the best of the ten best trials is selected again in each resample.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np

from hpo.queue import Job, Queue
from hpo.queue.closing_result import Gain
from hpo.scores import ranking
from hpo.study.records import GROUPS, NETWORK, VARIANCE
from models import metrics

TRIALS = 10  # of which the best is selected again
RESAMPLES = 2000
SEED = 0
CONFIDENCE = 0.95
BLOCK = 2**22  # numbers of resamples that are held at once
DIGITS = 6  # that are kept: machines agree in them


def of_trial(
    queue: Queue, jobs: Sequence[Job], job: Job, *, over: Collection[str] | None = None
) -> dict[str, Gain] | None:
    """Return what a finished trial gains over baseline predictors, by their names; `jobs` are those of its study.

    `over` all: those that learn from the training split, and ridge on descriptors where its errors are stored. None if
    the errors of the trial or the others are not stored: an earlier hpo closed the study. Trials without stored errors
    are not among those compared.
    """
    closing = next((other for other in jobs if other.kind == "closing"), None)
    if closing is None:
        return None
    compared = [ranking.out_of_fold(jobs, other) for other in (job, *contenders(jobs, job))]
    stored = queue.validation([closing.id, *(trial.id for trials in compared for trial in trials)])
    beside = stored[closing.id]
    over = over or [*metrics.PREDICTORS, *({metrics.DESCRIPTORS} & beside.keys())]
    arrays = [[stored[trial.id].get(NETWORK) for trial in trials] for trials in compared]
    whole = [[array for array in own if array is not None] for own in arrays]
    networks = [np.concatenate(own) for own, trials in zip(whole, compared, strict=True) if len(own) == len(trials)]
    if len(whole[0]) < len(compared[0]) or not beside.keys() >= set(over):
        return None
    groups = beside.get(GROUPS)
    return {name: gain(beside[name], networks[:TRIALS], variance=beside[VARIANCE], groups=groups) for name in over}


def beats_mean(queue: Queue, jobs: Sequence[Job], job: Job) -> bool:
    """Return whether a trial's network is better than the mean predictor for certain, as far as that is known."""
    gains = of_trial(queue, jobs, job, over=["mean"])
    return gains is None or gains["mean"].is_certain


def contenders(jobs: Sequence[Job], job: Job) -> Iterator[Job]:
    """Yield the trials that this one has beaten, the best first: the repeats of its configuration, then the best trial
    of each configuration that comes behind. The folds of a configuration are one trial."""
    if not job.is_refit:
        yield from (repeat for repeat in ranking.repeats(jobs)[job.number] if repeat.id != job.id)
    ranked = ranking.ranked(jobs)
    place = [other.number for other in ranked].index(job.number)
    without = ranking.lacking(jobs)
    yield from (other for other in ranked[place + 1 : place + TRIALS] if other.number not in without)


def gain(
    baseline: np.ndarray, networks: Sequence[np.ndarray], *, variance: np.ndarray, groups: np.ndarray | None
) -> Gain:
    """Return what the first of the networks gains over a baseline predictor: the difference of their NMSE.

    All errors are squared errors (n, k), label's unit squared, NaN where there is no label; `variance` (k,) of the
    training labels; `groups` (n,) of images that are resampled together. If there are too few groups for a finite
    interval, the images are resampled one by one, and the result says so.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # an infinite error gives no interval
        units = np.column_stack([_by_unit(baseline - errors, variance, groups) for errors in networks])
        gains = units.mean(axis=0)
    low, high = _interval(units, gains) if len(units) > 1 and np.isfinite(units).all() else (None, None)
    if groups is not None and low is None:
        return replace(gain(baseline, networks, variance=variance, groups=None), groups=len(units))
    return Gain(
        gain=_rounded(gains[0]) or 0.0,
        low=low,
        high=high,
        trials=len(networks),
        drawn=len(units),
        unit="image" if groups is None else "image group",
        resamples=RESAMPLES,
        seed=SEED,
    )


def _by_unit(differences: np.ndarray, variance: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """Return the gain in NMSE that each image or group stands for; their mean is the gain of the split.

    Where labels are missing, a target counts by its own images: its mean over those is taken for the others.
    """
    counted = (variance > 0) & ~np.isnan(differences).all(axis=0)  # as in the NMSE
    scaled = differences[:, counted] / variance[counted]
    present = ~np.isnan(scaled)
    means = np.where(present, scaled, 0).sum(axis=0) / present.sum(axis=0)
    apart = np.where(present, scaled - means, 0) / present.mean(axis=0)
    gain, images = means.mean(), apart.mean(axis=1)  # `images`: apart from the gain
    if groups is None:
        return np.asarray(gain + images)
    _, members = np.unique(groups, return_inverse=True)
    sums = np.bincount(members, weights=images)
    return np.asarray(gain + sums * len(sums) / len(images))


def _interval(units: np.ndarray, gains: np.ndarray) -> tuple[float | None, float | None]:
    """Return the ends of the interval of the first network's gain; None where the resamples give no finite one.

    `units` (m, t) are the gains of each image or group, with mean `gains` (t,). Each resample gives the greatest
    difference from these, in standard errors, among the networks that come out at least as good as the first one there:
    what the selection of the best adds to its score.
    """
    apart = units - gains
    deviation = np.sqrt((apart**2).mean(axis=0))
    greatest = np.concatenate([_greatest(shares, gains, apart, deviation) for shares in _resamples(len(units))])
    tail = (1 - CONFIDENCE) / 2
    high, low = np.quantile(greatest, (tail, 1 - tail), method="inverted_cdf")
    return _rounded(gains[0] - low * deviation[0]), _rounded(gains[0] - high * deviation[0])


def _greatest(shares: np.ndarray, gains: np.ndarray, apart: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Return, of each resample, the greatest difference of a resampled gain from the gain, (resamples,).

    It is divided by its own standard deviation, and is that of a network that may be selected in the resample.
    """
    moved = shares @ apart
    selected = gains + moved >= gains[0] + moved[:, :1]
    selected[:, 0] = True
    spread = np.sqrt(np.maximum(shares @ apart**2 - moved**2, 0))
    moved[np.abs(moved) <= 1e-9 * deviation] = 0.0
    spread[spread <= 1e-6 * deviation] = 0.0  # one image again and again
    with np.errstate(divide="ignore", invalid="ignore"):
        differences = np.where(moved == 0, 0.0, moved / spread)
    return np.where(selected, differences, -np.inf).max(axis=1)


def _resamples(count: int) -> Iterator[np.ndarray]:
    """Yield, in blocks of resamples, the share of each of `count` images or groups, (resamples, count)."""
    random = np.random.default_rng(SEED)
    block = max(1, min(RESAMPLES, BLOCK // count))
    for begin in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - begin)
        drawn = random.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count) / count


def _rounded(value: float) -> float | None:
    """Return a number with DIGITS digits; None if it is not finite."""
    return float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None
