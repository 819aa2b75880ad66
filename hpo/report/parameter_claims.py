"""Claims on a parameter's values and on the networks' size, decided by the validation NMSE of whole studies.

Trials without a score (diverged, pruned, dead, cancelled) are not missing by chance: an answer stands only if they
could not turn it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from hpo.queue import Job, State
from hpo.report.answers import OPEN, SAME, Answer, interval_text
from hpo.scores import analysis
from hpo.scores.evidence import Closed, Evidence
from hpo.study.claims import Claim
from hpo.text import number_text

ALPHA = 1 - analysis.CONFIDENCE


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """Two values of a parameter in one study; pairs are configurations that differ in nothing else."""

    closed: Closed
    name: str  # of the parameter
    contrast: analysis.Contrast | None  # of the pairs that have both their scores
    worse: Any
    better: Any  # as claimed
    lost: list[Job]  # trials of the other pairs that have no score

    @property
    def lost_pairs(self) -> list[str]:
        """Why each of the other pairs is lost: a state."""
        return list({analysis.apart(_point(job), self.name): job.state for job in reversed(self.lost)}.values())


def effect(evidence: Evidence, claim: Claim) -> list[Answer]:
    """Compare two values of a parameter in the study that has most pairs of them."""
    name = claim.parameter
    compared = [case for closed in _of_family(evidence, claim.family) if (case := _compare(closed, claim)) is not None]
    if not compared:
        values = [number_text(value) for value in (claim.worse, claim.better) if value is not None]
        wanted = " and ".join(values) or "several values"
        because = f"It takes a study that compares {wanted} of {name}, all else equal."
        return [Answer(question=claim.text, answer=OPEN, because=because)]
    case = max(compared, key=lambda case: case.contrast.pairs if case.contrast else 0)
    contrast, answer = case.contrast, OPEN
    parts = [other for other in analysis.contrasts(*_scored(case.closed)) if other.parameter == name]
    if contrast is not None:
        answer = SAME if contrast.better is None else claim.yes if contrast.better == contrast.high else claim.no
        parts += [contrast] if contrast not in parts else []
    states = case.lost_pairs
    pairs = len(states) + (contrast.pairs if contrast else 0)
    answer, lost = _despite(answer, states, pairs, "pairs", stands=_stands(evidence, case))
    sentences = [f"{case.closed.row.name}:", *map(_sentence, parts), lost]
    return [Answer(question=claim.text, answer=answer, because=" ".join(sentences).strip())]


def _compare(closed: Closed, claim: Claim) -> _Compared | None:
    """Return the claim's two values compared in this study; None if it has not planned any pair of them."""
    name = claim.parameter
    points, scores = _scored(closed)
    lost = [job for job in closed.lost if job.spec and name in _point(job)]
    planned = [point for point in [*points, *map(_point, lost)] if name in point]
    values = {point[name] for point in planned}
    worse, better = claim.worse, claim.better
    if better is None:
        worse, better = min(values, default=None), max(values, default=None)
    if worse == better or not {worse, better} <= values:
        return None
    sides = [{analysis.apart(point, name) for point in planned if point[name] == value} for value in (worse, better)]
    pairs = sides[0] & sides[1]
    lost = [job for job in lost if _point(job)[name] in (worse, better) and analysis.apart(_point(job), name) in pairs]
    contrast = analysis.contrast(points, scores, name, worse, better)
    if not pairs:
        return None
    return _Compared(closed=closed, name=name, contrast=contrast, worse=worse, better=better, lost=lost)


def _stands(evidence: Evidence, case: _Compared) -> bool:
    """Whether the lost pairs could not turn what the others say."""
    if case.contrast is None:
        return False
    (points, scores), better = _scored(case.closed), case.contrast.better
    filled = _filled(evidence, case.lost, scores, lambda job: _point(job)[case.name] == better)
    points, scores = points + [_point(job) for job, _ in filled], scores + [score for _, score in filled]
    again = analysis.contrast(points, scores, case.name, case.worse, case.better)
    return again is not None and again.better == better


def capacity(evidence: Evidence, claim: Claim) -> list[Answer]:
    """Correlate size and validation NMSE of the networks, in the largest study of three sizes or more."""
    studies = [closed for closed in _of_family(evidence, claim.family) if len(set(_sizes(closed))) > 2]
    if not studies:
        because = "It takes a study of networks of three sizes."
        return [Answer(question=claim.text, answer=OPEN, because=because)]
    closed = max(studies, key=lambda closed: len(closed.whole))
    sizes, scores = _sizes(closed), [score for _, score in closed.whole]
    rank, p = _rank(sizes, scores)
    gaps = [_gap(closed, job) for job, _ in closed.whole]
    gap_rank, gap_p = _rank(sizes, gaps)
    answer = SAME if p > ALPHA else claim.yes if rank < 0 else claim.no
    overfitting = "" if gap_p > ALPHA or gap_rank < 0 else "; the gap grows with the size"
    lost = [job for job in closed.lost if job.spec]
    middle = float(np.median([*sizes, *map(_size, lost)]))
    filled = _filled(evidence, lost, scores, lambda job: (_size(job) > middle) == (rank < 0))
    again, p_again = _rank([*sizes, *(_size(job) for job, _ in filled)], [*scores, *(score for _, score in filled)])
    stands = p_again <= ALPHA and again * rank > 0
    answer, without = _despite(answer, [job.state for job in lost], len(sizes) + len(lost), "networks", stands=stands)
    because = (
        f"{len(sizes)} networks of {min(sizes):,} to {max(sizes):,} parameters on {len(evidence.split.train)} cells "
        f"with {evidence.dataset.targets.shape[1]} targets each: rank correlation of size and validation NMSE "
        f"{rank:+.2f} (p = {p:.2g}). Validation over training NMSE at the best epoch (of training: mean over the epoch "
        f"while it learned, dropout included): median {np.median(gaps):.2g}, {min(gaps):.2g} to {max(gaps):.2g}"
        f"{overfitting}. {without}"
    )
    return [Answer(question=claim.text, answer=answer, because=because.strip())]


def _gap(closed: Closed, job: Job) -> float:
    """Return validation over training NMSE at a trial's best epoch."""
    assert job.result is not None
    curves, epoch = closed.curves[job.id], job.result.best_epoch
    return curves["val/nmse"][epoch] / curves["train/nmse"][epoch]


def _rank(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Return Spearman's correlation and its p-value; values that are all the same have none."""
    if len(set(values)) < 2:
        return 0.0, 1.0
    correlation = stats.spearmanr(sizes, values)
    return float(correlation.statistic), float(correlation.pvalue)


def _filled(
    evidence: Evidence, lost: Iterable[Job], scores: Sequence[float], is_favoured: Callable[[Job], bool]
) -> list[tuple[Job, float]]:
    """Return lost trials with the scores that speak most against what is favoured.

    A favoured trial is as bad as the mean predictor, or as the worst of the scores. The others are as good as the
    best; those that diverged are left out, for they speak for it.
    """
    worst, least = max(evidence.mean_nmse, *scores), min(scores, default=0.0)
    filled = [(job, worst if is_favoured(job) else least) for job in lost]
    return [(job, score) for job, score in filled if is_favoured(job) or job.state != State.DIVERGED]


def _despite(answer: str, lost: Sequence[str], count: int, what: str, *, stands: bool) -> tuple[str, str]:
    """Return the answer that may be given though some of `count` things are lost, by their states, and a sentence."""
    if not lost:
        return answer, ""
    states = ", ".join(f"{number} {state}" for state, number in Counter(lost).items())
    sentence = f"{len(lost)} of {count} {what} lack a score ({states})"
    if "pruned" in lost:
        return OPEN, f"{sentence}; pruning selects by the score itself, so the others prove nothing."
    if answer in (SAME, OPEN) or not stands:
        return OPEN, f"{sentence}: they could turn the answer."
    return answer, f"{sentence}: at their worst they would not turn the answer."


def _sentence(contrast: analysis.Contrast) -> str:
    return (
        f"{contrast.parameter} {number_text(contrast.high)} over {number_text(contrast.low)}: NMSE times "
        f"{contrast.ratio:.3f} {interval_text(contrast.interval)} over {contrast.pairs} pairs."
    )


def _point(job: Job) -> dict[str, Any]:
    return dict(job.spec.point) if job.spec else {}


def _scored(closed: Closed) -> tuple[list[dict[str, Any]], list[float]]:
    """Return the study's whole configurations and their validation NMSE."""
    return [_point(job) for job, _ in closed.whole], [score for _, score in closed.whole]


def _sizes(closed: Closed) -> list[int]:
    return [_size(job) for job, _ in closed.whole]


def _size(job: Job) -> int:
    return job.spec.parameters if job.spec else 0


def _of_family(evidence: Evidence, family: str) -> list[Closed]:
    """Return the studies with a score whose networks are of this family; without one all."""
    return [
        closed
        for closed in evidence.closed
        if closed.points and (spec := closed.points[0][0].spec) and family in ("", spec.model["family"])
    ]
