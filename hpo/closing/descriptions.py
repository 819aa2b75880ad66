"""The texts of a registered model and its versions on MLflow's pages, and the versions' tags."""

from collections.abc import Mapping, Sequence
from typing import Any

from hpo.queue import Job, StudyRow
from hpo.queue.closing_result import ClosingEntry
from hpo.report import promotion, words
from hpo.scores import candidates, lineage
from hpo.study.records import Scores, SplitScores
from hpo.text import for_markdown, in_brackets, in_unit_text, number_text, score_text, squared

NAME_SHOWN = 20  # letters of a study's name that leave room for its trial where 32 are shown
VERDICTS = {
    "below mean": "it does not beat predicting the mean of the training labels, so it is not promoted",
    "not distinguishable from the mean": "it is not distinguishable from the mean of the training labels",
    "below volume fraction": "it does NOT beat a cubic polynomial in the volume fraction",
    "not distinguishable from the volume fraction": (
        "it beats the mean, and is not distinguishable from a cubic polynomial in the volume fraction"
    ),
    "below descriptors": "it beats the mean and the volume fraction, but NOT ridge on descriptors of the image",
    "not distinguishable from the descriptors": (
        "it beats the mean and the volume fraction, and is not distinguishable from ridge on descriptors of the image"
    ),
    "good": "it beats the mean and a cubic polynomial in the volume fraction",
}


def of_model(study: StudyRow) -> str:
    """Return the description of the registered model that the study's winners are versions of."""
    data, before = study.facts.data, [lineage.title(version) for version in study.facts.data.earlier or ()]
    grown = (
        f" The data set extends {', '.join(reversed(before))}. Models of different versions of it are compared on the "
        "validation images of both; the tag `hpo.data` of a version says which one it was trained on."
    )
    return (
        f"Models trained on {data.name} (digest {data.digest[:8]}), targets {', '.join(data.target_names)} in "
        f"{for_markdown(data.unit + data.beside)}. "
        f"All studies of one database on this data and split compete for `@champion`; the "
        "point with the lowest validation NMSE, the mean over its seeds, wins."
        + (for_markdown(grown) if before else "")
    )


def of_version(
    study: StudyRow,
    job: Job,
    entry: ClosingEntry,
    predictors: Mapping[str, SplitScores],
    *,
    alarms: Sequence[str],
) -> str:
    """Return the description of a winner's version, with its scores on the test split beside the predictors'."""
    assert job.spec is not None
    choice, labels, gains = _choice(study, job), _labels(study, entry), promotion.gains(entry)
    unit, in_unit = for_markdown(study.facts.data.unit), for_markdown(in_unit_text(entry.test.in_unit))
    point = ", ".join(f"{name} = {number_text(value)}" for name, value in job.spec.point.items())
    title = job.run_name
    if len(study.name) > NAME_SHOWN:
        title = f"…{title.removeprefix(study.name)}"
    rows: list[tuple[str, Scores | None]] = [("this model", entry.test)]
    rows += [(words.BASELINES[name], predictors[name].test) for name in reversed(words.BASELINES) if name in predictors]
    table = [f"| predictor | test NMSE | test MSE ({squared(unit)}) | test R² | test NRMSE |", "|---|---|---|---|---|"]
    for name, scores in rows:
        assert scores is not None
        values = (scores.nmse, scores.mse, scores.r2, scores.nrmse)
        table.append(f"| {name} | {' | '.join(score_text(value) for value in values)} |")
    return (
        f"{title}\n\n"  # the model's page shows of each version the first 32 letters
        f"Trial {job.number} of the study {study.name}{in_brackets(point)}; {VERDICTS[entry.verdict]}.\n\n"
        + "".join(f"{sentence}\n\n" for sentence in gains)
        + "".join(f"**Alarm:** {alarm}\n\n" for alarm in alarms)
        + "".join(f"{doubt}\n\n" for doubt in study.facts.doubts)
        + choice
        + f"{_pretraining(entry.weights or '')}{job.spec.parameters:,} parameters.\n\n"
        + "\n".join(table)
        + "\n\nNMSE: mean over the targets of MSE / variance of the training split. Selected on validation alone."
        + labels
        + (f" With the transform undone, test split: {in_unit}." if in_unit else "")
    )


def tags_of_version(job: Job, entry: ClosingEntry) -> dict[str, Any]:
    """Return the tags of a winner's version."""
    assert job.spec is not None
    tags = {
        "hpo.study": job.study,
        "hpo.trial": job.number,
        "hpo.verdict": entry.verdict,
        "hpo.weights": entry.weights or "random",
        "hpo.beats_volume_fraction": str(not entry.verdict.endswith(("mean", "volume fraction"))).lower(),
    }
    if (origin := job.spec.best_of) is not None:  # the trial of another study that has this configuration
        tags["hpo.best_of"] = f"{origin.study}/{origin.trial}"
    return tags


def _pretraining(weights: str) -> str:
    """Return a sentence on where the weights of a backbone came from; empty without one."""
    sentences = {"": "", "ImageNet": "Backbone pretrained on ImageNet. ", "not pretrained": "**Not pretrained.** "}
    return sentences.get(weights, f"Backbone {for_markdown(weights)}. ")


def _labels(study: StudyRow, entry: ClosingEntry) -> str:
    """Say of how many labels the scores are where some are missing."""
    data, counts = study.facts.data, entry.test.per_target.get("n", [])
    fewer = [
        f"{name} {count}" for name, count in zip(data.target_names, counts, strict=False) if count != data.sizes[2]
    ]
    more = f" and {len(fewer) - 5} more targets" if len(fewer) > 5 else ""
    text = f" Of {data.sizes[2]} labels of the test split some are missing; there are: {', '.join(fewer[:5])}{more}."
    return for_markdown(text) if fewer else ""


def _choice(study: StudyRow, job: Job) -> str:
    """Say how a configuration that is trained several times, and this network of it, are chosen.

    Without scores: repeats that come back change them.
    """
    assert job.spec is not None
    text = ""
    if (origin := job.spec.best_of) is not None:
        text = f"The point is that of trial {origin.trial} of {origin.study}. "
    if (refit := job.spec.refit) is not None:
        text += (
            f"Cross-validation: {refit.folds} networks of the point were each trained without one fold of the training "
            f"and validation images, and have a validation NMSE of {score_text(refit.nmse)} ± "
            f"{score_text(refit.deviation)} there. This network was trained again on all of these images, for "
            f"{refit.epochs} epochs, the median of the folds' best. Its validation scores are the folds' means."
        )
    elif (repeats := study.specification.repeats) > 1:
        text += (
            f"It is trained with {repeats} seeds: of points the mean of their validation NMSE decides "
            f"(tag {candidates.POINT}), of the point's networks the lowest (tag {candidates.OWN})."
        )
    return f"{text.strip()}\n\n" if text else ""
