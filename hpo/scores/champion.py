"""The champion and the studies' aliases in MLflow's model registry, set to where the rows of the queue put them.

What the registry says of its versions (tags, descriptions) is for people, and is brought up to date from the rows. A
registered model belongs to one database, as an experiment does.
"""

import logging
import math
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hpo import crash
from hpo.errors import ModelError, NotFound
from hpo.queue import DatabaseLost, Job, Queue, State, StudyRow
from hpo.queue.closing_result import ClosingResult, Election
from hpo.scores import gains, lineage, ranking
from hpo.scores.candidates import DATA, Candidate, compared, table
from hpo.scores.lineage import Line
from hpo.scores.standings import Rival
from hpo.study import alias
from hpo.tracking import registry
from hpo.tracking.client import OWNER, Tracker
from hpo.tracking.registry import CHAMPION, Version

NOT_CHECKED = "not checked"  # a version that is neither sound nor unsound
PATIENCE = 30.0  # seconds after which an election that froze loses its lock

log = logging.getLogger("hpo")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What setting the aliases led to."""

    elected: Election
    moved: list[str]  # aliases of studies that were set
    refused: dict[str, str]  # aliases of studies that were not set, and the reason


def settle(
    queue: Queue,
    tracker: Tracker,
    row: StudyRow,
    *,
    closing: Job | None = None,
    leaving: str | None = None,
    sound: Collection[str] = (),
) -> Outcome:
    """Set @champion and the alias of each study on the line of `row` by the rows; refresh tags and tables.

    `closing`: this job's study counts as closed; raise LeaseLost, and change nothing, if another worker holds the job.
    `leaving`: a study that is being deleted. `sound`: runs whose models have just been downloaded, checked and scored;
    every other model is checked before it gets an alias.
    """
    study = closing.study if closing else None
    try:
        with lock(queue, row) as hold:
            if closing is not None:
                queue.require(closing)
            return Contest(queue, tracker, row, closing=study, leaving=leaving, sound=sound).settle(hold)
    except DatabaseLost:
        # We may have been frozen in the middle, and have written over what another worker decided meanwhile.
        with lock(queue, row) as hold:
            Contest(queue, tracker, row, leaving=leaving, sound=sound).settle(hold)
        raise


def force(queue: Queue, row: StudyRow, result: ClosingResult) -> None:
    """Let a closed study's best version be champion, whatever it gains over the mean predictor.

    Raise NotFound if it has none.
    """
    best = ranking.best_network(queue.jobs(row.name))
    if best is None or result.winner is None or result.winner.version is None:
        raise NotFound(f"--force: the study {row.name} has registered no model: {result.reason}.")
    queue.amend_facts(row.name, {"forced": sorted({*(row.facts.forced or ()), str(best.run_id)})})


def faults(queue: Queue, tracker: Tracker, row: StudyRow) -> Iterator[str]:
    """Say where aliases and tags in the registry contradict the rows; nothing while a study on the problem closes."""
    contest = Contest(queue, tracker, row)
    closings = [rival.closing_attempt for rival in contest.rivals]
    if any(attempt is not None and attempt[0] == State.RUNNING for attempt in closings):
        return
    messages = list(contest.faults())
    if closings == [rival.closing_attempt for rival in rivals(queue, row)]:
        yield from messages


def competing(queue: Queue, row: StudyRow) -> list[StudyRow]:
    """Return all studies of this database on the data of `row` and its other versions, itself among them, the oldest
    first.

    A study that is half deleted competes no more.
    """
    studies = lineage.of_line(row, queue.studies())
    return [other for other in studies if other.name == row.name or not other.deleting]


def rivals(queue: Queue, row: StudyRow) -> list[Rival]:
    """Return the studies of `competing` with their jobs."""
    return [Rival(row=other, jobs=queue.jobs(other.name, brief=True)) for other in competing(queue, row)]


class Contest:
    """The studies on the problem of `row`, and the registered models that hold their versions."""

    def __init__(
        self,
        queue: Queue,
        tracker: Tracker,
        row: StudyRow,
        *,
        closing: str | None = None,
        leaving: str | None = None,
        sound: Collection[str] = (),
    ) -> None:
        self.queue, self.tracker, self.row, self.closing, self.sound = queue, tracker, row, closing, sound
        self.rivals = [rival for rival in rivals(queue, row) if rival.row.name != leaving]
        self.models = own_models(queue, tracker, [rival.row for rival in self.rivals])
        self.line = Line(self.rivals, closing=closing)
        self._standing: dict[str, bool] = {}  # answers of `stands`, by run

    def candidates(self) -> list[Candidate]:
        """Return every version that may be elected, with the aliases it has now, the best first."""
        owner, line = self.queue.database_id(), self.line
        jobs = {str(job.run_id): job for rival in self.rivals for job in rival.jobs}
        forced = {run for rival in self.rivals for run in rival.row.facts.forced or ()}
        result = [
            Candidate(
                model=name,
                version=version,
                job=jobs[version.run_id],
                standing=line.standings[version.run_id],
                is_forced=version.run_id in forced,
                data=line.data(version.run_id),
            )
            for name in self.models
            for version in registry.versions(self.tracker, name)
            if version.tags.get(OWNER) == owner and version.run_id in line.standings
        ]
        result.sort(key=lambda one: (one.standing, self.models.index(one.model), one.version.number))
        by_run = {one.version.run_id: one for one in reversed(result)}
        order = line.order([*reversed(by_run)], lambda run: self.stands(by_run[run]))
        places = {run: place for place, run in enumerate(order)}
        return sorted(result, key=lambda one: places[one.version.run_id])

    def study_aliases(self, candidates: Sequence[Candidate]) -> dict[str, Candidate | None]:
        """Return where the alias of each closed study belongs: to its best trial's version, None if there is none.

        A study with overrides has no alias, nor has a study whose alias an older study has.
        """
        by_run = {candidate.version.run_id: candidate for candidate in reversed(candidates)}
        owners = {alias(row.name): row.name for row in reversed(self.queue.studies()) if "+" not in row.name}
        result: dict[str, Candidate | None] = {}
        for rival in self.rivals:
            name = alias(rival.row.name)
            if owners.get(name) == rival.row.name and (rival.is_closed or rival.row.name == self.closing):
                best = ranking.best_network(rival.jobs)
                result[name] = by_run.get(str(best.run_id)) if best is not None else None
        return result

    def stands(self, candidate: Candidate) -> bool:
        """Return whether the candidate may be champion: it is distinguishable from the mean predictor as far as that is
        known, or forced."""
        run = candidate.version.run_id
        if run not in self._standing:
            jobs = next(rival.jobs for rival in self.rivals if rival.row.name == candidate.job.study)
            self._standing[run] = candidate.is_forced or gains.beats_mean(self.queue, jobs, candidate.job)
        return self._standing[run]

    def present(self, candidates: Sequence[Candidate]) -> Candidate | None:
        """Return the candidate that is champion now, the best one of several; None if it may not be."""
        return next((one for one in candidates if one.is_champion and self.stands(one)), None)

    def better(self, candidates: Sequence[Candidate], present: Candidate | None) -> Iterator[Candidate]:
        """Yield those that may be champion and come before the present one, the best first; all if there is none."""
        before = candidates[: None if present is None else candidates.index(present)]
        return (one for one in before if (present is None or not one.equals(present)) and self.stands(one))

    def fault(self, candidate: Candidate) -> str | None:
        """Say what is wrong with the model of a candidate; None if it is sound."""
        if candidate.version.run_id in self.sound:
            return None
        return unsound(self.queue, self.tracker, candidate.model, candidate.version)

    def settle(self, hold: Callable[[], None]) -> Outcome:
        """Set aliases, tags and tables. `hold` raises DatabaseLost if the lock is lost."""
        candidates = self.candidates()
        moved, refused = self._set_study_aliases(candidates, hold)
        elected = self._elect(candidates, hold)
        hold()
        for candidate in candidates:
            tags = candidate.score_tags | ({DATA: candidate.data} if candidate.data else {})
            registry.set_tags(self.tracker, candidate.model, candidate.version, tags)
        candidates = self.candidates()  # with their new aliases
        for name in self.models:
            own = [candidate for candidate in candidates if candidate.model == name]
            registry.describe_versions(self.tracker, name, table(own))
        return Outcome(elected=elected, moved=moved, refused=refused)

    def _set_study_aliases(
        self, candidates: Sequence[Candidate], hold: Callable[[], None]
    ) -> tuple[list[str], dict[str, str]]:
        moved, refused = [], {}
        for name, best in self.study_aliases(candidates).items():
            for candidate in candidates:
                if name in candidate.version.aliases and (best is None or candidate.model != best.model):
                    registry.delete_alias(self.tracker, candidate.model, name)
            if best is None or name in best.version.aliases:
                continue
            if (fault := self.fault(best)) is not None:
                refused[name] = fault
                continue
            hold()
            registry.set_alias(self.tracker, best.model, name, best.version.number)
            moved.append(name)
            crash.at("alias set")
        return moved, refused

    def _elect(self, candidates: Sequence[Candidate], hold: Callable[[], None]) -> Election:
        """Move @champion to the first candidate that stands and is sound, if it is better than the present champion."""
        present = self.present(candidates)
        holder = present
        for candidate in self.better(candidates, present):
            hold()
            if (fault := self.fault(candidate)) is not None:
                log.warning("%s is passed over: %s", candidate.title, fault)
                continue
            hold()
            registry.set_alias(self.tracker, candidate.model, CHAMPION, candidate.version.number)
            holder = candidate
            break
        for name in self.models:
            if holder is None or name != holder.model:
                registry.delete_alias(self.tracker, name, CHAMPION)
        if holder is None:
            return Election(champion=None, champion_moved=False)
        standing, best = holder.standing, {holder.data: holder}
        for candidate in candidates:
            if candidate.data not in best and self.stands(candidate):
                best[candidate.data] = candidate
        others = [one for one in best.values() if one is not holder]
        return Election(
            champion=holder.version.number,
            champion_model=holder.model,
            champion_moved=holder is not present,
            champion_study=holder.job.study,
            champion_nmse=standing.own,
            champion_point_nmse=standing.point if math.isfinite(standing.point) else standing.own,
            champion_data=None if holder.data in ("", lineage.title(self.row.facts.data)) else holder.data,
            compared=compared(holder, others, self.line) or None,
        )

    def faults(self) -> Iterator[str]:
        """Say where aliases and tags are not what `settle` would set."""
        candidates = self.candidates()
        present = self.present(candidates)
        for candidate in candidates:
            if candidate.is_champion and not self.stands(candidate):
                yield f"@champion is {candidate.title}, which is not distinguishable from the mean"
        for candidate in self.better(candidates, present):
            if self.fault(candidate) is None:
                yield (
                    f"@champion is {present.title}, but {candidate.title} is better"
                    if present
                    else f"@champion is on no version, but {candidate.title} stands for election"
                )
                break
        for name, best in self.study_aliases(candidates).items():
            if best is None:
                for candidate in candidates:
                    if name in candidate.version.aliases:
                        yield f"the alias @{name} is at {candidate.title}, but the study's best model is not registered"
            elif name not in best.version.aliases and not self.fault(best):
                yield f"expected the alias @{name} at {best.title}"
        for candidate in candidates:
            for tag, expected in candidate.score_tags.items():
                if (value := candidate.version.tags.get(tag)) != expected:
                    yield f"{candidate.title}: expected the tag {tag} {expected}, found {value}"


@contextmanager
def lock(queue: Queue, row: StudyRow) -> Iterator[Callable[[], None]]:
    """Let one worker at a time settle the aliases of a line, so that studies that close at once see each other.

    The lock is held for as long as a step takes, and ends PATIENCE after the process froze. The function that it yields
    raises DatabaseLost if the lock has ended.
    """
    mutex, ended = threading.Lock(), threading.Event()
    root = lineage.root(row, queue.studies())
    with queue.lock(f"champion.{root.digest}.{root.split}", patience=PATIENCE) as touch:

        def hold() -> None:
            with mutex:
                touch()

        def keep() -> None:
            with suppress(DatabaseLost):
                while not ended.wait(PATIENCE / 4):
                    hold()

        keeper = threading.Thread(target=keep, name="election", daemon=True)
        keeper.start()
        try:
            yield hold
        finally:
            ended.set()
            keeper.join()


def claim_model(queue: Queue, tracker: Tracker, row: StudyRow, *, description: str) -> str:
    """Return the registered model of all studies of this database on the line of `row`; create it if there is none.

    Its name is the planned one, unless a study on the same line uses another one already, or the planned one belongs
    to another database: then part of this database's id follows. Raise ModelError if both belong to other databases.
    """
    owner, line = queue.database_id(), competing(queue, row)
    row = next(other for other in line if other.name == row.name)  # a worker may have read it before it was amended
    planned = row.facts.model_name
    versions, used = lineage.versions(lineage.newest(row, line)), own_models(queue, tracker, line)
    tags = {"hpo.data": versions[0].digest, "hpo.split": versions[0].split}
    if len(versions) > 1:
        tags["hpo.lineage"] = ", ".join(f"{version.name} {version.digest[:8]}" for version in versions)
    for name in dict.fromkeys([*used, planned, f"{planned}-{owner[:8]}"]):
        if registry.ensure_registered_model(tracker, name, description=description, tags=tags, owner=owner):
            if name != planned:
                queue.amend_facts(row.name, {"model_name": name, "models": [*names(row)]})
            return name
    raise ModelError(
        f"The registered model {planned} of the MLflow server belongs to another database, and so does the name with "
        "this database's id behind it: nothing was registered. Rename one of them in MLflow."
    )


def names(row: StudyRow) -> list[str]:
    """Return the names of the registered models that may hold versions of a study, the present one first."""
    return list(dict.fromkeys([row.facts.model_name, *(row.facts.models or ())]))


def own_models(queue: Queue, tracker: Tracker, rows: Iterable[StudyRow]) -> list[str]:
    """Return the registered models of this database that may hold versions of these studies, in their order.

    There are several where studies of an earlier hpo used names of their own; it let databases share a model, too.
    """
    owner = queue.database_id()
    candidates = dict.fromkeys(name for row in rows for name in names(row))
    return [name for name in candidates if registry.belongs(tracker, name, owner)]


def downloadable(queue: Queue, tracker: Tracker) -> list[str]:
    """Return the names of this database's registered models, the newest study's first."""
    return own_models(queue, tracker, reversed(queue.studies()))


def unsound(queue: Queue, tracker: Tracker, model_name: str, version: Version) -> str | None:
    """Download, hash and load a version and let it predict; say what is wrong with it, None if nothing is.

    NOT_CHECKED comes before the reason why code that makes its network does not run here.
    """
    import numpy as np

    from models import bundle, regressor, user
    from models.specs import SpecError

    job = queue.by_run(version.run_id)
    if job is None or job.result is None:
        return "it was not made by a study of this database, so its hashes are unknown"
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "model")
        try:
            registry.download_model(tracker, model_id=version.model_id, folder=folder, expected_sha256=job.result.files)
            model, spec = bundle.load(folder)
            cell = np.random.default_rng(0).integers(0, 2, (1, *spec.image_shape)).astype(np.float32) * spec.levels[1]
            middle = [[(low + high) / 2 for low, high in spec.ranges]]
            answer = regressor.predict(model, cell, np.array(middle) if spec.ranges else None)
        except user.NotTrusted:
            return f"{NOT_CHECKED}: its network is code of its author, which is not trusted here"
        except (ModelError, NotFound, SpecError) as error:
            return str(error)
        except Exception as error:
            if (fault := user.fault(error)) is None:
                raise
            return f"its own code fails: {fault}"
        return None if np.isfinite(answer).all() else f"it predicts {answer.tolist()}"
