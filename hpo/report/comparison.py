"""Trials side by side: what they are, what determines them, where they ran, how they score, where they differ.

Each is named as a study, a trial, a run or a registered version. Values come from the database; MLflow adds the
machines they ran on and the versions of the registry.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlflow.exceptions import MlflowException

from hpo.queue import Job, Queue, State, StudyRow
from hpo.queue.closing_result import ClosingResult
from hpo.report import names, pareto, tables
from hpo.report.words import BASELINES, SCORES
from hpo.scores import ranking
from hpo.study import provenance
from hpo.study.records import NEW, OLD
from hpo.text import first_line, number_text, point_text, squared
from hpo.tracking import registry
from hpo.tracking.client import Tracker
from hpo.tracking.errors import TrackingUnavailable, server
from hpo.tracking.registry import Version
from models.metrics import Scores

RAN = ("hpo.host", "hpo.device", "hpo.python", "hpo.version.", "hpo.commit")  # tags of a run; one is several
SCORE = re.compile(rf"(best_val|last_val|test)_({'|'.join(SCORES)})(?:/(.+))?")  # as MLflow's metrics are called
VALIDATION = (
    *(f"best_val_{name}" for name in SCORES),
    "best_epoch",
    "last_val_nmse",
    "last_val_mse",
    *(f"{part}s_nmse_{value}" for part in ("repeat", "fold") for value in ("mean", "deviation")),
    "epochs",
    "train_seconds",
)
TEST = "test split, opened once"
DIGEST = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{24,}")  # run ids and commits, too: eight digits are enough to look at
NAME, MARK = "name", "mark"  # keys of the first two columns of the table

Values = dict[str, Any]
log = logging.getLogger("hpo")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One trial, or a baseline predictor beside it."""

    name: str
    data: tuple[str, str]  # digests of the data set and of its split
    sections: dict[str, Values]  # values under flat names, none of which stands in two sections

    @cached_property
    def values(self) -> Values:
        return {key: value for section in self.sections.values() for key, value in section.items()}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Trials side by side, and the baseline predictors on their data."""

    things: list[Compared]
    predictors: list[Compared]
    unit: str  # of the label

    @cached_property
    def differences(self) -> list[str]:
        """The values that are not the same for all trials; one that is missing differs from one that is there."""
        first, *others = (thing.values for thing in self.things)
        keys = dict.fromkeys(key for values in (first, *others) for key in values)
        return [key for key in keys if any(values.get(key) != first.get(key) for values in others)]

    @cached_property
    def warning(self) -> str | None:
        """That the scores cannot be compared, if so."""
        sets: dict[tuple[str, str], list[str]] = {}
        for thing in self.things:
            sets.setdefault(thing.data, []).append(thing.name)
        if len(sets) == 1:
            return None
        parts = [f"{', '.join(names)}: data {data[:8]}, split {split[:8]}" for (data, split), names in sets.items()]
        return (
            f"NOT COMPARABLE: the scores are of different data or splits ({'; '.join(parts)}). No best score is marked."
        )

    def best(self, key: str) -> float | None:
        """Return the best value of a score, predictors included; None if all have the same or the data differ."""
        values = {side.values[key] for side in (*self.things, *self.predictors) if side.values.get(key) is not None}
        score = SCORE.fullmatch(key)
        if score is None or (self.warning and score[3] not in (OLD, NEW)) or len(values) < 2:
            return None
        return max(values) if score[2] == "r2" else min(values)

    def as_dict(self) -> dict[str, Any]:
        """Return flat dictionaries for programs, and the names of the values that differ."""
        return {
            "things": [{"name": thing.name} | thing.values for thing in self.things],
            "predictors": [
                {"name": predictor.name, "data": predictor.data[0], "split": predictor.data[1]} | predictor.values
                for predictor in self.predictors
            ],
            "differences": self.differences,
            "warning": self.warning,
        }


def compare(queue: Queue, tracker: Tracker | None, wanted: Sequence[str]) -> Comparison:
    """Put trials side by side; without a tracker MLflow is away.

    Raise NotFound; TrackingUnavailable only if a name is none of a study, trial or run.
    """
    studies = {row.name: row for row in queue.studies()}
    chosen = [names.find(queue, tracker, studies, name) for name in wanted]
    jobs = {name: queue.jobs(name) for name in dict.fromkeys(job.study for job in chosen)}
    tracked, of_versions = _tracked(tracker, studies, chosen), _of_versions(chosen, jobs)
    things = []
    for name, job in zip(wanted, chosen, strict=True):
        study, of_study = studies[job.study], jobs[job.study]
        version, machine = tracked[job.id]
        sections = {
            "what it is": _identity(study, job) | _front(study, job, of_study) | version,
            "what determines it": _settings(study, job),
            "where it ran": {"attempt": job.attempt} | machine,
        }
        validation = job.result.validation if job.state == State.DONE and job.result else None
        targets = study.facts.data.target_names
        sections |= _score_sections(_validation(queue, job, of_study), validation, _tested(job, of_study), targets)
        sections[TEST] |= of_versions.get(job.run_id, {})
        things.append(Compared(name=name, data=_data(study), sections=sections))
    rows = [studies[name] for name in jobs]
    units = dict.fromkeys(row.facts.data.unit for row in rows)
    return Comparison(things=things, predictors=_predictors(things, rows, jobs), unit=" or ".join(units))


def _data(study: StudyRow) -> tuple[str, str]:
    return study.facts.data.digest, study.facts.data.split


def _identity(study: StudyRow, job: Job) -> Values:
    values = {
        "study": job.study,
        "trial": job.number,
        study.specification.part: ("refit" if job.is_refit else job.repeat)
        if study.specification.trainings > 1
        else None,
        "config": job.config,
        "point": point_text(job.spec.point) if job.spec else None,
        "weights": provenance(job.spec.model) if job.spec else None,
        "state": job.state,
        "reason": job.reason,
        "run_id": job.run_id,
    }
    return {key: value for key, value in values.items() if value not in (None, "")}


def _front(study: StudyRow, job: Job, jobs: list[Job]) -> Values:
    """Return whether a finished trial of a study with several objectives is on its Pareto front."""
    tags = pareto.tags(study, jobs).get(job.number)
    return {} if tags is None else {"pareto": tags[pareto.TAG]}


def _settings(study: StudyRow, job: Job) -> Values:
    """Return the params of its run; those of the configuration stand among model and training, as in every study."""
    if job.spec is None:  # no sampler has filled the slot
        return {"data": _data(study)[0], "split": _data(study)[1], "identity": study.identity}
    own = (*job.spec.point, "config")
    return {key: value for key, value in job.spec.params().items() if key not in own}


def _tracked(
    tracker: Tracker | None, studies: Mapping[str, StudyRow], jobs: Iterable[Job]
) -> dict[int, tuple[Values, Values]]:
    """Return, by the id of the job, its version in the registry and where it ran; nothing if MLflow does not answer."""
    values = {}
    versions: dict[str, list[Version]] = {}
    try:
        tracker = names.require(tracker)
        for job in jobs:
            model = studies[job.study].facts.model_name
            if model not in versions:
                versions[model] = registry.versions(tracker, model)
            own = next((one for one in versions[model] if job.run_id and one.run_id == job.run_id), None)
            registered = {"version": f"{model}/{own.number}"} | _verdict(own) if own else {}
            if own and own.aliases:
                registered["aliases"] = " ".join(f"@{alias}" for alias in own.aliases)
            values[job.id] = registered, _machine(tracker, job.run_id) if job.run_id else {}
        return values
    except TrackingUnavailable as error:
        log.warning("MLflow does not answer: machines and registered versions are left out. %s", first_line(error))
        return {job.id: ({}, {}) for job in jobs}


def _verdict(version: Version) -> dict[str, str]:
    """Return how a version compares with the baseline predictors; nothing of one that somebody else registered."""
    return {"verdict": version.tags["hpo.verdict"]} if "hpo.verdict" in version.tags else {}


@server()
def _machine(tracker: Tracker, run_id: str) -> dict[str, str]:
    """Return where a run ran, by its tags; nothing if somebody has deleted it for good."""
    try:
        tags = tracker.client.get_run(run_id).data.tags
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}
    wanted = [name for prefix in RAN for name in sorted(tags) if name.startswith(prefix) and tags[name]]
    return {name.removeprefix("hpo."): tags[name] for name in wanted}


def _validation(queue: Queue, job: Job, jobs: list[Job]) -> Values:
    """Return the scores of the best epoch and of the last; those so far of a trial that is not done."""
    values: Values = {}
    if job.state == State.DONE and job.result:
        values = _means("best_val", job.result.validation) | job.result.to_json()
    elif curve := [(number, epoch) for number, epoch in queue.curve(job.id) if epoch.get("val/nmse") is not None]:
        number, best = min(curve, key=lambda epoch: epoch[1]["val/nmse"])
        last = curve[-1][1]
        values = {"best_val_nmse": best["val/nmse"], "best_val_mse": best["val/mse"], "best_epoch": number}
        values |= {"last_val_nmse": last["val/nmse"], "last_val_mse": last["val/mse"]}
        values |= {"seconds": sum(epoch["seconds"] for _, epoch in curve)}
    if len(repeats := ranking.repeats(jobs).get(job.number, [])) > 1:
        part = "folds" if repeats[0].spec and repeats[0].spec.fold else "repeats"
        values[f"{part}_nmse_mean"], values[f"{part}_nmse_deviation"] = ranking.spread(repeats)
    values |= {"epochs": job.epochs, "train_seconds": values.get("seconds")}  # "seconds" is the name of an epoch's
    return {name: values[name] for name in VALIDATION if values.get(name) is not None}


def _tested(job: Job, jobs: list[Job]) -> Scores | None:
    """Return the trial's scores on the test split, as the study's closing stored them; None if it did not score it."""
    networks = (ranking.network(jobs, best) for best in ranking.ranked(jobs))
    if job.id not in (network.id for network in networks if network is not None):  # of repeats only the best
        return None
    return next((group.test for group in _ended(jobs).groups if group.number == job.number), None)


def _of_versions(chosen: Sequence[Job], jobs: Mapping[str, list[Job]]) -> dict[str | None, Values]:
    """Return scores on the old and the new test images of a data set that has grown, by run: those of the closing that
    has scored most of the trials, the last of such closings."""
    runs = {job.run_id for job in chosen}
    closings = [job for of_study in jobs.values() for job in of_study if job.closing and job.closing.tested]
    scored = [
        (len(runs & by_run.keys()), closing.changed_at, by_run)
        for closing in closings
        for by_run in [{one.run_id: one.tests for one in (closing.closing and closing.closing.tested) or ()}]
    ]
    _, _, by_run = max(scored, key=lambda one: one[:2], default=(0, 0.0, {}))
    return {
        run: {f"test_{name}/{part}": getattr(of, name) for part, of in (tests or {}).items() for name in ("nmse", "r2")}
        for run, tests in by_run.items()
    }


def _ended(jobs: list[Job]) -> ClosingResult:
    """Return the result of the closing; an empty one until the study is closed."""
    closings = (job.closing for job in jobs if job.kind == "closing" and job.state == State.DONE)
    return next(closings, None) or ClosingResult()


def _predictors(
    things: Sequence[Compared], studies: Sequence[StudyRow], jobs: Mapping[str, list[Job]]
) -> list[Compared]:
    """Return the baseline predictors on each data set; on the test split if a trial has scores of it."""
    predictors: dict[tuple[tuple[str, str], str], Compared] = {}
    several = len({thing.data for thing in things}) > 1
    for study in studies:
        data, targets = _data(study), study.facts.data.target_names
        is_opened = any(thing.sections[TEST] for thing in things if thing.data == data)
        tested = (_ended(jobs[study.name]).predictors if is_opened else None) or {}
        for name, scores in study.facts.predictors.items():
            test = tested[name].test if name in tested else None
            validation = scores.validation
            sections = _score_sections(_means("best_val", validation), validation, test, targets)
            title = BASELINES[name] + (f" ({data[0][:8]})" if several else "")
            if test or (data, name) not in predictors:
                predictors[data, name] = Compared(name=title, data=data, sections=sections)
    return list(predictors.values())


def _score_sections(
    means: Values, validation: Scores | None, test: Scores | None, targets: Sequence[str]
) -> dict[str, Values]:
    """Return the sections of `means` of the validation split, and of the scores on both splits, if any."""
    return {
        "validation split": means,
        "validation, by target": _targets("best_val", validation, targets),
        TEST: _means("test", test),
        "test, by target": _targets("test", test, targets),
    }


def _means(prefix: str, scores: Scores | None) -> Values:
    values = {f"{prefix}_{name}": getattr(scores, name, None) for name in SCORES}
    return {key: value for key, value in values.items() if value is not None}


def _targets(prefix: str, scores: Scores | None, targets: Sequence[str]) -> Values:
    return {
        f"{prefix}_{name}/{target}": value
        for name in ("nmse", "r2")
        for target, value in (zip(targets, scores.per_target[name], strict=True) if scores else ())
        if value is not None
    } | {
        f"{prefix}_{name}/{target}": value
        for target, values in (scores.in_unit if scores else {}).items()
        for name, value in values.items()
        if value is not None
    }


def table(comparison: Comparison, *, only_differences: bool = False) -> tables.Table:
    """Return a column for each trial and each baseline predictor, a row for each value."""
    sides = {f"side {index}": side for index, side in enumerate((*comparison.things, *comparison.predictors))}
    columns = [
        tables.Column(name=NAME, label=" ", left=True),
        tables.Column(name=MARK, label="≠", left=True, in_title=True),
    ]
    for key, side in sides.items():
        style = "dim" if side in comparison.predictors else ""
        columns.append(tables.Column(name=key, label=side.name, style=style))
    rows = []
    for section in comparison.things[0].sections:
        keys = dict.fromkeys(key for thing in comparison.things for key in thing.sections[section])
        wanted = [key for key in keys if key in comparison.differences or not only_differences]
        blank = dict.fromkeys((MARK, *sides), "")
        rows += [tables.Row(values={NAME: section} | blank, style="italic", rule=True)] if wanted else []
        for key in wanted:
            differs = key in comparison.differences
            texts = _texts(key, [side.values.get(key) for side in sides.values()], comparison.best(key))
            head = {NAME: _label(key, comparison.unit), MARK: "≠" if differs else ""}
            style = "bold yellow" if differs else ""
            rows.append(tables.Row(values=head | dict(zip(sides, texts, strict=True)), style=style))
    title = "≠: not the same for all; *: the best, predictors included"
    return tables.Table(title=title, columns=columns, rows=rows)


def _label(key: str, unit: str) -> str:
    """Return `NMSE C11` for best_val_nmse/C11; other names as study file and MLflow have them, without underscores."""
    score = SCORE.fullmatch(key)
    if score is None:
        return key if "." in key else key.replace("_", " ")
    name = SCORES[score[2]] + (f" {squared(unit)}" if score[2] == "mse" else "")
    return " ".join(filter(None, ("last epoch's" if score[1] == "last_val" else "", name, score[3])))


def _texts(key: str, values: Sequence[Any], best: float | None) -> list[str]:
    """Return the values of a row as text, with a mark behind the best score; the mark is as wide as no mark."""
    if (score := SCORE.fullmatch(key)) or key in VALIDATION or key.endswith(("parameters", "multiply_adds")):
        texts = tables.numbers_text(values, SCORES[score[2]] if score else "")
    else:
        texts = [DIGEST.sub(r"\1", number_text(value)) for value in values]
    marks = ["" if best is None else " *" if value == best else "  " for value in values]
    return ["" if value is None else text + mark for value, text, mark in zip(values, texts, marks, strict=True)]
