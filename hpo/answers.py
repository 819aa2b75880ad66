"""The source study's questions and claims, decided by rules from numbers and their intervals.

A difference counts when the 95 % interval of it, resampled over the same test cells, leaves out zero; a claim on a
hyperparameter when the interval over pairs of points that differ in nothing else leaves out a ratio of 1. "not
distinguishable" and "not measured" are answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from hpo import analysis
from hpo.evidence import Closed, Evidence, Winner
from hpo.mirror import number_text

SAME, OPEN = "not distinguishable", "not measured"
ALPHA = 1 - analysis.CONFIDENCE

# Parameter -> the value the source study claims to be the better one: the highest or the lowest of the grid.
CLAIMS = {
    "filters": ("More filters are better", max),
    "kernel_size": ("Larger kernels are better", max),
    "dropout": ("Dropout 0.2 is better than none", max),
    "learning_rate": ("The learning rate 1e-3 is better than 1e-4", max),
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
    if len(heads) < 2:
        return Answer(question=question, answer=OPEN, because=_no_transfer(evidence, "heads of two backbones"))
    epochs = {winner.model["backbone"]: analysis.converged(winner.curves["val/nmse"]) for winner in heads}
    least = min(epochs.values())
    first = [name for name, count in epochs.items() if count == least]
    listed = ", ".join(f"{name} {count}" for name, count in epochs.items())
    return Answer(
        question=question,
        answer=first[0] if len(first) == 1 else SAME,
        because=f"Epochs of the head until within 5 % of its lowest validation NMSE: {listed}. One seed each.",
    )


def _best_backbone(evidence: Evidence) -> Answer:
    question = "Which backbone was best?"
    found = _backbones(evidence, "head", "fine-tuned")
    if len(found) < 2:
        return Answer(question=question, answer=OPEN, because=_no_transfer(evidence, "two backbones"))
    first, second = found[:2]
    low, high = difference(evidence, first, second)
    listed = ", ".join(f"{winner.title} {_nmse(winner)}" for winner in found)
    return Answer(
        question=question,
        answer=first.model["backbone"] if high < 0 else SAME,
        because=f"Test NMSE, in the order of the validation split: {listed}; first - second {_ends(low, high)}.",
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
    same = [winner.title for winner in others if _contains_zero(difference(evidence, first, winner))]
    r2, ends = first.entry["test"]["r2"], analysis.interval(evidence.samples(first.predicted)["r2"])
    words = [
        f"It has the lowest validation NMSE ({_number(first.nmse)}) of {len(evidence.winners)} "
        f"selected models, with {first.entry['parameters']:,} parameters.",
        f"On the test split: R² {r2:.4f} {_ends(*ends)}, NMSE {_nmse(first)}; it is "
        f"{against_volume_fraction(evidence, first)}.",
    ]
    if same:
        words.append(f"On these {len(evidence.truth)} test cells not distinguishable from it: {', '.join(same)}.")
    elif others:
        words.append("On the test split, too, it is distinguishable from every other.")
    return Answer(question=question, answer=first.title, because=" ".join(words))


def _capacity(evidence: Evidence) -> Answer:
    question = "Does more capacity help with this much data?"
    grid = _study(evidence, "grid")
    jobs = grid.ranked if grid is not None else []
    sizes = [job.spec["parameters"] for job in jobs if job.spec]
    if grid is None or len(set(sizes)) < 3:
        return Answer(question=question, answer=OPEN, because="It takes a study of networks of three sizes.")
    scores = [job.result["best_val_nmse"] for job in jobs if job.result]
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
        f"(p = {p:.2g}). Validation over training NMSE at the best epoch: {np.median(gaps):.2g} in the middle of the "
        f"networks, {min(gaps):.2g} to {max(gaps):.2g}{overfitting}.",
    )


def _rank(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Spearman's correlation and its p-value; values that are all the same have none."""
    if len(set(values)) < 2:
        return 0.0, 1.0
    found = stats.spearmanr(sizes, values)
    return float(found.statistic), float(found.pvalue)


def _claims(evidence: Evidence) -> list[Answer]:
    grid = _study(evidence, "grid")
    jobs = grid.ranked if grid is not None else []
    points = [job.spec["point"] for job in jobs if job.spec]
    scores = [job.result["best_val_nmse"] for job in jobs if job.result]
    found = []
    for name, (claim, better) in CLAIMS.items():
        values = {point[name] for point in points if name in point}
        ends = analysis.contrast(points, scores, name, min(values), max(values)) if len(values) > 1 else None
        if ends is None:
            because = f"It takes a study that compares values of {name}, all else equal."
            found.append(Answer(question=claim, answer=OPEN, because=because))
            continue
        answer = SAME if ends.better is None else "confirmed" if ends.better == better(values) else "refuted"
        parts = [each for each in analysis.contrasts(points, scores) if each.parameter == name]
        parts += [ends] if len(parts) > 1 else []
        found.append(Answer(question=claim, answer=answer, because=" ".join(_contrast(each) for each in parts)))
    return found


def _contrast(each: analysis.Contrast) -> str:
    return (
        f"{each.parameter} {number_text(each.high)} over {number_text(each.low)}: NMSE times {each.ratio:.3f} "
        f"{_ends(*each.interval)} over {each.pairs} pairs."
    )


def _convergence(evidence: Evidence) -> list[Answer]:
    found = []
    for role, (claim, low, high) in EPOCHS.items():
        closed = _study(evidence, role)
        counts = [analysis.converged(closed.curves[job.id]["val/nmse"]) for job in closed.ranked] if closed else []
        if not counts:
            because = "No such network was trained." if role == "grid" else _no_transfer(evidence, "heads")
            found.append(Answer(question=claim, answer=OPEN, because=because))
            continue
        first, middle, last = np.quantile(counts, [0.25, 0.5, 0.75])
        inside, outside = low <= first and last <= high, last < low or first > high
        answer = "confirmed" if inside else "refuted" if outside else "in part"
        found.append(
            Answer(
                question=claim,
                answer=answer,
                because=f"Epochs until within 5 % of the lowest validation NMSE: median {middle:.0f}, middle half "
                f"{first:.0f} to {last:.0f}, all {min(counts)} to {max(counts)}, of {len(counts)} networks.",
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


def _contains_zero(ends: Sequence[float]) -> bool:
    return ends[0] <= 0 <= ends[1]


def _nmse(winner: Winner) -> str:
    return _number(winner.entry["test"]["nmse"])


def _number(value: float) -> str:
    return f"{value:.4g}"


def _ends(low: float, high: float) -> str:
    return f"[{low:.3g}, {high:.3g}]"
