"""A process that dies at any named step of a trial's life or of the closing: the same command makes it good."""

import json
import re
from pathlib import Path

import cells
import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType
from places import ROOT
from shell import Shell, check_recorded_once, fresh_database

from hpo import crash, settings
from hpo.operations import doctor
from hpo.operations.connection import opened
from hpo.search import sampling
from hpo.services.serving import Services

pytestmark = pytest.mark.acceptance

EPOCHS = 8
OF_THE_TRAINER = ("batch", "packaging", "scoring")
TRAINED = ("training stored", "model registered unfinished", "model logged")
SLOW = ("model logged", "recorded")  # the others: long
OF_THE_PRUNER = "verdict stored"
OF_FOLDS = "refits planned"  # tests/acceptance/test_cross_validation.py


def study(folder: Path, name: str, data: Path) -> Path:
    """Of one point: a step is reached at the first trial, and again and again costs most of these tests' time."""
    file = cells.study(folder, name, data=data, epochs=EPOCHS, rates="[1e-3]")
    file.write_text(file.read_text().replace("[2, 4]", "[4]"))
    return file


def test_every_step_stands_once_in_the_code():
    text = "\n".join(path.read_text() for path in (ROOT / "hpo").rglob("*.py"))
    assert sorted(re.findall(r'crash\.at\("([^"]+)"\)', text)) == sorted(crash.STEPS + crash.DELETION)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(step, marks=pytest.mark.slow if step in SLOW else pytest.mark.long)
        for step in crash.STEPS
        if step not in (OF_THE_PRUNER, OF_FOLDS)
    ],
)
def test_a_process_that_dies_there_loses_nothing_and_changes_no_bit(shell, data, tmp_path, undisturbed, step):
    name = "crash-" + step.replace(" ", "-")
    file, marker = study(tmp_path, name, data), tmp_path / "died"
    shell.environment |= {"HPO_CRASH_AT": f"{step}:{marker}", "HPO_CHECKPOINT_INTERVAL": "0", "HPO_LEASE": "2"}
    words = ("run", "--study", file, "--trainers", 1)
    first = shell.start(*words)
    output, _ = first.communicate(timeout=240)
    assert marker.exists(), f"the step was never reached: {output}"
    if step in OF_THE_TRAINER:
        assert first.returncode == 0, output
        assert "failed in attempt 1: trainer killed by SIGKILL (exit 137" in output
    else:
        assert first.returncode == -9
        output = shell.hpo(*words)
        if step not in ("recorded", "run ended", "closing recorded"):
            assert "worker lost, attempt 2" in output
    check_recorded_once(shell, name, points=1, epochs=EPOCHS)
    if step in TRAINED:
        (job,) = shell.trials(name)
        first, second = shell.queue.attempts(name)[job.id]
        assert (first.epochs, second.epochs) == (EPOCHS, 0), "nothing is trained twice"
    for job in shell.trials(name):
        calm = undisturbed[json.dumps(job.spec.point)]
        for key in ("best_val_nmse", "best_epoch", "last_val_mse", "validation"):
            assert getattr(job.result, key) == getattr(calm, key), key
        assert job.result.files["weights.safetensors"] == calm.files["weights.safetensors"]
    client = MlflowClient(shell.tracking_uri)
    experiment = client.get_experiment_by_name(name).experiment_id
    runs = client.search_runs([experiment], run_view_type=ViewType.ALL)
    assert len(runs) == 1 + 2 + 1, "trial, predictors, the study: no ghost run, not even a deleted one"
    ours = Services(database_url=shell.database_url, tracking_uri=shell.tracking_uri)
    with opened(settings.read(shell.environment), ours) as connection:
        assert list(doctor.examine(connection, study=name)) == []


@pytest.mark.long
def test_a_verdict_outlives_the_worker_that_dies_of_it(shell, data, tmp_path):
    file, marker = study(tmp_path, "crash-verdict", data), tmp_path / "died"
    file.write_text(file.read_text().replace("[1e-3]", "[1e-2, 1e-6]") + RUNGS)
    shell.environment |= {"HPO_CRASH_AT": f"{OF_THE_PRUNER}:{marker}", "HPO_LEASE": "2"}
    words = ("run", "--study", file, "--trainers", 1)
    first = shell.start(*words)
    output, _ = first.communicate(timeout=240)
    assert marker.exists() and first.returncode == -9, output
    _, before = shell.trials("crash-verdict")
    assert before.state == "running" and before.verdict == "pruned by SuccessiveHalvingPruner at epoch 2"
    output = shell.hpo(*words)
    assert f"trial 1 of crash-verdict was {before.verdict}" in output
    done, pruned = shell.trials("crash-verdict")
    assert (done.state, pruned.state, pruned.reason) == ("done", "pruned", before.verdict)
    assert pruned.epochs == before.epochs, "nothing was trained again"
    store = sampling.storage(shell.database_url)
    trials = store.get_all_trials(store.get_study_id_from_name("crash-verdict"))
    assert [(trial.state.name, len(trial.intermediate_values)) for trial in trials] == [
        ("COMPLETE", EPOCHS),
        ("PRUNED", 2),
    ]
    store.remove_session()
    store.engine.dispose()
    ours = Services(database_url=shell.database_url, tracking_uri=shell.tracking_uri)
    with opened(settings.read(shell.environment), ours) as connection:
        assert list(doctor.examine(connection, study="crash-verdict")) == []


RUNGS = """
[pruner]
name = "successive-halving"
min_epochs = 2
reduction_factor = 2
"""


@pytest.fixture(scope="session")
def undisturbed(services, tmp_path_factory, data) -> dict:
    """The results of the same points, by point, when nobody dies."""
    folder = tmp_path_factory.mktemp("calm")
    with fresh_database(services) as url:
        shell = Shell(folder / "home", url, services.tracking_uri)
        try:
            shell.hpo("run", "--study", study(folder, "calm-crash", data), "--trainers", 1)
            return {json.dumps(job.spec.point): job.result for job in shell.trials("calm-crash")}
        finally:
            shell.close()
