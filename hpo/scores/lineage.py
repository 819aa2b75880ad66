"""Studies on the versions of a data set that grows: they have one registered model and one champion.

Networks of one data set are ordered by their standings. Those of another version are put among them by the validation
images that both data sets have: each trial has a score on those of the data sets that its own one extends.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from hpo.queue import Job, StudyRow
from hpo.scores.standings import Rival, Standing, problem, standings
from hpo.study.records import DataVersion


def versions(row: StudyRow) -> tuple[DataVersion, ...]:
    """Return the data set of a study behind those that it extends, the oldest first."""
    return (*(row.facts.data.earlier or ()), row.facts.data)


def of_line(row: StudyRow, rows: Iterable[StudyRow]) -> list[StudyRow]:
    """Return those of the studies that have the targets of `row`, and a data set that extends its data set, or is
    extended by it, or both extend a third."""
    related = [other for other in rows if other.facts.data.target_names == row.facts.data.target_names]
    line, before = _keys(row), frozenset[str]()
    while line != before:
        before = line
        line = line.union(*(_keys(other) for other in related if _keys(other) & line))
    return [other for other in related if _keys(other) & line]


def newest(row: StudyRow, line: Iterable[StudyRow]) -> StudyRow:
    """Return a study of the line whose data set extends the most others, `row` itself if it is one."""
    return max((row, *line), key=lambda other: len(versions(other)))


def root(row: StudyRow, rows: Iterable[StudyRow]) -> DataVersion:
    """Return the data set that the line of `row` began with, as far as these studies name it."""
    return versions(newest(row, of_line(row, rows)))[0]


def title(version: DataVersion) -> str:
    """Return what people call a data set: versions of it often have one name."""
    return f"{version.name} ({version.digest[:8]})"


class Line:
    """Every finished trial of studies on the versions of a data set, with what it is elected by; `closing` as in
    hpo.scores.standings."""

    def __init__(self, rivals: Sequence[Rival], *, closing: str | None = None) -> None:
        self.standings: dict[str, Standing] = {}  # by MLflow run, on the validation images of its own data set
        self.titles: dict[str, str] = {}  # of the data sets, by key
        self._data: dict[str, list[str]] = {}  # by run: keys of the data sets that its own one extends, and of that
        self._on: dict[str, dict[str, Standing]] = {}  # by the key of a data set, on whose images, and by run
        by_data: dict[tuple[str, ...], list[Rival]] = {}
        for rival in rivals:
            by_data.setdefault(problem(rival.row), []).append(rival)
        for group in by_data.values():
            # A study that an earlier hpo planned does not name the data sets that its own one extends.
            line = versions(newest(group[0].row, [rival.row for rival in group]))
            self.titles |= {version.key: title(version) for version in line}
            keys = [version.key for version in line]
            own = standings(group, closing=closing)
            self.standings |= own
            self._data |= dict.fromkeys(own, keys)
            self._on.setdefault(keys[-1], {}).update(own)
            for key in keys[:-1]:
                there = standings([_on(rival, key) for rival in group], closing=closing)
                self._on.setdefault(key, {}).update(there)

    def order(self, runs: Sequence[str], stands: Callable[[str], bool]) -> list[str]:
        """Return runs of all data sets, the best first; `runs` of one data set are in that order and stay in it.

        The data sets are taken from the oldest on; only runs that stand for election are compared. A run without a
        score on common images stands before the next of its data set that has one; without such a run it comes behind
        all of the older data sets.
        """
        by_data: dict[str, list[str]] = {}
        for run in sorted(runs, key=lambda run: len(self._data[run])):
            by_data.setdefault(self._data[run][-1], []).append(run)
        result: list[str] = []
        for newer in by_data.values():
            older, result = result, []
            while older and newer:
                pairs = (self.compared(run, older[0]) for run in newer if stands(run) and stands(older[0]))
                pair = next(filter(None, pairs), None)
                result.append((newer if pair and pair[1] < pair[2] else older).pop(0))
            result += [*older, *newer]
        return result

    def data(self, run: str) -> str:
        """Return the title of the data set that a run was trained on; an empty text if all were trained on one."""
        return self.titles[self._data[run][-1]] if len(self.titles) > 1 else ""

    def compared(self, run: str, other: str) -> tuple[str, Standing, Standing] | None:
        """Return the key of the newest data set on whose validation images both runs have scores, and these; None if
        there is no such data set."""
        for key in reversed(self._data[run]):
            there = self._on[key]
            if run in there and other in there:
                return key, there[run], there[other]
        return None


def _keys(row: StudyRow) -> frozenset[str]:
    return frozenset(version.key for version in versions(row))


def _on(rival: Rival, key: str) -> Rival:
    """Return a study with the scores of its trials on an earlier data set; those that lack one have no result."""

    def there(job: Job) -> Job:
        score = None if job.result is None else (job.result.common or {}).get(key)
        if job.result is None or score is None:
            return replace(job, result=None)
        return replace(job, result=replace(job.result, best_val_nmse=score))

    return replace(rival, jobs=[there(job) for job in rival.jobs])
