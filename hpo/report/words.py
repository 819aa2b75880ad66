"""Names, numbers and scores of trials as every table writes them."""

import math
from collections.abc import Mapping
from typing import Any

from hpo.queue import Job
from hpo.report.tables import Column
from hpo.study import provenance
from hpo.study.records import TrialSpec
from hpo.text import point_text, score_text

BASELINES = {"mean": "mean of the training labels", "volume fraction": "volume fraction, cubic"}  # the predictors
SCORES = ("nmse", "mse", "r2", "nrmse")
Spread = tuple[float, float | None]  # mean and standard deviation over the repeats of a configuration


def number(job: Job) -> int:
    """Return the number of a trial's configuration in its grid; without a grid the trial's."""
    return job.number if job.config is None else job.config


def label(spec: TrialSpec) -> str:
    """Return a configuration in few letters, such as `f8 k5 d0.2 lr1e-3`; it says if the backbone is not pretrained."""
    bare = " (not pretrained)" if provenance(spec.model) == "not pretrained" else ""
    return point_text(spec.point) + bare


def spread_text(spread: Spread, best: Spread | None = None) -> str:
    """Return such as `0.0651 ± 0.0012 ≈`; the sign says that it differs from the best by no more than the spread."""
    mean, deviation = spread
    text = score_text(mean) + (f" ± {deviation:.2g}" if deviation is not None else "")
    return text + (" ≈" if best is not None and within_spread(spread, best) else "")


def within_spread(spread: Spread, best: Spread) -> bool:
    """Whether a mean differs from the best one by no more than both standard deviations together."""
    return spread[0] - best[0] <= math.hypot(spread[1] or 0.0, best[1] or 0.0)


def score_columns(unit: str) -> list[Column]:
    """Return the columns of NMSE, MSE in the label's `unit` squared, R² and NRMSE; rows have them by `score_values`."""
    return [
        Column(name="NMSE", text=lambda nmse: score_text(nmse, ".3e" if nmse is not None and nmse < 1e-3 else ".5f")),
        Column(name="MSE", unit=f"{unit}²", text=score_text),
        Column(name="R²", text=four_places),
        Column(name="NRMSE", text=four_places),
    ]


def score_values(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row has in `score_columns`."""
    return dict(zip(("NMSE", "MSE", "R²", "NRMSE"), (scores[name] for name in SCORES), strict=True))


def four_places(score: float | None) -> str:
    return score_text(score, ".4f")
