"""Pruning and repeats on real services: what the pruner sees, and how ended and repeated trials are shown."""

import io
from dataclasses import replace

import cells
import optuna
import pytest
from rich.console import Console

from hpo import planning, promotion, pruning, report, sampling, settings, study
from hpo.mirror import Mirror
from hpo.pruning import Pruning
from hpo.queue import Queue
from hpo.tracking import Tracker

pytestmark = pytest.mark.service
EPOCHS = 9


@pytest.fixture
def planned(database_url, tracking_uri, data, tmp_path):
    """A function that plans a study of four points with the overrides given and returns its mirror."""
    queue, tracker = Queue(database_url), Tracker(tracking_uri)
    queue.install()
    stores = []

    def plan(*overrides: str) -> tuple[Mirror, study.Study]:
        file = cells.study(tmp_path, f"p-{tmp_path.name[-12:].replace('_', '-')}", data=data, epochs=EPOCHS)
        chosen = study.load(str(file), overrides)
        home = settings.read({"HPO_HOME": str(tmp_path / "home")})
        row = planning.plan(planning.prepare(chosen), queue, tracker, home, database_url)
        stores.append(sampling.storage(database_url))
        return Mirror(queue, tracker, stores[-1], row), study.restore(row.name, row.spec)

    yield plan
    for store in stores:
        store.remove_session()
        store.engine.dispose()
    queue.close()


def claim(shown: Mirror):
    job = shown.queue.claim(shown.study.name, worker="w", lease=60)
    shown.show(job)
    return job


def train(shown: Mirror, job, *losses: float, first: int = 1) -> None:
    epochs = [
        (first + index, 1_000_000 * (first + index), {"val/nmse": loss, "train/nmse": loss, "seconds": 1.0})
        for index, loss in enumerate(losses)
    ]
    shown.queue.add_epochs(job, epochs)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")  # Optuna's word for its Hyperband
def test_hyperband_counts_to_the_longest_training_of_the_space(tmp_path):
    file = cells.study(tmp_path, "lengths", data=tmp_path, epochs=7)
    file.write_text(file.read_text().replace("epochs = 7", "").replace("[space]", "[space]\nepochs = [4, 20]"))
    chosen = study.load(str(file), ["pruner.name=hyperband", "pruner.min_epochs=2"])
    assert chosen.most("epochs") == 20
    assert pruning.pruner(chosen)._max_resource == 20


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        (("pruner.name=median", "pruner.startup_trials=1", "pruner.warmup_epochs=1"), "MedianPruner"),
        (("pruner.name=successive-halving", "pruner.min_epochs=2"), "SuccessiveHalvingPruner"),
        (("pruner.name=hyperband", "pruner.min_epochs=2", "pruner.reduction_factor=2"), "HyperbandPruner"),
    ],
)
def test_a_trial_that_is_clearly_worse_is_ended_and_shown_as_pruned_with_its_curve(planned, overrides, kind):
    shown, chosen = planned(*overrides)
    good = [claim(shown) for _ in range(3)]
    for job in good:
        train(shown, job, *(1 / (epoch + 1) for epoch in range(8)))
    pruning = Pruning(shown.queue, shown.store, shown.study.name, chosen)
    for job in good:
        pruning.ends(job)
    shown.queue.end(good[0], "done", result={"best_val_nmse": 0.1, "best_epoch": 8} | FOUND)
    sampling.show(shown.store, shown.study.name, shown.queue.job(good[0].id), [shown.queue.job(good[0].id)])

    bad = claim(shown)
    train(shown, bad, 9.0)
    assert not pruning.ends(bad), "not before its first decision"
    train(shown, bad, *[9.0] * 7, first=2)
    assert pruning.ends(bad) and pruning.ends(bad)
    assert kind in pruning.reason(bad)
    shown.queue.end(bad, "pruned", result={"epoch": 8}, reason=pruning.reason(bad))
    shown.show(shown.queue.job(bad.id))
    loaded = optuna.load_study(study_name=shown.study.name, storage=shown.store)
    trial = loaded.trials[bad.number]
    assert trial.state == optuna.trial.TrialState.PRUNED and set(trial.intermediate_values.values()) == {9.0}
    run = shown.tracker.client.get_run(shown.queue.job(bad.id).run_id)
    assert run.data.tags["hpo.state"] == "pruned" and run.info.status == "KILLED"
    history = shown.tracker.client.get_metric_history(run.info.run_id, "val/nmse")
    assert [metric.step for metric in history] == list(range(1, 9))


FOUND = {
    "seconds": 1.0,
    "best_val_mse": 1.0,
    "last_val_nmse": 1.0,
    "last_val_mse": 1.0,
    "target_names": [],
    "validation": {"r2": 0.0, "nrmse": 1.0, "per_target": {"r2": [], "nrmse": []}},
    "last_validation": {"r2": 0.0, "nrmse": 1.0},
    "model_id": "m",
    "files": {},
}


def test_another_worker_goes_on_where_the_pruner_stood(planned):
    shown, chosen = planned("pruner.name=successive-halving", "pruner.min_epochs=2")
    job = claim(shown)
    train(shown, job, 0.5, 0.4)
    first = Pruning(shown.queue, shown.store, shown.study.name, chosen)
    assert not first.ends(job)
    train(shown, job, 0.3, first=3)
    second = Pruning(shown.queue, shown.store, shown.study.name, chosen)
    assert not second.ends(job)
    trial = optuna.load_study(study_name=shown.study.name, storage=shown.store).trials[job.number]
    assert trial.intermediate_values == {1: 0.5, 2: 0.4, 3: 0.3}


def test_a_study_without_a_pruner_ends_nothing_and_asks_nobody(planned):
    shown, chosen = planned()
    job = claim(shown)
    train(shown, job, 9.0)
    assert not Pruning(shown.queue, None, shown.study.name, chosen).ends(job)


def test_a_point_whose_last_repeat_is_cancelled_has_ended_until_it_is_brought_back(planned):
    shown, _ = planned("repeats=2")
    states = optuna.trial.TrialState
    jobs = [claim(shown) for _ in range(2)]
    (number,) = {job.number for job in jobs}

    def point() -> tuple[optuna.trial.TrialState, float | None]:
        for job in jobs:
            shown.show(shown.queue.job(job.id))
        trial = shown.store.get_all_trials(shown.store.get_study_id_from_name(shown.study.name))[number]
        return trial.state, trial.value

    def end(job, score: float) -> None:
        shown.queue.end(job, "done", result={"best_val_nmse": score, "best_epoch": 1} | FOUND)

    end(jobs[0], 0.25)
    assert point() == (states.RUNNING, None)
    assert shown.queue.cancel(shown.study.name, number, jobs[1].repeat, by="somebody")
    assert point() == (states.COMPLETE, 0.25)
    assert shown.queue.undo_cancel(shown.study.name, number, jobs[1].repeat)
    assert point() == (states.RUNNING, None), "to Optuna the point has begun"
    assert shown.queue.cancel(shown.study.name, number, jobs[1].repeat, by="somebody")
    assert point() == (states.COMPLETE, 0.25)
    assert shown.queue.undo_cancel(shown.study.name, number, jobs[1].repeat)
    again = shown.queue.claim(shown.study.name, worker="w", lease=60)
    assert again.id == jobs[1].id
    end(again, 0.75)
    assert point() == (states.COMPLETE, 0.5), "though nobody showed it in between"
    point()
    assert point() == (states.COMPLETE, 0.5)


def test_repeats_have_seeds_of_their_own_and_their_mean_decides(planned):
    shown, _ = planned("repeats=2", "seed=5")
    jobs = [job for job in shown.queue.jobs(shown.study.name) if job.kind == "trial"]
    assert [(job.number, job.repeat, job.spec["seed"]) for job in jobs] == [
        (number, repeat, 5 + repeat) for number in range(4) for repeat in range(2)
    ]
    scores = {0: (0.10, 0.50), 1: (0.20, 0.22), 2: (0.21, 0.25), 3: (0.9, 0.8)}
    for _ in jobs:
        job = claim(shown)
        if (job.number, job.repeat) == (3, 1):
            continue
        score = scores[job.number][job.repeat]
        shown.queue.end(job, "done", result={"best_val_nmse": score, "best_epoch": 1} | FOUND)
        shown.show(shown.queue.job(job.id))
    ended = shown.queue.jobs(shown.study.name)
    ranked = promotion.ranked(ended)
    assert [(job.number, job.repeat) for job in ranked] == [(1, 0), (2, 0), (0, 0), (3, 0)]
    assert promotion.spread(promotion.repeats(ended)[1]) == (pytest.approx(0.21), pytest.approx(0.02 / 2**0.5))
    loaded = optuna.load_study(study_name=shown.study.name, storage=shown.store)
    assert [trial.value for trial in loaded.trials[:3]] == pytest.approx([0.3, 0.21, 0.23])
    assert loaded.trials[3].state == optuna.trial.TrialState.RUNNING, "a point ends with its last repeat"
    with io.StringIO() as file:
        report.print_table(Console(file=file, width=200), report.top_table(shown.study, ended))
        lines = [line for line in file.getvalue().splitlines() if "±" in line and "│" in line]
    assert ["≈" in line for line in lines] == [False, True, True]
    assert "0.21 ± 0.014" in lines[0] and "0.3 ± 0.28" in lines[2]
    long = {f"a_parameter_{number}": 0.123456 for number in range(7)}
    wordy = [replace(job, spec=job.spec and job.spec | {"point": long}) for job in ended]
    with io.StringIO() as file:
        report.print_table(Console(file=file, width=100, force_terminal=True), report.top_table(shown.study, wordy))
        assert "0.21 ± 0.014" in file.getvalue() and "…" not in file.getvalue(), "a long point leaves the scores whole"
