"""Planning a study: load and split the data, find the study's identity, and write down every point once.

Everything is idempotent: a planner that died, or two at once, leave the same rows as one.
"""

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import dataset as data_sets
from data_pipeline import npz
from data_pipeline.dataset import Dataset
from data_pipeline.split import Split, lacks, split
from hpo import study
from hpo.errors import StudyConflict, StudyError
from hpo.machine import now_ms
from hpo.queue import Job, NewJob, Queue, State, StudyRow, require_whole
from hpo.scores import ranking
from hpo.search import sampling
from hpo.settings import Settings
from hpo.study import Study
from hpo.study.records import DataFacts, Network, SourceTrial, SplitScores, StudyFacts, TrialSpec, WeightsFile
from hpo.text import for_markdown, point_text
from hpo.tracking import data_sets as data_files
from hpo.tracking import experiments, foreign
from hpo.tracking.client import Tracker
from models import hill, metrics, sizes, specs
from models import weights as pretrained

# What labels that were rounded to three digits may miss: of the bounds, as a share of the cell's largest component; of
# Hill's relations, as a share of the smallest standard deviation of a component.
BOUND_SLACK, HILL_SLACK = 0.01, 0.01
START = "start"  # a point that a search begins with


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study together with its data and its identity; nothing of it is written anywhere yet."""

    study: Study
    name: str
    folder: Path
    dataset: Dataset
    split: Split
    canonical: dict[str, Any]
    identity: str
    weights: dict[str, WeightsFile]  # name and SHA-256 of the file, for each backbone that begins pretrained

    @cached_property
    def facts(self) -> StudyFacts:
        """What the database and every worker need to know of the data."""
        data = self.dataset
        return StudyFacts(
            description=self.study.description,
            claims=self.study.claims or None,
            data=DataFacts(
                name=data.name,
                digest=data.digest,
                split=self.split.digest,
                unit=data.unit,
                target_names=data.target_names,
                image_shape=data.images.shape[1:],
                phases=constants(data),
                sizes=(len(self.split.train), len(self.split.validation), len(self.split.test)),
                source=json.dumps({"uri": self.study.data_path}),
                profile=json.dumps({"num_rows": len(data.images), "num_elements": int(data.images.size)}),
            ),
            model_name=model_name(data, self.split),
            predictors=predictors(data, self.split),
            # only where a trainer reads the files: not when it starts from another study's networks
            weights=None if self.study.starts_from is not None or not self.weights else self.weights,
        )

    def specs(self, facts: StudyFacts | None = None) -> list[tuple[TrialSpec, float]]:
        """Specification and cost of each point of a grid, repeat after repeat; empty if a sampler chooses them later.

        Without `facts` the networks to start from are left open.
        """
        if self.study.sampler != "grid":
            return []
        return [
            study.trial_spec(self.study, self.identity, facts or self.facts, point, config=config, repeat=repeat)
            for repeat in range(self.study.repeats)
            for config, point in enumerate(self.study.grid())
        ]

    def examples(self) -> list[tuple[str, TrialSpec]]:
        """Where a sampler chooses the points: those it starts from, and the ends of the space, with what they are."""
        points = [(START, point) for point in (self.study.best_of or self.study).start]
        points += [("smallest", self.study.corners()[0]), *(("largest", point) for point in self.study.largest())]
        return [
            (what, study.trial_spec(self.study, self.identity, self.facts, point, config=None)[0])
            for what, point in points
        ]


def prepare(chosen: Study, *, trial_run: bool = False) -> Plan:
    """Load the data and find the identity. Raises DatasetError, StudyError, SpecError (no pretrained weights).

    For a trial run files of weights that are not there yet do without a digest.
    """
    folder = data_sets.DEFAULT if chosen.data_path == study.DEFAULT_DATA else Path(chosen.data_path)
    data = data_sets.load(folder, image_size=chosen.image_size)
    if lacking := lacks(data):
        raise StudyError(f"{folder}: {lacking}.")
    parts = split(len(data.images))
    if chosen.needs_symmetries() and not data.symmetries:
        raise StudyError(
            f"{folder}: nothing is known of how the targets move when an image is flipped or transposed, which "
            'training.augmentation and model.symmetric need: set training.augmentation = "none" and, for a periodic '
            "network, model.symmetric = false."
        )
    if chosen.needs_phases():
        _check_physics(data, folder)
    _check_sizes(chosen, folder, data)
    files = {backbone: pretrained.FILES[backbone] for backbone in chosen.pretrained()}
    weights = {
        backbone: WeightsFile(
            name=name, sha256="" if trial_run and pretrained.absent(name) else pretrained.find(name)[1]
        )
        for backbone, name in files.items()
    }
    canonical = chosen.canonical(
        data_digest=data.digest,
        split_digest=parts.digest,
        weights={backbone: file.sha256 for backbone, file in weights.items()},
        phases=constants(data) if chosen.needs_phases() else None,
    )
    identity = study.digest(canonical)
    name = study.full_name(chosen, identity)
    if len(name) > experiments.LONGEST_STUDY_NAME:
        raise StudyError(
            f"The study's name is too long: expected at most {experiments.LONGEST_STUDY_NAME} characters, with what "
            f"hpo puts behind the file's name, found {len(name)}: '{name}'. Nothing was made. "
            "Give the file a shorter name."
        )
    return Plan(
        study=chosen,
        name=name,
        folder=folder,
        dataset=data,
        split=parts,
        canonical=canonical,
        identity=identity,
        weights=weights,
    )


def _check_sizes(chosen: Study, folder: Path, data: Dataset) -> None:
    """Raise StudyError if the study can reach a network or a batch that does not fit the images."""
    shape = data.images.shape[1:]
    for point in chosen.combinations("backbone", "trainable", "batch_size"):
        model, training = chosen.trial(point)
        try:
            sizes.check_batches(specs.from_dict(model), specs.training_from_dict(training), shape)
        except specs.SpecError as error:
            raise StudyError(f"{folder}: {chosen.name} at {point_text(point) or 'its one point'}: {error}") from None
    for point in chosen.largest():
        try:
            sizes.size(specs.from_dict(chosen.trial(point)[0]), shape, len(data.target_names))
        except specs.SpecError as error:
            raise StudyError(
                f"{folder}: its images do not fit {chosen.name} at {point_text(point) or 'its one point'}: "
                f"{error} Plan other networks, or other images (data.image_size)."
            ) from None


def plan(ready: Plan, queue: Queue, tracker: Tracker, settings: Settings, database_url: str) -> StudyRow:
    """Write the study down as far as it is not yet. Raises StudyConflict if its name stands for something else, and
    StudyError if the one it starts from has not been finished."""
    earlier = _earlier(ready, "best_of" if ready.study.best_of else "starts_from") if ready.study.follows else None
    if earlier is not None and study.alias(earlier) == study.alias(ready.name):
        raise StudyConflict(
            f"The study {ready.name} begins with a study of the same name or alias, {earlier}: give one of the files "
            "another name."
        )
    with lock_plan(queue, earlier) if earlier else nullcontext(), lock_plan(queue, ready.name):
        rows = {row.name: row for row in queue.studies()}
        row = rows.get(ready.name)
        for name in (ready.name, earlier):
            if name in rows:
                require_whole(rows[name])
        if row is None and (taken := [name for name in rows if study.alias(name) == study.alias(ready.name)]):
            raise StudyConflict(
                f"The study {ready.name} cannot be planned beside {taken[0]}: as aliases of a registered model both "
                f"are called {study.alias(ready.name)}. Give the file another name, or `hpo delete --study {taken[0]}` "
                "first."
            )
        if row is not None and row.identity != ready.identity:
            raise study.conflict(ready.name, row.spec, ready.canonical)
        if row is not None and row.facts.planned:
            if (row.facts.claims or ()) != ready.study.claims:  # they may change, for they move no number
                queue.amend_facts(row.name, {"claims": [claim.to_dict() for claim in ready.study.claims]})
            return row
        tracker.require_version()
        # A planner that died after it wrote the best points down has planned some of them: they stay the best.
        chosen = row.facts.best_of if row is not None else None
        facts = replace(ready.facts, best_of=chosen) if chosen else _follow(ready, queue)
        facts = _track(ready, facts, tracker, settings, queue.database_id())
        row = StudyRow(name=ready.name, identity=ready.identity, spec=ready.canonical, facts=facts)
        queue.put_study(row)
        with queue.lock("optuna"):  # Optuna makes its tables without a lock of its own
            store = sampling.storage(database_url)
        # The best points are planned as those that other studies begin with.
        points = tuple(source.point for source in facts.best_of or () if source.point is not None)
        planned = replace(ready.study, start=points, trials=len(points)) if points else ready.study
        trials = sampling.plan(store, ready.name, planned)
        store.remove_session()
        store.engine.dispose()
        specs = ready.specs(facts)
        jobs = [NewJob(kind="closing", number=-1)]
        for repeat in range(ready.study.repeats):
            for trial in trials:
                config = trial.user_attrs.get("config")
                spec, cost = (None, 0.0) if config is None else specs[repeat * len(trials) + config]
                jobs.append(
                    NewJob(kind="trial", number=trial.number, repeat=repeat, config=config, cost=cost, spec=spec)
                )
        queue.put_jobs(ready.name, jobs)
        queue.put_study(replace(row, facts=replace(facts, planned=True)))
    return queue.study(ready.name)


def lock_plan(queue: Queue, name: str) -> AbstractContextManager[object]:
    """Who plans or deletes a study holds this, as does who plans one that begins with it. Studies that would have the
    same alias have the same lock."""
    return queue.lock(f"plan.{study.alias(name)}")


def _follow(ready: Plan, queue: Queue) -> StudyFacts:
    """Return the plan's facts with what an earlier study gives it: best configurations, or networks to start from."""
    if ready.study.follows is None:
        return ready.facts
    if ready.study.best_of is None:
        best = _ranked(ready, queue, "starts_from", "starts from the best networks of")
        return replace(ready.facts, starts_from=_start(ready, best))
    best = _ranked(ready, queue, "best_of", "trains the best points of")
    if not best:
        raise StudyError(f"{ready.name} trains the best points of {ready.study.best_of.name}, which has none.")
    sources: dict[str, SourceTrial] = {}
    for job in best:
        assert job.spec is not None and job.run_id is not None
        source = SourceTrial(study=job.study, trial=job.number, run_id=job.run_id, point=job.spec.point)
        sources.setdefault(json.dumps(job.spec.point), source)
    return replace(ready.facts, best_of=tuple(sources.values())[: ready.study.trials])


def _earlier(ready: Plan, key: str) -> str:
    """The full name of the study that this one starts from ("starts_from") or whose points it takes ("best_of")."""
    return study.full_name(getattr(ready.study, key), study.digest(ready.canonical[key]["spec"]))


def _ranked(ready: Plan, queue: Queue, key: str, what: str) -> list[Job]:
    """The finished trials of the earlier study, best first. Raises StudyError unless all have ended."""
    first, name = ready.canonical[key], _earlier(ready, key)
    rows = {row.name: row for row in queue.studies()}
    if name in rows and rows[name].identity != study.digest(first["spec"]):
        raise study.conflict(name, rows[name].spec, first["spec"])
    jobs = [job for job in queue.jobs(name) if job.kind == "trial"] if name in rows else []
    left = sum(job.state in (State.WAITING, State.RUNNING) for job in jobs)
    if left or not jobs:
        state = f"{left} of its {len(jobs)} trials are still to be trained" if jobs else "it has not been run"
        raise StudyError(
            f"{ready.name} {what} {name}, and {state}. Run `hpo run --study {study.file_name(name)}` "
            "with the same options first; or add --with-prerequisites to this command."
        )
    return ranking.ranked(jobs)


def _start(ready: Plan, best: list[Job]) -> dict[str, Network]:
    """The networks to start from: for each origin the best of the earlier study's finished trials."""
    name = _earlier(ready, "starts_from")
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


def _track(ready: Plan, facts: StudyFacts, tracker: Tracker, settings: Settings, owner: str) -> StudyFacts:
    """Make the experiment, the study's own run with its data set, and the baseline predictors as runs.

    Return the facts with their ids.
    """
    data, now = facts.data, now_ms()
    experiment_id = experiments.ensure(
        tracker,
        ready.name,
        description=_note(ready),
        params=[*(["config"] if ready.study.sampler == "grid" else []), *ready.study.space],
        owner=owner,
    )
    run_id = tracker.ensure_run(
        experiment_id,
        key=f"{ready.name}/study",
        name=f"{ready.name} (study)",
        kind="study",
        params={"identity": ready.identity, "seed": ready.study.seed, "data": data.digest, "split": data.split},
        tags={"mlflow.note.content": _note(ready)},
        start_ms=now,
    )
    file = data_files.keep(settings.home, ready.dataset)
    data_files.upload(tracker, run_id, file)
    ids = {}
    for name, scores in facts.predictors.items():
        ids[name] = tracker.ensure_run(
            experiment_id,
            key=f"{ready.name}/predictor/{name}",
            name=f"{ready.name}/predictor {name}",
            kind="predictor",
            params={"predictor": name, "data": data.digest, "split": data.split},
            tags={"mlflow.note.content": f"Trivial predictor: {LEARNED[name]}, fitted on the training split."},
            start_ms=now,
        )
        summary = {f"best_val_{key}": getattr(scores.validation, key) for key in ("nmse", "mse", "r2", "nrmse")}
        tracker.log_summary(ids[name], summary, timestamp_ms=now)
        tracker.set_status(ids[name], "FINISHED", end_ms=now)
    for run in [run_id, *ids.values()]:
        tracker.log_dataset(run, name=data.name, digest=data.digest, source=data.source, profile=data.profile)
    return replace(
        facts,
        data=replace(data, sha256=npz.sha256_in(file)),
        experiment_id=experiment_id,
        study_run_id=run_id,
        predictor_run_ids=ids,
    )


LEARNED = {"mean": "the mean of the training labels", "volume fraction": "a cubic polynomial in the volume fraction"}


def predictors(data: Dataset, parts: Split) -> dict[str, SplitScores]:
    """Validation scores of the baseline predictors. The test split is not looked at here."""
    learned = (data.images[parts.train], data.targets[parts.train])
    images, truth, variance = data.images[parts.validation], data.targets[parts.validation], learned[1].var(axis=0)
    return {
        name: SplitScores(validation=metrics.scores(fit(*learned)(images), truth, train_variance=variance))
        for name, fit in metrics.PREDICTORS.items()
    }


def constants(data: Dataset) -> dict[str, dict[str, float]] | None:
    """What models with physics need to know of the phases; None where there are no two known ones."""
    if data.phases is None:
        return None
    return {name: {"lame_lambda": phase.lame_lambda, "lame_mu": phase.lame_mu} for name, phase in data.phases.items()}


def _check_physics(data: Dataset, folder: Path) -> None:
    """Raise StudyError unless two phases are known, and can have made the labels."""
    from hpo.scores import analysis

    other = "other pixels" if data.description.phases else "no phases"
    leave = 'Or set model.physics = "none".'
    if data.phases is None:
        raise StudyError(
            f"{folder}: model.physics needs two known phases: expected [phases.matrix] and [phases.inclusion] in "
            f"dataset.toml, and pixels of 0 and 255 alone, found {other}. {leave}"
        )
    lambdas, mus = ([getattr(phase, name) for phase in data.phases.values()] for name in ("lame_lambda", "lame_mu"))
    if (largest := max(map(abs, (*lambdas, *mus)))) > hill.LARGEST:
        raise StudyError(
            f"{folder}: model.physics reckons in single precision: expected phases whose Lame constants are at most "
            f"{hill.LARGEST:.0e}, found {largest:.3g} {data.unit}. Give labels and phases in a larger unit, or a "
            f"poisson_ratio further from 0.5. {leave}"
        )
    ks = lambdas[0] + mus[0], lambdas[1] + mus[1]
    if not hill.apart(ks):
        raise StudyError(
            f"{folder}: model.physics needs phases whose lambda + mu = E / (2 (1 + nu) (1 - 2 nu)) differ by more than "
            f"{hill.SMALLEST:.1%}: between others Hill's relations say nothing. Found {ks[0]:.6g} and {ks[1]:.6g} "
            f"{data.unit}. {leave}"
        )
    fractions = data.images.mean(axis=(1, 2, 3), dtype=np.float64)
    given = (data.targets, data.target_names, fractions, data.phases)
    beyond = np.maximum(*analysis.beyond_bounds(*given).values())
    outside, worst = int((beyond > BOUND_SLACK).sum()), int(beyond.argmax())
    residual = float(np.sqrt((analysis.hill_residuals(*given) ** 2).mean()))
    # A label's error comes out of the relations so many times as large.
    allowed = HILL_SLACK * data.targets.std(axis=0).min() * max(1.0, abs((lambdas[1] - lambdas[0]) / (ks[1] - ks[0])))
    if outside or residual > allowed:
        raise StudyError(
            f"{folder}: model.physics needs labels that the phases of dataset.toml can have made: {outside} of "
            f"{len(beyond)} lie outside the bounds of Voigt and Reuss by more than {BOUND_SLACK:.0%} of their largest "
            f"component (the worst, {data.names[worst]}, by {max(beyond[worst], 0):.2%}), and Hill's relations are "
            f"missed by {residual:.3g} {data.unit} (at most {allowed:.3g}). Are young_modulus and poisson_ratio those "
            f"of the labels, in their unit, and is the matrix the phase of the black pixels? {leave}"
        )


def model_name(data: Dataset, parts: Split) -> str:
    """The registered model all studies on this data, split and these targets compete for: `<data set>-<8 hex>`."""
    text = json.dumps([data.digest, parts.digest, data.target_names])
    slug = "".join(c if c.isalnum() or c in "-_." else "-" for c in data.name).strip("-") or "data"
    digits = f"-{study.digest({'model': text})[:8]}"
    # Part of a database's id may follow (hpo.scores.champion.claim_model).
    return slug[: foreign.LONGEST_MODEL_NAME - len(digits) - 9] + digits


def _note(ready: Plan) -> str:
    data, chosen = ready.facts.data, ready.study
    bare = f"**{chosen.at_random}.**\n\n" if chosen.at_random else ""
    best = f" best points of {_earlier(ready, 'best_of')}" if chosen.best_of else " trials"
    repeats = f", each {chosen.repeats} times with another seed" if chosen.repeats > 1 else ""
    return (
        f"{for_markdown(chosen.description or ready.name)}\n\n{bare}"
        f"{chosen.trials}{best}{repeats}; data set {data['name']} ({len(ready.dataset.images)} cells, "
        f"{'/'.join(map(str, data['sizes']))} for training/validation/test), targets {', '.join(data['target_names'])} "
        f"in {for_markdown(data['unit'])}. Selected by the lowest validation NMSE: the mean over the targets of MSE / "
        "variance of the training split."
    )
