"""Cross-validation as users run it: folds on several workers, a refit that survives its worker, an honest champion."""

import signal
import statistics

import cells
import pytest
from mlflow import MlflowClient
from shell import PATIENCE, family, mirrored

from hpo.operations import invariants
from hpo.queue import State
from hpo.scores import ranking

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

FOLDS, EPOCHS = 3, 300
OF_FOLDS = "refits planned"


def end(process):
    """End a worker and its trainers as the kernel does without memory: at once."""
    for each in family(process):
        each.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.long
def test_a_closing_that_dies_when_it_has_planned_the_refit_plans_it_once(shell, tmp_path):
    file = cells.study(tmp_path, "refit-once", data=cells.make(tmp_path / "cells", count=60, seed=4), epochs=5)
    file.write_text(file.read_text().replace("[data]", "[data]\nfolds = 2"))
    calm, marker = shell.environment, tmp_path / "died"
    shell.environment = calm | {"HPO_CRASH_AT": f"{OF_FOLDS}:{marker}", "HPO_LEASE": "2"}
    first = shell.start("run", "--study", file)
    output, _ = first.communicate(timeout=PATIENCE)
    assert marker.exists() and first.returncode == -signal.SIGKILL, output
    shell.environment = calm
    shell.hpo("run", "--study", file)
    jobs = shell.trials("refit-once")
    assert all(job.state == State.DONE for job in jobs) and sum(job.is_refit for job in jobs) == 1
    assert shell.queue.jobs("refit-once")[0].closing.winner.version == 1
    with mirrored(shell, "refit-once") as reconciler:
        assert not invariants.check(reconciler)


def weights(jobs):
    return {job.key.partition("/")[2]: job.result.files["weights.safetensors"] for job in jobs}


def test_killed_folds_and_a_killed_refit_go_on_to_the_same_bits(shell, tmp_path):
    data = cells.make(tmp_path / "cells", count=150, seed=4)
    shell.environment |= {"HPO_CHECKPOINT_INTERVAL": "0.2"}  # a refit takes a few seconds
    plain, killed = (
        cells.study(tmp_path, name, data=data, epochs=EPOCHS, rates="[1e-3]") for name in ("calm", "folds")
    )
    for file in (plain, killed):
        file.write_text(file.read_text().replace("[data]", f"[data]\nfolds = {FOLDS}"))
    output = shell.hpo("run", "--study", plain, "--trainers", 2)
    assert f"each in {FOLDS} folds" in output

    first = shell.start("run", "--study", killed, "--trainers", 1)
    shell.training("folds")
    second = shell.start("worker", "--study", "folds", "--trainers", 1)
    shell.until(lambda: sum(job.alive and job.epochs > 20 for job in shell.trials("folds")) == 2, "two folds at once")
    end(first)
    refit = shell.until(
        lambda: next((job for job in shell.trials("folds") if job.is_refit and job.alive and job.checkpoint), None),
        "a refit in mid-training",
    )
    end(second)
    third = shell.start("run", "--study", killed, "--trainers", 1)
    output, _ = third.communicate(timeout=PATIENCE)
    assert third.returncode == 0, output

    jobs, calm = shell.trials("folds"), shell.trials("calm")
    assert all(job.state == State.DONE for job in jobs) and len(jobs) == 2 * FOLDS + 1
    assert sum(job.attempt > 1 for job in jobs) >= 2, "a fold and the refit"
    assert weights(jobs) == weights(calm), "to the bit"
    with mirrored(shell, "folds") as reconciler:
        assert not invariants.check(reconciler)

    folds = ranking.repeats(jobs)[refit.number]
    mean = statistics.fmean(job.result.best_val_nmse for job in folds)
    assert mean == min(score for _, score in ranking.points(jobs)) == refit.spec.refit.nmse
    done = ranking.refits(jobs)[refit.number]
    assert done.result.epochs == statistics.median(job.result.best_epoch for job in folds)
    client = MlflowClient(shell.tracking_uri)
    runs = [client.get_run(job.run_id).data for job in (*folds, done)]
    assert {run.tags["hpo.point_val_nmse"] for run in runs} == {repr(mean)}
    assert [run.params.get("fold") for run in runs] == ["0", "1", "2", None]
    model = shell.queue.study("folds").facts.model_name
    version = client.get_model_version_by_alias(model, "folds")
    assert version.run_id == done.run_id and float(version.tags["hpo.best_val_nmse"]) == mean
    assert client.get_model_version_by_alias(model, "champion").run_id in {
        job.run_id for job in (*jobs, *calm) if job.is_refit
    }
    assert "the median of the folds' best" in version.description

    listed = shell.hpo("trials", "--study", "folds")
    assert "refit" in listed.splitlines()[4] and "fold" in listed
    shell.hpo("report", "--study", "folds", "-o", tmp_path / "report")
    assert "standard deviation" in (tmp_path / "report" / "report.md").read_text()
    shell.hpo("download", "--study", "folds", tmp_path / "model")
    shell.hpo("predict", tmp_path / "model", data / "3_cell.png")
