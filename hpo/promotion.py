"""What closing a study decides: winners, verdict, aliases. The model is registered and compared with the champion."""

import logging
import math
import statistics
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from hpo import alarms, crash, mirror, registry
from hpo.errors import ModelError, NotFound
from hpo.mirror import Mirror
from hpo.queue import Job, Queue, StudyRow
from hpo.registry import Version
from hpo.study import provenance
from hpo.tracking import OWNER, Tracker

CHAMPION = "champion"
NAME_SHOWN = 20  # letters of a study's name that leave room for its trial where 32 are shown
# Tags of a version: its network's validation NMSE, its point's, and the trial of another study whose point that is.
OWN, POINT, BEST_OF = "hpo.best_val_nmse", "hpo.point_val_nmse", "hpo.best_of"
ELECTION = 120.0  # seconds an election may take before a frozen one gives up its lock

log = logging.getLogger("hpo")


def ranked(jobs: list[Job]) -> list[Job]:
    """The best finished trial of each point, the point of the lowest best-epoch validation NMSE first; equal ones by
    their number. Of a point trained several times the mean counts."""
    points = repeats(jobs)
    return sorted(
        (min(each, key=_nmse) for each in points.values()),
        key=lambda job: (spread(points[job.number])[0], job.number),
    )


def repeats(jobs: list[Job]) -> dict[int, list[Job]]:
    """The finished trials of each point, by its number."""
    found: dict[int, list[Job]] = {}
    for job in jobs:
        if job.kind == "trial" and job.state == "done" and job.result:
            found.setdefault(job.number, []).append(job)
    return found


def spread(jobs: Sequence[Job]) -> tuple[float, float | None]:
    """Mean and standard deviation (None of a single one) of the validation NMSE of a point's repeats."""
    values = [_nmse(job) for job in jobs]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def points(jobs: list[Job]) -> list[tuple[Job, float]]:
    """What `ranked` gives, each with the score of its point: the mean over its repeats."""
    found = repeats(jobs)
    return [(job, spread(found[job.number])[0]) for job in ranked(jobs)]


def winners(jobs: list[Job], report_by: list[str]) -> list[Job]:
    """The best trial of each combination of values of the `report_by` parameters, the best of all first."""
    first: dict[tuple[Any, ...], Job] = {}
    for job in ranked(jobs):
        assert job.spec is not None
        first.setdefault(tuple(repr(job.spec["point"].get(key)) for key in report_by), job)
    return list(first.values())


def fetch(tracker: Tracker, job: Job, folder: Path) -> Path:
    """The model of a finished trial, from the tracking server, every file checked against the database's hash."""
    assert job.result is not None
    return registry.download_model(
        tracker, model_id=job.result["model_id"], folder=folder, expected_sha256=job.result["files"]
    )


def verdict(validation: Mapping[str, Any], predictors: Mapping[str, Any]) -> str:
    """'below mean' (never promoted), 'below volume fraction' (promoted and marked) or 'good', on validation NMSE."""
    if not validation["nmse"] < predictors["mean"]["validation"]["nmse"]:
        return "below mean"
    if not validation["nmse"] < predictors["volume fraction"]["validation"]["nmse"]:
        return "below volume fraction"
    return "good"


VERDICTS = {
    "below mean": "it does not beat predicting the mean of the training labels, so it is not promoted",
    "below volume fraction": "it does NOT beat a cubic polynomial in the volume fraction",
    "good": "it beats the mean and a cubic polynomial in the volume fraction",
}


def check_same(scored: Mapping[str, Any], job: Job) -> None:
    """Raise ValueError unless the downloaded model gives the validation score its trial was recorded with."""
    assert job.result is not None
    recorded, found = job.result["validation"]["nmse"], scored["validation"]["nmse"]
    if found is None or recorded is None or not abs(found - recorded) <= 1e-4 * recorded:
        raise ValueError(
            f"trial {job.number}: its downloaded model has a validation NMSE of {mirror.score_text(found, '.6g')}, "
            f"recorded is {mirror.score_text(recorded, '.6g')}"
        )


def promote(
    mirror_: Mirror, closing: Job, scored: Mapping[int, Mapping[str, Any]], predictions: Mapping[int, Path]
) -> dict[str, Any]:
    """Register the winners and move the aliases; return the closing's result. Idempotent.

    `scored`: for each winner's number what hpo.trainer.score found. Raises LeaseLost if somebody else closes now.
    """
    queue, tracker, study = mirror_.queue, mirror_.tracker, mirror_.study
    facts, jobs = study.facts, queue.jobs(study.name)
    chosen = [job for job in ranked(jobs) if job.number in scored]
    failed = [job for job in jobs if job.kind == "trial" and job.state in ("dead", "diverged", "cancelled")]
    pruned = sum(job.state == "pruned" for job in jobs)
    result: dict[str, Any] = {
        "winner": None,
        "failed": [{"number": job.number, "state": job.state, "reason": job.reason} for job in failed],
        "pruned": pruned,
        "reason": "no trial was finished",
        "groups": [],
        "alarms": [],
    }
    if not chosen:
        return result
    result["alarms"] = alarms.alarms(ranked(jobs), facts["predictors"], predictions[chosen[0].number])
    tracker_model = facts["model_name"]
    registry.ensure_registered_model(
        tracker,
        tracker_model,
        description=f"Models trained on {facts['data']['name']} (digest {facts['data']['digest'][:8]}), "
        f"targets {', '.join(facts['data']['target_names'])} in {facts['data']['unit']}. All studies on this data and "
        "split compete for @champion; the point with the lowest validation NMSE, the mean over its seeds, wins.",
        tags={"hpo.data": facts["data"]["digest"], "hpo.split": facts["data"]["split"]},
    )
    again = repeats(jobs)
    for rank, job in enumerate(chosen):
        assert job.result is not None and job.spec is not None
        found = scored[job.number]
        outcome = verdict(found["validation"], found["predictors"])
        entry: dict[str, Any] = {
            "number": job.number,
            "config": job.config,
            "point": job.spec["point"],
            "parameters": job.spec["parameters"],
            "weights": provenance(job.spec["model"]),
            "verdict": outcome,
            "validation": found["validation"],
            "test": found["test"],
            "version": None,
            **dict(zip(("point_nmse", "point_deviation"), spread(again[job.number]), strict=True)),
        }
        if outcome != "below mean":
            queue.require(closing)
            entry["version"] = registry.register(
                tracker,
                model_name=tracker_model,
                key=mirror.key(job),
                model_id=job.result["model_id"],
                run_id=str(job.run_id),
                description=_description(study, job, again[job.number], found, outcome, result["alarms"]),
                tags={
                    OWNER: queue.database_id(),
                    "hpo.study": study.name,
                    "hpo.trial": job.number,
                    "hpo.verdict": outcome,
                    "hpo.weights": provenance(job.spec["model"]) or "random",
                    "hpo.beats_volume_fraction": str(outcome == "good").lower(),
                    OWN: repr(_nmse(job)),
                    **_of_point(job, again[job.number]),
                },
            )
            crash.at("version registered")
        if rank == 0:
            result |= {"winner": entry, "predictors": found["predictors"], "reason": VERDICTS[outcome]}
        result["groups"].append(entry)
        tracker.upload(facts["study_run_id"], predictions[job.number], "predictions")
        tracker.log_summary(
            str(job.run_id),
            mirror.known({f"test_{name}": found["test"][name] for name in ("nmse", "mse", "r2", "nrmse")}),
            timestamp_ms=round(job.changed_at * 1000),
            step=job.result["best_epoch"],
        )
    version = result["winner"]["version"]
    if version is not None:
        queue.require(closing)
        if "+" not in study.name:
            registry.set_alias(tracker, tracker_model, alias(study.name), version)
            crash.at("alias set")
        with champion_lock(queue, tracker_model):
            result |= elect(queue, tracker, tracker_model, sound={str(job.run_id) for job in chosen})
        crash.at("champion elected")
    result["model_name"] = tracker_model
    return result


def champion_lock(queue: Queue, model_name: str) -> AbstractContextManager[None]:
    """Two studies that close at once must see each other."""
    return queue.lock(f"champion.{model_name}", patience=ELECTION)


def elect(queue: Queue, tracker: Tracker, model_name: str, *, sound: Collection[str] = ()) -> dict[str, Any]:
    """Point @champion at the version that is first in `standings`; it moves only to a better one that is sound.

    `sound`: runs whose models have just been fetched, checked and made to predict; another one is, before it is
    chosen. The model's description gets a table of its versions, @champion first, then the best. The caller holds the
    champion's lock.
    """
    elected = _elect(queue, tracker, model_name, sound)
    rows = [("version", "trial", "validation NMSE", "verdict", "aliases"), ("---",) * 5]
    candidates = _candidates(tracker, model_name)
    standing = standings(candidates)
    rows += [
        (
            str(each.number),
            each.description.partition("\n")[0],
            _scores_text(*standing[each.number]),
            each.tags.get("hpo.verdict", ""),
            " ".join(f"`@{name}`" for name in each.aliases),
        )
        for each in sorted(candidates, key=lambda v: (CHAMPION not in v.aliases, standing[v.number], v.number))
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    registry.describe_versions(tracker, model_name, table if len(rows) > 2 else "")
    return elected


def standings(versions: Sequence[Version]) -> dict[int, tuple[float, float]]:
    """What each version is elected by, by its number, lowest first: the validation NMSE of its point, which is the mean
    over the point's repeats, then that of its own network.

    A study that trains the best points of another with other seeds answers for them: the other's versions have the
    scores that it found for their points, infinity where it found another point better or did not train theirs.
    """
    again: dict[tuple[str, str], dict[str, float]] = {}  # database and study -> trial -> mean
    for each in versions:
        if BEST_OF in each.tags:
            name, _, number = each.tags[BEST_OF].rpartition("/")
            means = again.setdefault((each.tags.get(OWNER, ""), name), {})
            means[number] = min(_tagged(each, POINT), means.get(number, math.inf))
    found = {}
    for each in versions:
        own = _tagged(each, OWN)
        point = _tagged(each, POINT) if POINT in each.tags else own
        study = each.tags.get(OWNER, ""), each.tags.get("hpo.study", "")
        if study in again:
            point = again[study].get(each.tags.get("hpo.trial", ""), math.inf)
        found[each.number] = point, own
    return found


def _elect(queue: Queue, tracker: Tracker, model_name: str, sound: Collection[str]) -> dict[str, Any]:
    candidates = _candidates(tracker, model_name)
    if not candidates:
        registry.delete_alias(tracker, model_name, CHAMPION)
        return {"champion": None, "champion_moved": False}
    standing = standings(candidates)
    present = next((v for v in candidates if CHAMPION in v.aliases), None)
    holder = present
    for each in sorted(candidates, key=lambda v: (standing[v.number], v.number)):
        if present is not None and standing[each.number] >= standing[present.number]:
            break
        if each.run_id not in sound and (fault := unsound(queue, tracker, model_name, each)):
            log.warning("%s version %d is passed over: %s", model_name, each.number, fault)
            continue
        registry.set_alias(tracker, model_name, CHAMPION, each.number)
        holder = each
        break
    if holder is None:
        return {"champion": None, "champion_moved": False}
    point, own = standing[holder.number]
    return {
        "champion": holder.number,
        "champion_moved": holder is not present,
        "champion_study": holder.tags["hpo.study"],
        "champion_nmse": own,
        "champion_point_nmse": point if math.isfinite(point) else own,
    }


def _scores_text(point: float, own: float) -> str:
    """A network's validation NMSE, with that of its point where it has another one or lost to another point."""
    text = mirror.score_text(own)
    if math.isinf(point):
        return f"{text}, with other seeds another point is better"
    return text if point == own else f"{text}, mean of its point {mirror.score_text(point)}"


def _candidates(tracker: Tracker, model_name: str) -> list[Version]:
    """The versions that studies registered."""
    return [version for version in registry.versions(tracker, model_name) if OWN in version.tags]


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
        cell = np.random.default_rng(0).integers(0, 2, (1, *spec["image_shape"])).astype(np.float32)
        answer = regressor.predict(model, cell)
        return None if np.isfinite(answer).all() else f"it predicts {answer.tolist()}"


def _tagged(version: Version, tag: str) -> float:
    """A validation NMSE that it was registered with."""
    return float(version.tags[tag])


def _of_point(job: Job, again: Sequence[Job]) -> dict[str, str]:
    """Tags of a version whose point was trained several times, or is one of another study's best."""
    assert job.spec is not None
    first = job.spec.get("best_of")
    found = {} if first is None else {BEST_OF: f"{first['study']}/{first['trial']}"}
    return found | ({POINT: repr(spread(again)[0])} if found or len(again) > 1 else {})


def alias(study: str) -> str:
    """The study's name as MLflow allows it for an alias."""
    return study.replace(".", "-")


def _description(
    study: StudyRow,
    job: Job,
    again: Sequence[Job],
    found: Mapping[str, Any],
    outcome: str,
    warnings: Sequence[str],
) -> str:
    assert job.spec is not None
    unit, test = study.facts["data"]["unit"], found["test"]
    cubic, mean = found["predictors"]["volume fraction"]["test"], found["predictors"]["mean"]["test"]
    point = ", ".join(f"{name} = {mirror.number_text(value)}" for name, value in job.spec["point"].items())
    weights = {"ImageNet": "Backbone pretrained on ImageNet. ", "not pretrained": "**Not pretrained.** "}
    title = mirror.run_name(job)
    if len(study.name) > NAME_SHOWN:
        title = f"…{title.removeprefix(study.name)}"
    return (
        f"{title}\n\n"  # the model's page shows of each version the first 32 letters
        f"Trial {job.number} of the study {study.name} ({point}); {VERDICTS[outcome]}.\n\n"
        + "".join(f"**Alarm:** {alarm}\n\n" for alarm in warnings)
        + _why(job, again)
        + f"{weights.get(provenance(job.spec['model']), '')}{job.spec['parameters']:,} parameters.\n\n"
        f"| predictor | test NMSE | test MSE ({unit}²) | test R² | test NRMSE |\n|---|---|---|---|---|\n"
        + "\n".join(
            f"| {name} | {mirror.score_text(s['nmse'])} | {mirror.score_text(s['mse'])} | {mirror.score_text(s['r2'])} "
            f"| {mirror.score_text(s['nrmse'])} |"
            for name, s in (
                ("this model", test),
                ("volume fraction, cubic", cubic),
                ("mean of the training labels", mean),
            )
        )
        + "\n\nNMSE: mean over the targets of MSE / variance of the training split. Selected on validation alone."
    )


def _why(job: Job, again: Sequence[Job]) -> str:
    """How a point that was trained several times, and this network of it, were chosen."""
    assert job.spec is not None
    text = ""
    if (first := job.spec.get("best_of")) is not None:
        text = f"The point is that of trial {first['trial']} of {first['study']}. "
    mean, deviation = spread(again)
    if deviation is not None:
        text += (
            f"It was trained with {len(again)} seeds: of points the mean of their validation NMSE decides "
            f"({mirror.score_text(mean)} ± {mirror.score_text(deviation)}), of the point's networks the lowest, this "
            f"one's ({mirror.score_text(_nmse(job))})."
        )
    return f"{text.strip()}\n\n" if text else ""


def _nmse(job: Job) -> float:
    assert job.result is not None
    return float(job.result["best_val_nmse"])
