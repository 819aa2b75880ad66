"""What somebody who gives a command reads when a service is away: the cause, where, and what to do."""

import time

import cells
import pytest
from mlflow import MlflowClient
from proxy import proxy
from shell import PATIENCE, Shell, check_recorded_once, read_only

from hpo import ownership, settings, study
from hpo.cli import unreachable
from hpo.planning import plans
from hpo.planning.preparation import prepare
from hpo.queue import DatabaseLost
from hpo.services import home as homes
from hpo.services import postgres, serving
from hpo.tracking.client import Tracker
from hpo.tracking.errors import TrackingUnavailable

FULL = "connection failed: FATAL:  sorry, too many clients already"
READ_ONLY = "cannot execute UPDATE in a read-only transaction"


@pytest.mark.parametrize("embedded", [False, True])
def test_the_message_names_what_is_set_here_and_nothing_else(monkeypatch, embedded):
    if not embedded:
        monkeypatch.setenv("HPO_DATABASE_URL", "postgresql://hpo:secret@db:5432/hpo")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    lost, gone = DatabaseLost("connection refused"), TrackingUnavailable("connection refused")
    for message, variable, log in [
        (unreachable.database(lost), "HPO_DATABASE_URL", "postgres.log"),
        (unreachable.tracking(gone), "MLFLOW_TRACKING_URI", "mlflow.log"),
        (unreachable.database_refuses(lost), "HPO_DATABASE_URL", None),
        (unreachable.tracking_refuses(gone), "MLFLOW_TRACKING_URI", None),
    ]:
        assert "connection refused" in message and "secret" not in message
        assert (variable in message) is not embedded
        assert log is None or (log in message) is embedded


def test_a_full_and_a_read_only_database_are_told_with_their_cure():
    assert "raise max_connections" in unreachable.database(DatabaseLost(FULL))
    assert "read-only at the moment" in unreachable.database(DatabaseLost(READ_ONLY))


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("mode", "only", "words"),
    [
        ("401", "", "are user and password right"),
        ("host", "", "--allowed-hosts"),
        ("413", "PUT", "stores no files: it answers 413 (413 Request Entity Too Large): a proxy in front of it"),
    ],
)
def test_a_command_that_meets_a_gateway_says_so_in_one_line_and_plans_nothing(
    shell, data, tracking_uri, mode, only, words
):
    with proxy(tracking_uri) as between, between.answering(mode, only=only):
        shell.environment["MLFLOW_TRACKING_URI"] = between.url
        output = shell.hpo("run", "--study", "baseline", "--data", data, code=1)
    (line,) = [line for line in output.splitlines() if line.startswith("hpo: ")]
    assert line == output.splitlines()[-1] and words in line and between.url in line
    assert shell.queue.studies() == []
    experiment = MlflowClient(tracking_uri).get_experiment_by_name("baseline")
    assert experiment is None, "what was made before the refusal is deleted"


def output_of(process) -> str:
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and "Traceback" not in output, output
    return output


@pytest.mark.long
@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("mode", "only", "words"),
    [
        ("401", "", "MLflow answers 401, "),
        ("login", "", "MLflow answers with a web page, "),
        ("404", "", "MLflow answers 404, "),
        pytest.param(
            "403", "/mlflow-artifacts/", "no trial is claimed until it takes files again", marks=pytest.mark.long
        ),
    ],
)
def test_a_trial_trained_while_a_gateway_answers_for_mlflow_is_kept(
    shell, data, tmp_path, tracking_uri, mode, only, words
):
    study = cells.study(tmp_path, f"kept-{mode}-{len(only)}", data=data, epochs=900, rates="[1e-3]")
    with proxy(tracking_uri) as between:
        shell.environment |= {"MLFLOW_TRACKING_URI": between.url, "HPO_OUTAGE_LIMIT": "0.2"}
        process = shell.start("run", "--study", study, "--trainers", 1)
        job = shell.training(study.stem, epochs=20)
        with between.answering(mode, only=only):
            shell.until(lambda: shell.queue.job(job.id).epochs == 900, "training goes on to the last epoch")
            shell.until(
                lambda: list(shell.home.glob(f"work/*/job-{job.id}-*/model/README.md")), "the model is packaged"
            )
            time.sleep(3)
            assert [
                (each.state, each.attempt) for each in sorted(shell.trials(study.stem), key=lambda each: -each.attempt)
            ] == [
                ("running", 1),
                ("waiting", 0),
            ], "it is kept, and no other trial is claimed"
        output = output_of(process)
    assert words in output and "all services answer again" in output
    check_recorded_once(shell, study.stem, points=2, epochs=900)
    assert {each.attempt for each in shell.trials(study.stem)} == {1}
    assert shell.queue.jobs(study.stem)[0].closing.winner.version, "and the study has closed by itself"


@pytest.mark.long
@pytest.mark.acceptance
def test_workers_wait_for_a_database_that_is_read_only_for_longer_than_their_leases(shell, data, tmp_path, services):
    shell.environment |= {"HPO_LEASE": "4"}
    study = cells.study(tmp_path, "standing", data=data, epochs=600, rates="[1e-3]")
    first = shell.start("run", "--study", study, "--trainers", 1)
    shell.training("standing", epochs=20)
    second = shell.start("worker", "--study", "standing", "--trainers", 1)
    shell.until(lambda: all(job.epochs for job in shell.trials("standing")), "both trials are trained")
    with read_only(services, shell.database_url):
        time.sleep(8)
    outputs = output_of(first), output_of(second)
    assert all("database lost, retrying (cannot execute" in output for output in outputs), outputs
    check_recorded_once(shell, "standing", points=2, epochs=600)
    assert {job.attempt for job in shell.trials("standing")} == {1}


@pytest.mark.acceptance
@pytest.mark.long
def test_with_mlflow_alone_away_commands_show_what_the_database_has(data, tmp_path, tracking_uri):
    path = (tmp_path / "home").resolve()
    read = settings.read({"HPO_HOME": str(path)})
    ownership.folder(path, "services")
    plan = prepare(study.load(str(cells.study(tmp_path, "left-alone", data=data, epochs=3))))
    try:
        home, _ = postgres.start(homes.settle(path, print, postgres.stop), print)
        shell = Shell(path, postgres.url(home, "hpo"), "")
        shell.environment["HPO_DATABASE_URL"] = ""
        shell.queue.install()
        plans.plan(plan, shell.queue, Tracker(tracking_uri), read, shell.database_url)

        shown = " ".join(shell.hpo("status").split())
        assert "0 closed, 1 open" in shown and "does not answer, its Postgres does. `hpo up` starts it" in shown
        found = shell.json("status")
        assert (found["services"], [each["name"] for each in found["studies"]]) == (
            {"tracking_uri": None},
            ["left-alone"],
        )
        assert "versions are left out. its server is away" in shell.hpo("compare", "left-alone/0", "left-alone/1")
        assert "its server is away" in shell.hpo("compare", "left-alone/0", "@champion", code=1)
        assert "MLflow is away: a worker shows it there later." in shell.hpo("stop", "--study", "left-alone")
        assert "waiting" in shell.hpo("run", "--study", tmp_path / "left-alone.toml", "--dry-run")
        shell.close()
    finally:
        serving.erase(read)
