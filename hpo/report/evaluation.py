"""What `hpo evaluate` says of a model on further labelled images: tables, JSON and a page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from data_pipeline.description import UNKNOWN_UNIT
from hpo.report import error_section, tables
from hpo.report.document import Document, Section
from hpo.report.tables import HIGH, LOW, Column, Row, Table
from hpo.report.words import BASELINES
from hpo.scores import analysis
from hpo.scores.tested import Tested
from hpo.text import counted, score_text, utf8
from models import metrics

Record = dict[str, Any]
HEADS = {"r2": "R²", "nrmse": "NRMSE", "rmse": "RMSE"}  # of the scores of a target
EXPLAINED = (
    "R²: against the mean of these labels. NRMSE: RMSE / standard deviation of the training labels. RMSE: in the "
    "target's unit. Brackets: 95 % intervals, bootstrap over the images. Baseline predictors: the mean of the training "
    "labels, and a cubic polynomial in the volume fraction, both fitted on the training split."
)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The scores of one model on further labelled images."""

    model: str  # such as steel-1a2b3c4d/3, or a folder
    version: tuple[str, int] | None  # registered model and number
    folder: str  # of the images
    tested: Tested
    distance: list[Record]  # of the images from those of training: a record for each property
    notes: list[str]  # what is doubtful, or could not be known
    run_id: str | None = None  # in MLflow
    link: str | None = None

    @cached_property
    def targets(self) -> list[Record]:
        """A record for each target and predictor: the model first, then the baseline predictors that are known.

        Targets with a transform follow once more without it, in the label's unit; their NRMSE is not known.
        """
        tested, data = self.tested, self.tested.dataset
        units = dict(data.units)
        for name in data.in_unit(tested.truth):
            plain, _, unit = name.removesuffix("]").partition(" [")
            units[plain] = unit or UNKNOWN_UNIT
        truth = self._with_plain(tested.truth)
        labels = np.isfinite(truth).sum(axis=0).tolist()
        both = {tested.title: tested.predicted} | dict(tested.predictors)
        own = {name: self._scores(truth, self._with_plain(predicted)) for name, predicted in both.items()}
        return [
            {"target": target, "unit": unit, "predictor": name, "labels": labels[place]}
            | {key: values[place] for key, values in columns.items()}
            for place, (target, unit) in enumerate(units.items())
            for name, columns in own.items()
        ]

    def _with_plain(self, targets: np.ndarray) -> np.ndarray:
        """Return targets (n, k), followed by those that have a transform without it."""
        return np.column_stack([targets, *self.tested.dataset.in_unit(targets).values()])

    def _scores(self, truth: np.ndarray, predicted: np.ndarray) -> dict[str, Sequence[float | None]]:
        """Return a number for each target, by the name of the score or of an end of its interval."""
        variance = np.full(truth.shape[1], np.nan)
        variance[: len(self.tested.train_variance)] = self.tested.train_variance
        per_target = metrics.scores(predicted, truth, train_variance=variance).per_target
        samples = analysis.target_samples(truth, predicted, train_variance=variance, drawn=self.tested.drawn)
        samples["rmse"] = np.sqrt(samples["mse"])
        values = {**per_target, "rmse": [None if mse is None else math.sqrt(mse) for mse in per_target["mse"]]}
        columns: dict[str, Sequence[float | None]] = {}
        for score in HEADS:
            low, high = zip(*map(analysis.interval, samples[score].T), strict=True)
            columns |= {score: values[score], f"{score}_low": low, f"{score}_high": high}
        return columns

    @cached_property
    def means(self) -> dict[str, Record]:
        """The scores of model and baseline predictors over all targets, by name: means, with their intervals."""
        both = {"model": self.tested.predicted} | dict(self.tested.predictors)
        means: dict[str, Record] = {}
        for name, predicted in both.items():
            scores, samples = self.tested.scores(predicted), self.tested.samples(predicted)
            means[name] = {}
            for score in ("nmse", "r2", "nrmse"):
                low, high = analysis.interval(samples[score])
                means[name] |= {score: getattr(scores, score), f"{score}_low": low, f"{score}_high": high}
        return means

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON; a number that does not exist is None."""
        data = self.tested.dataset
        worst = [
            {
                "image": utf8(data.names[index]),
                "nrmse": float(self.tested.nrmse[index]),
                "volume_fractions": {name: float(own[index]) for name, own in self.tested.by_phase.items()},
            }
            for index in self.tested.worst
        ]
        model = {"name": self.version[0], "version": self.version[1]} if self.version else {"folder": self.model}
        facts = {
            "model": model,
            "data": {"folder": self.folder, "name": data.name, "digest": data.digest, "images": len(data.images)},
            "scores": self.means,
            "targets": [{**record, "predictor": self._short(record["predictor"])} for record in self.targets],
            "worst": worst,
            "distance": self.distance,
            "notes": self.notes,
            "run_id": self.run_id,
        }
        plain: dict[str, Any] = tables.plain(facts)
        return plain

    def _short(self, predictor: str) -> str:
        return "model" if predictor == self.tested.title else predictor

    @property
    def summary(self) -> list[str]:
        """Sentences on the result."""
        mean, tested = self.means["model"], self.tested
        r2, low, high = (score_text(mean[name], ".4f") for name in ("r2", "r2_low", "r2_high"))
        sentences = (
            f"{self.model} on {counted(len(tested.indices), 'image')} of {tested.dataset.name}: R² {r2} "
            f"(95 % interval {low} to {high}, mean over the targets)."
        )
        if "volume fraction" in tested.predictors:
            sentences += f" It is {error_section.against(tested, tested.predicted)}."
        return [sentences]

    def document(self) -> Document:
        """Return the page."""
        errors = error_section.errors(self.tested)
        return Document(
            title=f"{self.model} on {self.tested.dataset.name}",
            summary=[*self.summary, *self.notes],
            alarms=[],
            answers=[],
            sections=[
                Section(title="Scores", text=[EXPLAINED], tables=[scores_table(self), *baseline_tables(self)]),
                Section(title="How far the images are from those of training", tables=[distance_table(self)]),
                errors,
            ],
        )


def scores_table(evaluation: Evaluation) -> Table:
    """Return a row for each target: the model's scores with intervals, beside those of the baseline predictors."""
    names = list(evaluation.tested.predictors)
    columns = [Column(name="target", left=True), Column(name="unit", left=True)]
    rows: dict[str, Record] = {}
    if any(record["labels"] < len(evaluation.tested.indices) for record in evaluation.targets):
        columns.append(Column(name="labels"))
    columns += [Column(name=head, interval=True) for head in HEADS.values()]
    columns += [
        Column(name=f"{HEADS[score]} of the {name}", spare=score == "r2") for name in names for score in ("r2", "nrmse")
    ]
    for record in evaluation.targets:
        row = rows.setdefault(record["target"], dict(record))
        if record["predictor"] in names:
            row |= {f"{HEADS[score]} of the {record['predictor']}": record[score] for score in ("r2", "nrmse")}
        else:
            for score, head in HEADS.items():
                row |= {head: record[score], head + LOW: record[f"{score}_low"], head + HIGH: record[f"{score}_high"]}
    title = f"{evaluation.model} on {counted(len(evaluation.tested.indices), 'image')}"
    listed = [Row(values=row) for row in rows.values()]
    return Table(title=title, columns=columns, rows=listed, name="scores", note=_unknown(evaluation), limit=len(listed))


def _unknown(evaluation: Evaluation) -> str:
    return "" if evaluation.tested.predictors else "The baseline predictors of the training split are not known."


def baseline_tables(evaluation: Evaluation) -> list[Table]:
    """Return a table for each baseline predictor: its scores of each target, with their intervals."""
    listed = []
    for name in evaluation.tested.predictors:
        records = [
            {"target": record["target"], "unit": record["unit"]}
            | {
                head + end: record[score + key]
                for score, head in HEADS.items()
                for end, key in (("", ""), (LOW, "_low"), (HIGH, "_high"))
            }
            for record in evaluation.targets
            if record["predictor"] == name
        ]
        table = tables.of_records(
            records, title=f"Baseline predictor: {BASELINES[name]}", name=name, left=("unit",), limit=len(records)
        )
        listed.append(table)
    return listed


def worst_table(evaluation: Evaluation) -> Table:
    """Return the ten worst images."""
    records = [
        {"image": record["image"], **record["volume_fractions"], "NRMSE": record["nrmse"]}
        for record in evaluation.as_dict()["worst"]
    ]
    return tables.of_records(records, title=f"The {counted(len(records), 'worst image')}", name="worst")


def distance_table(evaluation: Evaluation) -> Table:
    """Return a row for each property of the images: its range in training and here, and how many images are outside."""
    keys = {"what": "what", "training": "in training", "here": "here", "outside": "images outside"}
    records = [{head: record[key] for key, head in keys.items()} for record in evaluation.distance]
    return tables.of_records(
        records, title="Distance from training", name="distance", left=("in training", "here"), limit=len(records)
    )
