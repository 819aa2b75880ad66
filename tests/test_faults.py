"""Workers that are killed or stopped: nothing is lost, nothing is done twice, and no bit changes."""

import json
import signal
import subprocess
import time

import cells
import psutil
import pytest
from mlflow import MlflowClient
from shell import PATIENCE, check_recorded_once

pytestmark = pytest.mark.acceptance


def trainers(process: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return [child for child in children if "hpo.trainer" in " ".join(child.cmdline())]


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
