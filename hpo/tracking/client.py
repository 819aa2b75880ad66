"""MLflow as hpo uses it: explicit ids, no fluent API, no retries here, every write safe to send again.

One experiment per study, one top-level run per trial. Each run, model and version carries the tag `hpo.key`: what
exists under a key is used, so that a lost answer leaves no duplicate behind.
"""

import math
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Literal

import psycopg
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from hpo.errors import NotFound, ServiceError
from hpo.text import cut
from hpo.tracking import artifacts, foreign, transfers
from hpo.tracking.errors import Refused, StoreRefuses, TrackingUnavailable, meaning, server

Kind = Literal["trial", "predictor", "study", "evaluation"]
Status = Literal["SCHEDULED", "RUNNING", "FINISHED", "FAILED", "KILLED"]
PAUSED = "hpo.paused"  # tag of a study's run: why nobody claims a trial of it; empty if somebody may
KEY = "hpo.key"
OWNER = "hpo.database"
CREATED = "hpo.created"  # nanoseconds, the creator's clock: which of two runs with one key is the older
Row = tuple[int, int, Mapping[str, float]]  # epoch, milliseconds since 1970, metrics
PAGE = 250  # runs of an answer: of a thousand with their scores a busy server needs longer than a request may take
RACES = 10  # refusals in a row that sound as if another worker wrote the same; that worker is done after one or two


class Races:
    """Insertions that the server refused because another worker had just made the same, by what was inserted."""

    def __init__(self) -> None:
        self._refusals: dict[str, int] = {}

    @contextmanager
    def written_once(self, what: str) -> Iterator[None]:
        """Raise TrackingUnavailable if the server refuses an insertion because another worker has just made the same.

        It words other refusals alike, which will not end: after RACES of them in a row the error is raised as it is.
        """
        try:
            yield
        except MlflowException as error:
            # A changed value has a code of its own; one that is too long does not get shorter.
            own_fault = issubclass(foreign.database_error(error.message) or object, psycopg.DataError)
            if error.error_code == "BAD_REQUEST" and not own_fault and self._refusals.get(what, 0) < RACES:
                self._refusals[what] = self._refusals.get(what, 0) + 1
                raise TrackingUnavailable(f"another worker is writing {what}") from error
            raise
        self._refusals.pop(what, None)


class Tracker:
    """A connection to one MLflow server, its runs and their files; experiments and models have modules of their own.

    Every method may raise TrackingUnavailable. Several threads may use it, for different runs.
    """

    def __init__(self, uri: str, *, timeout: int = 10) -> None:
        """`timeout` in seconds of one request; it holds for MLflow in this whole process."""
        # MLflow retries creations as well, which makes duplicates, and a dead server would hold us for minutes.
        foreign.configure(timeout=timeout, retries=0)
        foreign.require_usable(uri)
        self.uri = uri.rstrip("/")
        self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self.races = Races()
        self._artifact_uris: dict[str, str] = {}  # of runs
        self._is_proved = False  # the artifact store: it has listed what was uploaded

    # The server

    @server()
    def ping(self, experiment_id: str) -> None:
        """Ask the server for something small."""
        self.client.get_experiment(experiment_id)

    @server()
    def version(self) -> str:
        """Return the version of MLflow that the server runs."""
        version = foreign.server_version(self.uri)
        if "<" in version:
            raise Refused(200, version)
        return version

    def require_version(self) -> None:
        """Raise ServiceError if the server is of another major version than the MLflow that is installed here."""
        served, installed = self.version(), metadata.version("mlflow")
        if served.split(".")[0] != installed.split(".")[0]:
            raise ServiceError(
                f"Refusing to work with the MLflow server at {self.uri}: expected version {installed.split('.')[0]}, "
                f"as is installed here ({installed}), found {served[:40]!r}. Nothing was touched. Use a server of that "
                "version, or install the server's version here if this program's range admits it."
            )

    @contextmanager
    def storing(self, *files: Path) -> Iterator[None]:
        """Raise StoreRefuses if an upload of these files fails though the server answers another question."""
        try:
            with server():
                yield
        except TrackingUnavailable as error:
            if not isinstance(error, StoreRefuses):  # which the server has told
                with suppress(TrackingUnavailable), server():
                    self.client.search_experiments(max_results=1)  # on a connection the server has closed, perhaps
                with server():
                    self.client.search_experiments(max_results=1)
            needed = sum(file.stat().st_size for file in files if file.is_file())
            raise StoreRefuses(str(error), needed=needed, cause=getattr(error, "cause", None)) from error

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
        is_first: bool = False,
    ) -> str:
        """Return the id of the oldest active run with this key, created if there is none; set its params and tags.

        `is_first`: nobody has tried to create it before, so nothing is searched. Runs of `without` are deleted first.
        Of two creators at once each may get its own run: the caller that decides between them calls
        `delete_other_runs`. Raise MlflowException (INVALID_PARAMETER_VALUE) if a param has another value already,
        TrackingUnavailable if another worker writes it at this moment.
        """
        name = cut(name, foreign.LONGEST_RUN_NAME)
        words = {tag: cut(str(value), foreign.LONGEST_RUN_TAG) for tag, value in tags.items()}
        values = {param: cut(str(value), foreign.LONGEST_PARAM) for param, value in params.items()}
        if without:
            self._delete_runs(run for run in self._runs(experiment_id, key) if run.info.run_id in without)
        runs = [] if is_first else self._runs(experiment_id, key)
        if not runs:
            own = {KEY: key, "hpo.kind": kind, CREATED: str(time.time_ns())} | words
            created = self.client.create_run(experiment_id, start_time=start_ms, run_name=name, tags=own)
            runs = [created] if is_first else self._runs(experiment_id, key)
        if not runs:
            raise TrackingUnavailable(f"the run with the key {key} vanished between two requests")
        kept = runs[0]
        run_id = str(kept.info.run_id)
        self._artifact_uris[run_id] = kept.info.artifact_uri
        missing = [Param(param, value) for param, value in values.items() if kept.data.params.get(param) != value]
        changed = [RunTag(tag, word) for tag, word in words.items() if kept.data.tags.get(tag) != word]
        with self.races.written_once(f"the params of {name}, run {run_id}"):
            self.client.log_batch(run_id, params=missing, tags=changed)
        return run_id

    def _runs(self, experiment_id: str, key: str) -> list[Run]:
        runs = self.client.search_runs([experiment_id], f"tags.`{KEY}` = {quoted(key)}", ViewType.ACTIVE_ONLY)
        return sorted(runs, key=lambda run: (int(run.data.tags.get(CREATED, 0)), run.info.run_id))

    @server()
    def runs(
        self, experiment_id: str, *, kind: Kind, deleted: bool = False, keep: Callable[[Run], Any] = lambda run: run
    ) -> list[Any]:
        """Return what `keep` takes of each run of a kind in an experiment; with `deleted`, of those that were deleted
        instead."""
        view = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
        condition = f"tags.`hpo.kind` = {quoted(kind)}"
        search = self.client.search_runs
        return pages(lambda token: search([experiment_id], condition, view, PAGE, page_token=token), keep)

    @server()
    def curve(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """Return (step, value) of a metric as MLflow has it, by step."""
        return sorted((point.step, point.value) for point in self.client.get_metric_history(run_id, metric))

    @server()
    def tags(self, run_id: str) -> dict[str, str]:
        """Return all tags of a run."""
        return dict(self.client.get_run(run_id).data.tags)

    def set_tags(self, run_id: str, tags: Mapping[str, Any]) -> None:
        """Set tags of a run; values that are too long are cut."""
        self.log_epochs(run_id, [], tags=tags)

    @server()
    def log_epochs(self, run_id: str, rows: Iterable[Row], *, tags: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Log rows of metrics and set tags, in one request if it takes them all.

        Sending the same rows again changes nothing. The server keeps not-a-number as such, and infinity as the largest
        double; tags that are too long are cut.
        """
        metrics = [
            (name, float(value), time_ms, epoch) for epoch, time_ms, values in rows for name, value in values.items()
        ]
        words = {tag: cut(str(value), foreign.LONGEST_RUN_TAG) for tag, value in tags.items()}
        foreign.log_batch(self.uri, run_id, metrics, words)

    def log_summary(
        self, run_id: str, metrics: Mapping[str, float | None], *, timestamp_ms: int, step: int = 0
    ) -> None:
        """Log scores of the run as a whole; safe to repeat with the same time and step."""
        self.log_epochs(run_id, [summary_row(metrics, timestamp_ms=timestamp_ms, step=step)])

    @server()
    def log_dataset(
        self,
        run_id: str,
        *,
        name: str,
        digest: str,
        source: str,
        profile: str | None = None,
        context: str = "training",
    ) -> None:
        """Show the data set on the run's page. `source` and `profile` are JSON texts, `context` says what it is for."""
        name, short = cut(name, foreign.LONGEST_DATASET_NAME), digest[: foreign.LONGEST_DATASET_DIGEST]
        dataset = Dataset(name, short, "local", source, profile=profile)
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])]
        with self.races.written_once(f"the data set {name} of the run {run_id}"):
            self.client.log_inputs(run_id, inputs)

    @server()
    def set_status(self, run_id: str, status: Status, *, end_ms: int | None = None) -> None:
        """Set a run's status. Between attempts it is SCHEDULED: one that was KILLED would keep its old end."""
        if status in ("SCHEDULED", "RUNNING"):
            self.client.update_run(run_id, status=status)
        else:
            self.client.set_terminated(run_id, status=status, end_time=end_ms)
            self._artifact_uris.pop(run_id, None)

    @server()
    def delete_other_runs(self, experiment_id: str, key: str, *, keep: str) -> None:
        """Delete all active runs with the key but one."""
        self._delete_runs(run for run in self._runs(experiment_id, key) if run.info.run_id != keep)

    def _delete_runs(self, runs: Iterable[Run]) -> None:
        for run in runs:
            try:
                self.client.delete_run(run.info.run_id)
            except MlflowException as error:
                if meaning(error) is not None:
                    raise  # otherwise another worker has just deleted it

    @server()
    def delete_run(self, run_id: str) -> None:
        self.client.delete_run(run_id)

    @server()
    def restore_run(self, run_id: str) -> None:
        self.client.restore_run(run_id)

    # Files of a run

    @server()
    def upload(self, run_id: str, local_file: Path, artifact_dir: str) -> str:
        """Upload one file to a run under its own name; return its runs:/ URI."""
        with self.storing(local_file):
            if run_id not in self._artifact_uris:
                self._artifact_uris[run_id] = self.client.get_run(run_id).info.artifact_uri
            files = {str(PurePosixPath(artifact_dir, local_file.name)): local_file}
            self.put_files(self._artifact_uris[run_id], files)
        return f"runs:/{run_id}/{PurePosixPath(artifact_dir, local_file.name)}"

    def put_files(self, artifact_uri: str, files: Mapping[str, Path]) -> None:
        """Upload files, by their paths below an artifact URI of this server."""
        artifacts.upload(self.repository(artifact_uri), files, is_proved=self._is_proved)
        self._is_proved = True

    @server()
    def download_artifact(self, run_id: str, path: str, to_folder: Path) -> Path:
        """Download one file of a run into `to_folder` under its own name, at once or not at all.

        Raise NotFound if the run has no such file.
        """
        name, parent = PurePosixPath(path).name, str(PurePosixPath(path).parent)
        listed = self.client.list_artifacts(run_id, None if parent == "." else parent)
        if path not in {info.path for info in listed}:
            raise NotFound(f"MLflow run {run_id} has no file {path}.")
        to_folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to_folder, prefix=".download-") as partial_folder:
            file = Path(partial_folder, name)
            repository = self.repository(self.client.get_run(run_id).info.artifact_uri)
            size = next(info.file_size for info in listed if info.path == path)
            transfers.download_file(repository, path, file, size=size or 0)
            artifacts.check_sizes({path: file}, listed)
            return file.replace(to_folder / name)

    @server()
    def files(self, run_id: str, folder: str) -> list[str]:
        """Return the paths of the files and folders in a folder of a run."""
        return [info.path for info in self.client.list_artifacts(run_id, folder)]

    @server()
    def delete_artifact(self, run_id: str, path: str) -> None:
        """Delete one file or folder of a run; one that is not there is no error."""
        artifacts.delete(self.repository(self.client.get_run(run_id).info.artifact_uri), path)

    def repository(self, artifact_uri: str) -> ArtifactRepository:
        """Return the files below an artifact URI of this server."""
        return get_artifact_repository(artifact_uri, tracking_uri=self.uri)


def summary_row(metrics: Mapping[str, float | None], *, timestamp_ms: int, step: int = 0) -> Row:
    """Return scores of a run as a whole without those that are undefined, as R² of a target that does not vary is."""
    return step, timestamp_ms, {k: value for k, value in metrics.items() if value is not None and math.isfinite(value)}


def in_unit(prefix: str, scores: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return the metrics of targets with a transform in the label's unit: by the target's own name, without the unit,
    which MLflow does not take."""
    named = {name.partition(" [")[0]: values for name, values in scores.items()}
    return {f"{prefix}_{score}/{name}": value for name, values in named.items() for score, value in values.items()}


@server()
def curves(tracker: Tracker, run_ids: Sequence[str], metric: str) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) of a metric of runs as MLflow has it, by step and by the runs' ids: in one request if there
    are at most 100 with few enough values."""
    values = foreign.histories(tracker.uri, run_ids, metric) if len(run_ids) > 1 else None
    if values is None:
        return {run_id: tracker.curve(run_id, metric) for run_id in run_ids}
    if len(values) == foreign.MOST_VALUES:  # the answer is cut off
        half = len(run_ids) // 2
        return curves(tracker, run_ids[:half], metric) | curves(tracker, run_ids[half:], metric)
    points: dict[str, list[tuple[int, float]]] = {run_id: [] for run_id in run_ids}
    for run_id, step, value in sorted(values):
        points[run_id].append((step, value))
    return points


def pages(search: Callable[[str | None], Any], keep: Callable[[Any], Any] = lambda result: result) -> list[Any]:
    """Return what `keep` takes of each result of one of MLflow's searches; `search` gets the token of a page."""
    results: list[Any] = []
    token = None
    while True:
        page = search(token)
        results += map(keep, page)
        token = page.token
        if not token:
            return results


def quoted(text: str) -> str:
    """Return `text` as a string of MLflow's search language, which has no escapes: raise ValueError for apostrophes."""
    if "'" in text:
        raise ValueError(f"a key may not hold an apostrophe: {text!r}")
    return f"'{text}'"
