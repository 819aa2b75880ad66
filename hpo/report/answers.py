"""The source study's questions and claims, decided by rules from numbers and their intervals.

A difference counts when the 95 % interval of it, resampled over the same test cells, leaves out zero; a claim on a
hyperparameter when the interval over pairs of points that differ in nothing else leaves out a ratio of 1. "not
distinguishable" and "not measured" are answers. Trials that have no score (diverged, pruned, dead, cancelled) are not
missing by chance: an answer stands only if they could not turn it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from hpo.queue import Job
from hpo.scores import analysis
from hpo.scores.evidence import Closed, Evidence, Winner
from hpo.text import number_text, score_text

SAME, OPEN = "not distinguishable", "not measured"
ALPHA = 1 - analysis.CONFIDENCE
FOREVER = 1e9  # epochs; what a network that was not trained to its convergence may take

# Parameter -> claim, and the two values it is about, the better one last; None: the lowest and the highest.
CLAIMS: dict[str, tuple[str, tuple[float, float] | None]] = {
    "filters": ("More filters are better", None),
    "kernel_size": ("Larger kernels are better", None),
    "dropout": ("Dropout 0.2 is better than none", (0.0, 0.2)),
    "learning_rate": ("The learning rate 1e-3 is better than 1e-4", (1e-4, 1e-3)),
}
EPOCHS = {  # role -> claim, from and to epoch
    "head": ("Heads converge within 10 to 20 epochs", 10, 20),
    "grid": ("Custom CNNs converge within 100 to 150 epochs", 100, 150),
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question, its answer in a word or two, and the numbers it follows from."""

    question: str
    answer: str
    because: str


def answers(evidence: Evidence) -> list[Answer]:
    """All questions of the protocol, in its order, then its claims."""
    return [
        _tuning(evidence),
        _fastest(evidence),
        _best_backbone(evidence),
        *_fine_tuning(evidence),
        _tuning_or_transfer(evidence),
        _best(evidence),
        _capacity(evidence),
        *_claims(evidence),
        *_convergence(evidence),
    ]


def pretrained(winner: Winner) -> bool:
    return winner.entry.get("weights") == "ImageNet"


def best(evidence: Evidence, *roles: str, backbone: str | None = None) -> Winner | None:
    """The winner of these roles with the lowest validation NMSE; of transfer networks pretrained ones alone."""
    return next(
        (
            winner
            for winner in evidence.winners
            if winner.role in roles
            and (winner.model["family"] != "transfer" or pretrained(winner))
            and backbone in (None, winner.model.get("backbone"))
        ),
        None,
    )


def difference(evidence: Evidence, one: Winner, other: Winner, *, among: int = 1) -> analysis.Interval:
    """Interval of test NMSE of `one` - `other`, over the same resampled cells; of `among` such together."""
    samples = [evidence.samples(winner.predicted)["nmse"] for winner in (one, other)]
    return analysis.interval(samples[0] - samples[1], among=among)


def against_volume_fraction(evidence: Evidence, winner: Winner) -> str:
    """Whether it beats a cubic polynomial in the volume fraction on the test split, in words."""
    cubic = evidence.samples(evidence.predictors["volume fraction"])["nmse"]
    low, high = analysis.interval(evidence.samples(winner.predicted)["nmse"] - cubic)
    word = "better than" if high < 0 else "worse than" if low > 0 else SAME + " from"
    return f"{word} a cubic polynomial in the volume fraction (difference of the test NMSE {_ends(low, high)})"


def _tuning(evidence: Evidence) -> Answer:
    question = "Did tuning improve on the baseline?"
    baseline, tuned = best(evidence, "baseline"), best(evidence, "grid")
    if baseline is None or tuned is None:
        return Answer(question=question, answer=OPEN, because=_missing(baseline=baseline, grid=tuned))
    return _compared(evidence, question, tuned, baseline, better="yes", worse="no, it did harm")


def _compared(evidence: Evidence, question: str, new: Winner, old: Winner, *, better: str, worse: str) -> Answer:
    low, high = difference(evidence, new, old)
    answer = better if high < 0 else worse if low > 0 else SAME
    return Answer(
        question=question,
        answer=answer,
        because=f"Test NMSE {_nmse(new)} ({new.title}) against {_nmse(old)} ({old.title}); difference "
        f"{_ends(low, high)}.{_unequal(new, old)}",
    )


def _unequal(*winners: Winner) -> str:
    """A sentence on the epochs of networks that are compared, if they are not the same."""
    by_epochs: dict[int, list[str]] = {}
    for winner in winners:
        by_epochs.setdefault(winner.epochs, []).append(winner.title)
    listed = "; ".join(f"{epochs} for {', '.join(titles)}" for epochs, titles in by_epochs.items())
    return f" They had unequal epochs of training, which may be part of it: {listed}." if len(by_epochs) > 1 else ""


def _backbones(evidence: Evidence, *roles: str) -> list[Winner]:
    """The best pretrained network of each backbone, lowest validation NMSE first."""
    names = dict.fromkeys(
        winner.model["backbone"] for winner in evidence.winners if winner.role in roles and pretrained(winner)
    )
    found = [winner for name in names if (winner := best(evidence, *roles, backbone=name)) is not None]
    return sorted(found, key=lambda winner: winner.nmse)


def _fastest(evidence: Evidence) -> Answer:
    question = "Which backbone converged fastest?"
    heads = _backbones(evidence, "head")
    counts = {winner.model["backbone"]: evidence.converged(winner.curves["val/nmse"]) for winner in heads}
    epochs = {name: count for name, count in counts.items() if count is not None}
    failed = [name for name, count in counts.items() if count is None]
    left_out = f" {', '.join(failed)} learned no more than the mean." if failed else ""
    if len(epochs) < 2:
        because = _no_transfer(evidence, "heads of two backbones that learn") + left_out
        return Answer(question=question, answer=OPEN, because=because)
    known = [winner for winner in heads if winner.model["backbone"] in epochs]
    falling = {each.model["backbone"] for each in known if analysis.falling(each.curves["val/nmse"])}
    least = min(epochs.values())
    first = [name for name, count in epochs.items() if count == least]
    answer = first[0] if len(first) == 1 else SAME
    listed = ", ".join(f"{name} {'at least ' * (name in falling)}{count}" for name, count in epochs.items())
    because = f"Epochs of the head until within 5 % of its lowest validation NMSE: {listed}. One seed each.{left_out}"
    if falling:
        because += " At least: its lowest value lies at the end of its training."
    if unequal := _unequal(*known):
        because += f" Heads of equal epochs are needed.{unequal}"
    if unequal or falling.intersection(first):
        answer = OPEN
    return Answer(question=question, answer=answer, because=because)


def _best_backbone(evidence: Evidence) -> Answer:
    question = "Which backbone was best?"
    found = _backbones(evidence, "head", "fine-tuned")
    if len(found) < 2:
        return Answer(question=question, answer=OPEN, because=_no_transfer(evidence, "two backbones"))
    first, *others = found
    listed = ", ".join(f"{winner.title} {_nmse(winner)}" for winner in found)
    return Answer(
        question=question,
        answer=first.model["backbone"] if _is_best(evidence, first, others) else SAME,
        because=f"Test NMSE, in the order of the validation split: {listed}. {_against(evidence, first, others)}"
        + _unequal(*found),
    )


def _fine_tuning(evidence: Evidence) -> list[Answer]:
    names = sorted({winner.model["backbone"] for winner in evidence.winners if winner.model["family"] == "transfer"})
    found = []
    for name in names:
        head, tuned = (best(evidence, role, backbone=name) for role in ("head", "fine-tuned"))
        if head is not None and tuned is not None:
            question = f"Did fine-tuning help or harm {name}?"
            found.append(_compared(evidence, question, tuned, head, better="it helped", worse="it did harm"))
    if not found:
        because = _no_transfer(evidence, "a head and its fine-tuning")
        found = [Answer(question="Did fine-tuning help or harm?", answer=OPEN, because=because)]
    return found


def _tuning_or_transfer(evidence: Evidence) -> Answer:
    question = "What helped more, tuning or transfer?"
    tuned, transferred = best(evidence, "grid"), best(evidence, "head", "fine-tuned")
    if tuned is None or transferred is None:
        because = _no_transfer(evidence, "a tuned network and a transferred one")
        return Answer(question=question, answer=OPEN, because=because)
    return _compared(evidence, question, transferred, tuned, better="transfer", worse="tuning")


def _best(evidence: Evidence) -> Answer:
    question = "Which model is best, and why?"
    if not evidence.winners:
        return Answer(question=question, answer=OPEN, because="No trial was finished.")
    first, *others = evidence.winners
    r2, ends = first.entry["test"]["r2"], analysis.interval(evidence.samples(first.predicted)["r2"])
    words = [
        f"It has the lowest validation NMSE ({_number(first.nmse)}) of {len(evidence.winners)} "
        f"selected models, with {first.entry['parameters']:,} parameters.",
        f"On the test split: R² {score_text(r2, '.4f')} {_ends(*ends)}, NMSE {_nmse(first)}; it is "
        f"{against_volume_fraction(evidence, first)}.",
        _against(evidence, first, others) + _unequal(*evidence.winners),
    ]
    return Answer(question=question, answer=first.title, because=" ".join(words).strip())


def _is_best(evidence: Evidence, first: Winner, others: Sequence[Winner]) -> bool:
    return all(difference(evidence, first, winner, among=len(others))[1] < 0 for winner in others)


def _against(evidence: Evidence, first: Winner, others: Sequence[Winner]) -> str:
    """How the model that the validation split chose does on the test split against the others."""
    ends = [(winner.title, difference(evidence, first, winner, among=len(others))) for winner in others]
    better = [title for title, (low, _) in ends if low > 0]
    worse = [title for title, (_, high) in ends if high < 0]
    same = [title for title, _ in ends if title not in better and title not in worse]
    words = []
    if better:
        words.append(
            f"The splits disagree: better on these {len(evidence.truth)} test cells are {', '.join(better)} "
            f"({_together(others)}); the choice stays that of the validation split."
        )
    if same:
        words.append(f"Not distinguishable from {first.title} there: {', '.join(same)}.")
    if worse:
        words.append("Worse there than it: all others." if len(worse) == len(ends) else f"Worse: {', '.join(worse)}.")
    return " ".join(words)


def _together(others: Sequence[Winner]) -> str:
    count = len(others)
    return "95 % interval" if count == 1 else f"95 % intervals for all {count} comparisons together"


def _capacity(evidence: Evidence) -> Answer:
    question = "Does more capacity help with this much data?"
    found = [each for each in _of_family(evidence, "cnn") if len(set(_sizes(each.whole))) > 2]
    if not found:
        return Answer(question=question, answer=OPEN, because="It takes a study of networks of three sizes.")
    grid = max(found, key=lambda each: len(each.whole))
    jobs, sizes, scores = [job for job, _ in grid.whole], _sizes(grid.whole), [score for _, score in grid.whole]
    rank, p = _rank(sizes, scores)
    gaps = []
    for job in jobs:
        curve, epoch = grid.curves[job.id], job.result.best_epoch if job.result else 0
        gaps.append(curve["val/nmse"][epoch] / curve["train/nmse"][epoch])
    gap_rank, gap_p = _rank(sizes, gaps)
    count = len(evidence.split.train)
    answer = SAME if p > ALPHA else "yes" if rank < 0 else "no, it does harm"
    overfitting = "" if gap_p > ALPHA or gap_rank < 0 else "; the gap grows with the size"
    lost = [job for job in grid.lost if job.spec]
    middle = float(np.median([*sizes, *(_size(job) for job in lost)]))
    filled = _filled(evidence, lost, scores, lambda job: (_size(job) > middle) == (rank < 0))
    again, p_again = _rank([*sizes, *(_size(job) for job, _ in filled)], [*scores, *(score for _, score in filled)])
    stands = p_again <= ALPHA and again * rank > 0
    answer, missing = _despite(answer, [job.state for job in lost], len(jobs) + len(lost), "networks", stands=stands)
    because = (
        f"{len(jobs)} networks of {min(sizes):,} to {max(sizes):,} parameters on {count} cells with "
        f"{evidence.dataset.targets.shape[1]} targets each: rank correlation of size and validation NMSE {rank:+.2f} "
        f"(p = {p:.2g}). Validation over training NMSE at the best epoch (of training: mean over the epoch while it "
        f"learned, dropout included): median {np.median(gaps):.2g}, {min(gaps):.2g} to {max(gaps):.2g}{overfitting}. "
        + missing
    )
    return Answer(question=question, answer=answer, because=because.strip())


def _rank(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Spearman's correlation and its p-value; values that are all the same have none."""
    if len(set(values)) < 2:
        return 0.0, 1.0
    found = stats.spearmanr(sizes, values)
    return float(found.statistic), float(found.pvalue)


def _claims(evidence: Evidence) -> list[Answer]:
    found = []
    for name, (claim, pair) in CLAIMS.items():
        studies = [made for each in _of_family(evidence, "cnn") if (made := _decisive(each, name, pair))]
        if not studies:
            values = " and ".join(map(number_text, pair)) if pair else "several values"
            because = f"It takes a study that compares {values} of {name}, all else equal."
            found.append(Answer(question=claim, answer=OPEN, because=because))
            continue
        chosen = max(studies, key=lambda each: each.found.pairs if each.found else 0)
        answer = OPEN
        parts = [each for each in analysis.contrasts(*_scored(chosen.study)) if each.parameter == name]
        if (ends := chosen.found) is not None:
            answer = SAME if ends.better is None else "confirmed" if ends.better == ends.high else "refuted"
            parts += [ends] if ends not in parts else []
        states = chosen.lost_pairs
        pairs = len(states) + (ends.pairs if ends else 0)
        answer, missing = _despite(answer, states, pairs, "pairs", stands=_stands(evidence, chosen))
        words = [f"{chosen.study.row.name}:", *map(_contrast, parts), missing]
        found.append(Answer(question=claim, answer=answer, because=" ".join(words).strip()))
    return found


@dataclass(frozen=True, kw_only=True)
class _Decisive:
    """A claim's two values compared in a study."""

    study: Closed
    name: str  # of the parameter
    found: analysis.Contrast | None  # of the pairs that have both their scores
    low: Any
    high: Any
    lost: list[Job]  # trials of the other pairs that have no score

    @property
    def lost_pairs(self) -> list[str]:
        """Why each of the other pairs is lost: a state."""
        return list({analysis.apart(_point(job), self.name): job.state for job in reversed(self.lost)}.values())


def _decisive(each: Closed, name: str, pair: tuple[float, float] | None) -> _Decisive | None:
    """The claim's two values compared in this study; None if it was not to compare them, all else equal."""
    points, scores = _scored(each)
    lost = [job for job in each.lost if job.spec and name in _point(job)]
    planned = [point for point in [*points, *map(_point, lost)] if name in point]
    values = {point[name] for point in planned}
    low, high = pair or (min(values, default=None), max(values, default=None))
    if low == high or not {low, high} <= values:
        return None
    sides = {value: {analysis.apart(point, name) for point in planned if point[name] == value} for value in (low, high)}
    pairs = sides[low] & sides[high]
    lost = [job for job in lost if _point(job)[name] in (low, high) and analysis.apart(_point(job), name) in pairs]
    found = analysis.contrast(points, scores, name, low, high)
    if not pairs:
        return None
    return _Decisive(study=each, name=name, found=found, low=low, high=high, lost=lost)


def _stands(evidence: Evidence, claim: _Decisive) -> bool:
    """Whether the lost pairs could not turn what the others say."""
    if claim.found is None:
        return False
    (points, scores), better = _scored(claim.study), claim.found.better
    filled = _filled(evidence, claim.lost, scores, lambda job: _point(job)[claim.name] == better)
    points, scores = points + [_point(job) for job, _ in filled], scores + [score for _, score in filled]
    again = analysis.contrast(points, scores, claim.name, claim.low, claim.high)
    return again is not None and again.better == better


def _filled(
    evidence: Evidence, lost: Iterable[Job], scores: Sequence[float], favoured: Callable[[Job], bool]
) -> list[tuple[Job, float]]:
    """Lost trials with the scores that speak most against what is `favoured`: those as bad as the mean predictor, or
    the worst of the scores; the others as good as the best, but for those that diverged: they speak for it."""
    worst = max(evidence.mean_nmse, *scores)
    return [(job, worst if favoured(job) else min(scores)) for job in lost if favoured(job) or job.state != "diverged"]


def _despite(answer: str, lost: Sequence[str], count: int, what: str, *, stands: bool) -> tuple[str, str]:
    """The answer that may be given though some of `count` things are lost, by their states, and a sentence on them."""
    if not lost:
        return answer, ""
    states = ", ".join(f"{number} {state}" for state, number in Counter(lost).items())
    said = f"{len(lost)} of {count} {what} lack a score ({states})"
    if "pruned" in lost:
        return OPEN, f"{said}; pruning selects by the score itself, so the others prove nothing."
    if answer in (SAME, OPEN) or not stands:
        return OPEN, f"{said}: they could turn the answer."
    return answer, f"{said}: at their worst they would not turn the answer."


def _point(job: Job) -> dict[str, Any]:
    return dict(job.spec.point) if job.spec else {}


def _scored(each: Closed) -> tuple[list[dict[str, Any]], list[float]]:
    """The study's whole points and their validation NMSE."""
    return [_point(job) for job, _ in each.whole], [score for _, score in each.whole]


def _sizes(points: Sequence[tuple[Job, float]]) -> list[int]:
    return [_size(job) for job, _ in points]


def _size(job: Job) -> int:
    return job.spec.parameters if job.spec else 0


def _of_family(evidence: Evidence, family: str) -> list[Closed]:
    """Studies whose networks are of this family."""
    return [
        closed
        for closed in evidence.closed
        if closed.points and (spec := closed.points[0][0].spec) and spec.model["family"] == family
    ]


def _contrast(each: analysis.Contrast) -> str:
    return (
        f"{each.parameter} {number_text(each.high)} over {number_text(each.low)}: NMSE times {each.ratio:.3f} "
        f"{_ends(*each.interval)} over {each.pairs} pairs."
    )


def _convergence(evidence: Evidence) -> list[Answer]:
    found = []
    for role, (claim, low, high) in EPOCHS.items():
        closed = _study(evidence, role)
        curves = [closed.curves[job.id]["val/nmse"] for job, _ in closed.points] if closed else []
        all_counts = [(evidence.converged(curve), curve) for curve in curves]
        counts = [(count, curve) for count, curve in all_counts if count is not None]
        failed = len(all_counts) - len(counts)
        left_out = f" {failed} learned no more than the mean and are left out." if failed else ""
        if not counts:
            because = "No such network learned." if role == "grid" else _no_transfer(evidence, "heads that learn")
            found.append(Answer(question=claim, answer=OPEN, because=because + left_out))
            continue
        known = [count for count, _ in counts]
        limits = [max(curve) < low or analysis.falling(curve) for _, curve in counts]
        most = [FOREVER if limit else count for count, limit in zip(known, limits, strict=True)]
        states = _without_a_score(closed)
        unknown = sum(number for state, number in states.items() if state != "diverged")
        first, _, last = zip(_quartiles(known + unknown * [1]), _quartiles(most + unknown * [FOREVER]), strict=True)
        quarter, middle, three = _quartiles(known)
        because = (
            f"Epochs until within 5 % of the lowest validation NMSE: median {middle:.0f}, middle half {quarter:.0f} to "
            f"{three:.0f}, all {min(known)} to {max(known)}, of {len(known)} networks."
        )
        if any(limits):
            because += (
                f" Of {sum(limits)} of them that is a lower limit: their training ended before epoch {low}, or with "
                "its lowest value at the end."
            )
        if states:
            listed = ", ".join(f"{number} {state}" for state, number in states.items())
            because += f" {states.total()} more have no score ({listed})."
        found.append(Answer(question=claim, answer=_inside(low, high, first, last), because=because + left_out))
    return found


def _without_a_score(each: Closed | None) -> Counter[str]:
    """How many points of a study have no finished trial, by the state that says why."""
    scored = {job.number for job, _ in each.points} if each else set()
    return Counter(job.state for job in (each.lost if each else ()) if job.number not in scored)


def _quartiles(counts: Sequence[float]) -> tuple[float, float, float]:
    first, middle, last = np.quantile(counts, [0.25, 0.5, 0.75])
    return float(first), float(middle), float(last)


def _inside(low: float, high: float, first: tuple[float, float], last: tuple[float, float]) -> str:
    """Whether the middle half of the networks lies within `low` to `high`; of its ends is known what they are at least
    and at most."""
    if low <= first[0] and last[1] <= high:
        return "confirmed"
    if last[1] < low or first[0] > high:
        return "refuted"
    crosses = last[0] >= low and first[1] <= high
    return "in part" if crosses and (first[1] < low or last[0] > high) else OPEN


def _study(evidence: Evidence, role: str) -> Closed | None:
    """The study of the best winner of this role."""
    winner = best(evidence, role)
    return next((each for each in evidence.closed if winner is not None and each.row.name == winner.study), None)


def _no_transfer(evidence: Evidence, wanted: str) -> str:
    bare = any(winner.model["family"] == "transfer" and not pretrained(winner) for winner in evidence.winners)
    reason = "The backbones here were not pretrained: this is no transfer learning. " if bare else ""
    return f"{reason}It takes {wanted}, pretrained."


def _missing(**winners: Winner | None) -> str:
    return f"It takes a study of {' and of '.join(name for name, winner in winners.items() if winner is None)}."


def _nmse(winner: Winner) -> str:
    return _number(winner.entry["test"]["nmse"])


def _number(value: float) -> str:
    return f"{value:.4g}"


def _ends(low: float, high: float) -> str:
    return f"[{score_text(low, '.3g')}, {score_text(high, '.3g')}]"
