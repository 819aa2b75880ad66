"""Scores and errors of models on labelled images that no training saw: the test split, or new images."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from data_pipeline.components import COMPONENTS
from hpo.report import figures, tables, thumbnails
from hpo.report.answers import SAME, interval_text
from hpo.report.document import Picture, Section
from hpo.report.tables import HIGH, LOW, Table
from hpo.report.words import BASELINES, RIVALS, SCORES, rmse, score_values
from hpo.scores import analysis
from hpo.scores.tested import Tested
from hpo.text import counted, one_line, score_text, utf8
from models import metrics
from models.metrics import Scores

Record = dict[str, Any]
BETTER, UNKNOWN = "better than", "not comparable with"


def scored(tested: Tested, predicted: np.ndarray, scores: Scores) -> Record:
    """Return the scores of predictions (n, k) with their intervals."""
    samples, record = tested.samples(predicted), Record()
    for name, (head, score) in zip(SCORES, score_values(scores, tested.dataset.unit).items(), strict=True):
        low, high = analysis.interval(samples[name])
        record |= {head: score, head + LOW: low, head + HIGH: high}
    return record


def against(tested: Tested, predicted: np.ndarray, name: str = "volume fraction") -> str:
    """Say whether predictions (n, k) are better than those of a baseline predictor."""
    rival = tested.samples(tested.predictors[name])["nmse"]
    low, high = analysis.interval(tested.samples(predicted)["nmse"] - rival)
    word = BETTER if high < 0 else "worse than" if low > 0 else f"{SAME} from"
    if math.isnan(high):
        word = UNKNOWN
    ends = interval_text((low, high))
    return f"{word} {RIVALS[name]} (difference of the {tested.score} {ends})"


def by_target(tested: Tested, scores: Mapping[str, Scores]) -> Iterator[Table]:
    """Yield a table for each score: models and baseline predictors, by their titles, by target, and the mean."""
    titles = {"r2": "R²", "nrmse": "NRMSE", "rmse": f"RMSE in {tested.dataset.unit}", "mape": "MAPE"}
    for score, title in titles.items():
        records = []
        mark = "R² " if score == "r2" else ""
        for model, own in scores.items():
            if score == "rmse":
                values, mean = rmse(own)
            else:
                values, mean = own.per_target[score], getattr(own, score)
            named = zip([*tested.dataset.target_names, "mean"], [*values, mean], strict=True)
            records.append({"model": model} | {mark + name: value for name, value in named})
        yield tables.of_records(records, name=f"targets-{score}", title=f"{title} by target, {tested.name}")
    if any(own.in_unit for own in scores.values()):
        heads = {"r2": "R²", "nrmse": "NRMSE", "rmse": "RMSE"}
        records = [
            {"model": model}
            | {f"{heads[score]} {name}": of[score] for score in heads for name, of in own.in_unit.items()}
            for model, own in scores.items()
        ]
        title = f"With the transform undone, in the unit of the labels, {tested.name}"
        yield tables.of_records(records, name="targets-in-unit", title=title)
    if (missing := np.isnan(tested.truth)).any():
        labels = dict(zip(tested.dataset.target_names, (~missing).sum(axis=0).tolist(), strict=True))
        title = f"Labels by target, {tested.name}: only these count"
        count = counted(len(missing), "cell")
        yield tables.of_records([{"labels of": count} | labels], name="targets-labels", title=title)


def errors(tested: Tested) -> Section:
    """Return errors of the first model by kind, volume fraction and image, and physical consistency of all."""
    data, image = tested.dataset, tested.image
    worst = tested.worst
    names = [one_line(data.names[index]) for index in tested.indices[worst]]
    texts = [score_text(nrmse, ".3f") for nrmse in tested.nrmse[worst]]
    titles = [f"{name}\nNRMSE {nrmse}" for name, nrmse in zip(names, texts, strict=True)]
    drawn = {
        ("parity", f"Prediction over label, {tested.name}"): figures.parity(
            tested.truth, tested.predicted, data.target_names, data.unit
        ),
        ("errors", f"Error of each {image} over its volume fraction"): figures.errors(
            tested.by_phase, tested.nrmse, tested.kinds
        ),
        ("worst", f"The {counted(len(worst), f'worst {image}')}"): figures.cells(
            thumbnails.grey(data, tested.indices[worst]), titles
        ),
    }
    return Section(
        title="Where it errs",
        text=[f"All of the selected model, {tested.title}."],
        tables=[*_kinds(tested), *_physics(tested), _worst(tested)],
        pictures=[Picture(name=name, title=title, svg=figures.svg(figure)) for (name, title), figure in drawn.items()],
    )


def _kinds(tested: Tested) -> list[Table]:
    """Return the scores by kind of microstructure, if the names of the images tell kinds."""
    if tested.kinds is None or "volume fraction" not in tested.predictors:
        return []
    records = []
    for kind in sorted(set(tested.kinds)):
        inside = np.array(tested.kinds) == kind
        scores, cubic = (
            metrics.scores(predicted[inside], tested.truth[inside], train_variance=tested.train_variance)
            for predicted in (tested.predicted, tested.predictors["volume fraction"])
        )
        record = {"kind": kind, f"{tested.image}s": int(inside.sum()), "NMSE": scores.nmse, "R²": scores.r2}
        records.append(record | {"NMSE, volume fraction": cubic.nmse, "R², volume fraction": cubic.r2})
    note = "By the word behind the number in the image's name. R² against the mean of the kind itself."
    return [tables.of_records(records, name="kinds", title="By kind of microstructure", note=note)]


def _physics(tested: Tested) -> list[Table]:
    """Return what the predicted tensors break of mechanics; nothing if the targets are no stiffness tensor."""
    if set(tested.dataset.target_names) != set(COMPONENTS):
        return []
    baselines = {BASELINES[name]: predicted for name, predicted in tested.predictors.items()}
    heads = {
        "not positive definite": "not_positive_definite",
        "above Voigt": "above_voigt",
        "below Reuss": "below_reuss",
        f"Hill residual {tested.dataset.unit}": "hill",
    }
    records: list[dict[str, Any]] = []
    for title, predicted in {**tested.models, **baselines, "the labels themselves": tested.truth}.items():
        shares = analysis.physics(predicted, tested.dataset.target_names, tested.fractions, tested.phases)
        records.append({"model": title} | {head: shares[key] for head, key in heads.items()})
    note = (
        "Shares of the predicted tensors; bounds in the matrix sense: Voigt - C and C - Reuss must be positive "
        "semi-definite. Hill residual: root mean square over C13, C23, C33 of what Hill's two-phase relations miss."
    )
    if not tested.phases:
        note += " No phases are given, or the images have more than two: bounds and relations are not measured."
    return [tables.of_records(records, name="physics", title=f"Physical consistency, {tested.name}", note=note)]


def _worst(tested: Tested) -> Table:
    """Return label and prediction of the worst images."""
    records = []
    for index in tested.worst:
        image = utf8(tested.dataset.names[tested.indices[index]])
        rows = {"label": tested.truth[index], "prediction": tested.predicted[index]}
        for what, values in rows.items():
            head = {
                "image": image,
                **{name: float(values[index]) for name, values in tested.by_phase.items()},
                "NRMSE": float(tested.nrmse[index]),
            }
            numbers = [None if math.isnan(value) else float(value) for value in values]
            records.append(head | {"what": what} | dict(zip(tested.dataset.target_names, numbers, strict=True)))
    title = f"The worst {tested.image}s, label and prediction in {tested.dataset.unit}"
    return tables.of_records(records, name="worst", title=title)
