"""How errors fall as training images are added: a power law, fitted in log space, and what twice the images bring."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # whose modules are imported at their first use

from hpo.scores.analysis import CONFIDENCE, Interval

FEWEST_SIZES = 3  # of the training part: two lie on any power law
MISFIT = 0.01  # probability of so large a misfit by chance, below which a law does not describe the errors
ROUNDING = 1e-12  # of squared log errors: repeats that differ less are the same
LARGEST_LOG = 700.0  # whose exponential is a number


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """The law error = a * images^-exponent, at the most images that were trained on and at twice as many."""

    exponent: float
    exponent_interval: Interval  # 95 %, Student's t
    now: float  # error
    twice: float  # error with twice the images
    twice_interval: Interval  # 95 %: of this law, and of one with a floor under the error
    misfit: float | None  # probability of so large a misfit by chance; None without repeats, which would show it

    @property
    def is_poor(self) -> bool:
        """Whether the law does not describe the errors, so that it forecasts nothing."""
        return self.misfit is not None and self.misfit < MISFIT

    @property
    def is_flat(self) -> bool:
        """Whether the errors may as well be the same for any number of images."""
        return self.exponent_interval[0] <= 0


def fit(images: Sequence[float], errors: Sequence[float], sizes: Sequence[float]) -> PowerLaw | None:
    """Return the law of the errors (n,) of trainings on so many images; None if these are too few, or an error is 0.

    `sizes`: what is the same for repeats, such as their share of the images. The fit is least squares of log errors,
    and its intervals follow from the fit's covariance. A floor that the errors leave open, error = a * images^-exponent
    + floor, widens the interval of the forecast, up to no gain at all.
    """
    y = np.array(errors, np.float64)
    if len(set(sizes)) < FEWEST_SIZES or len(y) <= FEWEST_SIZES or not (np.isfinite(y) & (y > 0)).all():
        return None
    x, y = np.log(np.array(images, np.float64) / max(images)), np.log(y)
    plain = _Fit(x, y, (y[x.argmax()], 0.5))
    floor = _Fit(x, y, (y.min() - 1, max(plain.law[1], 0.5), y.min() - 0.5))
    low, high = plain.interval(np.log(2))
    if len(y) > len(floor.law):
        high = max(high, min(floor.interval(np.log(2))[1], floor.interval(0.0)[1]))
    exponent, half = float(plain.law[1]), plain.quantile * math.sqrt(plain.covariance[1, 1])
    return PowerLaw(
        exponent=exponent,
        exponent_interval=(exponent - half, exponent + half),
        now=math.exp(plain.law[0]),
        twice=math.exp(_log_errors(plain.law, np.log(2))),
        twice_interval=(low, high),
        misfit=_misfit(y, sizes, plain),
    )


class _Fit:
    """A law of log errors y (n,) at log images x (n,), 0 at the most: the parameters of `_log_errors`."""

    def __init__(self, x: np.ndarray, y: np.ndarray, start: Sequence[float]) -> None:
        solution = scipy.optimize.least_squares(lambda law: _log_errors(law, x) - y, start)
        freedom = len(y) - len(start)
        self.law, self.squares = solution.x, float(2 * solution.cost)
        self.covariance = np.linalg.pinv(solution.jac.T @ solution.jac) * self.squares / max(freedom, 1)
        self.quantile = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, max(freedom, 1)))

    def interval(self, x: float) -> Interval:
        """Return the 95 % interval of the error at log images x."""
        slope = scipy.optimize.approx_fprime(self.law, lambda law: float(_log_errors(law, x)), 1e-7)
        middle, half = float(_log_errors(self.law, x)), self.quantile * math.sqrt(slope @ self.covariance @ slope)
        return math.exp(middle - half), math.exp(min(middle + half, LARGEST_LOG))


def _log_errors(law: np.ndarray, x: np.ndarray | float) -> np.ndarray:
    """Return the log of the errors at log images x: of exp(law[0] - law[1] x), plus exp(law[2]) if that is there."""
    falling = law[0] - law[1] * x
    return np.asarray(falling if len(law) < 3 else np.logaddexp(falling, law[2]))


def _misfit(y: np.ndarray, sizes: Sequence[float], fitted: _Fit) -> float | None:
    """Return the probability of so large a lack of fit, beside what repeats differ by (F test); None without them."""
    same = np.array(sizes)
    of_repeats = float(sum(((y[same == size] - y[same == size].mean()) ** 2).sum() for size in set(sizes)))
    lacking, repeated = len(set(sizes)) - len(fitted.law), len(y) - len(set(sizes))
    if repeated < 1 or of_repeats <= ROUNDING:
        return None
    ratio = max(fitted.squares - of_repeats, 0) / lacking / (of_repeats / repeated)
    return float(scipy.stats.f.sf(ratio, lacking, repeated))
