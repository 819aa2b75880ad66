"""Everything that reaches into the inside of MLflow: what its public client neither offers nor promises.

Limits of its tables, the wording of its errors, the routes and saved views of its web page, the layout of its files,
and private calls. All of it was checked with MLflow 3.17; tests/service/test_tracking_foreign.py checks it with the
installed version. MLflow is imported where it is used, since that takes a second.
"""

import base64
import importlib
import json
import math
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg

from hpo import surroundings
from hpo.errors import SettingsError

# Limits. Characters of a text that the columns of MLflow's tables on Postgres and its own checks admit.
LONGEST_EXPERIMENT_TAG = 20_000  # a tag's value
LONGEST_RUN_NAME = 250
LONGEST_RUN_TAG = 8000
LONGEST_PARAM = 6000  # a param's value
LONGEST_DATASET_NAME = 500
LONGEST_DATASET_DIGEST = 36
LONGEST_MODEL_NAME = 256  # of a registered model
LONGEST_MODEL_TAG = 5000
LONGEST_VERSION_TAG = 100_000
LONGEST_DESCRIPTION = 5000  # of a registered model, or of a version of it
LONGEST_TAG_KEY = 250  # of any tag
LARGEST_BATCH, LARGEST_TAG_BATCH = 1000, 100  # metrics and tags of a request; tags of a request
MOST_RUNS, MOST_VALUES = 100, 25_000  # of one answer of `histories`
NOT_IN_MODEL_NAMES = re.compile(r"[/:.%\"']")  # of logged models
NOTE = "mlflow.note.content"  # tag with the description of a run or an experiment, Markdown

# Files.
STORE = "mlflow-artifacts:/"  # the root of the artifact store behind a server
LARGEST_MLMODEL = 2**16  # characters that are read of a model's MLmodel file; usual are two thousand
_RUN = re.compile(r"^run_id: ['\"]?([0-9a-f]{32})['\"]?$", re.MULTILINE)
PT2 = "data/model.pt2"  # the exported program, in the folder of a model in the pt2 flavour


def configure(*, retries: int, timeout: int | None = None) -> None:
    """Set MLflow's client up for this process: how often a request is sent again, and seconds until it fails."""
    if timeout is not None:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(timeout)
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = str(retries)
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"  # hpo has a display of its own on the terminal
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "2")  # of boto3: the retries are hpo's
    for what in (
        "UPLOAD",
        "DOWNLOAD",
    ):  # a server with a bucket would send its clients there, and may be alone to reach it
        os.environ.setdefault(f"MLFLOW_ENABLE_PROXY_MULTIPART_{what}", "false")
    _ask_once_for_databricks()


def _ask_once_for_databricks() -> None:
    """Take the provider of Databricks' headers out where it has none to give.

    The client asks it at each request, and it tries eleven imports each time: a fifth of a small request's CPU.
    """
    from mlflow.tracking.request_header import registry
    from mlflow.tracking.request_header.databricks_request_header_provider import DatabricksRequestHeaderProvider

    headers = registry._request_header_provider_registry
    headers._registry = [
        provider
        for provider in headers._registry
        if not isinstance(provider, DatabricksRequestHeaderProvider) or provider.in_context()
    ]


def require_usable(uri: str) -> None:
    """Raise SettingsError if the variables that are set make every request of MLflow's client an error."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds

    try:
        if get_default_host_creds(uri).aws_sigv4:
            importlib.import_module("requests_auth_aws_sigv4")
    except (MlflowException, ImportError) as error:
        names = ", ".join(surroundings.of_mlflow())
        raise SettingsError(f"{names}: MLflow's client cannot use what is set for {uri}: {error}") from None


def server_version(uri: str) -> str:
    """Return what the server says its version is. The client has no call for it."""
    answer = _request(uri, "/version", "GET", timeout=10)
    answer.raise_for_status()
    return str(answer.text).strip()


def _request(uri: str, route: str, method: str, **what: Any) -> Any:
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    return http_request(get_default_host_creds(uri), route, method, **what)


def log_batch(uri: str, run_id: str, metrics: Sequence[tuple[str, float, int, int]], tags: Mapping[str, str]) -> None:
    """Log metrics (name, value, milliseconds since 1970, step) and tags of a run, in as few requests as take them.

    The client's own call takes ten times the CPU: it turns every value into objects of four kinds, one after the other.
    """
    from mlflow.utils.rest_utils import verify_rest_response

    endpoint = "/api/2.0/mlflow/runs/log-batch"
    points = [{"key": key, "value": _number(value), "timestamp": ms, "step": step} for key, value, ms, step in metrics]
    words = [{"key": key, "value": value} for key, value in tags.items()]
    while points or words:
        now, words = words[:LARGEST_TAG_BATCH], words[LARGEST_TAG_BATCH:]
        room = LARGEST_BATCH - len(now)
        body = {"run_id": run_id, "metrics": points[:room], "tags": now}
        points = points[room:]
        answer = _request(uri, endpoint, "POST", json=body)
        json.loads(verify_rest_response(answer, endpoint).text)  # a login page is no JSON


def _number(value: float) -> float | str:
    """Return the number as MLflow's JSON has it."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def histories(uri: str, run_ids: Sequence[str], metric: str) -> list[tuple[str, int, float]] | None:
    """Return (run, step, value) of a metric of at most MOST_RUNS runs, the first MOST_VALUES of them.

    It is a route of the web page: the client asks for one run at a time. None if the server does not answer it so.
    """
    params = [("metric_key", metric), *(("run_id", run_id) for run_id in run_ids)]
    route = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"
    answer = _request(uri, route, "GET", params=params)
    if answer.status_code != 200:
        return None
    with suppress(ValueError, KeyError, TypeError):  # somebody else's answer
        return [(point["run_id"], int(point["step"]), float(point["value"])) for point in answer.json()["metrics"]]
    return None


# Errors


@dataclass(frozen=True)
class Answer:
    """What a server answered in place of what was asked for."""

    status: int  # of HTTP
    code: str | None  # MLflow's error_code; None if the answer is not MLflow's
    text: str


# How MLflow's client words an answer without MLflow's JSON.
_STATUS = re.compile(r"failed with error code (\d+) != \d+\. Response body: '(.*)'", re.DOTALL)
_NO_JSON = re.compile(r"not in a valid JSON format\. Response body: '(.*)'", re.DOTALL)
# How it words a connection that failed, and where in that the system's own words are.
_NO_CONNECTION = re.compile(r"API request to (\S+) failed with exception .*\(Caused by (\w+)\((.*)\)\)", re.DOTALL)
_CAUSE = re.compile(r"\[Errno -?\d+\] ([\w ]+)|'([^'<>]+)'$")
# How SQLAlchemy words an error of the server's database, such as (psycopg.errors.ReadOnlySqlTransaction).
_DRIVER = re.compile(r"\((?:\w+\.)+(\w+)\)")


def answer(error: Exception) -> Answer | None:
    """Return the answer that an error of MLflow's client tells of; None if there was none.

    MLflow wraps some errors of the connection: these count as an answer with status 500.
    """
    import requests
    from mlflow.exceptions import MlflowException, RestException

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return Answer(error.response.status_code, error_code(error.response.text), error.response.text)
    if isinstance(error, MlflowException):
        if not isinstance(error, RestException):
            if match := _STATUS.search(error.message):
                return Answer(int(match[1]), None, match[2])
            if match := _NO_JSON.search(error.message):
                return Answer(200, None, match[1])
        return Answer(error.get_http_status_code(), error.error_code, error.message)
    if isinstance(error, json.JSONDecodeError):  # requests has one that is both
        return Answer(200, None, error.doc)
    return None


def in_short(text: str) -> str:
    """Return address and cause of a connection that failed, of all that MLflow's client says about it."""
    match = _NO_CONNECTION.search(text)
    if match is None:
        return text
    cause = _CAUSE.search(match[3])
    return f"{match[1]}: {match[2]}" + (f": {(cause[1] or cause[2]).strip()}" if cause else "")


def error_code(body: str) -> str | None:
    """Return the error_code of MLflow's JSON; None if the body of an answer is something else."""
    try:
        content = json.loads(body)
    except ValueError:
        return None
    return content.get("error_code") if isinstance(content, dict) else None


def database_error(text: str) -> type[psycopg.Error] | None:
    """Return the class of the server's database error that a message names; None if it names none of Postgres."""
    match = _DRIVER.search(text)
    kind = getattr(psycopg.errors, match[1], None) if match else None  # other drivers have some of these names, too
    return kind if isinstance(kind, type) and issubclass(kind, psycopg.Error) else None


# Files


def adopt(folder: Path, *, model_id: str, run_id: str) -> None:
    """Write the ids into the MLmodel file of a model's folder, at once or not at all.

    MLflow's own `log_model` does so; it saves and uploads in one step, and leaves nothing to hash between them.
    """
    import yaml  # type: ignore[import-untyped]  # of MLflow
    from mlflow.models import Model  # 0.3 s, and only here

    # Not Model.load: in the name of a folder it takes %41 for an A.
    content = Model.from_dict(yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8")))
    content.model_id, content.run_id = model_id, run_id
    new = folder / "MLmodel.new"
    content.save(str(new))
    new.replace(folder / "MLmodel")


def run_of(folder: Path) -> str | None:
    """Return the id of the run that a model's folder names in its MLmodel file, as `adopt` wrote it; None if none."""
    try:
        with (folder / "MLmodel").open(encoding="utf-8") as file:
            match = _RUN.search(file.read(LARGEST_MLMODEL))
    except (OSError, ValueError):
        return None
    return match[1] if match else None


# The web page

EXPERIMENT_KIND = {"mlflow.experimentKind": "custom_model_development"}  # else the page opens as one of a chat bot
_SHARED = "mlflow.sharedViewState."
LONGEST_VIEW_KEY = LONGEST_TAG_KEY - len(_SHARED)


def view_tag(key: str) -> str:
    """Return the tag of an experiment that holds the shared view with this key."""
    return f"{_SHARED}{key}"


def runs_link(uri: str, experiment_id: str, *, view: str, charts: bool = False) -> str:
    """Return the page of an experiment's runs in a shared view, as a list or as charts."""
    query = f"workflowType=machine_learning&viewStateShareKey={view}" + ("&compareRunsMode=CHART" if charts else "")
    return f"{uri}/#/experiments/{experiment_id}/runs?{query}"


def experiments_link(uri: str, experiment_ids: Sequence[str], *, view: str) -> str:
    """Return the page of the runs of several experiments in a shared view, which any of them may be asked for."""
    chosen = quote(json.dumps(list(experiment_ids), separators=(",", ":")))
    query = f"experiments={chosen}&workflowType=machine_learning&viewStateShareKey={view}"
    return f"{uri}/#/compare-experiments/s?{query}"


def run_link(experiment_id: str, run_id: str) -> str:
    """Return the page of a run, for a link within MLflow's pages."""
    return f"#/experiments/{experiment_id}/runs/{run_id}"


def file_link(experiment_id: str, run_id: str, path: str) -> str:
    """Return the page of a file of a run, for a link within MLflow's pages."""
    return f"{run_link(experiment_id, run_id)}/artifacts/{path}"


SORT_KEY = "best_val_nmse"
HEAD = ("best_val_r2", "test_nmse")  # beside the score that sorts; the page cuts their last digits off
OTHERS = ("best_val_mse", "best_val_nrmse", "test_r2", "train_seconds")
RANK = "hpo.rank"  # tag: place in the order of the study's configurations, set when it closes
CURVES = ("val/nmse", "train/nmse")
SECTION = "hpo-comparison"
NAME, CREATED, MODELS = "attributes.`Run Name`", "runDateAndNestInfo", "attributes.`Models`"
# Widths in pixels
NUMBER = 162  # of a number with its sign and all its digits: the page rounds none
LETTER, MARGIN = 6, 28  # of a heading


def view(params: Sequence[str], *, trials_only: bool = False, without: Sequence[str] = ()) -> str:
    """Return the value of a view's tag: `params` and the summary scores as columns, the best run first, with charts.

    Rank, name and scores come first: they can be seen without scrolling on a laptop, even beside the panel that MLflow
    opens on a first visit; the parameters follow. Runs of `without` are left out. The charts show the first ten runs of
    the list: with `trials_only` the best ten trials. The fields are those of ExperimentPageUIState,
    ExperimentPageSearchFacetsState and RunsChartsCardConfig of the page; the value is their JSON, compressed.
    """
    # The study's own run has no scores. The baseline predictors stay in a list, where every score is to be seen beside
    # theirs; they have no curves.
    others = [f"tags.`hpo.kind` != '{kind}'" for kind in ("study", "evaluation")]
    chosen = "tags.`hpo.kind` = 'trial'" if trials_only else " AND ".join(others)
    if without:
        chosen += f" AND attributes.run_id NOT IN ({', '.join(repr(run_id) for run_id in without)})"
    columns = {f"tags.`{RANK}`": len(RANK) * LETTER + MARGIN, f"metrics.`{SORT_KEY}`": NUMBER - LETTER}  # no sign
    columns |= {f"metrics.`{name}`": len(name) * LETTER + MARGIN for name in HEAD}
    columns |= {f"params.`{name}`": max(len(name), 6) * LETTER + MARGIN for name in params}
    columns |= {"metrics.`best_epoch`": 10 * LETTER + MARGIN}
    columns |= {f"metrics.`{name}`": NUMBER for name in OTHERS}
    text = json.dumps(
        {
            "searchFilter": chosen,
            "orderByKey": f"metrics.`{SORT_KEY}`",
            "orderByAsc": True,
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "datasetsFilter": [],
            "modelVersionFilter": "All Runs",
            "selectedColumns": [*columns, MODELS],
            "columnOrder": [NAME, CREATED, *columns, MODELS],
            "columnWidths": {NAME: 216, CREATED: 48, MODELS: 160} | columns,
            "runsHiddenMode": "FIRST_10_RUNS",
            "compareRunCharts": _charts(params),
            "compareRunSections": [
                {"uuid": SECTION, "name": "Comparison", "columns": 2, "cardHeight": 360}
                | {"display": True, "isReordered": True, "deleted": False}
            ],
            "isAccordionReordered": True,
            "hideEmptyCharts": True,
            "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        },
        separators=(",", ":"),
    )
    return "deflate;" + base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _charts(params: Sequence[str]) -> list[dict[str, Any]]:
    """Return curves on a logarithmic axis, a scatter of best scores and epochs, and parallel coordinates."""
    # The page would smooth a curve that does not say how: what is seen must be what was measured.
    line = {"scaleType": "log", "lineSmoothness": 0, "useGlobalLineSmoothing": True, "useGlobalXaxisKey": True}
    curves = [_chart("LINE", key, metricKey=key, selectedMetricKeys=[key], **line) for key in CURVES]
    axes = ({"key": "best_epoch", "type": "METRIC"}, {"key": SORT_KEY, "type": "METRIC"})
    scatter = _chart("SCATTER", SORT_KEY, xaxis=axes[0], yaxis=axes[1])
    searched = [name for name in params if name != "config"]  # which is the number of the configuration
    parallel = _chart("PARALLEL", SORT_KEY, selectedParams=searched, selectedMetrics=[SORT_KEY], showAllRuns=True)
    return [*curves, parallel, scatter, _chart("BAR", SORT_KEY, metricKey=SORT_KEY)]


def _chart(kind: str, of: str, **fields: Any) -> dict[str, Any]:
    common = {"uuid": f"hpo-{kind.lower()}-{of}", "type": kind, "metricSectionId": SECTION}
    return common | {"deleted": False, "isGenerated": False} | fields
