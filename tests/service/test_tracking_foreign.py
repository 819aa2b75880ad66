"""hpo.tracking.foreign, transfers: the inside of MLflow is what it was in 3.17, with which the modules were checked."""

import importlib.util
import json
import re
import secrets
import threading
import zlib
from base64 import b64decode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import psycopg
import pytest
import requests
from mlflow import MlflowClient, environment_variables
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model as MLmodel
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking.request_header.databricks_request_header_provider import DatabricksRequestHeaderProvider
from mlflow.tracking.request_header.registry import _request_header_provider_registry, resolve_request_headers

from hpo.errors import SettingsError
from hpo.tracking import foreign, transfers
from hpo.tracking.client import Tracker, curves


@pytest.fixture
def tracker(tracking_uri: str) -> Tracker:
    return Tracker(tracking_uri)


def unique(length: int) -> str:
    """A name of this length that nobody has."""
    return secrets.token_hex((length + 1) // 2)[:length]


def a_run(client: MlflowClient) -> str:
    return str(client.create_run(client.create_experiment(unique(12))).info.run_id)


@pytest.mark.parametrize("is_databricks", [True, False])
def test_only_on_databricks_each_request_asks_for_its_headers(monkeypatch, is_databricks):
    asked = []

    class Provider(DatabricksRequestHeaderProvider):
        def in_context(self) -> bool:
            asked.append(self)
            return is_databricks

        def request_headers(self) -> dict[str, str]:
            return {"cluster_id": "7"}

    providers = [Provider(), *_request_header_provider_registry]
    monkeypatch.setattr(_request_header_provider_registry, "_registry", providers)
    before = resolve_request_headers()
    foreign.configure(retries=0)
    asked.clear()
    assert resolve_request_headers() == before and "User-Agent" in before
    assert bool(asked) == is_databricks == ("cluster_id" in before)


def test_metrics_and_tags_arrive_as_the_clients_own_call_stores_them(tracker, tracking_uri):
    values = [0.1, 1e-300, -3.0, float("nan"), float("inf"), -float("inf")]
    metrics = [("a", values[step % 6], 1_700_000_000_000 + step, step) for step in range(1200)]
    tags = {f"tag {number}": "ä ' \n" * number for number in range(120)}
    ours, theirs = a_run(tracker.client), a_run(tracker.client)
    foreign.log_batch(tracking_uri, ours, metrics, tags)
    tracker.client.log_batch(
        theirs, [Metric(*metric) for metric in metrics], tags=[RunTag(*tag) for tag in tags.items()]
    )
    curves = [
        sorted(
            (point.step, point.timestamp, repr(point.value)) for point in tracker.client.get_metric_history(run, "a")
        )
        for run in (ours, theirs)
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 1200
    stored = [tracker.client.get_run(run).data.tags for run in (ours, theirs)]
    assert all(each[tag] == value for each in stored for tag, value in tags.items())
    with pytest.raises(MlflowException, match="not found"):
        foreign.log_batch(tracking_uri, "0" * 32, metrics[:1], {})


# Limits


class Raw:
    """MLflow's client without hpo: each method writes a text of a length and returns what the server has of it."""

    def __init__(self, tracker: Tracker) -> None:
        self.client = tracker.client
        self.experiment = self.client.create_experiment(unique(12))
        self.run = self.client.create_run(self.experiment).info.run_id
        self.model = self.client.create_registered_model(unique(12)).name
        self.client.create_model_version(self.model, source=f"runs:/{self.run}/x", run_id=self.run)

    def EXPERIMENT_NAME(self, text: str) -> str:
        return self.client.get_experiment(self.client.create_experiment(text)).name

    def EXPERIMENT_TAG(self, text: str) -> str:
        self.client.set_experiment_tag(self.experiment, "a", text)
        return self.client.get_experiment(self.experiment).tags["a"]

    def RUN_NAME(self, text: str) -> str:
        return self.client.create_run(self.experiment, run_name=text).info.run_name

    def RUN_TAG(self, text: str) -> str:
        self.client.log_batch(self.run, tags=[RunTag("a", text)])
        return self.client.get_run(self.run).data.tags["a"]

    def TAG_KEY(self, text: str) -> str:
        self.client.log_batch(self.run, tags=[RunTag(text, "a")])
        self.client.set_experiment_tag(self.experiment, text, "a")
        return next(key for key in self.client.get_run(self.run).data.tags if len(key) > 100)

    def PARAM(self, text: str) -> str:
        run = self.client.create_run(self.experiment).info.run_id
        self.client.log_batch(run, params=[Param("a", text)])
        return self.client.get_run(run).data.params["a"]

    def DATASET_NAME(self, text: str) -> str:
        return self.dataset(text, "1")[0]

    def DATASET_DIGEST(self, text: str) -> str:
        return self.dataset("a", text)[1]

    def dataset(self, name: str, digest: str) -> tuple[str, str]:
        run = self.client.create_run(self.experiment).info.run_id
        source = DatasetInput(Dataset(name, digest, "local", "{}"), [InputTag("mlflow.data.context", "training")])
        self.client.log_inputs(run, [source])
        dataset = self.client.get_run(run).inputs.dataset_inputs[0].dataset
        return dataset.name, dataset.digest

    def MODEL_NAME(self, text: str) -> str:
        return self.client.create_registered_model(text).name

    def MODEL_TAG(self, text: str) -> str:
        self.client.set_registered_model_tag(self.model, "a", text)
        return self.client.get_registered_model(self.model).tags["a"]

    def VERSION_TAG(self, text: str) -> str:
        self.client.set_model_version_tag(self.model, "1", "a", text)
        return self.client.get_model_version(self.model, "1").tags["a"]

    def DESCRIPTION(self, text: str) -> str:
        self.client.update_model_version(self.model, "1", text)
        self.client.update_registered_model(self.model, text)
        assert self.client.get_registered_model(self.model).description == text
        return self.client.get_model_version(self.model, "1").description

    def ALIAS(self, text: str) -> str:
        self.client.set_registered_model_alias(self.model, text, "1")
        return next(iter(self.client.get_registered_model(self.model).aliases))


TABLE = [name for name in vars(foreign) if name.startswith("LONGEST_") and name != "LONGEST_VIEW_KEY"]


@pytest.mark.parametrize("name", TABLE)
def test_mlflow_keeps_a_text_of_the_length_that_the_table_says_and_no_longer_one(tracker: Tracker, name: str) -> None:
    write: Callable[[str], str] = getattr(Raw(tracker), name.removeprefix("LONGEST_"))
    longest = unique(getattr(foreign, name))
    assert write(longest) == longest
    longer = unique(getattr(foreign, name) + 1)
    with suppress(MlflowException):
        assert write(longer) != longer, "cut by the server"


def test_mlflow_reads_the_variables_that_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_REQUEST_TIMEOUT", "HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(f"MLFLOW_{name}", "1")
    for name in ("ENABLE_ARTIFACTS_PROGRESS_BAR", "SUPPRESS_PRINTING_URL_TO_STDOUT"):
        monkeypatch.setenv(f"MLFLOW_{name}", "")
    foreign.configure(timeout=7, retries=3)
    assert environment_variables.MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 7
    assert environment_variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() == 3
    assert environment_variables.MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.get() is False
    assert environment_variables.MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.get() is True


@pytest.mark.parametrize(
    "variables",
    [
        {"MLFLOW_TRACKING_AWS_SIGV4": "true"},
        {"MLFLOW_TRACKING_INSECURE_TLS": "true", "MLFLOW_TRACKING_SERVER_CERT_PATH": "/x"},
    ],
)
def test_variables_that_make_every_request_an_error_are_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"^{min(variables)}.*cannot use what is set for http://mlflow:5000: "):
        Tracker("http://mlflow:5000")


def test_a_server_tells_its_version(tracking_uri: str) -> None:
    assert foreign.server_version(tracking_uri) == metadata.version("mlflow")


# Errors


@contextmanager
def answering(status: int, body: str) -> Iterator[MlflowClient]:
    """A client of a server that is not MLflow's."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        foreign.configure(timeout=10, retries=0)
        yield MlflowClient(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_a_server_gives_the_curves_of_many_runs_at_once_as_one_by_one(tracker: Tracker, monkeypatch) -> None:
    client = tracker.client
    experiment = client.create_experiment(unique(12))
    runs = [client.create_run(experiment).info.run_id for _ in range(3)]
    for place, run in enumerate(runs[:2]):
        tracker.log_epochs(run, [(step, 1000 * step, {"m": step / 3 + place, "n": 1.0}) for step in (2, 1, 3)])
    one_by_one = {run: tracker.curve(run, "m") for run in runs}
    assert [len(curve) for curve in one_by_one.values()] == [3, 3, 0]
    asked: list[Sequence[str]] = []
    histories = foreign.histories

    def count(uri: str, run_ids: Sequence[str], metric: str) -> list[tuple[str, int, float]] | None:
        asked.append(run_ids)
        return histories(uri, run_ids, metric)

    monkeypatch.setattr(foreign, "histories", count)
    assert curves(tracker, runs, "m") == one_by_one and asked == [runs]
    monkeypatch.setattr(foreign, "MOST_VALUES", 6)  # as if the answer had been cut off
    assert curves(tracker, runs, "m") == one_by_one
    assert histories(tracker.uri, ["f" * 32] * (foreign.MOST_RUNS + 1), "m") is None
    monkeypatch.setattr(foreign, "histories", lambda *asked: None)  # a server without the route
    assert curves(tracker, runs, "m") == one_by_one


@pytest.mark.parametrize("status", [200, 403, 418])
def test_an_answer_that_is_not_mlflows_is_read_off_its_clients_error(status: int) -> None:
    page = "<html>it's a page</html>"
    with answering(status, page) as client, pytest.raises((MlflowException, requests.RequestException)) as error:
        client.get_experiment("0")
    answer = foreign.answer(error.value)
    assert answer is not None and (answer.code, answer.status) == (None, status) and "a page" in answer.text


def test_an_answer_of_mlflow_has_its_code(tracker: Tracker) -> None:
    with pytest.raises(MlflowException) as error:
        tracker.client.get_run("0" * 32)
    answer = foreign.answer(error.value)
    assert answer is not None and (answer.status, answer.code) == (404, "RESOURCE_DOES_NOT_EXIST")


def test_a_server_that_cannot_be_reached_counts_as_one_in_trouble() -> None:
    with answering(200, "{}") as client:
        pass  # nothing listens there any more
    with pytest.raises(MlflowException) as error:
        client.get_experiment("0")
    answer = foreign.answer(error.value)
    assert answer is not None and answer.status == 500
    assert re.fullmatch(
        r"http://127.0.0.1:\d+/\S+: NewConnectionError: Connection refused", foreign.in_short(answer.text)
    )
    assert foreign.answer(requests.ConnectionError("no route")) is None


def test_the_servers_database_error_is_read_off_the_message(tracker: Tracker) -> None:
    with pytest.raises(MlflowException) as error:
        tracker.client.create_run(tracker.client.create_experiment(unique(12)), run_name="x" * 300)
    assert foreign.database_error(error.value.message) is psycopg.errors.StringDataRightTruncation
    assert foreign.database_error("(builtins.ValueError) nothing of Postgres") is None


# Files


def test_a_file_of_a_run_is_downloaded_and_deleted_and_a_missing_one_is_told(tracker: Tracker, tmp_path: Path) -> None:
    run = a_run(tracker.client)
    (tmp_path / "file.txt").write_text("text")
    tracker.client.log_artifact(run, str(tmp_path / "file.txt"), "folder")
    root = get_artifact_repository(foreign.STORE, tracking_uri=tracker.uri)
    uri = tracker.client.get_run(run).info.artifact_uri
    repository, path = tracker.repository(uri), f"{uri.removeprefix(foreign.STORE)}/folder/file.txt"
    assert uri.startswith(foreign.STORE)
    for where, name in ((repository, "folder/file.txt"), (root, path)):
        transfers.download_file(where, name, tmp_path / "back.txt")
        assert (tmp_path / "back.txt").read_text() == "text"
    transfers.delete_files(repository, "folder/file.txt")
    assert tracker.client.list_artifacts(run, "folder") == []
    with pytest.raises(requests.HTTPError) as error:
        transfers.download_file(repository, "folder/file.txt", tmp_path / "back.txt")
    assert transfers.is_missing(error.value)


def test_a_models_folder_takes_the_ids_of_model_and_run(tmp_path: Path) -> None:
    MLmodel().save(str(tmp_path / "MLmodel"))
    run_id = "12345678" * 4  # as a number, YAML would quote it
    foreign.adopt(tmp_path, model_id="m-1", run_id=run_id)
    model = MLmodel.load(str(tmp_path))
    assert (model.model_id, model.run_id, foreign.run_of(tmp_path)) == ("m-1", run_id, run_id)
    assert [file.name for file in tmp_path.iterdir()] == ["MLmodel"]


# The web page


@pytest.fixture(scope="module")
def page() -> str:
    """All scripts of the web page of the installed MLflow."""
    spec = importlib.util.find_spec("mlflow")
    assert spec is not None and spec.submodule_search_locations
    scripts = Path(spec.submodule_search_locations[0], "server", "js", "build", "static").rglob("*.js")
    return "\n".join(script.read_text(encoding="utf-8") for script in scripts)


def keys(content: object) -> Iterator[str]:
    """All field names of a JSON value."""
    if isinstance(content, dict):
        yield from (key for key in content if re.fullmatch(r"[A-Za-z]+", key))
        yield from (key for value in content.values() for key in keys(value))
    elif isinstance(content, list):
        yield from (key for value in content for key in keys(value))


def test_the_page_has_every_field_of_a_saved_view(page: str) -> None:
    kind, _, payload = foreign.view(["filters"]).partition(";")
    view = json.loads(zlib.decompress(b64decode(payload)))
    names = {
        *keys(view),
        view["runsHiddenMode"],
        foreign.CREATED,
        *(chart["type"] for chart in view["compareRunCharts"]),
    }
    assert f"{kind};" in page and len(names) > 40
    assert [name for name in sorted(names) if name not in page] == []


def test_the_page_has_every_route_and_tag_of_a_link(page: str) -> None:
    links = foreign.runs_link("", "1", view="v", charts=True) + foreign.experiments_link("", ["1", "2"], view="v")
    words = {*re.findall(r"[?&](\w+)=", links), "machine_learning", "CHART", "compare-experiments"}
    (experiment_kind,) = foreign.EXPERIMENT_KIND.items()
    words |= {*experiment_kind, foreign.view_tag("")}
    assert [word for word in sorted(words) if word not in page] == []
