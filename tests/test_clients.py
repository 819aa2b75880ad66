"""Plain clients - Optuna, optuna-dashboard, MLflow's REST and command line - show the same trials as `hpo`."""

import json
import subprocess
import sys
import urllib.request
from io import BytesIO

import cells
import optuna_dashboard
import pytest
from shell import Shell

from hpo.sampling import storage

pytestmark = pytest.mark.acceptance


@pytest.fixture
def closed(shell: Shell, data, tmp_path) -> str:
    """The name of a study of four points that has run to its end."""
    shell.hpo("run", "--study", cells.study(tmp_path, "clients", data=data, epochs=2))
    return "clients"


def mlflow(shell: Shell, *words: str) -> str:
    command = [sys.executable, "-m", "mlflow", *words]
    return subprocess.run(command, env=shell.environment, capture_output=True, text=True, check=True).stdout


def test_every_plain_client_shows_the_trials(shell, closed, tmp_path):
    trials = shell.json("trials", "--study", closed)
    runs = {trial["run_id"] for trial in trials}
    experiment = shell.json("studies")[0]["experiment_id"]
    assert len(trials) == len(runs) == 4

    listed = mlflow(shell, "runs", "list", "--experiment-id", experiment)
    assert all(run in listed for run in runs)

    request = urllib.request.Request(
        f"{shell.tracking_uri}/api/2.0/mlflow/runs/search",
        data=json.dumps({"experiment_ids": [experiment], "filter": "tags.`hpo.kind` = 'trial'"}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        found = json.load(answer)["runs"]
    scores = {
        run["info"]["run_id"]: {each["key"]: each["value"] for each in run["data"]["metrics"]}["best_val_nmse"]
        for run in found
    }
    assert scores == {trial["run_id"]: trial["value"] for trial in trials}

    study_run = shell.queue.study(closed).facts["study_run_id"]
    folder = tmp_path / "tables"
    words = ("--run-id", study_run, "--artifact-path", "tables", "--dst-path", str(folder))
    mlflow(shell, "artifacts", "download", *words)
    assert len((folder / "tables" / "trials.csv").read_text().splitlines()) == 5

    store = storage(shell.database_url)
    app = optuna_dashboard.wsgi(store)
    status: list[str] = []
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/api/studies/1",
        "QUERY_STRING": "after=0",
        "SERVER_NAME": "x",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.input": BytesIO(),
        "wsgi.errors": sys.stderr,
        "wsgi.url_scheme": "http",
    }
    body = b"".join(app(environ, lambda code, headers, *rest: status.append(code)))
    shown = json.loads(body)["trials"]
    store.remove_session()
    store.engine.dispose()
    assert status[0].startswith("200")
    assert [trial["state"] for trial in shown] == ["Complete"] * 4
    assert {trial["values"][0] for trial in shown} == {trial["value"] for trial in trials}
