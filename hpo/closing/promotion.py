"""What closing a study decides: winners, verdict, aliases. The model is registered and compared with the champion."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpo import crash
from hpo.queue import Job, StudyRow
from hpo.recording.reconciler import Mirror
from hpo.scores import alarms, champion, ranking
from hpo.study import provenance
from hpo.text import for_markdown, number_text, score_text
from hpo.tracking import registry
from hpo.tracking.client import Tracker

NAME_SHOWN = 20  # letters of a study's name that leave room for its trial where 32 are shown


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
            f"trial {job.number}: its downloaded model has a validation NMSE of {score_text(found, '.6g')}, "
            f"recorded is {score_text(recorded, '.6g')}"
        )


def promote(
    mirror_: Mirror, closing: Job, scored: Mapping[int, Mapping[str, Any]], predictions: Mapping[int, Path]
) -> dict[str, Any]:
    """Register the winners and move the aliases; return the closing's result. Idempotent.

    `scored`: for each winner's number what hpo.worker.trainer.score returned. Raises LeaseLost if another worker
    closes the study now.
    """
    queue, tracker, study = mirror_.queue, mirror_.tracker, mirror_.study
    facts, jobs = study.facts, queue.jobs(study.name)
    chosen = [job for job in ranking.ranked(jobs) if job.number in scored]
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
    result["alarms"] = alarms.alarms(ranking.ranked(jobs), facts.predictors, predictions[chosen[0].number])
    with champion.lock(queue, study):
        queue.require(closing)
        result["model_name"] = champion.claim_model(queue, tracker, study, description=_model_description(study))
    for rank, job in enumerate(chosen):
        entry = _entry(job, jobs, scored[job.number])
        if entry["verdict"] != "below mean":
            queue.require(closing)
            entry["version"] = _register(mirror_, job, entry, scored[job.number], result)
            crash.at("version registered")
        if rank == 0:
            reason = VERDICTS[entry["verdict"]]
            result |= {"winner": entry, "predictors": scored[job.number]["predictors"], "reason": reason}
        result["groups"].append(entry)
        tracker.upload(facts["study_run_id"], predictions[job.number], "predictions")
        assert job.result is not None
        tracker.log_summary(
            str(job.run_id),
            {f"test_{name}": entry["test"][name] for name in ("nmse", "mse", "r2", "nrmse")},
            timestamp_ms=round(job.changed_at * 1000),
            step=job.result["best_epoch"],
        )
    sound = {str(job.run_id) for job in chosen}
    result |= champion.settle(queue, tracker, study, closing=closing, sound=sound).elected
    crash.at("champion elected")
    return result


def _entry(job: Job, jobs: Sequence[Job], found: Mapping[str, Any]) -> dict[str, Any]:
    """What the closing's result says of a winner; of `jobs` those of its point count."""
    assert job.spec is not None
    of_point = [other for other in jobs if other.kind == "trial" and other.number == job.number]
    mean, deviation = ranking.spread(ranking.repeats(of_point)[job.number])
    return {
        "number": job.number,
        "config": job.config,
        "point": job.spec["point"],
        "parameters": job.spec["parameters"],
        "weights": provenance(job.spec["model"]),
        "verdict": verdict(found["validation"], found["predictors"]),
        "validation": found["validation"],
        "test": found["test"],
        "version": None,
        "point_nmse": mean,
        "point_deviation": deviation,
        "incomplete": ranking.incomplete(of_point),
        "unstable": bool(ranking.diverged(of_point)),
    }


def _register(
    mirror_: Mirror, job: Job, entry: Mapping[str, Any], found: Mapping[str, Any], result: Mapping[str, Any]
) -> int:
    """The number of the winner's version, made or brought up to date."""
    queue, study = mirror_.queue, mirror_.study
    assert job.result is not None
    return registry.register(
        mirror_.tracker,
        model_name=result["model_name"],
        owner=queue.database_id(),
        key=job.key,
        model_id=job.result["model_id"],
        run_id=str(job.run_id),
        description=_description(study, job, found, entry["verdict"], result["alarms"]),
        tags={
            "hpo.study": study.name,
            "hpo.trial": job.number,
            "hpo.verdict": entry["verdict"],
            "hpo.weights": entry["weights"] or "random",
            "hpo.beats_volume_fraction": str(entry["verdict"] == "good").lower(),
            **_of_point(job),
        },
    )


def _model_description(study: StudyRow) -> str:
    data, unit = study.facts["data"], for_markdown(study.facts["data"]["unit"])
    return (
        f"Models trained on {data['name']} (digest {data['digest'][:8]}), targets {', '.join(data['target_names'])} in "
        f"{unit}. All studies of one database on this data and split compete for @champion; the point with the "
        "lowest validation NMSE, the mean over its seeds, wins."
    )


def _of_point(job: Job) -> dict[str, str]:
    """A version's tag for people: which trial of another study the point is that of."""
    assert job.spec is not None
    first = job.spec.get("best_of")
    return {} if first is None else {"hpo.best_of": f"{first['study']}/{first['trial']}"}


def _description(
    study: StudyRow,
    job: Job,
    found: Mapping[str, Any],
    outcome: str,
    warnings: Sequence[str],
) -> str:
    assert job.spec is not None
    unit, test = for_markdown(study.facts["data"]["unit"]), found["test"]
    cubic, mean = found["predictors"]["volume fraction"]["test"], found["predictors"]["mean"]["test"]
    point = ", ".join(f"{name} = {number_text(value)}" for name, value in job.spec["point"].items())
    weights = {"ImageNet": "Backbone pretrained on ImageNet. ", "not pretrained": "**Not pretrained.** "}
    title = job.run_name
    if len(study.name) > NAME_SHOWN:
        title = f"…{title.removeprefix(study.name)}"
    return (
        f"{title}\n\n"  # the model's page shows of each version the first 32 letters
        f"Trial {job.number} of the study {study.name} ({point}); {VERDICTS[outcome]}.\n\n"
        + "".join(f"**Alarm:** {alarm}\n\n" for alarm in warnings)
        + _why(study, job)
        + f"{weights.get(provenance(job.spec['model']), '')}{job.spec['parameters']:,} parameters.\n\n"
        f"| predictor | test NMSE | test MSE ({unit}²) | test R² | test NRMSE |\n|---|---|---|---|---|\n"
        + "\n".join(
            f"| {name} | {score_text(s['nmse'])} | {score_text(s['mse'])} | {score_text(s['r2'])} "
            f"| {score_text(s['nrmse'])} |"
            for name, s in (
                ("this model", test),
                ("volume fraction, cubic", cubic),
                ("mean of the training labels", mean),
            )
        )
        + "\n\nNMSE: mean over the targets of MSE / variance of the training split. Selected on validation alone."
    )


def _why(study: StudyRow, job: Job) -> str:
    """How a point that is trained several times, and this network of it, are chosen. Without scores: repeats that come
    back change them."""
    assert job.spec is not None
    text = ""
    if (first := job.spec.get("best_of")) is not None:
        text = f"The point is that of trial {first['trial']} of {first['study']}. "
    if study.spec.get("repeats", 1) > 1:
        text += (
            f"It is trained with {study.spec['repeats']} seeds: of points the mean of their validation NMSE decides "
            f"(tag {champion.POINT}), of the point's networks the lowest (tag {champion.OWN})."
        )
    return f"{text.strip()}\n\n" if text else ""
