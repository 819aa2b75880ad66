"""Plain clients - Optuna, optuna-dashboard, MLflow's REST and command line - show the same trials as `hpo`."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import cells
import pytest
from places import ROOT
from shell import PATIENCE, Shell

pytestmark = pytest.mark.acceptance


@pytest.fixture
def closed(shell: Shell, data, tmp_path) -> str:
    """The name of a study of two points that has run to its end."""
    shell.hpo("run", "--study", cells.study(tmp_path, "clients", data=data, epochs=2, rates="[1e-3]"))
    return "clients"


def mlflow(shell: Shell, *words: str) -> str:
    command = [sys.executable, "-m", "mlflow", *words]
    return subprocess.run(command, env=shell.environment, capture_output=True, text=True, check=True).stdout


def test_every_plain_client_shows_the_trials(shell, closed, tmp_path):
    trials = shell.json("trials", "--study", closed)
    runs = {trial["run_id"] for trial in trials}
    experiment = shell.json("studies")[0]["experiment_id"]
    assert len(trials) == len(runs) == 2

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

    study_run = shell.queue.study(closed).facts.study_run_id
    folder = tmp_path / "tables"
    words = ("--run-id", study_run, "--artifact-path", "tables", "--dst-path", str(folder))
    mlflow(shell, "artifacts", "download", *words)
    assert len((folder / "tables" / "trials.csv").read_text().splitlines()) == 3

    for line in documented_dashboards():
        with dashboard(shell, line, tmp_path) as ask:
            (study,) = ask("/api/studies")["study_summaries"]
            assert (study["study_name"], study["directions"]) == (closed, ["minimize"])
            whole = ask(f"/api/studies/{study['study_id']}?after=0")
            shown = whole["trials"]
        assert whole["objective_names"] == ["best_val_nmse"]
        assert {len(trial["intermediate_values"]) for trial in shown} == {2}
        assert [trial["state"] for trial in shown] == ["Complete"] * 2
        assert {trial["values"][0] for trial in shown} == {trial["value"] for trial in trials}


def documented_dashboards() -> list[str]:
    """The lines of the documentation that start optuna-dashboard."""
    text = (ROOT / "docs" / "reference" / "commands.md").read_text()
    lines = re.findall(r"^(?:eval .*\n)?optuna-dashboard .*DATABASE_URL.*$", text, re.MULTILINE)
    assert len(lines) == 1
    return lines


@contextmanager
def dashboard(shell: Shell, line: str, folder: Path):
    """Run a line of the documentation in bash, on a free port; a function that asks the dashboard's HTTP API."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = f"{line.partition(' --port')[0]} --port {port}"
    ours = f'hpo() {{ {shlex.quote(sys.executable)} -m hpo "$@"; }}; '
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (folder / "dashboard.log").open("w") as log:
        process = subprocess.Popen(
            ["bash", "-c", ours + command],
            env=shell.environment | {"PATH": path, "HOME": str(folder)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

        def ask(path: str):
            end = time.monotonic() + PATIENCE
            while True:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE) as answer:
                        return json.load(answer)
                except urllib.error.URLError:
                    assert process.poll() is None and time.monotonic() < end, Path(log.name).read_text()
                    time.sleep(0.1)

        try:
            yield ask
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=PATIENCE)
