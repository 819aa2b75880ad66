"""`hpo run` as users run it: real processes on a real Postgres and a real MLflow server, some of them killed."""

import json
import re
import signal
import subprocess
import sys
import time

import cells
import numpy as np
import optuna
import psutil
import pytest
from mlflow import MlflowClient
from shell import PATIENCE, Shell

from hpo.sampling import storage

pytestmark = pytest.mark.acceptance


def trainers(process: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return [child for child in children if "hpo.trainer" in " ".join(child.cmdline())]


def check_recorded_once(shell: Shell, study: str, *, points: int, epochs: int) -> None:
    """Every view of the study - ours, Optuna's, MLflow's - shows each point once, with its whole curve."""
    jobs = shell.trials(study)
    assert [(job.state, job.reason) for job in jobs if job.state != "done"] == []
    assert len(jobs) == points
    assert len({json.dumps(job.spec["point"]) for job in jobs}) == points
    store = storage(shell.database_url)
    loaded = optuna.load_study(study_name=study, storage=store)
    frame = loaded.trials_dataframe()
    assert list(frame.state) == ["COMPLETE"] * points
    assert len(frame.filter(like="params_").drop_duplicates()) == points
    assert list(frame.value) == [job.result["best_val_nmse"] for job in jobs]
    store.remove_session()
    store.engine.dispose()
    client = MlflowClient(shell.tracking_uri)
    experiment = client.get_experiment_by_name(study)
    runs = client.search_runs([experiment.experiment_id], "tags.`hpo.kind` = 'trial'")
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert sorted(run.info.run_id for run in runs) == sorted(job.run_id for job in jobs)
    for job in jobs:
        curve = client.get_metric_history(job.run_id, "val/nmse")
        assert [metric.step for metric in curve] == list(range(1, epochs + 1)), "a gap or a doubled step"
        ours = dict(shell.queue.curve(job.id))
        assert [metric.value for metric in curve] == [ours[step]["val/nmse"] for step in range(1, epochs + 1)]
        assert min(metric.value for metric in curve) == job.result["best_val_nmse"]
    everything = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in everything} == {"FINISHED"}
    assert len(client.search_logged_models([experiment.experiment_id])) == points


def test_the_grid_runs_to_its_end_and_its_champion_can_be_used(shell, tmp_path):
    data = cells.make(tmp_path / "tiny", seed=1)  # its own: all studies on one data set compete for one champion
    words = ("run", "--study", "grid", "--data", data, "--epochs", 2)
    output = shell.hpo(*words)
    study = shell.json("studies")[0]["name"]
    assert re.fullmatch(r"grid\+[0-9a-f]{8}", study)
    check_recorded_once(shell, study, points=24, epochs=2)
    assert "volume fraction, cubic" in output and "mean of the training labels" in output

    begin = time.monotonic()
    again = shell.hpo(*words)
    assert time.monotonic() - begin < 30
    table = output[output.index("┏") : output.index("Go on with")]
    assert table in again, "the same command prints the same result"
    assert {job.attempt for job in shell.trials(study)} == {1}, "and trains nothing"

    listed = shell.json("trials", "--study", study)
    best = min(listed, key=lambda trial: trial["value"])
    assert [trial["config"] for trial in listed] == list(range(24))
    assert listed[22]["params"] == {"filters": 32, "kernel_size": 5, "dropout": 0.2, "learning_rate": 1e-3}

    champion = tmp_path / "champion"
    downloaded = shell.hpo("download", champion)
    image = data / "3_cell.png"
    rows = json.loads(shell.hpo("predict", champion, image, "--json"))
    assert rows["unit"] == "GPa"
    ours = [value for name, value in rows["predictions"][0].items() if name != "image"]
    client = MlflowClient(shell.tracking_uri)
    registered = shell.queue.study(study).facts["model_name"]
    (model,) = [each for each in client.search_registered_models() if each.name == registered]
    version = client.get_model_version_by_alias(model.name, "champion")
    assert version.run_id == best["run_id"]
    mark = "it does NOT beat a cubic polynomial in the volume fraction"  # after two epochs
    assert mark in output and mark in version.description and version.tags["hpo.beats_volume_fraction"] == "false"
    assert "cubic polynomial in the volume fraction predicts better than this model" in downloaded

    client.delete_registered_model_alias(model.name, "champion")
    assert "@champion is this version" in shell.hpo("promote", "--study", study)
    assert client.get_model_version_by_alias(model.name, "champion").version == version.version
    assert f"MLflow: {shell.tracking_uri}" in shell.hpo("status")
    assert shell.json("status")["studies"][0]["state"] == "closed"
    plain = f"""
import mlflow.pyfunc, numpy, PIL.Image
image = numpy.asarray(PIL.Image.open({str(image)!r}), numpy.float32) / 255
print(mlflow.pyfunc.load_model("models:/{model.name}@champion").predict(image[None, None]).tolist())
"""
    theirs = subprocess.run(
        [sys.executable, "-c", plain], env=shell.environment, capture_output=True, text=True, check=True
    )
    assert np.allclose(json.loads(theirs.stdout)[0], ours, rtol=1e-5)

    shell.hpo("delete", "--study", study, "--yes")
    assert shell.json("studies") == []
    assert [each.aliases for each in client.search_registered_models() if each.name == model.name] in ([{}], [])


def test_killed_trainers_and_supervisors_lose_nothing_and_change_no_bit(shell, data, tmp_path):
    calm = cells.study(tmp_path, "calm", data=data, epochs=500)
    shell.hpo("run", "--study", calm, "--trainers", 2)
    undisturbed = {json.dumps(job.spec["point"]): job.result for job in shell.trials("calm")}

    stormy = cells.study(tmp_path, "stormy", data=data, epochs=500)
    first = shell.start("run", "--study", stormy, "--trainers", 2)
    shell.training("stormy", epochs=100)
    trainers(first)[0].kill()
    shell.until(
        lambda: any(job.attempt == 2 for job in shell.trials("stormy")), "the killed trainer's trial runs again"
    )
    shell.training("stormy", epochs=250)
    left = trainers(first)
    first.kill()
    psutil.wait_procs(left, timeout=10)
    assert not any(trainer.is_running() for trainer in left), "trainers outlive their supervisor"

    output = shell.hpo("run", "--study", stormy, "--trainers", 2)
    check_recorded_once(shell, "stormy", points=4, epochs=500)
    assert "Promoted" in output or "Nothing promoted" in output
    jobs = shell.trials("stormy")
    assert max(job.attempt for job in jobs) >= 2
    for job in jobs:
        expected = undisturbed[json.dumps(job.spec["point"])]
        for name in ("best_val_nmse", "best_epoch", "last_val_nmse", "last_val_mse", "validation"):
            assert job.result[name] == expected[name]
        assert job.result["files"]["weights.safetensors"] == expected["files"]["weights.safetensors"]


def test_ctrl_c_gives_back_within_seconds_and_the_same_command_goes_on(shell, data, tmp_path):
    study = cells.study(tmp_path, "stopped", data=data, epochs=700)
    process = shell.start("run", "--study", study, "--trainers", 2)
    job = shell.training("stopped", epochs=100)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)
    assert time.monotonic() - begin < 8
    assert process.returncode == 130 and "The same command goes on." in output
    kept = shell.queue.job(job.id)
    assert (kept.state, kept.attempt, kept.reason) == ("waiting", 0, "handed back")
    assert kept.checkpoint["epoch"] >= job.epochs
    runs = MlflowClient(shell.tracking_uri).get_run(kept.run_id)
    assert runs.info.status == "SCHEDULED"

    shell.hpo("worker", "--study", "stopped", "--once", "--trainers", 1)
    assert sum(each.state == "done" for each in shell.trials("stopped")) == 1

    shell.hpo("run", "--study", study, "--trainers", 2)
    check_recorded_once(shell, "stopped", points=4, epochs=700)
    assert {job.attempt for job in shell.trials("stopped")} == {1}


def test_eight_workers_on_tiny_trials_train_no_point_twice(shell, data):
    words = ("--data", data, "--epochs", 1, "--seed", 8, "--set", "space.filters=[2, 3, 4]")
    first = shell.start("run", "--study", "grid", *words, "--trainers", 1)
    study = shell.until(
        lambda: next((row.name for row in shell.queue.studies() if row.spec["seed"] == 8), None), "plan"
    )
    shell.until(lambda: shell.queue.study(study).facts.get("planned"), "the plan")
    others = [shell.start("worker", "--study", study, "--trainers", 1) for _ in range(6)]
    others.append(shell.start("run", "--study", "grid", *words, "--trainers", 1))
    for process in [first, *others]:
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
    check_recorded_once(shell, study, points=24, epochs=1)
    assert {job.attempt for job in shell.trials(study)} == {1}
    workers = {job.worker for job in shell.trials(study)}
    assert len(workers) > 1


def test_a_sampler_fills_its_slots_when_they_are_claimed_in_any_time_zone(shell, data, tmp_path):
    shell.environment |= {"TZ": "Pacific/Auckland"}
    study = cells.study(tmp_path, "tpe", data=data, epochs=2)
    text = study.read_text().replace("[1e-3, 1e-4]", "{low = 1e-4, high = 1e-2, log = true}")
    study.write_text(text + '[sampler]\nname = "tpe"\ntrials = 4\n')
    shell.hpo("run", "--study", study)
    check_recorded_once(shell, "tpe", points=4, epochs=2)
    with shell.queue.engine.connect() as connection:
        age = "SELECT extract(epoch FROM clock_timestamp() - changed_at) FROM hpo.job"
        assert all(0 <= seconds < PATIENCE for seconds in connection.exec_driver_sql(age).scalars())


def test_a_dry_run_shows_the_plan_and_leaves_nothing_behind(shell, data):
    output = shell.hpo("run", "--study", "grid", "--data", data, "--dry-run")
    assert "118,281" in output and "Nothing was started or written." in output  # F=32, K=5 at 16x16 pixels
    assert not shell.home.exists()
    assert not shell.queue.installed()


def test_cells_that_were_made_here_are_good_data(shell, tmp_path):
    folder = tmp_path / "made"
    shell.hpo("data", "make", folder, "--count", 2, "--size", 48, "--seed", 3)
    assert "good. 2 images of 48 x 48 pixels, 9 components in GPa" in shell.hpo("data", "check", folder)
    next(folder.glob("1_*.png")).unlink()
    assert "row 1: expected one image 1_*.png, found none" in shell.hpo("data", "check", folder, code=1)


def test_other_data_under_a_files_name_is_refused_and_the_study_is_kept(shell, tmp_path):
    data = cells.make(tmp_path / "cells", count=30)
    study = cells.study(tmp_path, "mine", data=data, epochs=1)
    shell.hpo("run", "--study", study)
    table = data / "1-30_Cij_pbc.csv"
    table.write_text(re.sub(r"^1,\d+", "1,77", table.read_text()))
    output = shell.hpo("run", "--study", study, code=1)
    assert "recorded here with another specification" in output and "hpo delete --study mine" in output
    assert shell.json("studies")[0]["state"] == "closed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "--study", "gird"), "Did you mean 'grid'"),
        (("run", "--study", "grid", "--epochs", "0"), "expected a whole number, at least 1"),
        (("run", "--study", "grid", "--data", "/nowhere"), "/nowhere"),
        (("trials", "--study", "grid"), "No study 'grid' has been planned here"),
        (("worker", "--study", "grid"), "No study 'grid' has been planned here"),
        (("download", "x"), "No study has been planned here"),
        (("predict", "/nowhere", "x.png"), "no such file"),
        (("data", "check", "/nowhere"), "/nowhere"),
        (("delete", "--study", "grid", "--yes"), "No study 'grid' has been planned here"),
    ],
)
def test_a_mistake_gets_one_message_and_exit_code_1(shell, words, message):
    output = shell.hpo(*words, code=1)
    assert message in output and output.startswith("hpo: ")


def test_an_unreachable_database_is_said_so(shell):
    shell.environment |= {"HPO_DATABASE_URL": "postgresql://a:secret@127.0.0.1:9/b"}
    output = shell.hpo("studies", code=1)
    assert "The database cannot be reached" in output and "secret" not in output
