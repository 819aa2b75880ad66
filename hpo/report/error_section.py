"""Where the selected model errs, and whether its predictions are physically possible."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from data_pipeline.components import COMPONENTS
from data_pipeline.dataset import Dataset
from hpo.report import figures, tables
from hpo.report.document import Picture, Section
from hpo.report.tables import Table
from hpo.report.words import BASELINES
from hpo.scores import analysis
from hpo.scores.evidence import Evidence
from hpo.text import one_line, utf8
from models import metrics

WORST = 10  # test cells shown


def section(evidence: Evidence) -> Section:
    """Return errors by kind, volume fraction and cell, and physical consistency, all on the test split."""
    first, data = evidence.winners[0], evidence.dataset
    nrmse = np.sqrt(((first.predicted - evidence.truth) ** 2 / evidence.train_variance).mean(axis=1))  # of each cell
    worst = np.argsort(-nrmse, kind="stable")[:WORST]
    names = [one_line(data.names[evidence.split.test[index]]) for index in worst]
    titles = [f"{name}\nNRMSE {nrmse[index]:.3f}" for name, index in zip(names, worst, strict=True)]
    drawn = {
        ("parity", "Prediction over label, test split"): figures.parity(
            evidence.truth, first.predicted, data.target_names, data.unit
        ),
        ("errors", "Error of each test cell over its volume fraction"): figures.errors(
            evidence.fractions, nrmse, evidence.kinds
        ),
        ("worst", f"The {len(worst)} worst test cells"): figures.cells(_grey(data, evidence.split.test[worst]), titles),
    }
    return Section(
        title="Where it errs",
        text=[f"All of the selected model, {first.title}."],
        tables=[*_kinds(evidence), *_physics(evidence), _worst(evidence, nrmse, worst)],
        pictures=[Picture(name=name, title=title, svg=figures.svg(figure)) for (name, title), figure in drawn.items()],
    )


def _grey(data: Dataset, indices: np.ndarray) -> np.ndarray:
    """Return images (n, h, w) to look at, 0..1; the phases of one that has several are greys from black to white."""
    images = data.images[indices]
    if data.description.layout.levels != "phases" or images.shape[1] == 1:
        return np.asarray(images.mean(axis=1))
    return np.tensordot(images, np.linspace(0, 1, images.shape[1]), axes=([1], [0]))


def _kinds(evidence: Evidence) -> list[Table]:
    """Return the scores by kind of microstructure, if the names of the images tell kinds."""
    if evidence.kinds is None:
        return []
    records = []
    for kind in sorted(set(evidence.kinds)):
        inside = np.array(evidence.kinds) == kind
        scores, cubic = (
            metrics.scores(predicted[inside], evidence.truth[inside], train_variance=evidence.train_variance)
            for predicted in (evidence.winners[0].predicted, evidence.predictors["volume fraction"])
        )
        record = {"kind": kind, "test cells": int(inside.sum()), "NMSE": scores.nmse, "R²": scores.r2}
        records.append(record | {"NMSE, volume fraction": cubic.nmse, "R², volume fraction": cubic.r2})
    note = "By the word behind the number in the image's name. R² against the mean of the kind itself."
    return [tables.of_records(records, name="kinds", title="By kind of microstructure", note=note)]


def _physics(evidence: Evidence) -> list[Table]:
    """Return what the predicted tensors break of mechanics; nothing if the targets are no stiffness tensor."""
    if set(evidence.dataset.target_names) != set(COMPONENTS):
        return []
    predictions = {winner.title: winner.predicted for winner in evidence.winners}
    predictions |= {BASELINES[name]: predicted for name, predicted in evidence.predictors.items()}
    heads = {
        "not positive definite": "not_positive_definite",
        "above Voigt": "above_voigt",
        "below Reuss": "below_reuss",
        f"Hill residual {evidence.dataset.unit}": "hill",
    }
    records: list[dict[str, Any]] = []
    for title, predicted in {**predictions, "the labels themselves": evidence.truth}.items():
        shares = analysis.physics(predicted, evidence.dataset.target_names, evidence.fractions, evidence.phases)
        records.append({"model": title} | {head: shares[key] for head, key in heads.items()})
    note = (
        "Shares of the predicted tensors; bounds in the matrix sense: Voigt - C and C - Reuss must be positive "
        "semi-definite. Hill residual: root mean square over C13, C23, C33 of what Hill's two-phase relations miss."
    )
    if not evidence.phases:
        note += " No phases are given, or the images have more than two: bounds and relations are not measured."
    return [tables.of_records(records, name="physics", title="Physical consistency, test split", note=note)]


def _worst(evidence: Evidence, nrmse: np.ndarray, worst: Iterable[int]) -> Table:
    """Return label and prediction of the cells `worst` (indices into the test split)."""
    records = []
    for index in worst:
        image = utf8(evidence.dataset.names[evidence.split.test[index]])
        rows = {"label": evidence.truth[index], "prediction": evidence.winners[0].predicted[index]}
        for what, values in rows.items():
            head = {"image": image, "volume fraction": float(evidence.fractions[index]), "NRMSE": float(nrmse[index])}
            targets = dict(zip(evidence.dataset.target_names, map(float, values), strict=True))
            records.append(head | {"what": what} | targets)
    title = f"The worst test cells, label and prediction in {evidence.dataset.unit}"
    return tables.of_records(records, name="worst", title=title)
