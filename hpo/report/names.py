"""The trial that a name stands for: a study, a trial, an MLflow run or a registered version."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from hpo.errors import NotFound
from hpo.queue import Job, Queue, StudyRow
from hpo.scores import champion, ranking
from hpo.tracking import registry
from hpo.tracking.client import Tracker
from hpo.tracking.errors import TrackingUnavailable
from hpo.tracking.registry import Version

FORMS = (
    "a study (grid: its best trial), a trial (grid/22; grid/22/1: its repeat 1), an MLflow run (32 hexadecimal digits) "
    "or a registered version (MODEL@champion, MODEL/3, @champion, champion)"
)


def find(queue: Queue, tracker: Tracker | None, studies: Mapping[str, StudyRow], name: str) -> Job:
    """Return the trial of a name; a study's name goes before a model's. Raise NotFound.

    Raise TrackingUnavailable if there is no tracker and the name is none of a study, trial or run.
    """
    head, slash, rest = name.partition("/")
    if name in studies:
        best = ranking.ranked(jobs := queue.jobs(name))
        if not best:
            raise NotFound(f"The study {name} has no finished trial that could stand for it. Name one, as in {name}/0.")
        return ranking.network(jobs, best[0]) or best[0]
    if slash and head in studies:
        return trial(queue, studies[head], rest)
    if (job := queue.by_run(name)) is not None:
        return job
    tracker = require(tracker)
    models = champion.downloadable(queue, tracker)
    if not slash and any(full.endswith(f"@{name}") for full in _aliases(tracker, models)):
        name = f"@{name}"
    if "@" in name:
        return _of_version(queue, *_aliased(tracker, models, name))
    if slash and head in models:
        return _of_version(queue, head, registry.find(tracker, head, rest))
    for row in studies.values():
        if name in (row.facts.study_run_id, *(row.facts.predictor_run_ids or {}).values()):
            raise NotFound(f"The run {name} is of no trial, but of the study {row.name} as a whole: name {row.name}.")
    runs = [str(job.run_id) for study in studies for job in queue.jobs(study) if job.run_id]
    raise _unknown(name, [*studies, *models, *runs])


def trial(queue: Queue, study: StudyRow, rest: str) -> Job:
    """Return the trial NUMBER or NUMBER/REPEAT; without a repeat the best finished one, else the first."""
    number, _, repeat = rest.partition("/")
    jobs = [job for job in queue.jobs(study.name) if job.kind == "trial"]
    matches = [job for job in jobs if str(job.number) == number and repeat in ("", str(job.repeat))]
    if not matches:
        last, repeats = max((job.number for job in jobs), default=0), study.specification.trainings
        again = f", then perhaps / and a {study.specification.part} of 0 to {repeats - 1}" if repeats > 1 else ""
        again += f", or {repeats} for the refit" if study.specification.folds else ""
        raise NotFound(
            f"The study {study.name} has no trial '{rest}': expected a number of 0 to {last}{again}. "
            f"`hpo trials --study {study.name}` lists them."
        )
    best = next(iter(ranking.ranked(matches)), matches[0])
    return ranking.network(matches, best) or best


def require(tracker: Tracker | None) -> Tracker:
    """Return the tracker. Raise TrackingUnavailable if there is none."""
    if tracker is None:
        raise TrackingUnavailable("its server is away")
    return tracker


def _aliased(tracker: Tracker, models: Sequence[str], name: str) -> tuple[str, Version]:
    """Return model and version of MODEL@ALIAS, or of @ALIAS if only one model has such an alias."""
    model, _, alias = name.rpartition("@")
    if model in models:
        return model, registry.find(tracker, model, alias)
    versions = _aliases(tracker, models)
    matches = [full for full in versions if not model and full.endswith(name)]
    if len(matches) > 1:
        raise NotFound(f"'{name}' stands for several versions: expected one of {', '.join(matches)}.")
    if not matches:
        raise _unknown(name, list(versions) if model else [f"@{full.rpartition('@')[2]}" for full in versions])
    return versions[matches[0]]


def _aliases(tracker: Tracker, models: Sequence[str]) -> dict[str, tuple[str, Version]]:
    """Return model and version of each alias, by MODEL@ALIAS."""
    return {
        f"{model}@{alias}": (model, version)
        for model in models
        for version in registry.versions(tracker, model)
        for alias in version.aliases
    }


def _of_version(queue: Queue, model: str, version: Version) -> Job:
    """Return the trial whose network a version is."""
    if (job := queue.by_run(version.run_id)) is None:
        raise NotFound(
            f"{model} version {version.number} was not made by a study of this database: its trial is unknown here."
        )
    return job


def _unknown(name: str, valid: Sequence[str]) -> NotFound:
    close = get_close_matches(name, valid) or [other for other in valid if name in other][:3]
    near = f" Did you mean {' or '.join(close)}?" if close else ""
    return NotFound(
        f"Expected {FORMS}, found '{name}'.{near} `hpo studies` and `hpo trials --study NAME` list what there is."
        + registry.why_without(name.removeprefix("@"))
    )
