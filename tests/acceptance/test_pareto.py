"""Several objectives within bounds, by each sampler: two workers, one killed, then the other; one front, the same next
point."""

import cells
import own_network
import pytest
from mlflow import MlflowClient
from shell import check_recorded_once, mirrored

from hpo.operations import invariants
from hpo.planning import plans
from hpo.report import pareto
from hpo.search import sampling
from hpo.study.sizing import beyond
from hpo.tracking.client import Tracker

pytestmark = pytest.mark.acceptance

TRIALS = 12  # beyond the ten that TPE and GP draw at random
SEARCH = """
[sampler]
name = "{kind}"
trials = {trials}
[bounds]
parameters = 14_000
"""
LONG = [pytest.param(kind, marks=pytest.mark.long) for kind in ("grid", "random", "qmc", "gp")]


def write(folder, kind, data):
    """Write a study of networks with 2 to 8 filters, of which those with 7 and 8 are beyond the bound."""
    rates = "[1e-3, 3e-3]" if kind == "grid" else "{low = 1e-4, high = 1e-2, log = true}"
    file = cells.study(folder, f"front-{kind}", data=data, epochs=2, rates=rates)
    filters = list(range(2, 9)) if kind == "grid" else "{low = 2, high = 8}"
    text = file.read_text().replace("[2, 4]", str(filters)).replace("\n[data]", "\nOBJECTIVES\n[data]")
    search = SEARCH.format(kind=kind, trials=TRIALS)
    search = search.replace(f"trials = {TRIALS}\n", "") if kind == "grid" else search
    file.write_text(text.replace("OBJECTIVES", 'objectives = ["nmse", "parameters", "multiply_adds"]') + search)
    return file


def front(jobs):
    """The numbers of the trials that no other one is better than, by comparing all with all."""
    values = {
        job.number: (job.result.best_val_nmse, *job.sizes(("parameters", "multiply_adds")).values()) for job in jobs
    }
    return {
        number
        for number, own in values.items()
        if not any(all(a <= b for a, b in zip(other, own, strict=True)) and other != own for other in values.values())
    }


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tpe", *LONG])
def test_killed_workers_leave_one_front_and_the_next_point_is_that_of_the_history(shell, tmp_path, kind):
    data = cells.make(tmp_path / "cells", seed=5)  # its own: all studies on one data set compete for one champion
    name = write(tmp_path, kind, data).stem
    run = shell.start("run", "--study", tmp_path / f"{name}.toml")
    shell.until(lambda: [row for row in shell.queue.studies() if row.facts.planned], "the plan")
    worker = shell.start("worker", "--study", name)
    held = lambda: {job.worker for job in shell.trials(name) if job.alive and job.spec}  # noqa: E731
    shell.until(lambda: len(held()) == 2, "two workers that train")
    worker.kill()
    shell.until(lambda: sum(job.state == "done" for job in shell.trials(name)) > 2, "trials that are done")
    run.kill()
    output = shell.hpo("run", "--study", name, "--trainers", 2)
    check_recorded_once(shell, name, points=TRIALS if kind != "grid" else 10, epochs=2)
    jobs = shell.trials(name)
    assert all(job.spec.parameters <= 14_000 and job.spec.point["filters"] <= 6 for job in jobs)
    if kind == "grid":
        assert "10 trials (4 more configurations are beyond the bounds)" in output
        assert [job.config for job in jobs] == list(range(10))

    expected, client = front(jobs), MlflowClient(shell.tracking_uri)
    runs = {job.number: client.get_run(job.run_id).data for job in jobs}
    assert {number for number, run in runs.items() if run.tags[pareto.TAG] == pareto.ON_FRONT} == expected
    assert all(run.metrics["multiply_adds"] == jobs[number].spec.multiply_adds for number, run in runs.items())
    assert {trial["number"] for trial in shell.json("trials", "--study", name) if trial["pareto"]} == expected
    assert [one["number"] for one in shell.json("show", name)["pareto"]] == sorted(
        expected, key=lambda number: jobs[number].result.best_val_nmse
    )
    of_study = shell.queue.study(name).facts.study_run_id
    files = {file.path for file in client.list_artifacts(of_study, "tables")}
    assert {"tables/pareto.csv", "tables/pareto.json", "tables/pareto.svg"} <= files
    assert (
        f"Pareto front of NMSE, parameters and multiply-adds, {len(expected)} of {len(jobs)} configurations" in output
    )
    model = shell.queue.study(name).facts.model_name
    best = min(jobs, key=lambda job: job.result.best_val_nmse)
    assert client.get_model_version_by_alias(model, "champion").run_id == best.run_id
    store = sampling.storage(shell.database_url)
    trials = store.get_all_trials(store.get_study_id_from_name(name))
    assert all(set(trial.constraints) == {"parameters"} and len(trial.values) == 3 for trial in trials)
    if kind != "grid":
        row = plans.extend(name, TRIALS + 1, shell.queue, Tracker(shell.tracking_uri))
        plan = row.specification
        accepts = lambda point: not beyond(plan, point, row.facts.data)  # noqa: E731
        proposed = sampling.suggest(store, name, plan, TRIALS, accepts=accepts)
        shell.hpo("run", "--study", name)
        assert shell.trials(name)[TRIALS].spec.point == proposed
    store.remove_session()
    store.engine.dispose()


@pytest.mark.long
def test_a_network_of_a_users_beyond_a_bound_costs_no_training(shell, data, tmp_path):
    file = own_network.write(tmp_path / "a", data=data, name="own-front")
    text = (
        file.read_text()
        .replace("[2, 4]", "[2, 3, 4]")
        .replace("\n[data]", '\nobjectives = ["nmse", "parameters"]\n[data]')
    )
    file.write_text(text + "[bounds]\nparameters = 80\n")
    output = shell.hpo("run", "--study", file)
    jobs = shell.trials("own-front")
    assert [(job.state, job.epochs, job.spec.parameters) for job in jobs[:2]] == [("done", 2, 51), ("done", 2, 72)]
    assert (jobs[2].state, jobs[2].epochs) == ("pruned", 0)
    assert jobs[2].reason == "not trained: 93 parameters, at most 80 (bounds.parameters)"
    assert "1 trial was not trained: their networks are beyond the bounds" in " ".join(output.split())
    with mirrored(shell, "own-front") as shown:
        assert invariants.check(shown) == []
    shell.hpo("report", "-o", tmp_path / "report")
    page = (tmp_path / "report" / "report.md").read_text()
    assert "Pareto front of NMSE and parameters" in page and "figures/own-front-pareto.svg" in page
    assert (tmp_path / "report" / "tables" / "own-front-pareto.json").exists()
