"""What the report is built from: recorded results, curves, predictions and the data set of closed studies. Read only.

Everything comes from the database and the tracking server; nothing is trained, predicted or selected again.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from data_pipeline.dataset import Dataset
from data_pipeline.npz import load_npz
from data_pipeline.phase import Phase
from data_pipeline.split import Split
from hpo import study
from hpo.errors import NotFound, StudyConflict
from hpo.queue import Job, Queue, State, StudyRow
from hpo.queue.closing_result import ClosingEntry, ClosingResult
from hpo.scores import alarms, analysis, learning_curve, ranking
from hpo.scores.tested import Tested
from hpo.text import counted, point_text
from hpo.tracking import data_sets
from hpo.tracking.client import Tracker
from models import metrics

CURVES = ("train/nmse", "val/nmse")
MARKS = {"below mean": "below the mean"}  # of a verdict, if its mark is another one


@dataclass(frozen=True, kw_only=True)
class Winner:
    """A model whose test split was opened when its study closed."""

    study: str
    job: Job
    entry: ClosingEntry  # of the closing's result
    nmse: float  # of the validation split, the mean over the repeats of its point: what selected it
    points: int  # of its study: one of a single point was not tuned
    curves: dict[str, dict[int, float]]  # name of the score -> epoch -> value
    predicted: np.ndarray  # (n, k) of the test split, label's unit
    described: np.ndarray | None = None  # what ridge on descriptors predicts of it; None of an earlier closing
    tags: dict[str, str]  # of its MLflow run: where it was trained, with what

    @property
    def title(self) -> str:
        """Such as `grid f8 k5 d0.2 lr1e-3`."""
        bare = ", not pretrained" if self.entry.weights == "not pretrained" else ""
        verdict = self.entry.verdict
        mark = "" if verdict == "good" else f" ({MARKS.get(verdict, verdict)})"
        return f"{self.study} {point_text(self.entry.point)}".strip() + bare + mark

    @property
    def curve(self) -> list[tuple[int, dict[str, float]]]:
        """(epoch, scores), by epoch."""
        epochs = sorted({epoch for curve in self.curves.values() for epoch in curve})
        return [
            (epoch, {score: curve[epoch] for score, curve in self.curves.items() if epoch in curve}) for epoch in epochs
        ]

    @property
    def model(self) -> dict[str, Any]:
        """The model's settings."""
        assert self.job.spec is not None
        return dict(self.job.spec.model)

    @property
    def epochs(self) -> int:
        """For which it was to be trained; an early end comes before."""
        assert self.job.spec is not None
        return int(self.job.spec.training["epochs"])

    @property
    def role(self) -> str:
        """What the source study calls it: baseline, grid, head, fine-tuned; or the model's family."""
        family = self.model["family"]
        if family == "transfer":
            return "head" if self.model["trainable"] == "head" else "fine-tuned"
        return "grid" if family == "cnn" and self.points > 1 else str(family)


@dataclass(frozen=True, kw_only=True)
class Closed:
    """A study that is closed."""

    row: StudyRow
    jobs: list[Job]  # its trials
    ended: ClosingResult
    curves: Mapping[int, dict[str, dict[int, float]]]  # job id -> name of the score -> epoch -> value

    @property
    def study(self) -> study.Study:
        return self.row.specification

    @cached_property
    def points(self) -> list[tuple[Job, float]]:
        """The best finished trial of each configuration, with the configuration's validation NMSE (the mean over its
        repeats), best first."""
        return ranking.points(self.jobs)

    @cached_property
    def whole(self) -> list[tuple[Job, float]]:
        """`points` without those of `lost`."""
        lost = {job.number for job in self.lost}
        return [(job, score) for job, score in self.points if job.number not in lost]

    @cached_property
    def lost(self) -> list[Job]:
        """A trial without a score of each configuration that has such trials; its state says why. The other trials of
        such a configuration were selected by how they went."""
        order = (State.PRUNED, State.DIVERGED, State.DEAD, State.CANCELLED)
        first: dict[int, Job] = {}
        for job in sorted((job for job in self.jobs if job.state in order), key=lambda job: order.index(job.state)):
            first.setdefault(job.number, job)
        return list(first.values())


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Closed studies on one data set and split."""

    closed: list[Closed]
    winners: list[Winner]  # of all of them, lowest validation NMSE first
    dataset: Dataset
    split: Split

    @cached_property
    def train_variance(self) -> np.ndarray:
        """(k,), label's unit squared."""
        return metrics.moments(self.dataset.targets[self.split.train])[1]

    @cached_property
    def mean_nmse(self) -> float:
        """Validation NMSE of predicting the mean of the training labels."""
        train, validation = (self.dataset.targets[part] for part in (self.split.train, self.split.validation))
        return float(np.nanmean((validation - metrics.moments(train)[0]) ** 2 / self.train_variance, axis=0).mean())

    def converged(self, curve: Mapping[int, float]) -> int | None:
        """Return the epochs until within 5 % of the curve's lowest; None if it has not learned more than the mean."""
        if min(curve.values()) > (1 - alarms.NEAR_MEAN) * self.mean_nmse:
            return None
        return analysis.converged(curve)

    @cached_property
    def predictors(self) -> dict[str, np.ndarray]:
        """What each baseline predictor, fitted on the training split, predicts for the test split, (n, k).

        Ridge on descriptors is one of them where the closing of a study has fitted it.
        """
        learned = self.dataset.part(self.split.train)
        images, _, *inputs = self.dataset.part(self.split.test)
        predicted = {name: fit(*learned)(images, *inputs) for name, fit in metrics.PREDICTORS.items()}
        described = next((winner.described for winner in self.winners if winner.described is not None), None)
        has_scores = any(metrics.DESCRIPTORS in (closed.ended.predictors or {}) for closed in self.closed)
        return predicted | {metrics.DESCRIPTORS: described} if described is not None and has_scores else predicted

    @cached_property
    def phases(self) -> dict[str, Phase] | None:
        """The phases of the newest study that recorded them. The data set's own may be those of an earlier
        dataset.toml: its digest does not cover them."""
        recorded = [closed.row.facts.data.phases for closed in self.closed]
        if (newest := next(filter(None, reversed(recorded)), None)) is None:
            return self.dataset.phases
        return {name: Phase.of_lame(**constants) for name, constants in newest.items()}

    @cached_property
    def tested(self) -> Tested:
        """The test split, with what the winners and the baseline predictors predict for it."""
        return Tested(
            dataset=self.dataset,
            indices=self.split.test,
            models={winner.title: winner.predicted for winner in self.winners},
            predictors=self.predictors,
            train_variance=self.train_variance,
            phases=self.phases,
        )


def gather(queue: Queue, tracker: Tracker, names: Sequence[str] = ()) -> Evidence:
    """Return the evidence of the named studies, or of all closed ones on the data of the newest that is closed.

    Raise NotFound if one is not closed, StudyConflict if they are on different data or if what is tracked of them is
    not what was recorded.
    """
    rows = [queue.study(name) for name in dict.fromkeys(names)] or _comparable(queue)
    keys = {(row.facts.data.digest, row.facts.data.split): row.name for row in rows}
    if len(keys) > 1:
        raise StudyConflict(
            f"A report compares studies on one data set and split; {' and '.join(keys.values())} are on different "
            "ones. Make a report of each."
        )
    studies = [_closed(queue, row) for row in rows]
    dataset = _dataset(tracker, rows[0])
    parts = dataset.split
    winners = [_winner(tracker, closed, entry, dataset, parts) for closed in studies for entry in closed.ended.groups]
    unstable = {closed.row.name: ranking.diverged(closed.jobs) for closed in studies}
    winners.sort(key=lambda winner: (winner.job.number in unstable[winner.study], winner.nmse))
    return Evidence(closed=studies, winners=winners, dataset=dataset, split=parts)


def _comparable(queue: Queue) -> list[StudyRow]:
    rows = [row for row in queue.studies() if queue.closing_state(row.name) == State.DONE]
    if not rows:
        raise NotFound("No study is closed yet, so there is nothing to report. `hpo run --study grid` makes one.")
    newest = rows[-1].facts.data
    return [row for row in rows if (row.facts.data.digest, row.facts.data.split) == (newest.digest, newest.split)]


def _dataset(tracker: Tracker, row: StudyRow) -> Dataset:
    """Return the data set of the study's run: the names of its images, which no digest covers, are the same for
    everybody."""
    with tempfile.TemporaryDirectory() as folder:
        return load_npz(data_sets.download(tracker, row.name, row.facts, Path(folder)))


def _closed(queue: Queue, row: StudyRow) -> Closed:
    jobs = queue.jobs(row.name, brief=True)
    ended = next((job.closing for job in jobs if job.kind == "closing" and job.state == State.DONE), None)
    if ended is None:
        left = sum(job.state in (State.WAITING, State.RUNNING) for job in jobs if job.kind == "trial")
        raise NotFound(
            f"The study {row.name} is not closed: {counted(left, 'trial', 'are')} still to be trained. `hpo run` with "
            f"the same options, or `hpo worker --study {row.name}`, finishes it; then report it."
        )
    if ended.alarms is None or row.specification.folds or learning_curve.SHARE in row.specification.space:
        jobs = queue.jobs(row.name)  # with the scores by target
    trials = [job for job in jobs if job.kind == "trial" and not job.is_refit]  # its curve has no validation
    return Closed(row=row, jobs=trials, ended=ended, curves=queue.curves([job.id for job in trials], CURVES))


def _winner(tracker: Tracker, closed: Closed, entry: ClosingEntry, dataset: Dataset, parts: Split) -> Winner:
    job, nmse = next((job, nmse) for job, nmse in closed.points if job.number == entry.number)
    predicted, described = predictions(tracker, closed.row, entry, dataset, parts)
    return Winner(
        study=closed.row.name,
        job=job,
        entry=entry,
        nmse=nmse,
        points=len(closed.points),
        curves=closed.curves[job.id],
        predicted=predicted,
        described=described,
        tags=tracker.tags(str(job.run_id)),
    )


def predictions(
    tracker: Tracker, row: StudyRow, entry: ClosingEntry, dataset: Dataset, parts: Split
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return what a closed study's winner predicted for the test split, (n, k), from the study's run, and what ridge on
    descriptors did; None if the file is of an earlier closing.

    Raise StudyConflict, naming the run and what helps, if the file is not there, damaged, or of other labels.
    """
    run_id, file = row.facts.study_run_id, f"predictions/trial-{entry.number}.csv"
    try:
        with tempfile.TemporaryDirectory() as folder:
            table = pandas.read_csv(tracker.download_artifact(run_id, file, Path(folder)), dtype={"image": str})
        table = table[table["split"] == "test"]
        true, predicted = (
            table[[f"{name} {what}" for name in dataset.target_names]].to_numpy(np.float64)
            for what in ("true", "predicted")
        )
        columns = [f"{name} {metrics.DESCRIPTORS}" for name in dataset.target_names]
        described = table[columns].to_numpy(np.float64) if set(columns) <= set(table.columns) else None
        # Not to the bit: pandas before 3 rounds what it reads.
        labels = dataset.targets[parts.test]
        same = len(true) == len(labels) and np.allclose(true, labels, rtol=1e-12, atol=0, equal_nan=True)
        wrong = "" if same else "other labels than the data set's"
        if not wrong and (np.isnan(predicted) & ~np.isnan(labels))[:, _scored(entry)].any():
            wrong = "predictions that are no numbers"
    except NotFound:
        wrong = "no such file"
    except (ValueError, KeyError) as error:  # pandas' errors, too, are ValueErrors
        wrong = f"a damaged file ({type(error).__name__})"
    if wrong:
        raise StudyConflict(
            f"{row.name}: expected what trial {entry.number} predicts, and the labels of the test split, in {file} of "
            f"the MLflow run {run_id}, found {wrong}. `hpo doctor --fix --study {row.name}` lets the recorded model "
            "predict it again."
        )
    return predicted, described


def _scored(entry: ClosingEntry) -> np.ndarray:
    """Return of which targets a closing stored an error of the test split, (k,): there all predictions are numbers."""
    return np.array([error is not None for error in entry.test.per_target["mse"]])
