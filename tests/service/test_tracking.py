"""hpo.tracking against a real MLflow server."""

import socket
import threading
import time
import uuid
import zlib
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import loads
from pathlib import Path
from urllib.parse import parse_qs

import pytest
import records
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException, RestException
from mlflow.models import Model as MLmodel
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from proxy import MODES, proxy
from shell import at_once

from hpo.errors import NotFound, ServiceError, StudyConflict
from hpo.files import sha256_of
from hpo.queue import Job, State
from hpo.tracking import experiments, links, logged_models
from hpo.tracking.client import KEY, RACES, Tracker
from hpo.tracking.errors import Refused, StoreRefuses, TrackingUnavailable, server

PARAMS = ("filters", "kernel_size", "dropout", "learning_rate")
START = 1_750_000_000_000  # milliseconds since 1970


@pytest.fixture
def tracker(tracking_uri: str) -> Tracker:
    return Tracker(tracking_uri)


@pytest.fixture
def experiment(tracker: Tracker) -> str:
    return experiments.ensure(tracker, unique("study"), description="text", params=PARAMS, owner="here")


@pytest.fixture
def run(tracker: Tracker, experiment: str) -> str:
    return ensure_run(tracker, experiment)


def unique(name: str) -> str:
    return f"{name}-{uuid.uuid4().hex[:8]}"


def ensure_run(tracker: Tracker, experiment: str, key: str = "trial-0", **fields: object) -> str:
    given = {"params": {"filters": 8}, "tags": {"attempt": 1}} | fields
    return tracker.ensure_run(experiment, key=key, name="grid/0 f8", kind="trial", start_ms=START, **given)  # type: ignore[arg-type]


# Experiments


def test_two_creators_at_once_share_one_experiment(tracking_uri: str) -> None:
    name = unique("race")
    ids = at_once(
        *[lambda: experiments.ensure(Tracker(tracking_uri), name, description="d", params=PARAMS, owner="here")] * 4
    )
    assert len(set(ids)) == 1


def test_the_experiment_opens_on_columns_of_the_parameters_and_scores_best_first(tracker: Tracker) -> None:
    name = unique("view")
    experiment = experiments.ensure(tracker, name, description="first", params=PARAMS, owner="here")
    assert experiments.ensure(tracker, name, description="second", params=PARAMS, owner="here") == experiment
    tags = tracker.client.get_experiment(experiment).tags
    charts = view_of(tags, links.charts(tracker.uri, experiment))
    assert charts["searchFilter"] == "tags.`hpo.kind` = 'trial'", "predictors have no curves"
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert tags["mlflow.note.content"] == "second"
    view = view_of(tags, links.trials(tracker.uri, experiment))
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`best_val_nmse`", True)
    columns = view["selectedColumns"]
    scores = ["metrics.`best_val_nmse`", "metrics.`best_val_r2`", "metrics.`test_nmse`"]
    assert columns[: 4 + len(PARAMS)] == ["tags.`hpo.rank`", *scores, *(f"params.`{name}`" for name in PARAMS)]
    assert {"metrics.`best_val_mse`", "metrics.`best_val_r2`", "metrics.`train_seconds`"} <= set(columns)
    assert set(columns) <= set(view["columnWidths"])
    curves = [chart for chart in view["compareRunCharts"] if chart["type"] == "LINE"]
    assert {curve["metricKey"] for curve in curves} == {"train/nmse", "val/nmse"}
    assert {(curve["scaleType"], curve["lineSmoothness"]) for curve in curves} == {("log", 0)}


def view_of(tags: dict[str, str], link: str) -> dict:
    """The saved view that a link opens."""
    key = parse_qs(link.partition("?")[2])["viewStateShareKey"][0]
    kind, _, payload = tags[f"mlflow.sharedViewState.{key}"].partition(";")
    assert kind == "deflate"
    return loads(zlib.decompress(b64decode(payload)))


def test_studies_are_compared_through_a_view_of_their_own_that_each_of_them_holds(tracker: Tracker) -> None:
    ids = [
        experiments.ensure(tracker, unique("compared"), description="d", params=PARAMS, owner="here") for _ in range(2)
    ]
    studies = [
        records.facts(experiment_id=experiment, predictor_run_ids={"mean": f"mean-{experiment}"}) for experiment in ids
    ]
    link = experiments.comparison_link(tracker, studies, ["model.family", *PARAMS])
    assert experiments.comparison_link(tracker, studies, ["model.family", *PARAMS]) == link
    assert loads(parse_qs(link.partition("?")[2])["experiments"][0]) == ids
    for experiment in ids:
        tags = tracker.client.get_experiment(experiment).tags
        view = view_of(tags, link)
        assert view["selectedColumns"][4:6] == ["params.`model.family`", f"params.`{PARAMS[0]}`"]
        assert view["searchFilter"].endswith(f" AND attributes.run_id NOT IN ('mean-{ids[1]}')"), "each baseline once"
        assert "params.`model.family`" not in view_of(tags, links.trials(tracker.uri, experiment))["selectedColumns"]


def test_the_views_filter_shows_trials_and_predictors_but_not_the_studys_own_run(
    tracker: Tracker, experiment: str
) -> None:
    kinds = ("trial", "predictor", "study")
    ids = [
        tracker.ensure_run(experiment, key=k, name=k, kind=k, params={}, tags={}, start_ms=START)  # type: ignore[arg-type]
        for k in kinds
    ]
    shown = tracker.client.search_runs([experiment], "tags.`hpo.kind` != 'study'")
    assert {found.info.run_id for found in shown} == set(ids[:2])


def test_an_experiment_deleted_in_mlflow_is_not_revived(tracker: Tracker) -> None:
    name = unique("deleted")
    experiment = experiments.ensure(tracker, name, description="d", params=PARAMS, owner="here")
    tracker.client.delete_experiment(experiment)
    with pytest.raises(StudyConflict, match=f"experiments restore --experiment-id {experiment}"):
        experiments.ensure(tracker, name, description="d", params=PARAMS, owner="here")
    assert tracker.client.get_experiment(experiment).lifecycle_stage == "deleted"


def test_an_experiment_of_another_database_is_not_used(tracker: Tracker) -> None:
    name = unique("theirs")
    experiments.ensure(tracker, name, description="d", params=PARAMS, owner="there")
    with pytest.raises(StudyConflict, match="not made from this database"):
        experiments.ensure(tracker, name, description="d", params=PARAMS, owner="here")


@pytest.mark.parametrize("deleted_in_mlflow", [False, True])
def test_after_deleting_a_study_its_name_is_free_and_its_files_are_gone(
    tracker: Tracker, tmp_path: Path, deleted_in_mlflow: bool
) -> None:
    name = unique("gone")
    experiment = experiments.ensure(tracker, name, description="d", params=PARAMS, owner="here")
    run = ensure_run(tracker, experiment)
    file = tmp_path / "table.csv"
    file.write_text("1,2\n")
    tracker.upload(run, file, "tables")
    if deleted_in_mlflow:
        tracker.client.delete_experiment(experiment)
    experiments.delete(tracker, experiment)
    experiments.delete(tracker, experiment)
    assert tracker.client.list_artifacts(run) == []
    assert experiments.ensure(tracker, name, description="d", params=PARAMS, owner="here") != experiment
    assert experiments.exists(tracker, experiment), "until `mlflow gc` removes it for good"
    gone = str(2**31 - 1)
    assert not experiments.exists(tracker, gone)
    experiments.delete(tracker, gone)


# Runs


def test_asking_again_for_a_run_finds_it(tracker: Tracker, experiment: str) -> None:
    first = ensure_run(tracker, experiment)
    assert ensure_run(tracker, experiment, tags={"attempt": 2}) == first
    found = tracker.client.get_run(first)
    assert found.data.params == {"filters": "8"}
    assert found.data.tags["attempt"] == "2"
    assert (found.info.start_time, found.info.run_name) == (START, "grid/0 f8")


def test_a_hundred_and_fifty_params_and_tags_all_arrive(tracker: Tracker, experiment: str) -> None:
    values = {f"p{i}": i for i in range(150)}
    run = ensure_run(tracker, experiment, params=values, tags=values)
    data = tracker.client.get_run(run).data
    assert data.params == {name: str(value) for name, value in values.items()}
    assert data.tags.items() >= data.params.items()


def test_a_param_never_changes(tracker: Tracker, experiment: str) -> None:
    ensure_run(tracker, experiment, params={"filters": 8})
    with pytest.raises(MlflowException, match="Changing param values is not allowed"):
        ensure_run(tracker, experiment, params={"filters": 16})


def test_of_several_creators_at_once_the_run_that_is_kept_is_found_from_then_on(
    tracking_uri: str, tracker: Tracker, experiment: str
) -> None:
    def make() -> str:
        while True:
            try:
                return ensure_run(Tracker(tracking_uri), experiment)
            except TrackingUnavailable:  # the server refuses params that another is writing: the caller comes back
                continue

    made = at_once(*[make] * 4)
    tracker.delete_other_runs(experiment, "trial-0", keep=made[0])
    assert ensure_run(tracker, experiment) == made[0]
    assert [run.info.run_id for run in tracker.client.search_runs([experiment])] == [made[0]]


def test_epochs_sent_again_double_nothing(tracker: Tracker, run: str) -> None:
    rows = [(n, START + n, {"train/nmse": 1 / n, "val/nmse": 2 / n, "lr": 1e-3, "s": 0.1}) for n in range(1, 301)]
    tracker.log_epochs(run, rows)  # 1,200 values: more than one request takes
    tracker.log_epochs(run, rows[:200])
    tracker.log_epochs(run, rows[100:])
    for name in ("train/nmse", "val/nmse", "lr", "s"):
        history = sorted(tracker.client.get_metric_history(run, name), key=lambda metric: metric.step)
        assert [(m.step, m.timestamp, m.value) for m in history] == [(n, time_ms, v[name]) for n, time_ms, v in rows]


def test_values_that_are_not_finite_are_kept_once_each(tracker: Tracker, run: str) -> None:
    rows = [(1, START, {"a": float("nan"), "b": float("inf"), "c": -float("inf")}), (2, START, {"a": 1.0})]
    tracker.log_epochs(run, rows)
    tracker.log_epochs(run, rows)
    first, second = sorted(tracker.client.get_metric_history(run, "a"), key=lambda metric: metric.step)
    assert first.value != first.value
    assert second.value == 1.0
    largest = 1.7976931348623157e308  # of a double
    assert [metric.value for metric in tracker.client.get_metric_history(run, "b")] == [largest]
    assert [metric.value for metric in tracker.client.get_metric_history(run, "c")] == [-largest]


def test_a_run_that_goes_on_after_being_scheduled_gets_the_end_of_its_last_attempt(tracker: Tracker, run: str) -> None:
    for status in ("SCHEDULED", "RUNNING", "SCHEDULED"):
        tracker.set_status(run, status)  # type: ignore[arg-type]
        info = tracker.client.get_run(run).info
        assert (info.status, info.end_time) == (status, None)
    tracker.set_status(run, "FINISHED", end_ms=START + 50_000)
    info = tracker.client.get_run(run).info
    assert (info.status, info.end_time) == ("FINISHED", START + 50_000)


def test_nothing_is_printed(tracker: Tracker, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    tracker.set_status(run, "FINISHED")
    assert capsys.readouterr() == ("", "")


def test_the_data_set_is_shown_once(tracker: Tracker, run: str) -> None:
    for _ in range(2):
        tracker.log_dataset(run, name="default", digest="a" * 64, source='{"folder": "default"}')
    (shown,) = tracker.client.get_run(run).inputs.dataset_inputs
    assert (shown.dataset.name, shown.dataset.digest) == ("default", "a" * 36)


# Files


def test_a_file_comes_back_as_it_was_and_can_be_deleted(tracker: Tracker, run: str, tmp_path: Path) -> None:
    file = tmp_path / "state 1.safetensors"
    file.write_bytes(bytes(range(256)) * 100)
    assert tracker.upload(run, file, "checkpoints") == f"runs:/{run}/checkpoints/{file.name}"
    path = f"checkpoints/{file.name}"
    got = tracker.download_artifact(run, path, tmp_path / "cache")
    assert got == tmp_path / "cache" / file.name
    assert got.read_bytes() == file.read_bytes()
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [file.name]
    tracker.upload(run, file, "")
    tracker.delete_artifact(run, path)
    tracker.delete_artifact(run, path)
    with pytest.raises(NotFound, match=r"no file checkpoints/state 1\.safetensors"):
        tracker.download_artifact(run, path, tmp_path / "cache")
    assert tracker.download_artifact(run, file.name, tmp_path / "cache") == got


def test_a_store_is_proved_and_nothing_stays(tracking_uri, tmp_path):
    tracker = Tracker(tracking_uri)
    experiment = tracker.client.create_experiment(f"proved-{uuid.uuid4()}")
    root = tracker.repository(tracker.client.get_experiment(experiment).artifact_location)
    experiments.prove_store(tracker, experiment, tmp_path)
    assert root.list_artifacts() == [] and list(tmp_path.iterdir()) == []
    assert tracker.client.search_runs([experiment]) == []
    with proxy(tracking_uri) as between:
        tracker = Tracker(between.url)
        between.set("503", only="PUT /api/2.0/mlflow-artifacts/")
        with pytest.raises(StoreRefuses):
            experiments.prove_store(tracker, experiment, tmp_path)
        between.set("html", only="GET /api/2.0/mlflow-artifacts/artifacts/")
        with pytest.raises(TrackingUnavailable, match="returns another"):
            experiments.prove_store(tracker, experiment, tmp_path)
        between.set("403", only="DELETE")
        experiments.prove_store(tracker, experiment, tmp_path)
        assert len(root.list_artifacts()) == 1, "a server that deletes nothing keeps one file of a process"
        between.set(None)
        experiments.prove_store(tracker, experiment, tmp_path)
    assert root.list_artifacts() == [] and list(tmp_path.iterdir()) == []


def test_a_whole_folder_of_a_run_can_be_deleted(tracker: Tracker, run: str, tmp_path: Path) -> None:
    for name in ("1", "2"):
        (tmp_path / name).write_text(name)
        tracker.upload(run, tmp_path / name, "checkpoints")
    tracker.delete_artifact(run, "checkpoints")
    tracker.delete_artifact(run, "checkpoints")
    assert tracker.client.list_artifacts(run) == []


# Models


def model_folder(folder: Path, weights: bytes = b"weights") -> Path:
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "model.pt2").write_bytes(weights)
    MLmodel().save(str(folder / "MLmodel"))
    return folder


def test_a_model_has_its_trials_name_in_characters_that_mlflow_takes(tracker: Tracker, experiment: str) -> None:
    point = {"dropout": 0.2}
    for study, repeat, expected in (("grid", 0, "grid-22"), ("my.grid%+1", 2, "my-grid-+1-22-2")):
        job = Job(
            id=1, study=study, kind="trial", number=7, repeat=repeat, config=22, cost=1.0,
            spec=records.spec(point=point),
            state=State.RUNNING, attempt=1, fence=1, worker="w", run_id=None, checkpoint=None, result=None, reason=None,
            mirrored=True, alive=True, epochs=0, changed_at=0.0,
        )  # fmt: skip
        assert logged_models.name_of(job.run_name, job.repeat) == expected
        assert tracker.client.create_logged_model(experiment, expected).name == expected


def test_a_model_logged_again_is_the_one_that_was_finished(tracker: Tracker, experiment: str, tmp_path: Path) -> None:
    run = ensure_run(tracker, experiment)
    folder = model_folder(tmp_path / "a")
    model = logged_models.log(tracker, run, experiment, folder, name="cnn", key="trial-0")
    assert set(model.sha256) == {"MLmodel", "data/model.pt2"}
    assert model.sha256["data/model.pt2"] == sha256_of(folder / "data" / "model.pt2")
    other = model_folder(tmp_path / "b", b"other weights")
    assert logged_models.log(tracker, run, experiment, other, name="cnn", key="trial-0") == model
    logged = tracker.client.get_logged_model(model.model_id)
    assert (logged.status, logged.source_run_id) == (LoggedModelStatus.READY, run)
    assert MLmodel.load(str(folder)).model_id == model.model_id
    outputs = tracker.client.get_run(run).outputs.model_outputs
    assert [output.model_id for output in outputs] == [model.model_id]


def test_a_model_left_unfinished_is_replaced(tracker: Tracker, experiment: str, tmp_path: Path) -> None:
    run = ensure_run(tracker, experiment)
    left = tracker.client.create_logged_model(experiment, "cnn", source_run_id=run, tags={KEY: "trial-0"})
    model = logged_models.log(tracker, run, experiment, model_folder(tmp_path / "a"), name="cnn", key="trial-0")
    found = tracker.client.search_logged_models([experiment])
    assert [logged.model_id for logged in found] == [model.model_id] != [left.model_id]


# Servers that are away


@contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """A server that sends `answer` to every request, or none at all."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                    connections.append(connection)
                    if answer is not None:
                        connection.recv(65536)
                        connection.sendall(answer)
                except OSError:
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in connections:
                connection.close()


def test_a_server_that_is_not_there_is_unavailable_at_once(tmp_path: Path) -> None:
    with listening(None) as uri:
        pass  # now nobody listens on that port
    tracker, start = Tracker(uri), time.monotonic()
    with pytest.raises(TrackingUnavailable):
        tracker.log_epochs("0" * 32, [(1, START, {"a": 1.0})])
    with pytest.raises(TrackingUnavailable):
        tracker.upload("0" * 32, tmp_path / "x", "")
    assert time.monotonic() - start < 20, "mlflow's own retries take minutes"


def test_a_server_that_does_not_answer_is_unavailable_after_the_timeout() -> None:
    with listening(None) as uri:
        tracker, start = Tracker(uri, timeout=1), time.monotonic()
        with pytest.raises(TrackingUnavailable):
            tracker.set_status("0" * 32, "RUNNING")
        assert 0.9 < time.monotonic() - start < 20


@pytest.mark.parametrize("status", ["500 Internal Server Error", "503 Service Unavailable", "429 Too Many Requests"])
def test_a_server_in_trouble_is_unavailable_and_asked_once(status: str) -> None:
    answer = f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
    with listening(answer) as uri, pytest.raises(TrackingUnavailable):
        experiments.ensure(Tracker(uri, timeout=2), "grid", description="", params=(), owner="here")


def tell(tracker: Tracker, experiment: str, run: str, file: Path) -> dict[str, Callable[[], object]]:
    """One call of each kind: what MLflow's API answers in JSON, artifacts, and its plain text."""
    return {
        "post": lambda: tracker.set_tags(run, {"a": 1}),
        "get": lambda: tracker.tags(run),
        "search": lambda: tracker.runs(experiment, kind="trial"),
        "upload": lambda: tracker.upload(run, file, "tables"),
        "download": lambda: tracker.download_artifact(run, "tables/table.csv", file.parent / "downloaded"),
        "list": lambda: tracker.files(run, "tables"),
        "delete": lambda: tracker.delete_artifact(run, "tables/none.csv"),
        "delete runs": lambda: tracker.delete_other_runs(experiment, "trial-0", keep="none"),
        "version": tracker.require_version,
    }


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_that_is_not_mlflows_says_nothing_of_what_was_asked_for(
    tracking_uri: str, tmp_path: Path, mode: str
) -> None:
    file = tmp_path / "table.csv"
    file.write_text("1,2\n")
    with proxy(tracking_uri) as between:
        tracker = Tracker(between.url)
        experiment = experiments.ensure(tracker, unique("gate"), description="d", params=(), owner="here")
        run = ensure_run(tracker, experiment)
        tracker.upload(run, file, "tables")
        calls = tell(tracker, experiment, run, file)
        between.set(mode)
        for name, call in calls.items():
            if name == "delete" and mode in ("login", "html"):
                continue  # a page that says all is well: what stays is found by `hpo doctor`
            with pytest.raises(TrackingUnavailable):
                call()
        between.set(mode, only="/mlflow-artifacts/")
        with pytest.raises(StoreRefuses):
            tracker.upload(run, file, "tables")
        with pytest.raises(StoreRefuses):
            logged_models.log(tracker, run, experiment, model_folder(tmp_path / mode), name="cnn", key=mode)
        between.set(mode, only="GET /api/2.0/mlflow-artifacts/artifacts/")  # the file itself, not the listing
        with pytest.raises(TrackingUnavailable):
            tracker.download_artifact(run, "tables/table.csv", tmp_path / "downloaded")
        between.set(None)
        assert tracker.tags(run)["attempt"] == "1"
        assert tracker.download_artifact(run, "tables/table.csv", tmp_path / "downloaded").read_text() == "1,2\n"


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("401", r"answers 401 \(You are not logged in\.\): are user and password right"),
        ("403", r"answers 403 \(403 Forbidden\): this user may not do that"),
        ("host", "its --allowed-hosts must have it"),
        ("404", "no MLflow server is there"),
        ("login", r"answers with a web page \(User, password\): a login"),
        ("413", "client_max_body_size"),
    ],
)
def test_an_answer_of_a_gateway_is_told_in_one_line_with_its_likely_cause(
    tracking_uri: str, mode: str, words: str
) -> None:
    with proxy(tracking_uri) as between, between.answering(mode), pytest.raises(Refused, match=words) as refused:
        Tracker(between.url).runs("0", kind="trial")
    assert "<" not in str(refused.value) and "\n" not in str(refused.value)


def test_trouble_of_mlflows_own_database_is_told_from_a_wrong_request() -> None:
    for text, away in [
        ("(psycopg.errors.ReadOnlySqlTransaction) cannot execute INSERT in a read-only transaction", True),
        ("(raised as a result of Query-invoked autoflush)\n(psycopg2.errors.InsufficientPrivilege) denied", True),
        ("(psycopg.errors.StringDataRightTruncation) value too long for type character varying(250)", False),
        ("(psycopg.errors.UniqueViolation) duplicate key", False),
        ("a name is missing", False),
    ]:
        with pytest.raises(TrackingUnavailable if away else RestException), server():
            raise RestException({"error_code": "BAD_REQUEST", "message": text})


def test_a_refusal_is_not_taken_for_an_outage(tracker: Tracker) -> None:
    with pytest.raises(MlflowException, match="not found"):
        tracker.set_tags("0" * 32, {"a": 1})


def test_what_is_refused_as_a_conflict_is_tried_again_but_not_without_end(
    tracker: Tracker, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MlflowException("(psycopg2.errors.UniqueViolation) odd", error_code=BAD_REQUEST)

    fields = {"name": "cells", "digest": "0" * 36, "source": "{}"}
    for _ in range(2):  # what was written in the end counts as no refusal
        monkeypatch.setattr(tracker.client, "log_inputs", refuse)
        for _ in range(RACES):
            with pytest.raises(TrackingUnavailable, match="another worker is writing the data set cells"):
                tracker.log_dataset(run, **fields)
        monkeypatch.undo()
        tracker.log_dataset(run, **fields)
    monkeypatch.setattr(tracker.client, "log_inputs", refuse)
    for _ in range(RACES):
        with pytest.raises(TrackingUnavailable):
            tracker.log_dataset(run, **fields)
    with pytest.raises(MlflowException, match="odd"):
        tracker.log_dataset(run, **fields)


def test_a_server_of_another_major_version_is_refused(tracker: Tracker) -> None:
    tracker.require_version()
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\n2.9.2"
    with listening(answer) as uri, pytest.raises(ServiceError, match=r"expected version 3.*found '2.9.2'"):
        Tracker(uri).require_version()


def test_only_the_recorded_one_of_two_finished_models_is_kept(
    tracker: Tracker, experiment: str, tmp_path: Path
) -> None:
    run = ensure_run(tracker, experiment)
    first = logged_models.log(tracker, run, experiment, model_folder(tmp_path / "a"), name="cnn", key="one writer")
    second = logged_models.log(tracker, run, experiment, model_folder(tmp_path / "b"), name="cnn", key="another")
    for _ in range(2):  # safe to repeat
        logged_models.delete_others(tracker, run, experiment, keep=second.model_id)
    assert (
        [model.model_id for model in logged_models.of_experiment(tracker, experiment)]
        == [second.model_id]
        != [first.model_id]
    )
