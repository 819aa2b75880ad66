"""Names, numbers and scores of trials as every table writes them."""

import math
from typing import Any

from hpo.queue import Job
from hpo.queue.closing_result import ClosingEntry, ClosingResult
from hpo.report.tables import Column
from hpo.study import provenance
from hpo.study.records import TrialSpec
from hpo.text import point_text, score_text, squared
from models.metrics import DESCRIPTORS, Scores

BASELINES = {  # the predictors
    "mean": "mean of the training labels",
    "volume fraction": "volume fraction, cubic",
    DESCRIPTORS: "descriptors, ridge",
}
RIVALS = {  # the same within a sentence
    "mean": "the mean of the training labels",
    "volume fraction": "a cubic polynomial in the volume fraction",
    DESCRIPTORS: "ridge on descriptors",
}
SCORES = {"nmse": "NMSE", "mse": "MSE", "r2": "R²", "nrmse": "NRMSE", "mape": "MAPE"}  # names and heads
Spread = tuple[float, float | None]  # mean and standard deviation over the repeats of a configuration


def openings(ended: ClosingResult) -> str:
    """Return how often a study has opened the test split so far: each closing does."""
    return "opened once" if (ended.openings or 1) == 1 else f"opened {ended.openings} times"


def baselines_r2(ended: ClosingResult) -> dict[str, Scores]:
    """Return the test scores of the baseline predictors by the head of the column of their R², as a closing recorded
    them; an earlier one has no descriptors."""
    heads = {DESCRIPTORS: "R² descriptors", "volume fraction": "R² volume fraction", "mean": "R² mean predictor"}
    tested = {name: scores.test for name, scores in (ended.predictors or {}).items()}
    return {head: scores for name, head in heads.items() if (scores := tested.get(name)) is not None}


def number(job: Job | ClosingEntry) -> int:
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
    return [Column(name=SCORES[name], unit=f"{squared(unit)}" if name == "mse" else "") for name in list(SCORES)[:4]]


def score_values(scores: Scores, unit: str = "") -> dict[str, Any]:
    """Return all scores by their heads; with a `unit` its square stands behind that of the MSE."""
    heads = SCORES | ({"mse": f"MSE {squared(unit)}"} if unit else {})
    return {head: getattr(scores, name) for name, head in heads.items()}


def rmse(scores: Scores) -> tuple[list[float | None], float | None]:
    """Return the root mean square error of each target, and their mean; None where it does not exist."""
    roots = [None if mse is None else mse**0.5 for mse in scores.per_target["mse"]]
    existing = [root for root in roots if root is not None]
    return roots, sum(existing) / len(existing) if existing else None
