"""Pruning and repeats on real services: what the pruner sees, and how ended and repeated trials are shown."""

import io
import json
import math
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import cells
import hypothesis
import optuna
import psycopg
import pytest
import records
from hypothesis import given, strategies
from rich.console import Console
from shell import clock, until_ended

from hpo import settings, study
from hpo.planning import plans
from hpo.planning.preparation import prepare
from hpo.queue import AttemptOutcome, Judged, LeaseLost, Queue
from hpo.recording.reconciler import Reconciler
from hpo.report import results, tables
from hpo.scores import ranking
from hpo.search import pruning, sampling
from hpo.search.pruning import Pruning
from hpo.tracking.client import Tracker

pytestmark = pytest.mark.service
EPOCHS = 9


@pytest.fixture
def planned(database_url, tracking_uri, data, tmp_path):
    """A function that plans a study of four points with the overrides given and returns its mirror."""
    queue, tracker = Queue(database_url), Tracker(tracking_uri)
    queue.install()
    stores = []

    def plan(*overrides: str) -> tuple[Reconciler, study.Study]:
        file = cells.study(tmp_path, f"p-{tmp_path.name[-12:].replace('_', '-')}", data=data, epochs=EPOCHS)
        chosen = study.load(str(file), overrides)
        home = settings.read({"HPO_HOME": str(tmp_path / "home")})
        row = plans.plan(prepare(chosen), queue, tracker, home, database_url)
        stores.append(sampling.storage(database_url))
        return Reconciler(queue, tracker, stores[-1], row), row.specification

    yield plan
    for store in stores:
        store.remove_session()
        store.engine.dispose()
    queue.close()


def claim(shown: Reconciler):
    job = shown.queue.claim(shown.study.name, worker="w", lease=60)
    shown.reconcile_job(job)
    return job


def train(shown: Reconciler, job, *losses: float, first: int = 1) -> None:
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
    assert Pruning(None, "lengths", chosen).most == 20


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
    pruning = Pruning(shown.queue, shown.study.name, chosen)
    for job in good:
        assert pruning.settle(job) is None
    shown.queue.end(good[0], "done", result=records.result(0.1, best_epoch=8, target_names=()))
    ended = shown.queue.job(good[0].id)
    sampling.update_trial(shown.store, shown.study.specification, ended, [ended])

    bad = claim(shown)
    train(shown, bad, 9.0)
    assert not pruning.settle(bad), "not before its first decision"
    train(shown, bad, *[9.0] * 7, first=2)
    reason = pruning.settle(bad)
    assert kind in reason and reason == pruning.settle(bad) == pruning.reason(bad)
    shown.queue.end(bad, "pruned", result={"epoch": 8}, reason=pruning.reason(bad))
    shown.reconcile_job(shown.queue.job(bad.id))
    loaded = optuna.load_study(study_name=shown.study.name, storage=shown.store)
    trial = loaded.trials[bad.number]
    assert trial.state == optuna.trial.TrialState.PRUNED and set(trial.intermediate_values.values()) == {9.0}
    run = shown.tracker.client.get_run(shown.queue.job(bad.id).run_id)
    assert run.data.tags["hpo.state"] == "pruned" and run.info.status == "KILLED"
    history = shown.tracker.client.get_metric_history(run.info.run_id, "val/nmse")
    assert [metric.step for metric in history] == list(range(1, 9))


def test_another_worker_goes_on_where_the_pruner_stood(planned):
    shown, chosen = planned("pruner.name=successive-halving", "pruner.min_epochs=2")
    job = claim(shown)
    train(shown, job, 0.5, 0.4)
    assert not Pruning(shown.queue, shown.study.name, chosen).settle(job)
    train(shown, job, 0.3, first=3)
    assert not Pruning(shown.queue, shown.study.name, chosen).settle(job)
    judged = shown.queue.job(job.id).judged
    assert judged == Judged(epoch=3, value=0.4, rungs=[0.4])
    for _ in range(2):
        shown.update_judged(shown.queue.job(job.id))
        assert seen(shown, job) == {1: 0.5, 2: 0.4, 3: 0.3}


def test_of_a_curve_that_was_cut_back_what_comes_now_is_judged(planned):
    shown, chosen = planned("pruner.name=successive-halving", "pruner.min_epochs=2")
    job = claim(shown)
    shown.reconcile_job(shown.queue.job(job.id))
    for losses, first in (((0.5, 0.4, 0.3), 1), ((0.6,), 2)):  # the second one of another kind of machine
        train(shown, job, *losses, first=first)
        assert not Pruning(shown.queue, shown.study.name, chosen).settle(job)
        shown.update_judged(shown.queue.job(job.id))
    assert shown.queue.job(job.id).judged == Judged(epoch=2, value=0.6, rungs=[0.6])
    assert seen(shown, job) == {1: 0.5, 2: 0.6}


def seen(shown: Reconciler, job) -> dict[int, float]:
    """What Optuna shows of a trial's curve."""
    return optuna.load_study(study_name=shown.study.name, storage=shown.store).trials[job.number].intermediate_values


RUNGS = ("pruner.name=successive-halving", "pruner.min_epochs=2", "pruner.reduction_factor=2")


def to_be_pruned(shown: Reconciler, chosen: study.Study):
    """A job that its pruner ends at epoch 2, as soon as it is asked."""
    for _ in range(3):
        good = claim(shown)
        train(shown, good, 0.1, 0.1)
        assert Pruning(shown.queue, shown.study.name, chosen).settle(good) is None
    bad = claim(shown)
    train(shown, bad, 0.9, 0.9, 0.9)
    return bad


def test_what_the_pruner_decided_stands_though_its_worker_dies_at_once(planned):
    shown, chosen = planned(*RUNGS)
    bad = to_be_pruned(shown, chosen)
    reason = Pruning(shown.queue, shown.study.name, chosen).settle(bad)
    assert reason == "pruned by SuccessiveHalvingPruner at epoch 2"
    assert shown.queue.job(bad.id).judged == Judged(epoch=2, value=0.9, rungs=[0.9], ends=reason)
    assert seen(shown, bad) == {}, "Optuna hears of it later"
    with shown.queue.engine.begin() as connection:
        connection.exec_driver_sql(f"""
            INSERT INTO hpo.attempt (job, study, fence, host, device, ended, outcome)
            SELECT {bad.id}, '{bad.study}', -fence, '', 'cpu', clock_timestamp(), 'failed'
            FROM generate_series(1, 6) AS fence;
            UPDATE hpo.job SET lease_until = '2000-01-01' WHERE id = {bad.id}
        """)
    assert shown.queue.expire(shown.study.name, lease=0) == [bad.id]
    again = claim(shown)
    assert (again.id, again.verdict) == (bad.id, reason), "though it has had all its attempts"
    train(shown, again, 0.9, first=4)
    assert Pruning(shown.queue, shown.study.name, chosen).settle(again) == reason
    shown.queue.give_back(again, AttemptOutcome.FAILED, reason="it failed")
    assert shown.queue.job(again.id).state == "waiting", "not dead"


def test_a_worker_that_woke_without_its_lease_judges_nothing(planned):
    shown, chosen = planned(*RUNGS)
    bad = to_be_pruned(shown, chosen)
    frozen, before = Pruning(shown.queue, shown.study.name, chosen), shown.queue.job(bad.id)
    with shown.queue.engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE hpo.job SET fence = fence + 1 WHERE id = {bad.id}")
    with pytest.raises(LeaseLost):
        frozen.settle(bad)
    with pytest.raises(LeaseLost):
        shown.queue.judge(bad, Judged(epoch=3, value=0.9))
    assert frozen.reason(bad) is None
    holder = shown.queue.job(bad.id)
    assert holder.judged == before.judged is None
    assert "at epoch 2" in Pruning(shown.queue, shown.study.name, chosen).settle(holder)
    shown.update_judged(replace(shown.queue.job(bad.id), fence=bad.fence))
    assert seen(shown, bad) == {}, "Optuna is told by the holder alone"


def test_a_trial_that_optuna_shows_as_ended_is_judged_all_the_same(planned):
    """Cancelled, say, while it is judged, or brought back while MLflow is away."""
    shown, chosen = planned(*RUNGS)
    bad = to_be_pruned(shown, chosen)
    study_id = shown.store.get_study_id_from_name(shown.study.name)
    trial_id = shown.store.get_trial_id_from_study_id_trial_number(study_id, bad.number)
    shown.store.set_trial_state_values(trial_id, optuna.trial.TrialState.FAIL)
    reason = Pruning(shown.queue, shown.study.name, chosen).settle(bad)
    assert "at epoch 2" in reason
    shown.update_judged(shown.queue.job(bad.id))
    assert seen(shown, bad) == {}
    shown.queue.end(bad, "pruned", result={"epoch": 3}, reason=reason)
    shown.reconcile_job(shown.queue.job(bad.id))
    assert seen(shown, bad) == {1: 0.9, 2: 0.9}, "up to the verdict"


def test_two_at_once_may_show_the_same_end(planned, monkeypatch):
    shown, _ = planned(*RUNGS)
    job = claim(shown)
    shown.queue.cancel(shown.study.name, job.number, 0, by="somebody")
    write = shown.store.set_trial_user_attr

    def late(trial_id: int, *words) -> None:
        monkeypatch.setattr(shown.store, "set_trial_user_attr", write)
        shown.store.set_trial_state_values(trial_id, optuna.trial.TrialState.FAIL)
        write(trial_id, *words)

    monkeypatch.setattr(shown.store, "set_trial_user_attr", late)
    shown.reconcile_job(shown.queue.job(job.id))
    assert shown.queue.job(job.id).mirrored


@pytest.mark.long
@pytest.mark.acceptance
def test_a_pruner_that_gets_nowhere_costs_no_lease_and_ctrl_c_is_heard(shell, data, tmp_path):
    file = cells.study(tmp_path, "stuck", data=data, epochs=30_000)
    file.write_text(file.read_text() + '[pruner]\nname = "median"\n')
    shell.environment["HPO_LEASE"] = "6"
    run = shell.start("run", "--study", file, "--trainers", 1)
    job = shell.until(lambda: next((each for each in shell.trials("stuck") if each.alive), None), "a claim")
    with psycopg.connect(shell.database_url, autocommit=False) as connection:  # before Optuna shows that it runs
        connection.execute("LOCK TABLE trial_intermediate_values IN ACCESS EXCLUSIVE MODE")
        end = clock(run) + 18  # seconds: three leases
        while clock(run) < end:
            assert shell.queue.expired("stuck", lease=6) == []
            time.sleep(0.1)
        seen = shell.queue.job(job.id).epochs
        shell.until(lambda: shell.queue.job(job.id).epochs > seen, "it trains on")
        run.send_signal(signal.SIGINT)
        asked = clock(run)
        shell.until(lambda: shell.queue.job(job.id).judged.epoch, "judged all the same")
        until_ended(run)
        assert clock(run) - asked < 8 and run.wait() == 130
    kept = shell.queue.job(job.id)
    assert (kept.state, kept.attempt) == ("waiting", 0), "handed back"


class Rows:
    """The rows of a study's jobs as Pruning uses them, in memory: for many examples."""

    def __init__(self) -> None:
        self.judged: dict[int, Judged] = {}
        self.curves: dict[int, list[float]] = {}
        self.done: list[int] = []

    def unjudged(self, job, *, limit: int):
        judged = self.judged.get(job.id, Judged())
        return judged, list(enumerate(self.curves[job.id], start=1))[judged.epoch : judged.epoch + limit]

    def judge(self, job, judged: Judged) -> None:
        self.judged[job.id] = Judged.from_json(json.loads(json.dumps(judged.to_json())))

    def at_rung(self, job, rung: int):
        return [
            (other, judged.rungs[rung])
            for other, judged in self.judged.items()
            if other != job.id and len(judged.rungs) > rung
        ]

    def finished(self, name: str, *, without):
        return [
            (each, list(range(1, len(self.curves[each]) + 1)), self.curves[each])
            for each in self.done
            if each not in without
        ]


SCORES = strategies.one_of(strategies.sampled_from([0.25, 0.5, 0.75, math.nan]), strategies.floats(0.001, 10))


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning", "ignore:All-NaN:RuntimeWarning")
@given(
    settings=strategies.one_of(
        strategies.fixed_dictionaries(
            {"startup_trials": strategies.integers(1, 3), "warmup_epochs": strategies.integers(1, 4)}
        ),
        strategies.fixed_dictionaries(
            {"min_epochs": strategies.integers(1, 4), "reduction_factor": strategies.integers(2, 4)}
        ),
    ),
    hyperband=strategies.booleans(),
    curves=strategies.lists(strategies.lists(SCORES, min_size=1, max_size=20), min_size=2, max_size=8),
    steps=strategies.lists(strategies.tuples(strategies.integers(0, 7), strategies.integers(1, 9)), max_size=60),
    batch=strategies.integers(1, 7),
)
@hypothesis.settings(deadline=None, max_examples=300)
def test_the_decisions_are_those_of_optunas_pruners_fed_epoch_by_epoch(settings, hyperband, curves, steps, batch):
    most = max(map(len, curves))
    if "startup_trials" in settings:
        name, pruner = "median", optuna.pruners.MedianPruner(settings["startup_trials"], settings["warmup_epochs"] + 1)
    else:
        least, factor = settings["min_epochs"], settings["reduction_factor"]
        name, pruner = "successive-halving", optuna.pruners.SuccessiveHalvingPruner(least, factor)
        if hyperband:
            name, pruner = "hyperband", optuna.pruners.HyperbandPruner(least, most, factor)
    theirs = optuna.create_study(study_name="s", sampler=optuna.samplers.RandomSampler(seed=0), pruner=pruner)
    trials = [theirs.ask() for _ in curves]
    rows, ended = Rows(), set()
    chosen = SimpleNamespace(pruner={"name": name} | settings, most=lambda key: most)
    ours = Pruning(rows, "s", chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "BATCH", batch)
        for number, count in steps:
            if number >= len(curves) or number in ended:
                continue
            curve, trial = curves[number], trials[number]
            known = rows.curves.setdefault(number, [])
            first = len(known)
            known += curve[first : first + count]
            expected = None
            for epoch in range(first + 1, len(known) + 1):
                trial.report(curve[epoch - 1], epoch)
                if trial.should_prune() and epoch < len(curve):
                    expected = f"pruned by {type(pruner).__name__} at epoch {epoch}"
                    break
            job = SimpleNamespace(id=number, number=number, fence=1, spec=records.spec(training={"epochs": len(curve)}))
            assert ours.settle(job) == expected
            if expected:
                theirs.tell(trial, state=optuna.trial.TrialState.PRUNED)
            elif len(known) == len(curve):
                theirs.tell(trial, 0.5)
                rows.done.append(number)
            else:
                continue
            ended.add(number)


def test_a_study_without_a_pruner_ends_nothing(planned):
    shown, chosen = planned()
    job = claim(shown)
    train(shown, job, 9.0)
    assert not Pruning(shown.queue, shown.study.name, chosen).settle(job)
    assert shown.queue.job(job.id).judged is None


def test_a_point_whose_last_repeat_is_cancelled_has_ended_until_it_is_brought_back(planned):
    shown, _ = planned("repeats=2")
    states = optuna.trial.TrialState
    jobs = [claim(shown) for _ in range(2)]
    (number,) = {job.number for job in jobs}

    def point() -> tuple[optuna.trial.TrialState, float | None]:
        for job in jobs:
            shown.reconcile_job(shown.queue.job(job.id))
        trial = shown.store.get_all_trials(shown.store.get_study_id_from_name(shown.study.name))[number]
        return trial.state, trial.value

    def end(job, score: float) -> None:
        shown.queue.end(job, "done", result=records.result(score, target_names=()))

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
    assert [(job.number, job.repeat, job.spec.seed) for job in jobs] == [
        (number, repeat, 5 + repeat) for number in range(4) for repeat in range(2)
    ]
    scores = {0: (0.10, 0.50), 1: (0.20, 0.22), 2: (0.21, 0.25), 3: (0.9, 0.8)}
    for _ in jobs:
        job = claim(shown)
        if (job.number, job.repeat) == (3, 1):
            continue
        score = scores[job.number][job.repeat]
        shown.queue.end(job, "done", result=records.result(score, target_names=()))
        shown.reconcile_job(shown.queue.job(job.id))
    ended = shown.queue.jobs(shown.study.name)
    ranked = ranking.ranked(ended)
    assert [(job.number, job.repeat) for job in ranked] == [(1, 0), (2, 0), (0, 0), (3, 0)]
    assert ranking.spread(ranking.repeats(ended)[1]) == (pytest.approx(0.21), pytest.approx(0.02 / 2**0.5))
    loaded = optuna.load_study(study_name=shown.study.name, storage=shown.store)
    assert [trial.value for trial in loaded.trials[:3]] == pytest.approx([0.3, 0.21, 0.23])
    assert loaded.trials[3].state == optuna.trial.TrialState.RUNNING, "a point ends with its last repeat"
    with io.StringIO() as file:
        tables.print_table(Console(file=file, width=200), results.top_table(shown.study, ended))
        lines = [line for line in file.getvalue().splitlines() if "±" in line and "│" in line]
        assert "1 of 2 repeats, 1 running" in file.getvalue()
    assert ["≈" in line for line in lines] == [False, True, True]
    assert "0.21 ± 0.014" in lines[0] and "0.3 ± 0.28" in lines[2]
    long = {f"a_parameter_{number}": 0.123456 for number in range(7)}
    wordy = [replace(job, spec=job.spec and replace(job.spec, point=long)) for job in ended]
    with io.StringIO() as file:
        tables.print_table(Console(file=file, width=100, force_terminal=True), results.top_table(shown.study, wordy))
        assert "0.21 ± 0.014" in file.getvalue() and "…" not in file.getvalue(), "a long point leaves the scores whole"
