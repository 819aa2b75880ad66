"""The claims of closed studies, decided by the same rules for everybody from numbers and their intervals."""

from collections.abc import Callable
from itertools import chain

from hpo.report import convergence_claims, model_claims, parameter_claims
from hpo.report.answers import Answer
from hpo.scores.evidence import Evidence
from hpo.study.claims import Claim, shipped

RULES: dict[str, Callable[[Evidence, Claim], list[Answer]]] = {
    "parameter effect": parameter_claims.effect,
    "model comparison": model_claims.decide,
    "convergence": convergence_claims.decide,
    "capacity": parameter_claims.capacity,
}


def answers(evidence: Evidence) -> list[Answer]:
    """Return the answers to all claims, in the order of the files."""
    return [answer for claim in asked(evidence) for answer in RULES[claim.kind](evidence, claim)]


def asked(evidence: Evidence) -> list[Claim]:
    """Return the claims of the studies' files, each once; if none has any, those of the source study."""
    own = [closed.row.facts.claims or () for closed in evidence.closed]
    return list(dict.fromkeys(chain.from_iterable(own)) or shipped())
