"""The source study's questions and claims, decided by rules from numbers and their intervals.

A difference counts when the 95 % interval of it, resampled over the same test cells, leaves out zero; a claim on a
hyperparameter when the interval over pairs of points that differ in nothing else leaves out a ratio of 1. "not
distinguishable" and "not measured" are answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from hpo import analysis
from hpo.evidence import Closed, Evidence, Winner
from hpo.mirror import number_text, score_text

SAME, OPEN = "not distinguishable", "not measured"
ALPHA = 1 - analysis.CONFIDENCE

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


def difference(evidence: Evidence, one: Winner, other: Winner) -> analysis.Interval:
    """Interval of test NMSE of `one` - `other`, over the same resampled cells."""
    samples = [evidence.samples(winner.predicted)["nmse"] for winner in (one, other)]
    return analysis.interval(samples[0] - samples[1])


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
        f"{_ends(low, high)}.",
    )


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
    least = min(epochs.values())
    first = [name for name, count in epochs.items() if count == least]
    listed = ", ".join(f"{name} {count}" for name, count in epochs.items())
    return Answer(
        question=question,
        answer=first[0] if len(first) == 1 else SAME,
        because=f"Epochs of the head until within 5 % of its lowest validation NMSE: {listed}. One seed "
        f"each.{left_out}",
    )


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
        because=f"Test NMSE, in the order of the validation split: {listed}. {_against(evidence, first, others)}",
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
        _against(evidence, first, others),
    ]
    return Answer(question=question, answer=first.title, because=" ".join(words).strip())


def _is_best(evidence: Evidence, first: Winner, others: Sequence[Winner]) -> bool:
    return all(difference(evidence, first, winner)[1] < 0 for winner in others)


def _against(evidence: Evidence, first: Winner, others: Sequence[Winner]) -> str:
    """How the model that the validation split chose does on the test split against the others."""
    ends = [(winner.title, difference(evidence, first, winner)) for winner in others]
    better = [title for title, (low, _) in ends if low > 0]
    worse = [title for title, (_, high) in ends if high < 0]
    same = [title for title, _ in ends if title not in better and title not in worse]
    words = []
    if better:
        words.append(
            f"The splits disagree: better on these {len(evidence.truth)} test cells are {', '.join(better)}; the "
            "choice stays that of the validation split."
        )
    if same:
        words.append(f"Not distinguishable from {first.title} there: {', '.join(same)}.")
    if worse:
        words.append("Worse there than it: all others." if len(worse) == len(ends) else f"Worse: {', '.join(worse)}.")
    return " ".join(words)


def _capacity(evidence: Evidence) -> Answer:
    question = "Does more capacity help with this much data?"
    found = [each for each in _of_family(evidence, "cnn") if len(set(_sizes(each))) > 2]
    if not found:
        return Answer(question=question, answer=OPEN, because="It takes a study of networks of three sizes.")
    grid = max(found, key=lambda each: len(each.points))
    jobs, sizes, scores = [job for job, _ in grid.points], _sizes(grid), [score for _, score in grid.points]
    rank, p = _rank(sizes, scores)
    gaps = []
    for job in jobs:
        curve, epoch = grid.curves[job.id], (job.result or {})["best_epoch"]
        gaps.append(curve["val/nmse"][epoch] / curve["train/nmse"][epoch])
    gap_rank, gap_p = _rank(sizes, gaps)
    count = len(evidence.split.train)
    answer = SAME if p > ALPHA else "yes" if rank < 0 else "no, it does harm"
    overfitting = "" if gap_p > ALPHA or gap_rank < 0 else "; the gap grows with the size"
    return Answer(
        question=question,
        answer=answer,
        because=f"{len(jobs)} networks of {min(sizes):,} to {max(sizes):,} parameters on {count} cells with "
        f"{evidence.dataset.targets.shape[1]} targets each: rank correlation of size and validation NMSE {rank:+.2f} "
        f"(p = {p:.2g}). Validation over training NMSE at the best epoch (of training: mean over the epoch while it "
        f"learned, dropout included): median {np.median(gaps):.2g}, {min(gaps):.2g} to {max(gaps):.2g}{overfitting}.",
    )


def _rank(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Spearman's correlation and its p-value; values that are all the same have none."""
    if len(set(values)) < 2:
        return 0.0, 1.0
    found = stats.spearmanr(sizes, values)
    return float(found.statistic), float(found.pvalue)


def _claims(evidence: Evidence) -> list[Answer]:
    found = []
    for name, (claim, pair) in CLAIMS.items():
        studies = [(each, ends) for each in _of_family(evidence, "cnn") if (ends := _decisive(each, name, pair))]
        if not studies:
            values = " and ".join(map(number_text, pair)) if pair else "several values"
            because = f"It takes a study that compares {values} of {name}, all else equal."
            found.append(Answer(question=claim, answer=OPEN, because=because))
            continue
        chosen, ends = max(studies, key=lambda each: each[1].pairs)
        answer = SAME if ends.better is None else "confirmed" if ends.better == ends.high else "refuted"
        parts = [each for each in analysis.contrasts(*_scored(chosen)) if each.parameter == name]
        parts += [ends] if ends not in parts else []
        because = f"{chosen.row.name}: " + " ".join(_contrast(each) for each in parts)
        found.append(Answer(question=claim, answer=answer, because=because))
    return found


def _decisive(each: Closed, name: str, pair: tuple[float, float] | None) -> analysis.Contrast | None:
    """The claim's two values compared in this study; None if it does not have both, all else equal."""
    points, scores = _scored(each)
    values = {point[name] for point in points if name in point}
    low, high = pair or (min(values, default=None), max(values, default=None))
    if low == high or not {low, high} <= values:
        return None
    return analysis.contrast(points, scores, name, low, high)


def _scored(each: Closed) -> tuple[list[dict[str, Any]], list[float]]:
    """The study's points and their validation NMSE."""
    return [job.spec["point"] for job, _ in each.points if job.spec], [score for _, score in each.points]


def _sizes(each: Closed) -> list[int]:
    return [job.spec["parameters"] for job, _ in each.points if job.spec]


def _of_family(evidence: Evidence, family: str) -> list[Closed]:
    """Studies whose networks are of this family."""
    return [
        each for each in evidence.closed if each.points and (each.points[0][0].spec or {})["model"]["family"] == family
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
        all_counts = (
            [evidence.converged(closed.curves[job.id]["val/nmse"]) for job, _ in closed.points] if closed else []
        )
        counts = [count for count in all_counts if count is not None]
        failed = len(all_counts) - len(counts)
        left_out = f" {failed} learned no more than the mean and are left out." if failed else ""
        if not counts:
            because = "No such network learned." if role == "grid" else _no_transfer(evidence, "heads that learn")
            found.append(Answer(question=claim, answer=OPEN, because=because + left_out))
            continue
        first, middle, last = np.quantile(counts, [0.25, 0.5, 0.75])
        inside, outside = low <= first and last <= high, last < low or first > high
        answer = "confirmed" if inside else "refuted" if outside else "in part"
        found.append(
            Answer(
                question=claim,
                answer=answer,
                because=f"Epochs until within 5 % of the lowest validation NMSE: median {middle:.0f}, middle half "
                f"{first:.0f} to {last:.0f}, all {min(counts)} to {max(counts)}, of {len(counts)} networks.{left_out}",
            )
        )
    return found


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
