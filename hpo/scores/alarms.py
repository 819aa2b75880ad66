"""Signs that the numbers of a study mean nothing, whatever its best score: networks that predict a constant."""

import statistics
from collections.abc import Mapping
from pathlib import Path

import pandas

from hpo.queue import Job
from hpo.study.records import SplitScores

LOWEST_R2 = 0.1  # below it a model explains next to nothing
SMALLEST_SPREAD = 0.1  # of the labels' standard deviation: predictions that vary less are a constant
NEAR_MEAN = 0.02  # of the mean predictor's NMSE
ALIKE = 3  # so many unlike models near the mean are no coincidence


def alarms(ranked: list[Job], predictors: Mapping[str, SplitScores], predictions: Path | None) -> list[str]:
    """Return the alarms as sentences, none if all is well.

    `ranked`: the finished trials of a study, best first; `predictors`: validation scores of the baseline predictors;
    `predictions`: the CSV of the best model, as the worker writes it.
    """
    sentences: list[str] = []
    if not ranked:
        return sentences
    best = ranked[0].result
    assert best is not None
    defined = [r2 for r2 in best.validation.per_target["r2"] if r2 is not None]  # a target may not vary there
    r2 = statistics.fmean(defined) if defined else 1.0
    if r2 < LOWEST_R2:
        sentences.append(f"R² of the best model is {r2:.3f} on the validation split: it explains next to nothing.")
    if predictions is not None and (ratio := spread(predictions)) < SMALLEST_SPREAD:
        sentences.append(
            f"The best model's predictions have hardly any spread: {100 * ratio:.2g} % of the labels' standard "
            "deviation."
        )
    return sentences + at_the_mean(ranked, predictors)


def at_the_mean(ranked: list[Job], predictors: Mapping[str, SplitScores]) -> list[str]:
    """Return the alarm that unlike models are no better than the mean, for the trials of one study or of several."""
    mean = predictors["mean"].validation.nmse
    assert mean is not None
    near = [job for job in ranked if job.result and abs(job.result.best_val_nmse / mean - 1) <= NEAR_MEAN]
    if len(near) < ALIKE:
        return []
    return [
        f"{len(near)} unlike models are within {100 * NEAR_MEAN:.0f} % of the mean predictor (validation NMSE "
        f"{mean:.4g}): these networks predict a constant: look at the scale of your targets."
    ]


def spread(predictions: Path) -> float:
    """Return the predictions' over the labels' standard deviation on the validation split, of a refit on the images
    that it was trained on: the median of the targets that vary."""
    table = pandas.read_csv(predictions)
    table = table[table["split"] != "test"]
    names = [column.removesuffix(" true") for column in table.columns if column.endswith(" true")]
    columns = {
        name: table[[f"{name} predicted", f"{name} true"]].dropna() for name in names
    }  # of the cells with a label
    deviations = {name: column.std().to_list() for name, column in columns.items()}
    ratios = [predicted / label for predicted, label in deviations.values() if label > 0]
    return statistics.median(ratios) if ratios else 1.0
