"""Logged models: one a finished trial, uploaded once, with the hash of every file in its tags."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException

from hpo import crash
from hpo.files import sha256_of_files
from hpo.tracking import artifacts, foreign
from hpo.tracking.client import KEY, Tracker, pages, quoted
from hpo.tracking.errors import TrackingUnavailable, server

SHA256 = "hpo.sha256."  # + path in the model's folder: a tag


@dataclass(frozen=True, kw_only=True)
class Model:
    """A finished model in MLflow."""

    model_id: str
    uri: str  # models:/<model_id>
    sha256: dict[str, str]  # hexadecimal digest of every file, by its path relative to the model's folder


def name_of(run_name: str, repeat: int) -> str:
    """Return the name of a trial's model: that of its run up to the parameters, in characters that MLflow admits."""
    name = run_name.partition(" ")[0]
    return foreign.NOT_IN_MODEL_NAMES.sub("-", f"{name}/{repeat}" if repeat else name)


@server()
def log(
    tracker: Tracker, run_id: str, experiment_id: str, folder: Path, *, name: str, key: str, is_first: bool = False
) -> Model:
    """Upload a folder of `hpo.worker.packaging` as the model with this key, and name it an output of the run.

    `is_first`: nobody has tried it before, so nothing is searched. The folder's MLmodel gets the ids of the model and
    the run. A finished model with this key is returned as it is, with the hashes of the files that were uploaded then;
    an unfinished one is deleted and made again, so that two writers never share files. Raise TrackingUnavailable if
    another writer deleted the model meanwhile: the next attempt finds out whether this writer still may. Of two that
    finish at once both stay, until the queue has recorded one (`delete_others`).
    """
    ready, unfinished = ([], []) if is_first else _with_key(tracker, experiment_id, key)
    for model in unfinished:
        delete(tracker, model)
    if ready:
        model_id, tags = ready[0].model_id, ready[0].tags
        sha256 = {tag.removeprefix(SHA256): value for tag, value in tags.items() if tag.startswith(SHA256)}
        outputs = tracker.client.get_run(run_id).outputs  # log_outputs does not deduplicate
        is_output = model_id in {output.model_id for output in (outputs.model_outputs if outputs else [])}
    else:
        model_id, sha256 = _upload(tracker, run_id, experiment_id, folder, name, key)
        is_output = False
    if not is_output:
        with tracker.races.written_once(f"the model of the run {run_id}"):
            tracker.client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    return Model(model_id=model_id, uri=f"models:/{model_id}", sha256=sha256)


def _upload(
    tracker: Tracker, run_id: str, experiment_id: str, folder: Path, name: str, key: str
) -> tuple[str, dict[str, str]]:
    """Return the id of the new model and the hashes of its files."""
    model = tracker.client.create_logged_model(experiment_id, name, source_run_id=run_id, tags={KEY: key})
    try:
        crash.at("model registered unfinished")
        foreign.adopt(folder, model_id=model.model_id, run_id=run_id)
        hashes = sha256_of_files(folder)
        with tracker.storing(*folder.rglob("*")):
            tracker.put_files(model.artifact_location, {path: folder / path for path in hashes})
        tags = {SHA256 + path: digest for path, digest in hashes.items()}
        tracker.client.set_logged_model_tags(model.model_id, tags)
        tracker.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise TrackingUnavailable(f"another writer deleted the model {model.model_id}") from error
    return model.model_id, hashes


def _with_key(tracker: Tracker, experiment_id: str, key: str) -> tuple[list[LoggedModel], list[LoggedModel]]:
    """Return finished and unfinished models with the key, the oldest (by the server's clock) first."""
    unsorted = tracker.client.search_logged_models([experiment_id], f"tags.`{KEY}` = {quoted(key)}")
    models = sorted(unsorted, key=lambda model: (model.creation_timestamp, model.model_id))
    ready = [model for model in models if model.status == LoggedModelStatus.READY]
    return ready, [model for model in models if model.status != LoggedModelStatus.READY]


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """A model as a list of them has it."""

    model_id: str
    run_id: str
    key: str
    is_ready: bool
    artifact_location: str


@server()
def of_experiment(tracker: Tracker, experiment_id: str) -> list[Listed]:
    """Return all models in an experiment."""
    return pages(lambda token: tracker.client.search_logged_models([experiment_id], page_token=token), _listed)


def _listed(model: LoggedModel) -> Listed:
    return Listed(
        model_id=model.model_id,
        run_id=model.source_run_id or "",
        key=str(model.tags.get(KEY, "")),
        is_ready=model.status == LoggedModelStatus.READY,
        artifact_location=model.artifact_location,
    )


@server()
def delete(tracker: Tracker, model: LoggedModel | Listed) -> None:
    """Delete a model and its files."""
    tracker.client.delete_logged_model(model.model_id)
    artifacts.delete(tracker.repository(model.artifact_location))


@server()
def delete_others(
    tracker: Tracker,
    run_id: str,
    experiment_id: str,
    *,
    keep: str | None,
    still: Callable[[], bool] = lambda: True,
) -> None:
    """Delete all models of a run but `keep`, the recorded one, or None.

    `still` is asked once the models are listed: if it returns false, because the record has changed, none is deleted.
    """
    condition = f"source_run_id = {quoted(run_id)}"
    models = pages(lambda token: tracker.client.search_logged_models([experiment_id], condition, page_token=token))
    others = [model for model in models if model.model_id != keep]
    for model in others if others and still() else []:
        delete(tracker, model)
