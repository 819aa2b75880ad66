"""Claims that compare models: by the test split, on the same resampled cells.

A difference counts if its 95 % interval excludes zero.
"""

from collections.abc import Sequence

from hpo.report.answers import OPEN, SAME, Answer, best, best_of_each, interval_text, is_of, missing, unequal, values
from hpo.scores import analysis
from hpo.scores.evidence import Evidence, Winner
from hpo.study.claims import Claim
from hpo.text import score_text


def decide(evidence: Evidence, claim: Claim) -> list[Answer]:
    """Compare the best of `models` with the best of `against` (for each value of `each`); without `against` name the
    best value of `each`; without that, too, the best model."""
    if claim.against:
        return _pairs(evidence, claim)
    return [_best_value(evidence, claim) if claim.each else _best(evidence, claim)]


def difference(evidence: Evidence, one: Winner, other: Winner, *, among: int = 1) -> analysis.Interval:
    """Return the interval of the test NMSE of `one` - `other`, over the same resampled cells; of `among` such
    together."""
    samples = [evidence.samples(winner.predicted)["nmse"] for winner in (one, other)]
    return analysis.interval(samples[0] - samples[1], among=among)


def against_volume_fraction(evidence: Evidence, winner: Winner) -> str:
    """Say whether a winner beats a cubic polynomial in the volume fraction on the test split."""
    cubic = evidence.samples(evidence.predictors["volume fraction"])["nmse"]
    low, high = analysis.interval(evidence.samples(winner.predicted)["nmse"] - cubic)
    word = "better than" if high < 0 else "worse than" if low > 0 else SAME + " from"
    ends = interval_text((low, high))
    return f"{word} a cubic polynomial in the volume fraction (difference of the test NMSE {ends})"


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
                answer=claim.yes if high < 0 else claim.no if low > 0 else SAME,
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
    is_best = all(difference(evidence, first, winner, among=len(others))[1] < 0 for winner in others)
    return Answer(
        question=claim.text,
        answer=str(first.model[claim.each]) if is_best else SAME,
        because=f"Test NMSE, in the order of the validation split: {listed}. {_against(evidence, first, others)}"
        + unequal(winners),
    )


def _best(evidence: Evidence, claim: Claim) -> Answer:
    winners = [winner for winner in evidence.winners if is_of(winner, claim.models)]
    if not winners:
        because = missing(evidence, claim.models) if claim.models else "No trial was finished."
        return Answer(question=claim.text, answer=OPEN, because=because)
    first, *others = winners
    r2, ends = first.entry.test.r2, analysis.interval(evidence.samples(first.predicted)["r2"])
    sentences = [
        f"It has the lowest validation NMSE ({first.nmse:.4g}) of {len(winners)} "
        f"selected models, with {first.entry.parameters:,} parameters.",
        f"On the test split: R² {score_text(r2, '.4f')} {interval_text(ends)}, NMSE {_nmse(first)}; it is "
        f"{against_volume_fraction(evidence, first)}.",
        _against(evidence, first, others) + unequal(winners),
    ]
    return Answer(question=claim.text, answer=first.title, because=" ".join(sentences).strip())


def _against(evidence: Evidence, first: Winner, others: Sequence[Winner]) -> str:
    """Say how the model that the validation split chose does on the test split against the others."""
    count = len(others)
    ends = {winner.title: difference(evidence, first, winner, among=count) for winner in others}
    better = [title for title, (low, _) in ends.items() if low > 0]
    worse = [title for title, (_, high) in ends.items() if high < 0]
    same = [title for title in ends if title not in better and title not in worse]
    sentences = []
    if better:
        intervals = "95 % interval" if count == 1 else f"95 % intervals for all {count} comparisons together"
        sentences.append(
            f"The splits disagree: better on these {len(evidence.truth)} test cells are {', '.join(better)} "
            f"({intervals}); the choice stays that of the validation split."
        )
    if same:
        sentences.append(f"Not distinguishable from {first.title} there: {', '.join(same)}.")
    if worse:
        all_worse = len(worse) == len(ends)
        sentences.append("Worse there than it: all others." if all_worse else f"Worse: {', '.join(worse)}.")
    return " ".join(sentences)


def _nmse(winner: Winner) -> str:
    return score_text(winner.entry.test.nmse)
