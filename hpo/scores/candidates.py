"""Registered versions that may be elected champion, and how MLflow's pages list them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hpo.queue import Job
from hpo.scores.standings import Standing
from hpo.text import for_markdown, score_text
from hpo.tracking.registry import CHAMPION, Version

# Tags of a version, for people: the validation NMSE of its network, and that of its configuration.
OWN, POINT = "hpo.best_val_nmse", "hpo.point_val_nmse"
FORCED = "hpo.forced"  # tag of a version that may be champion for `hpo promote --force` was said of it


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A registered version of a finished trial of this database."""

    model: str
    version: Version
    job: Job
    standing: Standing
    is_forced: bool = False  # by `hpo promote --force`

    @property
    def title(self) -> str:
        return f"{self.model} version {self.version.number}"

    @property
    def is_champion(self) -> bool:
        return CHAMPION in self.version.aliases

    @property
    def score_tags(self) -> dict[str, str]:
        """The tags that say in MLflow what the version is elected by."""
        same = self.standing.point == self.standing.own and POINT not in self.version.tags
        tags = {OWN: repr(self.standing.own)} | ({} if same else {POINT: repr(self.standing.point)})
        return tags | ({FORCED: "true"} if self.is_forced else {})


def table(candidates: Sequence[Candidate]) -> str:
    """Return the versions of a model for its description, @champion first, then the best; empty if there is none."""
    rows = [("version", "trial", "validation NMSE", "verdict", "aliases"), ("---",) * 5]
    rows += [
        (
            str(candidate.version.number),
            for_markdown(candidate.version.description.partition("\n")[0]),
            _scores_text(candidate.standing),
            candidate.version.tags.get("hpo.verdict", ""),
            " ".join(f"`@{name}`" for name in candidate.version.aliases),
        )
        for candidate in sorted(candidates, key=lambda one: (not one.is_champion, one.standing))
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if len(rows) > 2 else ""


def _scores_text(standing: Standing) -> str:
    """Return a network's validation NMSE, and its configuration's if that differs or lost to another one."""
    text = score_text(standing.own)
    if math.isinf(standing.point):
        return f"{text}, with other seeds another point is better"
    return text if standing.point == standing.own else f"{text}, mean of its point {score_text(standing.point)}"
