"""MLflow as we use it: explicit ids, no fluent API, nothing retried here, every write safe to send again.

One experiment per study, one top-level run per trial. Each run, model and version carries the tag `hpo.key`: what
exists under a key is used, so that a lost answer leaves no ghost behind.
"""

import hashlib
import json
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar
from urllib.parse import quote

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # before the import, which starts it

import psycopg
import requests
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    Experiment,
    FileInfo,
    InputTag,
    LoggedModel,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    Run,
    RunTag,
    ViewType,
)
from mlflow.exceptions import MlflowException, RestException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from hpo import crash
from hpo.errors import ModelError, NotFound, ServiceError, StudyConflict
from hpo.files import sha256_of_files
from hpo.tracking import lengths, views
from hpo.tracking.lengths import cut

T = TypeVar("T")
Kind = Literal["trial", "predictor", "study"]
KEY = "hpo.key"
OWNER = "hpo.database"
CREATED = "hpo.created"  # nanoseconds, the creator's clock: which of two runs with one key is the older
SHA256 = "hpo.sha256."  # + path in the model's folder
BATCH = 100  # params or tags in one request: the server's limit
METRICS_BATCH = 1000  # likewise
MOST_ENTRIES = 200  # files and folders of a model, which has a dozen: a listing need not end by itself
RACES = 10  # answers in a row that sound as if another worker wrote the same; the other one is done after one or two
SAID = 120  # characters quoted of an answer that is not MLflow's


class TrackingUnavailable(Exception):
    """The MLflow server cannot be reached, is too slow, or in trouble itself: try again later."""


class Refused(TrackingUnavailable):
    """Whoever answers in the MLflow server's place does not let us in, or is not MLflow: a gateway, a login page. That
    says nothing of what we asked for, and passes as it came."""

    def __init__(self, status: int, body: str) -> None:
        said = " ".join(re.sub(r"<[^>]*>", " ", body).split())
        self.answer = f"answers {status}" if status != 200 else "answers with a web page"
        super().__init__(f"it {self.answer} ({cut(said, SAID)}): {_cause(status, said)}")


class StoreRefuses(TrackingUnavailable):
    """The MLflow server answers, but its artifact store takes no file: it is full, read-only or out of its reach."""

    def __init__(self, message: str, *, needed: int) -> None:
        super().__init__(message)
        self.needed = needed  # bytes that were to be stored


@dataclass(frozen=True, kw_only=True)
class Model:
    """A finished model in MLflow."""

    model_id: str
    uri: str  # models:/<model_id>
    sha256: dict[str, str]  # hexadecimal digest of every file, by its path relative to the model's folder


@contextmanager
def server() -> Iterator[None]:
    """Raise TrackingUnavailable for an answer that says nothing of what was asked for, and everything else as it is:
    MLflow's own answer that there is no such run, say, or that a value is wrong."""
    try:
        yield
    except (requests.RequestException, MlflowException, json.JSONDecodeError) as error:
        if (away := _away(error)) is None:
            raise
        raise away from error


# What the answer is about: our request (an error_code not named here), or whether we may ask at all.
_NOT_ASKED = ("PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED", "UNAUTHENTICATED", "ENDPOINT_NOT_FOUND")
# How MLflow's client words an answer without MLflow's JSON.
_STATUS = re.compile(r"failed with error code (\d+) != \d+\. Response body: '(.*)'", re.DOTALL)
_NO_JSON = re.compile(r"not in a valid JSON format\. Response body: '(.*)'", re.DOTALL)
# How SQLAlchemy words an error of the server's database, such as (psycopg.errors.ReadOnlySqlTransaction).
_DRIVER = re.compile(r"\((?:\w+\.)+(\w+)\)")


def _away(error: Exception) -> TrackingUnavailable | None:
    """What an error means for whoever asked: that the service is not itself, or, None, that the request was wrong."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        status, body = error.response.status_code, error.response.text
        return _meaning(status, _error_code(body), body)
    if isinstance(error, RestException):
        return _meaning(error.get_http_status_code(), error.error_code, error.message)
    if isinstance(error, MlflowException):
        if found := _STATUS.search(error.message):
            return _meaning(int(found[1]), None, found[2])
        if found := _NO_JSON.search(error.message):
            return Refused(200, found[1])
        return _meaning(error.get_http_status_code(), error.error_code, error.message)  # its client's, unsent
    if isinstance(error, json.JSONDecodeError):  # requests has one that is both
        return Refused(200, error.doc)
    return TrackingUnavailable(str(error))


def _meaning(status: int, code: str | None, text: str) -> TrackingUnavailable | None:
    """`code`: MLflow's error_code, None in an answer that is not MLflow's."""
    passing = status >= 500 or status == 429
    if code in _NOT_ASKED or (code is None and not passing):
        return Refused(status, text)
    if passing or (code == "BAD_REQUEST" and _of_its_database(text)):
        return TrackingUnavailable(text if code else str(Refused(status, text)))
    return None


def _error_code(body: str) -> str | None:
    try:
        found = json.loads(body)
    except ValueError:
        return None
    return found.get("error_code") if isinstance(found, dict) else None


def _of_its_database(text: str) -> bool:
    """Whether MLflow tells of trouble with its database, which it calls a bad request as well: it is read-only, say."""
    kind = _driver_error(text)
    return kind is not None and not issubclass(kind, (psycopg.DataError, psycopg.IntegrityError))


def _driver_error(text: str) -> type[psycopg.Error] | None:
    found = _DRIVER.search(text)
    kind = getattr(psycopg.errors, found[1], None) if found else None  # other drivers have some of these names, too
    return kind if isinstance(kind, type) and issubclass(kind, psycopg.Error) else None


def _cause(status: int, said: str) -> str:
    if "Invalid Host header" in said:
        return "it does not know the name it is called by in MLFLOW_TRACKING_URI; its --allowed-hosts must have it"
    causes = {
        200: "a login or a maintenance page in front of it, perhaps",
        401: "are user and password right (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, or HPO_CREDENTIALS)?",
        403: "this user may not do that, or a gateway in front of it keeps us out",
        404: "no MLflow server is there; is MLFLOW_TRACKING_URI right, with the path, if it has one?",
        413: "a proxy in front of it takes no requests of this size (nginx: client_max_body_size)",
    }
    return causes.get(status, "something in front of it answers in its place")


class Tracker:
    """A connection to one MLflow server. Every method may raise TrackingUnavailable; use it from one thread."""

    def __init__(self, uri: str, *, timeout: int = 10) -> None:
        """`timeout` in seconds of one request. These settings hold for MLflow in this whole process."""
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(timeout)
        # MLflow retries creations as well, which makes ghosts, and a dead server would hold us for minutes.
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"  # the terminal is our display's
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        self.uri = uri.rstrip("/")
        self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._races: dict[str, int] = {}  # by what was to be written: how often in a row somebody else wrote it

    @contextmanager
    def _written_once(self, what: str) -> Iterator[None]:
        """Raise TrackingUnavailable when two workers insert one row, which the server refuses to the second of them.

        It says so of other requests as well, which it will refuse again: after RACES answers in a row it is an error.
        """
        try:
            yield
        except MlflowException as error:
            # A changed value has a code of its own; one that is too long does not get shorter.
            own_fault = issubclass(_driver_error(error.message) or object, psycopg.DataError)
            if error.error_code == "BAD_REQUEST" and not own_fault and self._races.get(what, 0) < RACES:
                self._races[what] = self._races.get(what, 0) + 1
                raise TrackingUnavailable(f"another worker is writing {what}") from error
            raise
        self._races.pop(what, None)

    @contextmanager
    def _storing(self, *files: Path) -> Iterator[None]:
        """Raise StoreRefuses where an upload of these files fails though the server answers another question."""
        try:
            with server():
                yield
        except TrackingUnavailable as error:
            with suppress(TrackingUnavailable), server():
                self.client.search_experiments(max_results=1)  # on a connection the server has closed, perhaps
            with server():
                self.client.search_experiments(max_results=1)
            needed = sum(file.stat().st_size for file in files if file.is_file())
            raise StoreRefuses(str(error), needed=needed) from error

    # Experiments

    @server()
    def ensure_experiment(self, study: str, *, description: str, params: Sequence[str], owner: str) -> str:
        """The id of the study's experiment, made if need be, with its note and its saved view over `params`.

        `owner` is the queue's database: two databases on one server must not share runs. An experiment of another
        owner is not used, nor is one deleted in MLflow revived or replaced: StudyConflict says what to do.
        """
        tags = {
            "mlflow.experimentKind": "custom_model_development",  # else its page opens as one of a chat bot
            "mlflow.note.content": cut(description, lengths.EXPERIMENT_TAG),
            f"mlflow.sharedViewState.{views.SHARE_KEY}": views.state(params),
            f"mlflow.sharedViewState.{views.CHARTS_KEY}": views.state(params, trials_only=True),
            OWNER: owner,
        }
        experiment = self.client.get_experiment_by_name(study)
        if experiment is None:
            try:
                self.client.create_experiment(study, tags=tags)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise  # otherwise somebody else was quicker
            experiment = self.client.get_experiment_by_name(study)
        if experiment is None or experiment.lifecycle_stage != "active":
            number = experiment.experiment_id if experiment else "?"
            raise StudyConflict(
                f"The MLflow experiment of {study} (id {number}) was deleted in MLflow. "
                f"Restore it with `mlflow experiments restore --experiment-id {number}`, "
                f"or start afresh after `hpo delete --study {study}`."
            )
        if experiment.tags.get(OWNER) != owner:
            raise StudyConflict(
                f"The MLflow server at {self.uri} has an experiment '{study}' (id {experiment.experiment_id}) that was "
                "not made from this database. Nothing was touched. Use a copy of the study file under another name, or "
                "the database that made the experiment, or rename the experiment in MLflow."
            )
        for name, value in tags.items():
            if experiment.tags.get(name) != value:
                self.client.set_experiment_tag(experiment.experiment_id, name, value)
        return str(experiment.experiment_id)

    @server()
    def ping(self, experiment_id: str) -> None:
        """Ask the server for something small."""
        self.client.get_experiment(experiment_id)

    def link(self, experiment_id: str) -> str:
        """Where a browser shows the study's trials as a list, best first."""
        return self._view(experiment_id, views.SHARE_KEY)

    def chart_link(self, experiment_id: str) -> str:
        """Where a browser shows the study's trials as charts, curves of the best ten."""
        return f"{self._view(experiment_id, views.CHARTS_KEY)}&compareRunsMode=CHART"

    def _view(self, experiment_id: str, key: str) -> str:
        query = f"workflowType=machine_learning&viewStateShareKey={key}"
        return f"{self.uri}/#/experiments/{experiment_id}/runs?{query}"

    @server()
    def comparison_link(self, experiment_ids: Sequence[str], params: Sequence[str]) -> str:
        """Where a browser shows the trials of several studies as one list with columns for `params`, best first.

        MLflow looks the view up in one of the experiments, not always the first: each gets it, under a name of its own.
        """
        key = "-".join([views.SHARE_KEY, *experiment_ids])
        if len(key) > lengths.TAG_KEY - len("mlflow.sharedViewState."):
            key = f"{views.SHARE_KEY}-{hashlib.sha256(key.encode()).hexdigest()}"
        for experiment_id in experiment_ids:
            self.client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{key}", views.state(params))
        chosen = quote(json.dumps(list(experiment_ids), separators=(",", ":")))
        query = f"experiments={chosen}&workflowType=machine_learning&viewStateShareKey={key}"
        return f"{self.uri}/#/compare-experiments/s?{query}"

    # Runs

    @server()
    def ensure_run(
        self,
        experiment_id: str,
        *,
        key: str,
        name: str,
        kind: Kind,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        start_ms: int,
        without: Collection[str] = (),
    ) -> str:
        """The id of the oldest active run with this key, made if need be; its params and tags are set either way. Runs
        of `without` are deleted first.

        Of two creators at once each may get its own: whoever decides between them calls `delete_other_runs`. A param
        that has another value already raises MlflowException (INVALID_PARAMETER_VALUE); one that another writes at this
        moment, which the server refuses as well, TrackingUnavailable.
        """
        name = cut(name, lengths.RUN_NAME)
        words = {tag: cut(str(value), lengths.RUN_TAG) for tag, value in tags.items()}
        values = {param: cut(str(value), lengths.PARAM) for param, value in params.items()}
        if without:
            self._delete_runs(run for run in self._runs(experiment_id, key) if run.info.run_id in without)
        runs = self._runs(experiment_id, key)
        if not runs:
            own = {KEY: key, "hpo.kind": kind, CREATED: str(time.time_ns())} | words
            self.client.create_run(experiment_id, start_time=start_ms, run_name=name, tags=own)
            runs = self._runs(experiment_id, key)
        if not runs:
            raise TrackingUnavailable(f"the run with the key {key} vanished between two requests")
        kept = runs[0]
        missing = {k: v for k, v in values.items() if kept.data.params.get(k) != v}
        changed = {k: v for k, v in words.items() if kept.data.tags.get(k) != v}
        with self._written_once(f"the params of {name}, run {kept.info.run_id}"):
            for batch in _batches([Param(k, v) for k, v in missing.items()], BATCH):
                self.client.log_batch(kept.info.run_id, params=batch)
        self._set_tags(kept.info.run_id, changed)
        return str(kept.info.run_id)

    @server()
    def delete_other_runs(self, experiment_id: str, key: str, *, keep: str) -> None:
        """Delete all active runs with the key but one."""
        self._delete_runs(run for run in self._runs(experiment_id, key) if run.info.run_id != keep)

    def _delete_runs(self, runs: Iterable[Run]) -> None:
        for run in runs:
            try:
                self.client.delete_run(run.info.run_id)
            except MlflowException as error:
                if _away(error) is not None:
                    raise  # otherwise another worker has just deleted it

    @server()
    def runs(self, experiment_id: str, *, kind: Kind, deleted: bool = False) -> list[Run]:
        """All runs of a kind in an experiment; with `deleted`, those that somebody deleted instead."""
        view = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
        condition = f"tags.`hpo.kind` = {quoted(kind)}"
        return pages(lambda token: self.client.search_runs([experiment_id], condition, view, page_token=token))

    @server()
    def models(self, experiment_id: str) -> list[LoggedModel]:
        """All models in an experiment."""
        return pages(lambda token: self.client.search_logged_models([experiment_id], page_token=token))

    @server()
    def owned_experiments(self, owner: str) -> list[Experiment]:
        """All active experiments that were made from the queue's database `owner`."""
        condition = f"tags.`{OWNER}` = {quoted(owner)}"
        return pages(lambda token: self.client.search_experiments(filter_string=condition, page_token=token))

    @server()
    def curve(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a metric as MLflow has it, by step."""
        return sorted((point.step, point.value) for point in self.client.get_metric_history(run_id, metric))

    @server()
    def tags(self, run_id: str) -> dict[str, str]:
        return dict(self.client.get_run(run_id).data.tags)

    @server()
    def delete_run(self, run_id: str) -> None:
        self.client.delete_run(run_id)

    @server()
    def restore_run(self, run_id: str) -> None:
        self.client.restore_run(run_id)

    @server()
    def delete_model(self, model: LoggedModel) -> None:
        """Delete a model and its files."""
        self._delete_model(model)

    @server()
    def version(self) -> str:
        """Version of MLflow that the server runs."""
        answer = http_request(get_default_host_creds(self.uri), "/version", "GET", timeout=10)
        answer.raise_for_status()
        if "<" in answer.text:
            raise Refused(answer.status_code, answer.text)
        return answer.text.strip()

    def require_version(self) -> None:
        """Raise ServiceError if the server is of another major version than the MLflow that is installed here."""
        found, ours = self.version(), metadata.version("mlflow")
        if found.split(".")[0] != ours.split(".")[0]:
            raise ServiceError(
                f"Refusing to work with the MLflow server at {self.uri}: expected version {ours.split('.')[0]}, as is "
                f"installed here ({ours}), found {found[:40]!r}. Nothing was touched. Use a server of that version, or "
                "install the server's version here if this program's range admits it."
            )

    def _runs(self, experiment_id: str, key: str) -> list[Run]:
        found = self.client.search_runs([experiment_id], f"tags.`{KEY}` = {quoted(key)}", ViewType.ACTIVE_ONLY)
        return sorted(found, key=lambda run: (int(run.data.tags.get(CREATED, 0)), run.info.run_id))

    @server()
    def log_epochs(self, run_id: str, rows: Iterable[tuple[int, int, Mapping[str, float]]]) -> None:
        """Log rows of (epoch, milliseconds since 1970, metrics). Sending the same rows again changes nothing.

        The server keeps not-a-number as such, and infinity as the largest double.
        """
        metrics = [
            Metric(name, float(value), time_ms, epoch)
            for epoch, time_ms, values in rows
            for name, value in values.items()
        ]
        for batch in _batches(metrics, METRICS_BATCH):
            self.client.log_batch(run_id, metrics=batch)

    def log_summary(
        self, run_id: str, metrics: Mapping[str, float | None], *, timestamp_ms: int, step: int = 0
    ) -> None:
        """Log scores of the run as a whole; safe to repeat with the same time and step.

        A score that is undefined (R² of a target that does not vary in a split) is left out.
        """
        defined = {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}
        self.log_epochs(run_id, [(step, timestamp_ms, defined)])

    @server()
    def set_tags(self, run_id: str, tags: Mapping[str, Any]) -> None:
        self._set_tags(run_id, tags)

    def _set_tags(self, run_id: str, tags: Mapping[str, Any]) -> None:
        for batch in _batches([RunTag(k, cut(str(v), lengths.RUN_TAG)) for k, v in tags.items()], BATCH):
            self.client.log_batch(run_id, tags=batch)

    @server()
    def set_status(
        self,
        run_id: str,
        status: Literal["SCHEDULED", "RUNNING", "FINISHED", "FAILED", "KILLED"],
        *,
        end_ms: int | None = None,
    ) -> None:
        """Between attempts a run is SCHEDULED: one that was KILLED would keep its old end when it goes on."""
        if status in ("SCHEDULED", "RUNNING"):
            self.client.update_run(run_id, status=status)
        else:
            self.client.set_terminated(run_id, status=status, end_time=end_ms)

    @server()
    def log_dataset(
        self,
        run_id: str,
        *,
        name: str,
        digest: str,
        source: str,
        source_type: str = "local",
        profile: str | None = None,
        context: str = "training",
    ) -> None:
        """Show the data set on the run's page. `source` and `profile` are JSON texts."""
        name, short = cut(name, lengths.DATASET_NAME), digest[: lengths.DATASET_DIGEST]
        dataset = Dataset(name, short, source_type, source, profile=profile)
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])]
        with self._written_once(f"the data set {name} of the run {run_id}"):
            self.client.log_inputs(run_id, inputs)

    # Models

    @server()
    def log_model(self, run_id: str, experiment_id: str, folder: Path, *, name: str, key: str) -> Model:
        """Upload a folder of `hpo.tracking.packaging` as the model with this key, and name it an output of the run.

        The folder's MLmodel gets the model's and the run's id. A finished model with this key is returned as it is,
        with the hashes of the files that were uploaded then; an unfinished one is deleted and made anew, so that two
        writers never share files. A writer whose model was deleted meanwhile gets TrackingUnavailable: when it tries
        again it finds out whether it still may. Of two finished at once both stay, until one is recorded
        (`delete_other_models`): which one that is, only the queue decides.
        """
        ready, unfinished = self._models(experiment_id, key)
        for other in unfinished:
            self._delete_model(other)
        if not ready:
            self._upload_model(run_id, experiment_id, folder, name, key)
            ready, _ = self._models(experiment_id, key)
        if not ready:
            raise TrackingUnavailable(f"the model with the key {key} vanished between two requests")
        kept = ready[0]
        outputs = self.client.get_run(run_id).outputs  # log_outputs does not deduplicate
        if kept.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
            with self._written_once(f"the model of the run {run_id}"):
                self.client.log_outputs(run_id, [LoggedModelOutput(kept.model_id, step=0)])
        sha256 = {name.removeprefix(SHA256): value for name, value in kept.tags.items() if name.startswith(SHA256)}
        return Model(model_id=kept.model_id, uri=f"models:/{kept.model_id}", sha256=sha256)

    @server()
    def delete_other_models(
        self, run_id: str, experiment_id: str, *, keep: str | None, still: Callable[[], bool] = lambda: True
    ) -> None:
        """Delete all models of a run but the recorded one, if there is one; none unless `still` says, once they are
        listed, that this is as it was."""
        condition = f"source_run_id = {quoted(run_id)}"
        found = pages(lambda token: self.client.search_logged_models([experiment_id], condition, page_token=token))
        others = [model for model in found if model.model_id != keep]
        for model in others if others and still() else []:
            self._delete_model(model)

    def _upload_model(self, run_id: str, experiment_id: str, folder: Path, name: str, key: str) -> None:
        made = self.client.create_logged_model(experiment_id, name, source_run_id=run_id, tags={KEY: key})
        try:
            crash.at("model registered unfinished")
            _adopt(folder, model_id=made.model_id, run_id=run_id)
            hashes = sha256_of_files(folder)
            with self._storing(*folder.rglob("*")):
                self.client.log_model_artifacts(made.model_id, str(folder))
                repository = get_artifact_repository(made.artifact_location, tracking_uri=self.uri)
                check_sizes({path: folder / path for path in hashes}, list(stored_files(repository)))
            self.client.set_logged_model_tags(made.model_id, {SHA256 + path: h for path, h in hashes.items()})
            self.client.finalize_logged_model(made.model_id, LoggedModelStatus.READY)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise TrackingUnavailable(f"another writer deleted the model {made.model_id}") from error

    def _models(self, experiment_id: str, key: str) -> tuple[list[LoggedModel], list[LoggedModel]]:
        """Finished and unfinished models with the key, the oldest (by the server's clock) first."""
        found = self.client.search_logged_models([experiment_id], f"tags.`{KEY}` = {quoted(key)}")
        models = sorted(found, key=lambda model: (model.creation_timestamp, model.model_id))
        ready = [model for model in models if model.status == LoggedModelStatus.READY]
        return ready, [model for model in models if model.status != LoggedModelStatus.READY]

    def _delete_model(self, model: LoggedModel) -> None:
        self.client.delete_logged_model(model.model_id)
        self._delete_files(model.artifact_location)

    # Files

    @server()
    def upload(self, run_id: str, local_file: Path, artifact_dir: str) -> str:
        """Upload one file to a run under its own name; returns its runs:/ URI."""
        path = str(PurePosixPath(artifact_dir, local_file.name))
        with self._storing(local_file):
            self.client.log_artifact(run_id, str(local_file), artifact_dir or None)
            check_sizes({path: local_file}, self.client.list_artifacts(run_id, artifact_dir or None))
        return f"runs:/{run_id}/{path}"

    @server()
    def download_artifact(self, run_id: str, path: str, to_folder: Path) -> Path:
        """Download one file of a run into `to_folder` under its own name, at once or not at all. Raises NotFound."""
        name, parent = PurePosixPath(path).name, str(PurePosixPath(path).parent)
        listed = self.client.list_artifacts(run_id, None if parent == "." else parent)
        if path not in {info.path for info in listed}:
            raise NotFound(f"MLflow run {run_id} has no file {path}.")
        to_folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to_folder, prefix=".download-") as partial_folder:
            file = Path(partial_folder, name)
            # The client's own download takes every error for a file that is not there.
            repository = get_artifact_repository(self.client.get_run(run_id).info.artifact_uri, tracking_uri=self.uri)
            repository._download_file(path, str(file))
            check_sizes({path: file}, listed)
            return file.replace(to_folder / name)

    @server()
    def files(self, run_id: str, folder: str) -> list[str]:
        """Paths of what lies in a folder of a run."""
        return [info.path for info in self.client.list_artifacts(run_id, folder)]

    @server()
    def delete_artifact(self, run_id: str, path: str) -> None:
        """Delete one file of a run; one that is not there is no error."""
        self._delete_files(self.client.get_run(run_id).info.artifact_uri, path)

    def _delete_files(self, artifact_uri: str, path: str | None = None) -> None:
        repository = get_artifact_repository(artifact_uri, tracking_uri=self.uri)
        delete: Callable[..., None] = repository.delete_artifacts
        try:
            delete(path)
        except requests.HTTPError as error:
            if not _is_missing(error):
                raise

    @server()
    def knows(self, experiment_id: str) -> bool:
        """Whether the server has this experiment, deleted or not."""
        try:
            self.client.get_experiment(experiment_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    @server()
    def delete_study_data(self, experiment_id: str) -> None:
        """Delete the study's experiment and all its files; the name is free again. Safe to repeat.

        Registered versions made from its models lose their files: delete them first (`registry.delete_version`).
        MLflow keeps rows of deleted experiments until `mlflow gc`; ours is renamed to "<study> (deleted <id>)".
        """
        if not self.knows(experiment_id):
            return  # `mlflow gc` has done it
        experiment: Experiment = self.client.get_experiment(experiment_id)
        suffix = f" (deleted {experiment_id})"
        if not experiment.name.endswith(suffix):
            if experiment.lifecycle_stage != "active":
                self.client.restore_experiment(experiment_id)  # only an active one can be renamed
            self.client.rename_experiment(experiment_id, experiment.name + suffix)
            experiment = self.client.get_experiment(experiment_id)
        if experiment.lifecycle_stage == "active":
            self.client.delete_experiment(experiment_id)
        self._delete_files(experiment.artifact_location)


class Store:
    """The artifact store behind an MLflow server as a whole, paths relative to its root; for backups."""

    def __init__(self, uri: str) -> None:
        os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "2"  # 6 seconds; by default a full disk holds us for minutes
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # it announces each
        self._root = get_artifact_repository("mlflow-artifacts:/", tracking_uri=uri)

    @server()
    def walk(self, folder: str) -> Iterator[str]:
        """Paths of all files below a folder."""
        for info in self._root.list_artifacts(folder):
            if info.is_dir:
                yield from self.walk(info.path)
            else:
                yield info.path

    @server()
    def fetch(self, path: str, to: Path) -> None:
        """Download one file. Raises NotFound."""
        try:
            self._root._download_file(path, str(to))  # the public call lists the folder before each file
        except requests.HTTPError as error:
            if _is_missing(error):
                raise NotFound(f"The artifact store has no file {path}.") from None
            raise

    @server()
    def put(self, path: str, file: Path) -> None:
        """Upload one file, whose name is the path's last part; what is there is replaced."""
        parent = str(PurePosixPath(path).parent)
        self._root.log_artifact(str(file), None if parent == "." else parent)


def stored_files(repository: ArtifactRepository) -> Iterator[FileInfo]:
    """The files of one model that lie in the artifact store. Raises ModelError where there are far too many."""
    folders: list[str | None] = [None]
    entries = 0
    while folders:
        for info in repository.list_artifacts(folders.pop()):
            entries += 1
            if entries > MOST_ENTRIES:
                raise ModelError(
                    f"The artifact store lists more than {MOST_ENTRIES} files in one model. Do not use it."
                )
            if info.is_dir:
                folders.append(info.path)
            else:
                yield info


def check_sizes(files: Mapping[str, Path], listed: Iterable[FileInfo]) -> None:
    """Raise TrackingUnavailable unless these files, by path in the store, are as large as the store lists them: a login
    page takes an upload, and stands for a download, with a status that says all is well."""
    sizes = {info.path: info.file_size for info in listed}
    for path, file in files.items():
        size = file.stat().st_size
        if path not in sizes or sizes[path] not in (None, size):
            raise TrackingUnavailable(
                f"the artifact store has {sizes.get(path, 0)} bytes of {path}, here it has {size}"
            )


def _is_missing(error: requests.HTTPError) -> bool:
    """Whether MLflow itself says that there is no such file."""
    found = error.response
    return found is not None and found.status_code == 404 and _error_code(found.text) is not None


def pages(search: Callable[[str | None], Any]) -> list[Any]:
    """All results of one of MLflow's searches; `search` gets the token of a page."""
    found: list[Any] = []
    token = None
    while True:
        page = search(token)
        found += page
        token = page.token
        if not token:
            return found


def _adopt(folder: Path, *, model_id: str, run_id: str) -> None:
    """Write the ids into the folder's MLmodel, at once or not at all."""
    from mlflow.models import Model as MLmodel  # 0.3 s, and only here

    content = MLmodel.load(str(folder))
    content.model_id, content.run_id = model_id, run_id
    new = folder / "MLmodel.new"
    content.save(str(new))
    new.replace(folder / "MLmodel")


def _batches(items: Sequence[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def quoted(text: str) -> str:
    """`text` as a string of MLflow's search language, which knows no escapes."""
    if "'" in text:
        raise ValueError(f"a key may not hold an apostrophe: {text!r}")
    return f"'{text}'"
