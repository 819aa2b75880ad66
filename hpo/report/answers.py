"""Answers to claims: words, sentences and intervals that every kind of claim uses.

"not distinguishable" and "not measured" are answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpo import study
from hpo.scores import analysis
from hpo.scores.evidence import Closed, Evidence, Winner
from hpo.text import score_text

SAME, OPEN = "not distinguishable", "not measured"
PRETRAINED_ROLES = ("head", "fine-tuned")  # of networks that are compared only if their backbone is pretrained
ROLES = ("baseline", "grid", "cnn", "periodic", *PRETRAINED_ROLES)  # of winners; any other word is a study's name


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question, its answer in a word or two, and the numbers it follows from."""

    question: str
    answer: str
    because: str


def is_pretrained(winner: Winner) -> bool:
    return winner.entry.weights not in (None, "", "not pretrained")


def is_of(winner: Winner, words: Sequence[str]) -> bool:
    """Whether a winner has one of these roles, or is of one of these studies; without words always."""
    if not words:
        return True
    names = {winner.study, study.file_name(winner.study)} - set(ROLES)
    in_role = winner.role in words and (winner.role not in PRETRAINED_ROLES or is_pretrained(winner))
    return in_role or not names.isdisjoint(words)


def best(evidence: Evidence, words: Sequence[str], **settings: Any) -> Winner | None:
    """Return the winner of these roles or studies, and of these settings of the model, with the lowest validation
    NMSE."""
    return next(
        (
            winner
            for winner in evidence.winners
            if is_of(winner, words) and all(winner.model.get(key) == value for key, value in settings.items())
        ),
        None,
    )


def values(evidence: Evidence, key: str) -> list[Any]:
    """Return the values that a setting of the model has among the winners."""
    return sorted({winner.model[key] for winner in evidence.winners if key in winner.model})


def best_of_each(evidence: Evidence, words: Sequence[str], key: str) -> list[Winner]:
    """Return the best winner of each value of a setting of the model, lowest validation NMSE first."""
    winners = [best(evidence, words, **{key: value}) for value in values(evidence, key)]
    return sorted((winner for winner in winners if winner is not None), key=lambda winner: winner.nmse)


def of_best(evidence: Evidence, words: Sequence[str]) -> Closed | None:
    """Return the study of the best winner of these roles or studies."""
    winner = best(evidence, words)
    return next((closed for closed in evidence.closed if winner is not None and closed.row.name == winner.study), None)


def missing(evidence: Evidence, *groups: Sequence[str]) -> str:
    """Return a sentence on the roles or studies that are missing, and on backbones that are not pretrained."""
    wanted = " and of ".join(" or ".join(words) for words in groups)
    if not any(word in PRETRAINED_ROLES for words in groups for word in words):
        return f"It takes a study of {wanted}."
    bare = any(winner.model["family"] == "transfer" and not is_pretrained(winner) for winner in evidence.winners)
    reason = "The backbones here were not pretrained: this is no transfer learning. " if bare else ""
    return f"{reason}It takes a study of {wanted}, pretrained."


def unequal(winners: Sequence[Winner]) -> str:
    """Return a sentence on the epochs of networks that are compared, if they are not the same."""
    by_epochs: dict[int, list[str]] = {}
    for winner in winners:
        by_epochs.setdefault(winner.epochs, []).append(winner.title)
    listed = "; ".join(f"{epochs} for {', '.join(titles)}" for epochs, titles in by_epochs.items())
    return f" They had unequal epochs of training, which may be part of it: {listed}." if len(by_epochs) > 1 else ""


def interval_text(ends: analysis.Interval) -> str:
    return f"[{score_text(ends[0], '.3g')}, {score_text(ends[1], '.3g')}]"
