"""Which registered model is the champion: decided from the queue's rows alone.

What the registry says of its versions (tags, descriptions) is for people, and is brought up to date from the rows.
All studies of this database on the same data, split and targets compete, whatever their data set is called; a
registered model belongs to one database, as an experiment does.
"""

import logging
import math
import statistics
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpo import crash
from hpo.errors import ModelError, NotFound
from hpo.queue import DatabaseLost, Job, Queue, StudyRow
from hpo.study import alias
from hpo.text import for_markdown, score_text
from hpo.tracking import registry
from hpo.tracking.client import OWNER, Tracker
from hpo.tracking.registry import Version

CHAMPION = "champion"
# Tags of a version, for people: its network's validation NMSE and its point's.
OWN, POINT = "hpo.best_val_nmse", "hpo.point_val_nmse"
PATIENCE = 30.0  # seconds after which an election that froze loses its lock

log = logging.getLogger("hpo")


def repeats(jobs: Sequence[Job]) -> dict[int, list[Job]]:
    """The finished trials of each point, by its number."""
    found: dict[int, list[Job]] = {}
    for job in jobs:
        if job.kind == "trial" and job.state == "done" and job.result:
            found.setdefault(job.number, []).append(job)
    return found


def ranked(jobs: Sequence[Job]) -> list[Job]:
    """The best finished trial of each point, the best point first.

    Points are ordered by the mean validation NMSE of their finished repeats, equal ones by their number; those of
    which a repeat diverged come behind all others. Repeats that are dead or cancelled are left out of the mean.
    """
    points, unstable = repeats(jobs), diverged(jobs)
    return sorted(
        (min(of_point, key=nmse) for of_point in points.values()),
        key=lambda job: (job.number in unstable, spread(points[job.number])[0], job.number),
    )


def diverged(jobs: Sequence[Job]) -> set[int]:
    """Numbers of the points of which a repeat diverged."""
    return {job.number for job in jobs if job.kind == "trial" and job.state == "diverged"}


def incomplete(repeats_of_point: Sequence[Job]) -> str:
    """How many repeats of a point its score is the mean of, and what became of the others; empty if it is of all."""
    done = [job for job in repeats_of_point if job.state == "done"]
    others = Counter(job.state for job in repeats_of_point if job.state != "done")
    words = ", ".join(f"{count} {state}" for state, count in sorted(others.items()))
    return f"{len(done)} of {len(repeats_of_point)} repeats, {words}" if words else ""


def spread(jobs: Sequence[Job]) -> tuple[float, float | None]:
    """Mean and standard deviation (None of a single one) of the validation NMSE of a point's repeats."""
    values = [nmse(job) for job in jobs]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def points(jobs: Sequence[Job]) -> list[tuple[Job, float]]:
    """What `ranked` gives, each with the score of its point: the mean over its repeats."""
    found = repeats(jobs)
    return [(job, spread(found[job.number])[0]) for job in ranked(jobs)]


def winners(jobs: Sequence[Job], report_by: Sequence[str]) -> list[Job]:
    """The best trial of each combination of values of the `report_by` parameters, the best of all first."""
    first: dict[tuple[Any, ...], Job] = {}
    for job in ranked(jobs):
        assert job.spec is not None
        first.setdefault(tuple(repr(job.spec["point"].get(key)) for key in report_by), job)
    return list(first.values())


def nmse(job: Job) -> float:
    """Validation NMSE of a finished trial."""
    assert job.result is not None
    return float(job.result["best_val_nmse"])


@dataclass(frozen=True, kw_only=True, order=True)
class Standing:
    """What a finished trial is elected by; the lowest comes first."""

    point: float  # mean validation NMSE of its point; infinity if another point is better, or a repeat diverged
    own: float  # validation NMSE of its network


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A study that competes, with its jobs."""

    row: StudyRow
    jobs: Sequence[Job]

    @property
    def closing(self) -> Job | None:
        """Its closing; None of a study that is not planned to its end."""
        return next((job for job in self.jobs if job.kind == "closing"), None)

    @property
    def closed(self) -> bool:
        return self.closing is not None and self.closing.state == "done"

    @property
    def answers(self) -> bool:
        """Whether it has been closed: also while trials that came back are trained."""
        return self.closed or bool(self.row.facts.get("closed"))


def rivals(queue: Queue, row: StudyRow) -> list[Rival]:
    """All studies of this database on the data, split and targets of `row`, itself among them, the oldest first. One
    that is half deleted competes no more."""
    return [
        Rival(row=other, jobs=queue.jobs(other.name))
        for other in queue.studies()
        if problem(other) == problem(row) and (other.name == row.name or not other.deleting)
    ]


def problem(row: StudyRow) -> tuple[str, ...]:
    """What has to be the same for two studies' scores to be compared; empty of one whose planner died at once."""
    data = row.facts.get("data")
    return (data["digest"], data["split"], *data["target_names"]) if data else ()


def standings(contest: Sequence[Rival], *, closing: str | None = None) -> dict[str, Standing]:
    """What every finished trial is elected by, by its MLflow run.

    A study that trains the best points of another with other seeds answers for the other once it has been closed (or
    is `closing`): the other's trials have the scores that it found for their points, infinity where it did not train
    theirs. Of several such studies the lowest score of a point counts.
    """
    answers = [_answers(rival) for rival in contest if rival.answers or rival.row.name == closing]
    found: dict[str, Standing] = {}
    for rival in contest:
        runs: dict[int, set[str]] = {}  # of each point
        for job in rival.jobs:
            if job.run_id is not None:
                runs.setdefault(job.number, set()).add(job.run_id)
        responsible = [answer for answer in answers if answer.keys() & set().union(*runs.values())]
        unstable = diverged(rival.jobs)
        for number, jobs in repeats(rival.jobs).items():
            point = math.inf if number in unstable else spread(jobs)[0]
            if responsible:
                means = [answer[run] for answer in responsible for run in answer.keys() & runs.get(number, set())]
                point = min(means, default=math.inf)
            found |= {str(job.run_id): Standing(point=point, own=nmse(job)) for job in jobs}
    return found


def _answers(rival: Rival) -> dict[str, float]:
    """By the run that one of its points was taken from: the mean validation NMSE it found for it, infinity if a repeat
    diverged."""
    unstable, done = diverged(rival.jobs), repeats(rival.jobs)
    found = {}
    for job in rival.jobs:
        taken = (job.spec or {}).get("best_of")
        if taken is not None and (job.number in unstable or job.number in done):
            found[taken["run_id"]] = math.inf if job.number in unstable else spread(done[job.number])[0]
    return found


@contextmanager
def lock(queue: Queue, row: StudyRow) -> Iterator[Callable[[], None]]:
    """Studies on the same problem that close at once must see each other. It is held however long a step takes, and
    falls soon after the process froze; what it gives raises DatabaseLost if it has fallen."""
    mutex, ended = threading.Lock(), threading.Event()
    with queue.lock(f"champion.{'.'.join(problem(row)[:2])}", patience=PATIENCE) as touch:

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
    """The registered model of all studies of this database on the problem of `row`, made if need be.

    The name that was planned, unless a study on the same problem uses another one already, or the planned one belongs
    to another database: then part of this database's id follows.
    """
    owner, planned = queue.database_id(), row.facts["model_name"]
    tags = {"hpo.data": row.facts["data"]["digest"], "hpo.split": row.facts["data"]["split"]}
    used = own_models(queue, tracker, rivals(queue, row))
    for name in dict.fromkeys([*used, planned, f"{planned}-{owner[:8]}"]):
        if registry.ensure_registered_model(tracker, name, description=description, tags=tags, owner=owner):
            if name != planned:
                queue.amend_facts(row.name, {"model_name": name, "models": [*names(row)]})
            return name
    raise ModelError(
        f"The registered model {row.facts['model_name']} of the MLflow server belongs to another database, and so does "
        "the name with this database's id behind it: nothing was registered. Rename one of them in MLflow."
    )


def names(row: StudyRow) -> list[str]:
    """Names of the registered models that versions of a study may be in, the present one first."""
    planned = [row.facts["model_name"]] if "model_name" in row.facts else []
    return list(dict.fromkeys([*planned, *row.facts.get("models", ())]))


def own_models(queue: Queue, tracker: Tracker, contest: Sequence[Rival]) -> list[str]:
    """Names of the registered models of this database that may have versions of these studies, the oldest study's
    first: one, or several where studies of an earlier hpo used names of their own. It let databases share one, too."""
    owner = queue.database_id()
    known = dict.fromkeys(name for rival in contest for name in names(rival.row))
    return [name for name in known if registry.belongs(tracker, name, owner)]


def downloadable(queue: Queue, tracker: Tracker) -> list[str]:
    """Names of this database's registered models, the newest study's first."""
    owner = queue.database_id()
    known = dict.fromkeys(name for row in reversed(queue.studies()) for name in names(row))
    return [name for name in known if registry.belongs(tracker, name, owner)]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A registered version of a finished trial of this database."""

    model: str
    version: Version
    job: Job
    standing: Standing

    @property
    def title(self) -> str:
        return f"{self.model} version {self.version.number}"


def candidates(queue: Queue, tracker: Tracker, contest: Sequence[Rival], closing: str | None = None) -> list[Candidate]:
    """Everything that stands for election, the best first. What is in a model of another database does not."""
    owner, scores = queue.database_id(), standings(contest, closing=closing)
    by_run = {str(job.run_id): job for rival in contest for job in rival.jobs}
    own = own_models(queue, tracker, contest)
    found = [
        Candidate(model=name, version=version, job=by_run[version.run_id], standing=scores[version.run_id])
        for name in own
        for version in registry.versions(tracker, name)
        if version.tags.get(OWNER) == owner and version.run_id in scores
    ]
    return sorted(found, key=lambda each: (each.standing, own.index(each.model), each.version.number))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What settling the aliases came to."""

    elected: dict[str, Any]  # who is champion, as a closing's result says it
    moved: list[str]  # aliases of studies that were set
    refused: dict[str, str]  # aliases of studies that were not set, and why


def settle(
    queue: Queue,
    tracker: Tracker,
    row: StudyRow,
    *,
    closing: Job | None = None,
    leaving: str | None = None,
    sound: Collection[str] = (),
) -> Outcome:
    """Let @champion and the alias of each study on the problem of `row` point where the rows say; refresh tags and
    tables.

    `closing`: raise LeaseLost, and change nothing, unless it is still ours. `leaving`: a study that is being deleted.
    `sound`: runs whose models have just been fetched, checked and made to predict; another one is, before it is chosen.
    """
    try:
        with lock(queue, row) as hold:
            if closing is not None:
                queue.require(closing)
            return _settle(queue, tracker, row, hold, closing.study if closing else None, leaving, sound)
    except DatabaseLost:
        # We may have been frozen in mid-step, and have written over what another one decided meanwhile.
        with lock(queue, row) as hold:
            _settle(queue, tracker, row, hold, None, leaving, sound)
        raise


def _settle(
    queue: Queue,
    tracker: Tracker,
    row: StudyRow,
    hold: Callable[[], None],
    closing: str | None,
    leaving: str | None,
    sound: Collection[str],
) -> Outcome:
    contest = [rival for rival in rivals(queue, row) if rival.row.name != leaving]
    standing = candidates(queue, tracker, contest, closing)
    moved, refused = [], {}
    for name, chosen in study_aliases(queue, contest, standing, closing).items():
        for candidate in standing:
            if name in candidate.version.aliases and (chosen is None or candidate.model != chosen.model):
                registry.delete_alias(tracker, candidate.model, name)
        if chosen is None or name in chosen.version.aliases:
            continue
        if fault := None if chosen.version.run_id in sound else unsound(queue, tracker, chosen.model, chosen.version):
            refused[name] = fault
            continue
        hold()
        registry.set_alias(tracker, chosen.model, name, chosen.version.number)
        moved.append(name)
        crash.at("alias set")
    elected = _elect(queue, tracker, contest, standing, hold, sound)
    hold()
    for candidate in standing:
        registry.set_tags(tracker, candidate.model, candidate.version, shown(candidate))
    standing = candidates(queue, tracker, contest, closing)  # with the aliases they have by now
    for name in own_models(queue, tracker, contest):
        registry.describe_versions(tracker, name, table([each for each in standing if each.model == name]))
    return Outcome(elected=elected, moved=moved, refused=refused)


def study_aliases(
    queue: Queue, contest: Sequence[Rival], standing: Sequence[Candidate], closing: str | None = None
) -> dict[str, Candidate | None]:
    """Where the alias of each closed (or `closing`) study belongs: to the version of its best trial; None if that was
    not registered. A study with overrides has none, and one whose alias an older study has neither."""
    by_run = {candidate.version.run_id: candidate for candidate in reversed(standing)}
    taken = {alias(row.name): row.name for row in reversed(queue.studies()) if "+" not in row.name}
    found = {}
    for rival in contest:
        name = alias(rival.row.name)
        if taken.get(name) != rival.row.name or not (rival.closed or rival.row.name == closing):
            continue
        best = next(iter(ranked(rival.jobs)), None)
        found[name] = by_run.get(str(best.run_id)) if best is not None else None
    return found


def _elect(
    queue: Queue,
    tracker: Tracker,
    contest: Sequence[Rival],
    standing: Sequence[Candidate],
    hold: Callable[[], None],
    sound: Collection[str],
) -> dict[str, Any]:
    """Move @champion to the first candidate that is sound, if it is better than the present one."""
    present = champion(standing)
    holder = present
    for candidate in standing:
        if present is not None and candidate.standing >= present.standing:
            break
        hold()
        fault = (
            None if candidate.version.run_id in sound else unsound(queue, tracker, candidate.model, candidate.version)
        )
        if fault is not None:
            log.warning("%s is passed over: %s", candidate.title, fault)
            continue
        hold()
        registry.set_alias(tracker, candidate.model, CHAMPION, candidate.version.number)
        holder = candidate
        break
    for name in own_models(queue, tracker, contest):
        if holder is None or name != holder.model:
            registry.delete_alias(tracker, name, CHAMPION)
    if holder is None:
        return {"champion": None, "champion_moved": False}
    return {
        "champion": holder.version.number,
        "champion_model": holder.model,
        "champion_moved": holder is not present,
        "champion_study": holder.job.study,
        "champion_nmse": holder.standing.own,
        "champion_point_nmse": holder.standing.point if math.isfinite(holder.standing.point) else holder.standing.own,
    }


def champion(standing: Sequence[Candidate]) -> Candidate | None:
    """The candidate that has the alias now, the best one if several models have it."""
    return next((candidate for candidate in standing if CHAMPION in candidate.version.aliases), None)


def shown(candidate: Candidate) -> dict[str, str]:
    """The tags that say in MLflow what a version is elected by."""
    same = candidate.standing.point == candidate.standing.own and POINT not in candidate.version.tags
    return {OWN: repr(candidate.standing.own)} | ({} if same else {POINT: repr(candidate.standing.point)})


def table(versions: Sequence[Candidate]) -> str:
    """The versions of a model for its description, @champion first, then the best; empty if there is none."""
    rows = [("version", "trial", "validation NMSE", "verdict", "aliases"), ("---",) * 5]
    rows += [
        (
            str(candidate.version.number),
            for_markdown(candidate.version.description.partition("\n")[0]),
            _scores_text(candidate.standing),
            candidate.version.tags.get("hpo.verdict", ""),
            " ".join(f"`@{each}`" for each in candidate.version.aliases),
        )
        for candidate in sorted(versions, key=lambda each: (CHAMPION not in each.version.aliases, each.standing))
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if len(rows) > 2 else ""


def _scores_text(standing: Standing) -> str:
    """A network's validation NMSE, with that of its point where it has another one or lost to another point."""
    text = score_text(standing.own)
    if math.isinf(standing.point):
        return f"{text}, with other seeds another point is better"
    return text if standing.point == standing.own else f"{text}, mean of its point {score_text(standing.point)}"


def unsound(queue: Queue, tracker: Tracker, model_name: str, version: Version) -> str | None:
    """What is wrong with a version, if anything: its files are fetched, hashed, loaded, and asked for a prediction."""
    import numpy as np

    from models import bundle, regressor
    from models.specs import SpecError

    job = queue.by_run(version.run_id)
    if job is None or job.result is None:
        return "it was not made by a study of this database, so its hashes are unknown"
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "model")
        try:
            registry.download(
                tracker,
                model_name=model_name,
                version=version.number,
                folder=folder,
                expected_sha256=job.result["files"],
            )
            model, spec = bundle.load(folder)
        except (ModelError, NotFound, SpecError) as error:
            return str(error)
        cell = np.random.default_rng(0).integers(0, 2, (1, *spec.image_shape)).astype(np.float32)
        answer = regressor.predict(model, cell)
        return None if np.isfinite(answer).all() else f"it predicts {answer.tolist()}"


def faults(queue: Queue, tracker: Tracker, row: StudyRow) -> Iterator[str]:
    """Where aliases and tags in the registry are not what the rows say; nothing while a study on the problem closes."""
    contest = rivals(queue, row)
    before = [(rival.closing and (rival.closing.state, rival.closing.fence)) for rival in contest]
    if any(rival.closing is not None and rival.closing.state == "running" for rival in contest):
        return
    found = list(_faults(queue, tracker, contest))
    after = [(rival.closing and (rival.closing.state, rival.closing.fence)) for rival in rivals(queue, row)]
    if before == after:
        yield from found


def _faults(queue: Queue, tracker: Tracker, contest: Sequence[Rival]) -> Iterator[str]:
    standing = candidates(queue, tracker, contest)
    present = champion(standing)
    for candidate in standing:
        if present is not None and candidate.standing >= present.standing:
            break
        if unsound(queue, tracker, candidate.model, candidate.version) is None:
            held = (
                f"is {present.title}, but {candidate.title}" if present else f"is on no version, but {candidate.title}"
            )
            yield f"@champion {held} is better" if present else f"@champion {held} stands for election"
            break
    for name, chosen in study_aliases(queue, contest, standing).items():
        if chosen is None:
            for candidate in standing:
                if name in candidate.version.aliases:
                    yield f"the alias @{name} is at {candidate.title}, but the study's best model is not registered"
        elif name not in chosen.version.aliases and not unsound(queue, tracker, chosen.model, chosen.version):
            yield f"expected the alias @{name} at {chosen.title}"
    for candidate in standing:
        for tag, expected in shown(candidate).items():
            if (tag_found := candidate.version.tags.get(tag)) != expected:
                yield f"{candidate.title}: expected the tag {tag} {expected}, found {tag_found}"
