"""The pool on real processes: one worker for several studies, by priority, and whatever becomes of it."""

import signal

import cells
import pytest
from mlflow import MlflowClient
from shell import PATIENCE, check_recorded_once

from hpo.study.records import WeightsFile

pytestmark = pytest.mark.acceptance


def closed(shell, *studies: str) -> bool:
    return all(shell.queue.closing_state(study) == "done" for study in studies)


def began(shell, study: str) -> list[float]:
    """When the trials of a study were claimed, in order."""
    trials = {job.id for job in shell.trials(study)}
    return sorted(each.began for job, all in shell.queue.attempts(study).items() if job in trials for each in all)


def numbers(shell, study: str) -> dict[str, tuple]:
    """By point: the whole curve, and the hash of the network."""
    return {
        str(job.spec.point): (
            [(epoch, scores | {"seconds": 0}) for epoch, scores in shell.queue.curve(job.id)],
            job.result.files["weights.safetensors"],
        )
        for job in shell.trials(study)
    }


@pytest.mark.slow
def test_one_worker_of_the_pool_serves_all_studies_by_their_priority(shell, data, tmp_path):
    other = cells.make(tmp_path / "other", seed=1)
    folders = {"shared-low": data, "shared-high": other, "shared-late": data}
    low, high, late = (
        cells.study(tmp_path, name, data=folder, epochs=12, rates="[1e-3]") for name, folder in folders.items()
    )
    assert "No worker of the pool is here. `hpo worker` starts one" in shell.hpo("run", "--study", low, "--detach")
    assert "priority 5" in shell.hpo("run", "--study", high, "--detach", "--priority", 5)
    pool = shell.start("worker")
    shell.until(lambda: any(job.state != "waiting" for job in shell.trials("shared-high")), "the pool has begun")
    seen = shell.json("status")["open"][0]
    assert [worker["pool"] for worker in seen["workers"]] == [True]
    assert "The pool has 1 worker" in shell.hpo("run", "--study", late, "--detach", "--priority", 1)
    shell.until(lambda: closed(shell, *folders), "all three are closed")
    for name in folders:
        check_recorded_once(shell, name, points=2, epochs=12)
        model = shell.queue.study(name).facts.model_name
        version = MlflowClient(shell.tracking_uri).get_model_version_by_alias(model, name)
        assert version.tags["hpo.study"] == name, "its best model is registered"
    assert max(began(shell, "shared-high")) < min(began(shell, "shared-low")), "the highest priority came first"
    first, last = min(began(shell, "shared-late")), max(began(shell, "shared-late"))
    assert not [claim for claim in began(shell, "shared-low") if first < claim < last], "and then the second highest"
    assert pool.poll() is None, "it waits for the next study"
    assert "No worker of the pool is here." in shell.hpo("stop")
    output, _ = pool.communicate(timeout=PATIENCE)
    assert pool.returncode == 0 and "(hpo stop): what is done is kept." in output, output
    assert "No study is open" in output and "Traceback" not in output, output


@pytest.mark.long
def test_nothing_is_lost_doubled_or_changed_when_a_worker_of_the_pool_is_killed(shell, data, tmp_path):
    other = cells.make(tmp_path / "other", seed=1)
    for name, folder in (("killed-one", data), ("killed-two", other), ("killed-none", data)):
        shell.hpo("run", "--study", cells.study(tmp_path, name, data=folder, epochs=150), "--detach")
    missing = WeightsFile(name="resnet18-00000000.pth", sha256="0" * 64)
    shell.queue.amend_facts("killed-none", {"weights": {"resnet18": missing.to_json()}})  # as if it needed them
    shell.environment["HPO_TRAINERS"] = "2"
    pool = shell.start("worker")
    for name in ("killed-one", "killed-two"):
        shell.training(name, epochs=5)
    pool.send_signal(signal.SIGKILL)
    pool.wait()
    pool = shell.start("worker")
    shell.until(lambda: closed(shell, "killed-one", "killed-two"), "another worker of the pool has finished both")
    for name in ("killed-one", "killed-two"):
        check_recorded_once(shell, name, points=4, epochs=150)
    assert {(job.state, job.attempt) for job in shell.trials("killed-none")} == {("waiting", 0)}
    assert "No worker" not in shell.hpo("stop", "--study", "killed-none"), "the pool holds nothing of it"
    assert pool.poll() is None, "and goes on"
    pool.send_signal(signal.SIGINT)
    output, _ = pool.communicate(timeout=PATIENCE)
    assert pool.returncode == 130, output
    assert output.count("killed-none is left to other workers: The pretrained weights") == 1, output
    for name, folder in (("killed-one", data), ("killed-two", other)):
        calm = name.replace("killed", "calm")
        shell.hpo("run", "--study", cells.study(tmp_path, calm, data=folder, epochs=150), "--trainers", 2)
        assert numbers(shell, name) == numbers(shell, calm), "to the bit"
