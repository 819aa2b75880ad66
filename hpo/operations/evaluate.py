"""The scores of a model on further labelled images, which must be of the kind that it was trained on."""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.dataset import Dataset
from data_pipeline.npz import load_npz
from hpo.errors import ModelError, NotFound, ServiceError, Unreachable
from hpo.files import sha256_of
from hpo.operations.connection import Connection, connect
from hpo.operations.further_images import distance, labelled
from hpo.operations.predict import predicted
from hpo.operations.trust import trusting
from hpo.queue import Job, StudyRow
from hpo.report import document, names
from hpo.report.evaluation import Evaluation
from hpo.scores import champion
from hpo.scores.tested import Tested
from hpo.text import counted, first_line, for_markdown
from hpo.tracking import data_sets as data_files
from hpo.tracking import evaluations, experiments, foreign, registry
from hpo.worker import trained_on
from hpo.worker.trained_on import TrainedOn

if TYPE_CHECKING:
    from models.bundle import Description

log = logging.getLogger("hpo")
FILES = ("weights.safetensors", "spec.json")  # that make a model what it is


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """A model that a study of a running database trained."""

    connection: Connection
    study: StudyRow
    job: Job

    @cached_property
    def version(self) -> tuple[str, registry.Version] | None:
        """Registered model and version; None if the trial's network is not registered."""
        for name in champion.names(self.study):
            for version in registry.versions(self.connection.tracker, name):
                if version.run_id == self.job.run_id:
                    return name, version
        return None

    def data(self) -> Dataset | None:
        """Return the data set that it was trained on; None, with a warning, if there is no sound copy."""
        home, tracker = self.connection.settings.home, self.connection.tracker
        try:
            return load_npz(data_files.fetch(home, tracker, self.study.name, self.study.facts))
        except ServiceError as error:
            log.warning("%s", error)
            return None


def evaluate(
    model: str | Path,
    folder: Path,
    *,
    image_size: int | None = None,
    page: Path | None = None,
    trust_code: Sequence[str] = (),
) -> Evaluation:
    """Return the scores of a model on the labelled images of a folder, beside those of the baseline predictors.

    `model` is a folder that `download` made, or a name of a registered version, trial or study as `compare` takes it.
    With `image_size` (pixels) the images are resized to that square. `page` is an HTML file to write. If the model is
    one of a running database, the evaluation is logged to MLflow, as a run of the kind `evaluation`. `trust_code`:
    SHA-256 of code of the model's author that may run.

    Raise NotFound, ModelError, DatasetError or ReportError: no such model; images or labels of another kind than those
    it was trained on; a page that would replace another file.
    """
    if page is not None:
        document.check_page(page)
    with trusting(trust_code), _opened(model) as (files, recorded, reason):
        evaluation = _evaluated(str(model), files, recorded, Path(folder), image_size)
        if reason:
            log.info("Not logged to MLflow: %s", reason)
        if recorded is not None:
            try:
                evaluation = _logged(evaluation, recorded)
            except Unreachable as error:  # the scores are there all the same
                log.warning("Not logged to MLflow, the same command does it later: %s", first_line(error))
    if page is not None:
        document.write_page(evaluation.document(), page)
    return evaluation


@contextmanager
def _opened(model: str | Path) -> Iterator[tuple[Path, _Recorded | None, str]]:
    """Give the folder of a model's files, and what the database knows of it, if it does; of a folder also why there is
    no database to ask, if there is none."""
    with ExitStack() as stack:
        if Path(model).is_dir():
            recorded, reason = None, ""
            try:
                recorded = _of_folder(stack.enter_context(connect()), Path(model))
            except (ServiceError, Unreachable) as error:
                reason = first_line(error)
            yield Path(model), recorded, reason
            return
        connection = stack.enter_context(connect())
        recorded = _of_name(connection, str(model))
        assert recorded.job.result is not None
        files = Path(stack.enter_context(tempfile.TemporaryDirectory()), "model")
        registry.download_model(
            connection.tracker,
            model_id=recorded.job.result.model_id,
            folder=files,
            expected_sha256=recorded.job.result.files,
        )
        yield files, recorded, ""


@contextmanager
def opened_model(model: str) -> Iterator[tuple[Path, str]]:
    """Give the folder of a model's files, and in words where it is from; `model` as in `evaluate`."""
    with _opened(model) as (files, recorded, _):
        version = recorded.version if recorded is not None else None
        registered = [f"{version[0]} version {version[1].number}"] if version else []
        yield files, ", ".join([*registered, recorded.job.title] if recorded is not None else ["a folder"])


def copy_model(model: str, folder: Path) -> str:
    """Copy the files of a model to a new folder; return in words where it is from. `model` as in `evaluate`."""
    with opened_model(model) as (files, source):
        shutil.copytree(files, folder)
        return source


def _of_name(connection: Connection, name: str) -> _Recorded:
    """Return the trial that a name stands for. Raise NotFound."""
    studies = {row.name: row for row in connection.queue.studies()}
    try:
        job = names.find(connection.queue, connection.tracker, studies, name)
    except NotFound as error:
        raise NotFound(f"{name} is no folder, and no name of a model: {error}") from None
    if job.result is None:
        raise NotFound(f"{name} has no model: {job.title} is {job.state}. `hpo trials --study {job.study}` lists all.")
    return _Recorded(connection=connection, study=studies[job.study], job=job)


def _of_folder(connection: Connection, folder: Path) -> _Recorded | None:
    """Return the trial whose model a folder holds, by its run and the hashes of its files; None if there is none."""
    run_id = foreign.run_of(folder)
    job = connection.queue.by_run(run_id) if run_id else None
    if job is None or job.result is None:
        return None
    for name in FILES:
        if not (folder / name).is_file() or sha256_of(folder / name) != job.result.files.get(name):
            return None
    return _Recorded(connection=connection, study=connection.queue.study(job.study), job=job)


def _evaluated(title: str, files: Path, recorded: _Recorded | None, folder: Path, image_size: int | None) -> Evaluation:
    from models import bundle
    from models.specs import SpecError

    try:
        network, spec = bundle.load(files)
    except SpecError as error:
        raise ModelError(str(error)) from None
    if image_size is None and recorded is not None:
        image_size = recorded.study.specification.image_size
    data = labelled(spec, title, folder, image_size)
    images, _, *inputs = data.part(np.arange(len(data.images)))
    predictions = predicted(
        network, images, inputs[0] if inputs else None, [f"{folder}: {name}" for name in data.names]
    )
    learned = recorded.data() if recorded is not None else None
    facts = _facts(spec, files, learned)
    unknown = np.full(len(spec.target_names), np.nan)
    tested = Tested(
        dataset=data,
        indices=np.arange(len(images)),
        name="new images",
        image="image",
        score="NMSE",
        models={title: predictions},
        predictors={name: fitted(images, *inputs) for name, fitted in facts.predictors.items()} if facts else {},
        train_variance=facts.variance if facts else unknown,
        phases=data.phases or (learned.phases if learned is not None else None),
    )
    version = recorded.version if recorded is not None else None
    records = distance(spec, facts, data)
    return Evaluation(
        model=f"{version[0]}/{version[1].number}" if version else title,
        version=(version[0], version[1].number) if version else None,
        folder=str(folder),
        tested=tested,
        distance=records,
        notes=[*_infinite(predictions), *_notes(records, facts, data, learned)],
    )


def _facts(spec: "Description", files: Path, learned: Dataset | None) -> TrainedOn | None:
    """Return what is known of the training split; None for a folder of an earlier hpo that no database here knows."""
    content = trained_on.describe(learned) if learned is not None else spec.extra.get(trained_on.KEY)
    if content is None:
        return None
    return trained_on.restore(
        content,
        channels=spec.image_shape[0],
        inputs=len(spec.input_names),
        targets=len(spec.target_names),
        where=str(files / FILES[1]),
    )


def _infinite(predictions: np.ndarray) -> list[str]:
    """Return in a sentence for how many images the model predicts no finite number; nothing if there are none."""
    count = int((~np.isfinite(predictions)).any(axis=1).sum())
    what = counted(count, "image", "are", of=len(predictions))
    return [f"The predictions for {what} not finite: scores that count them do not exist."] if count else []


def _notes(records: list[dict[str, Any]], facts: TrainedOn | None, data: Dataset, learned: Dataset | None) -> list[str]:
    """Return in sentences what makes the scores doubtful, and what could not be known."""
    notes = [
        f"Outside of what training saw: {counted(record['outside'], 'image', of=len(data.images))} ({record['what']}: "
        f"{record['here']} here, {record['training']} in training)."
        for record in records
        if record["outside"]
    ]
    if facts is None:
        notes.append(
            "NRMSE, the baseline predictors and the volume fractions of training are not known: the model's spec.json "
            "is of an earlier hpo, and no database here knows the model. Evaluate it by its name in the registry."
        )
    if learned is not None:
        keys = {image.tobytes() for image in learned.images[np.r_[learned.split.train, learned.split.validation]]}
        if seen := sum(image.tobytes() in keys for image in data.images):
            notes.append(
                f"{counted(seen, 'image', 'are', of=len(data.images))} among those that the model was trained or "
                "selected on: the scores are too good."
            )
    elif facts is not None:
        notes.append("Whether images are among those of training is not known: the folder does not hold them.")
    return notes


# MLflow


def _logged(evaluation: Evaluation, recorded: _Recorded) -> Evaluation:
    """Log an evaluation as a run in the experiment of the model's study; return it with the run's id."""
    tracker, job, study = recorded.connection.tracker, recorded.job, recorded.study
    assert job.result is not None
    data, experiment = evaluation.tested.dataset, study.facts.experiment_id
    experiments.renew_views(tracker, experiment, study.specification.columns)
    tags = {"hpo.study": job.study, "hpo.trial": job.number, "hpo.model": evaluation.model, "hpo.data": data.digest}
    with tempfile.TemporaryDirectory() as folder:
        page, numbers = Path(folder, "evaluation.html"), Path(folder, "evaluation.json")
        document.write_page(evaluation.document(), page)
        numbers.write_text(json.dumps(evaluation.as_dict(), indent=2), encoding="utf-8")
        run_id = evaluations.log(
            tracker,
            experiment,
            key=f"{job.key}/evaluation/{data.digest}",
            name=f"{evaluation.model} on {data.name}",
            note=for_markdown(f"{' '.join(evaluation.summary)} {' '.join(evaluation.notes)}"),
            model_id=job.result.model_id,
            tags=tags,
            metrics=_metrics(evaluation),
            data=(data.name, data.digest, evaluation.folder),
            files=[page, numbers],
        )
    if recorded.version is not None:
        name, version = recorded.version
        registry.set_tags(tracker, name, version, {f"hpo.evaluation.{data.digest[:8]}": run_id})
    return replace(evaluation, run_id=run_id, link=f"{tracker.uri}/{foreign.run_link(experiment, run_id)}")


def _metrics(evaluation: Evaluation) -> dict[str, float | None]:
    """Return the scores under names that no trial has."""
    flat: dict[str, float | None] = {}
    for predictor, means in evaluation.means.items():
        prefix = "evaluation" if predictor == "model" else f"evaluation_{predictor.replace(' ', '_')}"
        flat |= {f"{prefix}_{score}": value for score, value in means.items()}
    for record in evaluation.targets:
        if record["predictor"] == evaluation.tested.title:
            flat |= {f"evaluation_{score}/{record['target']}": record[score] for score in ("r2", "nrmse", "rmse")}
    return flat
