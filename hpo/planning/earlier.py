"""What an earlier study gives a plan: best configurations, or networks to start from."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace

from hpo import study
from hpo.errors import StudyError
from hpo.planning.preparation import Plan
from hpo.queue import Job, Queue
from hpo.scores import ranking
from hpo.study import Study, pruned, sizing, within
from hpo.study.objectives import measured
from hpo.study.records import LearnedTrial, Network, Point, SourceTrial, StudyFacts
from hpo.text import counted, near_miss

MOST_LEARNED = 1000  # trials that a sampler learns from


def follow(ready: Plan, queue: Queue) -> StudyFacts:
    """Return the plan's facts with what an earlier study gives it: best configurations, or networks to start from."""
    if ready.earlier is None:
        return ready.facts
    if ready.study.best_of is None:
        best = _ranked(ready, ready.earlier, queue, "starts from the best networks of")
        return replace(ready.facts, starts_from=_start(ready, ready.earlier, best))
    best = _ranked(ready, ready.earlier, queue, "trains the best configurations of")
    if not best:
        raise StudyError(f"{ready.name} trains the best configurations of {ready.study.best_of.name}, which has none.")
    sources: dict[str, SourceTrial] = {}
    for job in best:
        assert job.spec is not None and job.run_id is not None
        source = SourceTrial(study=job.study, trial=job.number, run_id=job.run_id, point=job.spec.point)
        sources.setdefault(json.dumps(job.spec.point), source)
    shares = ready.study.shares
    best_points = list(sources.values())[: ready.study.trials // len(shares)]
    return replace(ready.facts, best_of=tuple(with_shares(ready.study, best_points)))


def learn(ready: Plan, queue: Queue) -> tuple[LearnedTrial, ...] | None:
    """Return the finished configurations of the studies that the plan's sampler learns from, as far as its space has
    them; None if it learns from none. Raise StudyError if a study is not there, or gives nothing."""
    rows = {row.name: row for row in queue.studies()}
    learned: list[LearnedTrial] = []
    for name in ready.study.learn_from:
        if name not in rows:
            raise StudyError(
                f"{ready.name}: learn_from: expected a study that is planned, found '{name}'.{near_miss(name, rows)} "
                f"There are: {', '.join(rows) or 'none'}."
            )
        here, there = ready.facts.data, rows[name].facts.data
        if (here.digest, here.split, here.target_names) != (there.digest, there.split, there.target_names):
            raise StudyError(
                f"{ready.name}: learn_from: {name} is on other data, or another split of them: leave it out."
            )
        points = [
            (job, _in_space(ready.study, job), nmse) for job, nmse in ranking.points(queue.jobs(name, brief=True))
        ]
        own = [
            LearnedTrial(study=name, trial=job.number, point=point, nmse=nmse, sizes=_sizes(ready, job, point))
            for job, point, nmse in points
            if point and _is_measured(ready, job, point)
        ]
        if not own:
            raise StudyError(
                f"{ready.name}: learn_from: {name} has no finished trial of this model.family with a configuration in "
                "[space]: leave it out, or widen the space."
            )
        learned += own
    # of more, evenly among the best and the worst: all workers read them at each choice
    return tuple(learned[:: math.ceil(len(learned) / MOST_LEARNED)]) if learned else None


def _sizes(ready: Plan, job: Job, point: Point) -> dict[str, float] | None:
    """Return the sizes of the network of a trial of another study that the plan asks for, None if it asks for none."""
    measures = sizing.measures(ready.study)
    size = measured(measures, sizing.size(ready.study.specifications(point)[0], ready.facts.data))
    return size | {name: value for name, value in job.sizes(measures).items() if value} if measures else None


def _is_measured(ready: Plan, job: Job, point: Point) -> bool:
    """Return whether the sizes are known that are objectives of the plan; not all are of a network of the user's."""
    sizes = _sizes(ready, job, point) or {}
    return all(sizes[name] for name in ready.study.objectives[1:])


def _in_space(chosen: Study, job: Job) -> Point | None:
    """Return the configuration of a trial of another study in a study's space; None if that lacks it."""
    assert job.spec is not None
    settings = job.spec.model | job.spec.training
    if job.spec.model["family"] != chosen.model["family"]:
        return None
    point = pruned(chosen.space, {key: settings.get(key) for key in chosen.space})
    return point if all(within(chosen.space[key], value) for key, value in point.items()) else None


def with_shares(chosen: Study, sources: list[SourceTrial]) -> Iterator[SourceTrial]:
    """Yield each configuration once for each share of the training images that the study trains it on."""
    for source in sources:
        for share in chosen.shares:
            own = {"share": share} if "share" in chosen.space else {}
            yield replace(source, point=(source.point or {}) | own)


def _ranked(ready: Plan, name: str, queue: Queue, what: str) -> list[Job]:
    """The finished trials of the earlier study `name`, best first. Raises StudyError unless all have ended."""
    canonical, rows = ready.earlier_canonical or {}, {row.name: row for row in queue.studies()}
    if name in rows and rows[name].identity != study.digest(canonical):
        raise study.conflict(name, rows[name].canonical, canonical)
    jobs = [job for job in queue.jobs(name) if job.kind == "trial"] if name in rows else []
    left = len(rows[name].still_to_train(jobs)) if jobs else 0
    if left or not jobs:
        state = f"{counted(left, 'trial', 'are', of=len(jobs))} still to be trained" if jobs else "it has not been run"
        raise StudyError(
            f"{ready.name} {what} {name}, and {state}. Run `hpo run --study {study.file_name(name)}` "
            "with the same options first; or add --with-prerequisites to this command."
        )
    return ranking.ranked(jobs)


def _start(ready: Plan, name: str, best: list[Job]) -> dict[str, Network]:
    """The networks to start from: for each origin the best of the finished trials of the earlier study `name`."""
    networks: dict[str, Network] = {}
    for job in best:
        assert job.spec is not None and job.result is not None and job.run_id is not None
        network = Network(
            study=name,
            trial=job.number,
            run_id=job.run_id,
            model_id=job.result.model_id,
            files=job.result.files,
        )
        networks.setdefault(study.origin(job.spec.model), network)
    models = [ready.study.trial(point)[0] for point in ready.study.corners()]
    if missing := sorted({study.origin(model) for model in models} - set(networks)):
        raise StudyError(
            f"{ready.name} starts from the best networks of {name}, which has none of {', '.join(missing)}: "
            f"`hpo trials --study {name}` says why."
        )
    return networks
