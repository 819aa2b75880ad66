"""Claims on convergence: epochs until the validation NMSE is within 5 % of a network's own lowest."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from hpo.queue import State
from hpo.report.answers import OPEN, SAME, Answer, best_of_each, missing, of_best, unequal
from hpo.scores import analysis
from hpo.scores.evidence import Closed, Evidence
from hpo.study.claims import Claim

NEVER = 1e9  # epochs: of a network that was not trained to its convergence


def decide(evidence: Evidence, claim: Claim) -> list[Answer]:
    """Name the value of `each` that converged first; or say whether networks converge within the range `epochs`."""
    return [_first(evidence, claim) if claim.epochs is None else _within(evidence, claim, *claim.epochs)]


def _first(evidence: Evidence, claim: Claim) -> Answer:
    winners = best_of_each(evidence, claim.models, claim.each)
    counts = {winner.model[claim.each]: evidence.converged(winner.curves["val/nmse"]) for winner in winners}
    epochs = {value: count for value, count in counts.items() if count is not None}
    failed = [value for value in counts if value not in epochs]
    left_out = f" {', '.join(map(str, failed))} learned no more than the mean." if failed else ""
    if len(epochs) < 2:
        because = f"{missing(evidence, claim.models)} Two values of {claim.each} that learn are needed.{left_out}"
        return Answer(question=claim.text, answer=OPEN, because=because)
    learned = [winner for winner in winners if winner.model[claim.each] in epochs]
    falling = {winner.model[claim.each] for winner in learned if analysis.falling(winner.curves["val/nmse"])}
    least = min(epochs.values())
    first = [value for value, count in epochs.items() if count == least]
    listed = ", ".join(f"{value} {'at least ' * (value in falling)}{count}" for value, count in epochs.items())
    because = f"Epochs until within 5 % of its lowest validation NMSE: {listed}. One seed each.{left_out}"
    if falling:
        because += " At least: its lowest value lies at the end of its training."
    if differ := unequal(learned):
        because += f" Equal epochs are needed.{differ}"
    answer = OPEN if differ or falling.intersection(first) else str(first[0]) if len(first) == 1 else SAME
    return Answer(question=claim.text, answer=answer, because=because)


def _within(evidence: Evidence, claim: Claim, low: int, high: int) -> Answer:
    closed = of_best(evidence, claim.models)
    curves = [closed.curves[job.id]["val/nmse"] for job, _ in closed.points] if closed else []
    learned = [(count, curve) for curve in curves if (count := evidence.converged(curve)) is not None]
    failed = len(curves) - len(learned)
    left_out = f" {failed} learned no more than the mean and are left out." if failed else ""
    if closed is None or not learned:
        because = missing(evidence, claim.models) if closed is None else "No such network learned."
        return Answer(question=claim.text, answer=OPEN, because=because + left_out)
    counts = [count for count, _ in learned]
    is_limit = [max(curve) < low or analysis.falling(curve) for _, curve in learned]
    most = [NEVER if limit else count for count, limit in zip(counts, is_limit, strict=True)]
    states = _without_a_score(closed)
    unknown = sum(number for state, number in states.items() if state != State.DIVERGED)
    first, _, last = zip(_quartiles(counts + unknown * [1]), _quartiles(most + unknown * [NEVER]), strict=True)
    quarter, middle, three = _quartiles(counts)
    because = (
        f"Epochs until within 5 % of the lowest validation NMSE: median {middle:.0f}, middle half {quarter:.0f} to "
        f"{three:.0f}, all {min(counts)} to {max(counts)}, of {len(counts)} networks."
    )
    if any(is_limit):
        because += (
            f" Of {sum(is_limit)} of them that is a lower limit: their training ended before epoch {low}, or with "
            "its lowest value at the end."
        )
    if states:
        listed = ", ".join(f"{number} {state}" for state, number in states.items())
        because += f" {states.total()} more have no score ({listed})."
    return Answer(question=claim.text, answer=_inside(low, high, first, last), because=because + left_out)


def _without_a_score(closed: Closed) -> Counter[str]:
    """Count the configurations of a study that have no finished trial, by the state that says why."""
    scored = {job.number for job, _ in closed.points}
    return Counter(job.state for job in closed.lost if job.number not in scored)


def _quartiles(counts: Sequence[float]) -> tuple[float, float, float]:
    first, middle, last = np.quantile(counts, [0.25, 0.5, 0.75])
    return float(first), float(middle), float(last)


def _inside(low: float, high: float, first: tuple[float, float], last: tuple[float, float]) -> str:
    """Say whether the middle half of the networks lies within `low` to `high`.

    `first` and `last`: what the lower and the upper quartile are at least and at most.
    """
    if low <= first[0] and last[1] <= high:
        return "confirmed"
    if last[1] < low or first[0] > high:
        return "refuted"
    crosses = last[0] >= low and first[1] <= high
    return "in part" if crosses and (first[1] < low or last[0] > high) else OPEN
