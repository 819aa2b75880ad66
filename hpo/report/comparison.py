"""Several trials side by side: what they are, what determines them, where they ran, how they score, where they differ.

A thing to compare is named as a study, a trial, a run or a registered version, and is one trial in the end. What is
shown comes from the database; MLflow knows only the machines they ran on and the versions of the registry.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from mlflow.exceptions import MlflowException
from rich.table import Table
from rich.text import Text

from hpo.errors import NotFound
from hpo.queue import Job, Queue, StudyRow
from hpo.recording import reconciler
from hpo.report.results import NAMES
from hpo.scores import champion, ranking
from hpo.study import provenance
from hpo.text import first_line, number_text, point_text, score_text
from hpo.tracking import registry
from hpo.tracking.client import Tracker, TrackingUnavailable, server
from hpo.tracking.registry import Version

FORMS = (
    "a study (grid: its best trial), a trial (grid/22; grid/22/1: its repeat 1), an MLflow run (32 hexadecimal digits) "
    "or a registered version (MODEL@champion, MODEL/3, @champion)"
)
RAN = ("hpo.host", "hpo.device", "hpo.python", "hpo.version.", "hpo.commit")  # tags of a run; one is several
SCORES = {  # name and form of each
    "nmse": ("NMSE", ".4g"),
    "mse": ("MSE", ".4g"),
    "r2": ("R²", ".4f"),
    "nrmse": ("NRMSE", ".4f"),
    "mape": ("MAPE", ".2%"),
}
BY_COMPONENT = ("nmse", "r2")
SCORE = re.compile(rf"(best_val|last_val|test)_({'|'.join(SCORES)})(?:/(.+))?")  # as MLflow's metrics are called
VALIDATION = (
    *(f"best_val_{name}" for name in SCORES),
    "best_epoch",
    "last_val_nmse",
    "last_val_mse",
    "repeats_nmse_mean",
    "repeats_nmse_deviation",
    "epochs",
    "train_seconds",
)
TEST = "test split, opened once"
DIGEST = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{24,}")  # run ids and commits, too: eight digits are enough to look at
LABEL, NARROW = 16, 11  # characters a column needs at least; two things and the predictors fit into 80

log = logging.getLogger("hpo")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One thing compared, or a trivial predictor beside it."""

    name: str
    data: tuple[str, str]  # digests of the data set and of its split
    sections: dict[str, dict[str, Any]]  # values under flat names, none of which stands in two sections

    @cached_property
    def values(self) -> dict[str, Any]:
        return {key: value for section in self.sections.values() for key, value in section.items()}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Things side by side, and the trivial predictors on their data."""

    things: list[Column]
    predictors: list[Column]
    unit: str  # of the label

    @cached_property
    def differences(self) -> list[str]:
        """The values that are not the same for all things; one that is missing differs from one that is there."""
        first, *others = (thing.values for thing in self.things)
        keys = dict.fromkeys(key for each in (first, *others) for key in each)
        return [key for key in keys if any(each.get(key) != first.get(key) for each in others)]

    @cached_property
    def warning(self) -> str | None:
        """That the scores do not belong beside each other, if so."""
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
        """The best value of a score, predictors included, unless all have the same or the data differ."""
        found = {each.values[key] for each in (*self.things, *self.predictors) if each.values.get(key) is not None}
        score = SCORE.fullmatch(key)
        if score is None or self.warning or len(found) < 2:
            return None
        return max(found) if score[2] == "r2" else min(found)

    def as_dict(self) -> dict[str, Any]:
        """For programs: flat dicts, and the names of the values that differ."""
        return {
            "things": [{"name": each.name} | each.values for each in self.things],
            "predictors": [
                {"name": each.name, "data": each.data[0], "split": each.data[1]} | each.values
                for each in self.predictors
            ],
            "differences": self.differences,
            "warning": self.warning,
        }


def compare(queue: Queue, tracker: Tracker | None, names: Sequence[str]) -> Comparison:
    """Put things side by side; without a tracker MLflow is away. Raises NotFound; TrackingUnavailable only where a
    name is of no study, trial or run."""
    studies = {row.name: row for row in queue.studies()}
    chosen = [find(queue, tracker, studies, name) for name in names]
    jobs = {name: queue.jobs(name) for name in dict.fromkeys(job.study for job in chosen)}
    asked = _ask(tracker, studies, chosen)
    things = []
    for name, job in zip(names, chosen, strict=True):
        study, all_jobs = studies[job.study], jobs[job.study]
        sections = {
            "what it is": _what(study, job) | asked[job.id][0],
            "what determines it": _why(study, job),
            "where it ran": {"attempt": job.attempt} | asked[job.id][1],
        }
        each = job.result["validation"] if job.state == "done" and job.result else None
        targets = study.facts["data"]["target_names"]
        sections |= _score_sections(_validation(queue, job, all_jobs), each, _tested(job, all_jobs), targets)
        things.append(Column(name=name, data=_data(study), sections=sections))
    rows = [studies[name] for name in jobs]
    units = dict.fromkeys(row.facts["data"]["unit"] for row in rows)
    return Comparison(things=things, predictors=_predictors(things, rows, jobs), unit=" or ".join(units))


def find(queue: Queue, tracker: Tracker | None, studies: Mapping[str, StudyRow], name: str) -> Job:
    """The trial a name stands for; a study's name goes before a model's. Raises NotFound."""
    head, slash, rest = name.partition("/")
    if name in studies:
        best = ranking.ranked(queue.jobs(name))
        if not best:
            raise NotFound(f"The study {name} has no finished trial that could stand for it. Name one, as in {name}/0.")
        return best[0]
    if slash and head in studies:
        return trial(queue, studies[head], rest)
    if (job := queue.by_run(name)) is not None:
        return job
    tracker = _there(tracker)
    models = champion.downloadable(queue, tracker)
    if "@" in name:
        return _made(queue, *_aliased(tracker, models, name))
    if slash and head in models:
        return _made(queue, head, registry.find(tracker, head, rest))
    for row in studies.values():
        if name in (row.facts.get("study_run_id"), *row.facts.get("predictor_run_ids", {}).values()):
            raise NotFound(f"The run {name} is of no trial, but of the study {row.name} as a whole: name {row.name}.")
    runs = [str(job.run_id) for study in studies for job in queue.jobs(study) if job.run_id]
    raise _unknown(name, [*studies, *models, *runs])


def trial(queue: Queue, study: StudyRow, rest: str) -> Job:
    """NUMBER or NUMBER/REPEAT; without a repeat the best finished one, else the first."""
    number, _, repeat = rest.partition("/")
    jobs = [job for job in queue.jobs(study.name) if job.kind == "trial"]
    found = [job for job in jobs if str(job.number) == number and repeat in ("", str(job.repeat))]
    if not found:
        last, repeats = max((job.number for job in jobs), default=0), study.spec.get("repeats", 1)
        again = f", then perhaps / and a repeat of 0 to {repeats - 1}" if repeats > 1 else ""
        raise NotFound(
            f"The study {study.name} has no trial '{rest}': expected a number of 0 to {last}{again}. "
            f"`hpo trials --study {study.name}` lists them."
        )
    return next(iter(ranking.ranked(found)), found[0])


def _there(tracker: Tracker | None) -> Tracker:
    if tracker is None:
        raise TrackingUnavailable("its server is away")
    return tracker


def _aliased(tracker: Tracker, models: Sequence[str], name: str) -> tuple[str, Version]:
    """MODEL@ALIAS, or @ALIAS where only one model has such an alias."""
    model, _, alias = name.rpartition("@")
    if model in models:
        return model, registry.find(tracker, model, alias)
    known = {
        f"{each}@{one}": (each, v) for each in models for v in registry.versions(tracker, each) for one in v.aliases
    }
    found = [full for full in known if not model and full.endswith(name)]
    if len(found) > 1:
        raise NotFound(f"'{name}' stands for several versions: expected one of {', '.join(found)}.")
    if not found:
        raise _unknown(name, list(known) if model else [f"@{full.rpartition('@')[2]}" for full in known])
    return known[found[0]]


def _made(queue: Queue, model: str, version: Version) -> Job:
    """The trial whose network a version is."""
    if (job := queue.by_run(version.run_id)) is None:
        raise NotFound(
            f"{model} version {version.number} was not made by a study of this database: its trial is unknown here."
        )
    return job


def _unknown(name: str, known: Sequence[str]) -> NotFound:
    close = get_close_matches(name, known) or [each for each in known if name in each][:3]
    near = f" Did you mean {' or '.join(close)}?" if close else ""
    return NotFound(
        f"Expected {FORMS}, found '{name}'.{near} `hpo studies` and `hpo trials --study NAME` list what there is."
    )


def _data(study: StudyRow) -> tuple[str, str]:
    return study.facts["data"]["digest"], study.facts["data"]["split"]


def _what(study: StudyRow, job: Job) -> dict[str, Any]:
    found = {
        "study": job.study,
        "trial": job.number,
        "repeat": job.repeat if study.spec.get("repeats", 1) > 1 else None,
        "config": job.config,
        "point": point_text(job.spec["point"]) if job.spec else None,
        "weights": provenance(job.spec["model"]) if job.spec else None,
        "state": job.state,
        "reason": job.reason,
        "run_id": job.run_id,
    }
    return {key: value for key, value in found.items() if value not in (None, "")}


def _why(study: StudyRow, job: Job) -> dict[str, Any]:
    """The params of its run. Those of the point stand among model and training: under one name in every study."""
    if job.spec is None:  # no sampler has filled the slot
        return {"data": _data(study)[0], "split": _data(study)[1], "identity": study.identity}
    return {
        key: value for key, value in reconciler.params(job.spec).items() if key not in (*job.spec["point"], "config")
    }


def _ask(
    tracker: Tracker | None, studies: Mapping[str, StudyRow], jobs: Iterable[Job]
) -> dict[int, tuple[dict[str, Any], dict[str, Any]]]:
    """By job: its version in the registry, and where it ran. What MLflow does not answer is left out for all."""
    found = {}
    versions: dict[str, list[Version]] = {}
    try:
        tracker = _there(tracker)
        for job in jobs:
            model = studies[job.study].facts["model_name"]
            if model not in versions:
                versions[model] = registry.versions(tracker, model)
            of = next((each for each in versions[model] if job.run_id and each.run_id == job.run_id), None)
            made = {"version": f"{model}/{of.number}"} if of else {}
            made |= {"aliases": " ".join(f"@{alias}" for alias in of.aliases)} if of and of.aliases else {}
            found[job.id] = made, _ran(tracker, job.run_id) if job.run_id else {}
        return found
    except TrackingUnavailable as error:
        log.warning("MLflow does not answer: machines and registered versions are left out. %s", first_line(error))
        return {job.id: ({}, {}) for job in jobs}


@server()
def _ran(tracker: Tracker, run_id: str) -> dict[str, str]:
    """Where a run says it ran; nothing if somebody has deleted it for good."""
    try:
        tags = tracker.client.get_run(run_id).data.tags
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}
    names = [name for prefix in RAN for name in sorted(tags) if name.startswith(prefix) and tags[name]]
    return {name.removeprefix("hpo."): tags[name] for name in names}


def _validation(queue: Queue, job: Job, jobs: list[Job]) -> dict[str, Any]:
    """Scores of the best epoch and of the last; those so far of a trial that is not done."""
    found: dict[str, Any] = {}
    if job.state == "done" and job.result:
        found = _means("best_val", job.result["validation"]) | job.result
    elif curve := [(number, each) for number, each in queue.curve(job.id) if each.get("val/nmse") is not None]:
        number, best = min(curve, key=lambda epoch: epoch[1]["val/nmse"])
        last = curve[-1][1]
        found = {"best_val_nmse": best["val/nmse"], "best_val_mse": best["val/mse"], "best_epoch": number}
        found |= {"last_val_nmse": last["val/nmse"], "last_val_mse": last["val/mse"]}
        found |= {"seconds": sum(each["seconds"] for _, each in curve)}
    if len(repeats := ranking.repeats(jobs).get(job.number, [])) > 1:
        found["repeats_nmse_mean"], found["repeats_nmse_deviation"] = ranking.spread(repeats)
    found |= {"epochs": job.epochs, "train_seconds": found.get("seconds")}  # "seconds" is the name of an epoch's
    return {name: found[name] for name in VALIDATION if found.get(name) is not None}


def _tested(job: Job, jobs: list[Job]) -> dict[str, Any] | None:
    """What the study's closing found of this trial on the test split, if it was opened for it."""
    if job.id not in (best.id for best in ranking.ranked(jobs)):  # of a point's repeats only the best was tested
        return None
    return next((each["test"] for each in _ended(jobs).get("groups", []) if each["number"] == job.number), None)


def _ended(jobs: list[Job]) -> dict[str, Any]:
    """The result of the closing; empty until the study is closed."""
    return next((job.result or {} for job in jobs if job.kind == "closing" and job.state == "done"), {})


def _predictors(things: Sequence[Column], studies: Sequence[StudyRow], jobs: Mapping[str, list[Job]]) -> list[Column]:
    """The trivial predictors on each data set; on the test split where a thing has scores of it."""
    found: dict[tuple[tuple[str, str], str], Column] = {}
    several = len({thing.data for thing in things}) > 1
    for study in studies:
        data, targets = _data(study), study.facts["data"]["target_names"]
        opened = any(thing.sections[TEST] for thing in things if thing.data == data)
        ended = _ended(jobs[study.name]).get("predictors", {}) if opened else {}
        for name, scores in study.facts["predictors"].items():
            test = ended[name]["test"] if ended else None
            sections = _score_sections(_means("best_val", scores["validation"]), scores["validation"], test, targets)
            column = Column(name=NAMES[name] + (f" ({data[0][:8]})" if several else ""), data=data, sections=sections)
            if test or (data, name) not in found:
                found[data, name] = column
    return list(found.values())


def _score_sections(
    validation: dict[str, Any], each: dict[str, Any] | None, test: dict[str, Any] | None, targets: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """`validation`: the means; `each` and `test`: what hpo.models gives of the splits, None where there is nothing."""
    return {
        "validation split": validation,
        "validation, by component": _components("best_val", each, targets),
        TEST: _means("test", test),
        "test, by component": _components("test", test, targets),
    }


def _means(prefix: str, scores: dict[str, Any] | None) -> dict[str, Any]:
    return {f"{prefix}_{name}": scores[name] for name in SCORES if scores[name] is not None} if scores else {}


def _components(prefix: str, scores: dict[str, Any] | None, targets: Sequence[str]) -> dict[str, Any]:
    return {
        f"{prefix}_{name}/{target}": value
        for name in BY_COMPONENT
        for target, value in (zip(targets, scores["per_target"][name], strict=True) if scores else ())
        if value is not None
    }


def table(found: Comparison, *, only_differences: bool = False) -> Table:
    """A column for each thing and each trivial predictor, a row for each value."""
    made = Table(title="≠: not the same for all; *: the best, predictors included", title_justify="left")
    made.add_column("", min_width=LABEL, overflow="fold")
    made.add_column("≠")
    for each in found.things:
        made.add_column(each.name, justify="right", min_width=NARROW, overflow="fold")
    for each in found.predictors:
        made.add_column(Text(each.name, style="dim"), justify="right", min_width=NARROW, style="dim", overflow="fold")
    columns = [*found.things, *found.predictors]
    for section in found.things[0].sections:
        keys = dict.fromkeys(key for each in found.things for key in each.sections[section])
        shown = [key for key in keys if key in found.differences or not only_differences]
        if shown:
            made.add_section()
            made.add_row(Text(section, style="italic"))
        for key in shown:
            differs, best = key in found.differences, found.best(key)
            cells = [_text(key, value := each.values.get(key)) + _mark(value, best) for each in columns]
            style = "bold yellow" if differs else ""
            made.add_row(Text(_label(key, found.unit), style=style), "≠" if differs else "", *cells)
    return made


def _label(key: str, unit: str) -> str:
    """`NMSE C11` for best_val_nmse/C11; other names as the study file and MLflow have them, without underscores."""
    score = SCORE.fullmatch(key)
    if score is None:
        return key if "." in key else key.replace("_", " ")
    name = SCORES[score[2]][0] + (f" {unit}²" if score[2] == "mse" else "")
    return " ".join(filter(None, ("last epoch's" if score[1] == "last_val" else "", name, score[3])))


def _text(key: str, value: Any) -> str:
    score = SCORE.fullmatch(key)
    if value is None:
        return ""
    if score is not None:
        return score_text(value, SCORES[score[2]][1])
    if key in VALIDATION and isinstance(value, float):
        return score_text(value)
    if key.endswith("parameters"):
        return f"{value:,}"
    return DIGEST.sub(r"\1", number_text(value))


def _mark(value: Any, best: float | None) -> str:
    """Behind a score; as wide as nothing, so that the numbers stand below each other."""
    return "" if best is None else " *" if value == best else "  "
