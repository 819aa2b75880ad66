"""Registered versions that may be elected champion, and how MLflow's pages list them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hpo.queue import Job
from hpo.queue.closing_result import Compared
from hpo.scores.lineage import Line
from hpo.scores.standings import Standing
from hpo.text import for_markdown, score_text
from hpo.tracking.registry import CHAMPION, Version

# Tags of a version, for people: the validation NMSE of its network, and that of its configuration.
OWN, POINT = "hpo.best_val_nmse", "hpo.point_val_nmse"
FORCED = "hpo.forced"  # tag of a version that may be champion for `hpo promote --force` was said of it
DATA = "hpo.data"  # tag of a version: the data set that it was trained on
EARLIER = "hpo.val_nmse_of."  # with the digest of a data set that its own one extends: NMSE on that one's images


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A registered version of a finished trial of this database."""

    model: str
    version: Version
    job: Job
    standing: Standing
    is_forced: bool = False  # by `hpo promote --force`
    data: str = ""  # title of the data set that it was trained on, if there are several

    @property
    def title(self) -> str:
        return f"{self.model} version {self.version.number}"

    def equals(self, other: "Candidate") -> bool:
        """Return whether both have the same scores on the same data."""
        return (self.standing, self.data) == (other.standing, other.data)

    @property
    def is_champion(self) -> bool:
        return CHAMPION in self.version.aliases

    @property
    def score_tags(self) -> dict[str, str]:
        """The tags that say in MLflow what the version is elected by."""
        same = self.standing.point == self.standing.own and POINT not in self.version.tags
        earlier = (self.job.result.common if self.job.result else None) or {}
        tags = {OWN: repr(self.standing.own)} | ({} if same else {POINT: repr(self.standing.point)})
        tags |= {EARLIER + key[:8]: repr(nmse) for key, nmse in earlier.items()}
        return tags | ({FORCED: "true"} if self.is_forced else {})


def compared(champion: Candidate, best: Iterable[Candidate], line: Line) -> tuple[Compared, ...]:
    """Return the champion's score beside those of the best candidates of other data sets, on common images."""
    result = []
    for other in best:
        pair = line.compared(other.version.run_id, champion.version.run_id)
        result.append(
            Compared(
                study=other.job.study,
                model=other.model,
                version=other.version.number,
                data=other.data,
                on=None if pair is None else line.titles[pair[0]],
                nmse=None if pair is None else pair[1].own,
                champion_nmse=None if pair is None else pair[2].own,
            )
        )
    return tuple(result)


def table(candidates: Sequence[Candidate]) -> str:
    """Return the versions of a model for its description, @champion first, then the best; empty if there is none."""
    is_grown = len({candidate.data for candidate in candidates}) > 1
    rows = [("version", "trial", "validation NMSE", "verdict", "aliases"), ("---",) * 5]
    rows += [
        (
            str(candidate.version.number),
            for_markdown(candidate.version.description.partition("\n")[0]),
            _scores_text(candidate.standing) + (for_markdown(f" on {candidate.data}") if is_grown else ""),
            candidate.version.tags.get("hpo.verdict", ""),
            " ".join(f"`@{name}`" for name in candidate.version.aliases),
        )
        for candidate in sorted(candidates, key=lambda one: not one.is_champion)
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if len(rows) > 2 else ""


def _scores_text(standing: Standing) -> str:
    """Return a network's validation NMSE, and its configuration's if that differs or lost to another one."""
    text = score_text(standing.own)
    if math.isinf(standing.point):
        return f"{text}, with other seeds another point is better"
    return text if standing.point == standing.own else f"{text}, mean of its point {score_text(standing.point)}"
