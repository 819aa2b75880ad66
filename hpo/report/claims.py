"""The claims of closed studies, decided by the same rules for everybody from numbers and their intervals.

Models are compared by the test split, on the same resampled cells: a difference counts if its 95 % interval excludes
zero. Convergence: epochs until the validation NMSE is within 5 % of a network's own lowest.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import numpy as np

from hpo.queue import State
from hpo.report import parameter_claims
from hpo.report.answers import (
    OPEN,
    SAME,
    Answer,
    best,
    best_of_each,
    interval_text,
    is_of,
    missing,
    of_best,
    unequal,
    values,
)
from hpo.report.error_section import against
from hpo.scores import analysis
from hpo.scores.evidence import Closed, Evidence, Winner
from hpo.study.claims import Claim
from hpo.text import score_text

NEVER = 1e9  # epochs: of a network that was not trained to its convergence


def answers(evidence: Evidence) -> list[Answer]:
    """Return the answers to all claims, in the order of the files."""
    return [answer for claim in asked(evidence) for answer in RULES[claim.kind](evidence, claim)]


def asked(evidence: Evidence) -> list[Claim]:
    """Return the claims of the studies' files, each once."""
    return list(dict.fromkeys(chain.from_iterable(closed.row.facts.claims or () for closed in evidence.closed)))


def compare(evidence: Evidence, claim: Claim) -> list[Answer]:
    """Compare the best of `models` with the best of `against` (for each value of `each`); without `against` name the
    best value of `each`; without that, too, the best model."""
    if claim.against:
        return _pairs(evidence, claim)
    return [_best_value(evidence, claim) if claim.each else _best(evidence, claim)]


def difference(evidence: Evidence, one: Winner, other: Winner, *, among: int = 1) -> analysis.Interval:
    """Return the interval of the test NMSE of `one` - `other`, over the same resampled cells; of `among` such
    together."""
    samples = [evidence.tested.samples(winner.predicted)["nmse"] for winner in (one, other)]
    return analysis.interval(samples[0] - samples[1], among=among)


def _pairs(evidence: Evidence, claim: Claim) -> list[Answer]:
    answers = []
    for value in values(evidence, claim.each) if claim.each else [""]:
        settings = {claim.each: value} if claim.each else {}
        new, old = (best(evidence, words, **settings) for words in (claim.models, claim.against))
        if new is None or old is None:
            continue
        low, high = difference(evidence, new, old)
        answers.append(
            Answer(
                question=claim.text.replace(f"{{{claim.each}}}", str(value)),
                answer=claim.yes if high < 0 else claim.no if low > 0 else OPEN if math.isnan(high) else SAME,
                because=f"Test NMSE {_nmse(new)} ({new.title}) against {_nmse(old)} ({old.title}); difference "
                f"{interval_text((low, high))}.{unequal([new, old])}",
            )
        )
    if not answers:
        groups = [words for words in (claim.models, claim.against) if best(evidence, words) is None]
        because = missing(evidence, *(groups or (claim.models, claim.against)))
        answers = [Answer(question=claim.text.replace(f" {{{claim.each}}}", ""), answer=OPEN, because=because)]
    return answers


def _best_value(evidence: Evidence, claim: Claim) -> Answer:
    winners = best_of_each(evidence, claim.models, claim.each)
    if len(winners) < 2:
        because = f"{missing(evidence, claim.models)} Two values of {claim.each} are needed."
        return Answer(question=claim.text, answer=OPEN, because=because)
    first, *others = winners
    listed = ", ".join(f"{winner.title} {_nmse(winner)}" for winner in winners)
    ends = _differences(evidence, first, others)
    is_best = all(high < 0 for _, high in ends.values())
    is_known = not any(math.isnan(high) for _, high in ends.values())
    return Answer(
        question=claim.text,
        answer=str(first.model[claim.each]) if is_best else SAME if is_known else OPEN,
        because=f"Test NMSE, in the order of the validation split: {listed}. {_against(evidence, first, ends)}"
        + unequal(winners),
    )


def _best(evidence: Evidence, claim: Claim) -> Answer:
    winners = [winner for winner in evidence.winners if is_of(winner, claim.models)]
    if not winners:
        because = missing(evidence, claim.models) if claim.models else "No trial was finished."
        return Answer(question=claim.text, answer=OPEN, because=because)
    first, *others = winners
    r2, ends = first.entry.test.r2, analysis.interval(evidence.tested.samples(first.predicted)["r2"])
    sentences = [
        f"It has the lowest validation NMSE ({first.nmse:.4g}) of {len(winners)} "
        f"selected models, with {first.entry.parameters:,} parameters.",
        f"On the test split: R² {score_text(r2, '.4f')} {interval_text(ends)}, NMSE {_nmse(first)}; it is "
        f"{against(evidence.tested, first.predicted)}.",
        _against(evidence, first, _differences(evidence, first, others)) + unequal(winners),
    ]
    return Answer(question=claim.text, answer=first.title, because=" ".join(sentences).strip())


def _differences(evidence: Evidence, first: Winner, others: Sequence[Winner]) -> dict[str, analysis.Interval]:
    """Return the intervals of the test NMSE of `first` less that of each other model, by its title."""
    return {winner.title: difference(evidence, first, winner, among=len(others)) for winner in others}


def _against(evidence: Evidence, first: Winner, ends: Mapping[str, analysis.Interval]) -> str:
    """Say how the model that the validation split chose does on the test split against the others, from the intervals
    of the differences, by the others' titles."""
    count = len(ends)
    better = [title for title, (low, _) in ends.items() if low > 0]
    worse = [title for title, (_, high) in ends.items() if high < 0]
    unknown = [title for title, (low, _) in ends.items() if math.isnan(low)]
    same = [title for title in ends if title not in (*better, *worse, *unknown)]
    sentences = []
    if better:
        intervals = "95 % interval" if count == 1 else f"95 % intervals for all {count} comparisons together"
        sentences.append(
            f"The splits disagree: better on these {len(evidence.tested.truth)} test cells are {', '.join(better)} "
            f"({intervals}); the choice stays that of the validation split."
        )
    if same:
        sentences.append(f"Not distinguishable from {first.title} there: {', '.join(same)}.")
    if unknown:
        sentences.append(f"Not comparable with {first.title} there: {', '.join(unknown)}.")
    if worse:
        all_worse = len(worse) == len(ends)
        sentences.append("Worse there than it: all others." if all_worse else f"Worse: {', '.join(worse)}.")
    return " ".join(sentences)


def _nmse(winner: Winner) -> str:
    return score_text(winner.entry.test.nmse)


def converge(evidence: Evidence, claim: Claim) -> list[Answer]:
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


RULES: dict[str, Callable[[Evidence, Claim], list[Answer]]] = {
    "parameter effect": parameter_claims.effect,
    "model comparison": compare,
    "convergence": converge,
    "capacity": parameter_claims.capacity,
}
