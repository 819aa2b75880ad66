"""What the recorder's thread does for one job, on real services: each step may be repeated."""

import dataclasses
import time
from collections import Counter, deque
from contextlib import suppress
from functools import partial
from pathlib import Path

import cells
import numpy as np
import pandas
import psycopg
import pytest
import records
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from proxy import proxy
from shell import at_once
from sqlalchemy import event, text
from torch import nn

from hpo import settings, study
from hpo.closing import pictures, promotion
from hpo.files import sha256_of
from hpo.operations import doctor, invariants
from hpo.planning import plans
from hpo.planning.preparation import prepare
from hpo.queue import AttemptOutcome, DatabaseLost, LeaseLost, NewJob, Queue, State
from hpo.queue.database import as_json
from hpo.recording import recorder as recorder_module
from hpo.recording.outage import Outage
from hpo.recording.outcomes import Ended, Inbox, NothingRecorded, Refused
from hpo.recording.reconciler import Reconciler
from hpo.recording.reconcilers import Reconcilers
from hpo.recording.recorder import Recorder
from hpo.recording.tasks import Tasks
from hpo.recording.trained import Trained
from hpo.report import figures
from hpo.scores import ranking
from hpo.search import sampling
from hpo.search.pruning import Pruning
from hpo.tracking import logged_models
from hpo.tracking.client import Tracker
from hpo.tracking.errors import TrackingUnavailable
from hpo.worker.packaging import package
from models import networks, specs
from models.metrics import Scores
from models.regressor import Regressor

pytestmark = pytest.mark.service
EPOCHS = 3


@pytest.fixture
def shown(database_url, tracking_uri, data, tmp_path):
    """The mirror of a planned study of four points, nothing of it trained."""
    queue, tracker = Queue(database_url), Tracker(tracking_uri)
    queue.install()
    file = cells.study(tmp_path, f"recording-{tmp_path.name[-12:].replace('_', '-')}", data=data, epochs=EPOCHS)
    read = settings.read({"HPO_HOME": str(tmp_path / "home")})
    row = plans.plan(prepare(study.load(str(file))), queue, tracker, read, database_url)
    store = sampling.storage(database_url)
    yield Reconciler(queue, tracker, store, row)
    store.remove_session()
    store.engine.dispose()
    queue.close()


@pytest.fixture
def held(shown):
    """A claimed job with its epochs in the database, and the tasks of its worker."""
    job = shown.queue.claim(shown.study.name, worker="w", lease=60)
    epochs = []
    for number in range(1, EPOCHS + 1):
        scores = {f"{part}/{name}": 1 / number for part in ("train", "val") for name in ("nmse", "mse")}
        epochs.append((number, 1_000_000 * number, scores | {"seconds": 1.0}))
    shown.queue.add_epochs(job, epochs)
    return of(shown), job


def of(shown: Reconciler) -> Tasks:
    pruning = Pruning(shown.queue, shown.study.name, shown.study.specification)
    return Tasks(shown, pruning, Path())


def unreachable(shown: Reconciler) -> Reconciler:
    return Reconciler(shown.queue, Tracker("http://127.0.0.1:9"), shown.store, shown.study)


def test_a_committed_checkpoint_never_runs_ahead_of_the_stored_curve(shown, held, tmp_path):
    tasks, job = held
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(b"weights")
    digest = sha256_of(path)
    tasks.store_checkpoint(job, path, epoch=EPOCHS, sha256=digest)
    assert [number for number, _ in shown.queue.curve(job.id)] == [1, 2, 3]
    current = shown.queue.require(job)
    fetched = tasks.fetch(current, tmp_path / "fetched").checkpoint
    assert fetched.read_bytes() == b"weights"


def test_a_damaged_or_missing_checkpoint_means_a_start_from_epoch_0(shown, held, tmp_path):
    tasks, job = held
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(b"weights")
    tasks.store_checkpoint(job, path, epoch=EPOCHS, sha256="0" * 64)
    current = shown.queue.require(job)
    assert tasks.fetch(current, tmp_path / "fetched").checkpoint is None
    shown.tracker.delete_artifact(current.run_id, "checkpoints")
    assert tasks.fetch(current, tmp_path / "again").checkpoint is None


def model(shown: Reconciler, job, folder) -> Trained:
    """Package an untrained network of the job; return what a trainer would send."""
    facts, scores = shown.study.facts.data, {"nmse": 1.0, "mse": 1.0, "r2": 0.0, "nrmse": 1.0}
    count = len(facts.target_names)
    network: nn.Module = networks.build(specs.from_dict(job.spec.model), facts.image_shape, count)
    package(
        folder,
        Regressor(network, torch.zeros(count), torch.ones(count)),
        spec=job.spec.model,
        image_shape=facts.image_shape,
        target_names=facts.target_names,
        unit=facts.unit,
        example_images=np.zeros((2, *facts.image_shape), np.float32),
    )
    predictions = folder.with_name("validation.csv")
    columns = [f"{name} {which}" for which in ("true", "predicted") for name in facts.target_names]
    values = np.random.default_rng(0).random((9, len(columns)))
    pandas.DataFrame(values, columns=columns).to_csv(predictions, index_label="image")
    per_target = {name: [value] * count for name, value in scores.items()}
    validation = Scores.from_dict(scores | {"per_target": per_target})
    return Trained(
        folder=folder,
        predictions=predictions,
        epochs=EPOCHS,
        best_epoch=EPOCHS,
        **{name: 1 / EPOCHS for name in ("best_val_nmse", "best_val_mse", "last_val_nmse", "last_val_mse")},
        validation=validation,
        last_validation=validation,
        files={},
        device=None,
    )


def test_a_trial_takes_21_requests_and_28_transactions(shown, held, tmp_path):
    _, first = held
    trained = model(shown, first, tmp_path / "model")
    with proxy(shown.tracker.uri) as between:
        tasks = of(Reconciler(shown.queue, Tracker(between.url), shown.store, shown.study, worker="w"))
        tasks.record(first, trained)
        job = shown.queue.claim(shown.study.name, worker="w", lease=60)
        between.requests.clear()
        transactions = Counter[str]()
        for name, engine in (("queue", shown.queue.engine), ("optuna", shown.store.engine)):
            event.listen(engine, "begin", lambda _, name=name: transactions.update([name]))
        tasks.reconcile(job)
        begin = Counter(between.requests)
        shown.queue.add_epochs(job, [(n, 1_000 * n, {"val/nmse": 1 / n, "seconds": 1.0}) for n in range(1, EPOCHS + 1)])
        tasks.record(job, trained)
        tasks.reconcile(job)
        requests = Counter(request.partition("/m-")[0] for request in between.requests)
    api = "/api/2.0/mlflow/"
    assert begin == {f"POST {api}runs/{what}": 1 for what in ("create", "log-batch", "log-inputs")}
    files = sum(path.is_file() for path in trained.folder.rglob("*")) + 1  # what it predicts
    uploads = sum(count for request, count in requests.items() if request.startswith("PUT"))
    assert uploads == files == 11
    assert requests.total() - uploads == 10, requests
    assert transactions == {"queue": 15, "optuna": 13}
    history = shown.tracker.client.get_metric_history(shown.queue.job(job.id).run_id, "val/nmse")
    assert [metric.step for metric in history] == [1, 2, 3]


def test_lists_and_doctor_ask_as_often_for_four_trials_as_for_two(shown, tmp_path):
    asked: Counter[str] = Counter()
    event.listen(shown.queue.engine, "before_cursor_execute", lambda *arguments: asked.update(["SQL"]))
    embedded = settings.read({"HPO_HOME": str(tmp_path / "home")})  # whose files are listed without a request
    with proxy(shown.tracker.uri) as between:
        through = Reconciler(shown.queue, Tracker(between.url), shown.store, shown.study)
        assert list(doctor._study(through, embedded)) == []  # its first look asks what the server is
        counts = []
        for _ in range(2):
            for _ in range(2):
                job = shown.queue.claim(shown.study.name, worker="w", lease=60)
                shown.queue.add_epochs(job, [(1, 1000, {"train/nmse": 1.0, "val/nmse": 1.0, "seconds": 1.0})])
                shown.queue.end(job, State.DIVERGED, result={"epoch": 1}, reason="diverged")
                shown.reconcile_job(shown.queue.job(job.id))
            between.requests.clear()
            asked.clear()
            assert list(doctor._study(through, embedded)) == []
            shown.queue.jobs(shown.study.name, brief=True)
            shown.queue.counts()
            counts.append((Counter(between.requests).total(), asked["SQL"]))
    assert counts[0] == counts[1]


@pytest.mark.slow
@pytest.mark.parametrize("folds", [None, 2])
def test_the_best_score_that_the_database_counts_is_that_of_the_ranking(shown, folds):
    random = np.random.default_rng(5)
    jobs = [job for job in shown.queue.jobs(shown.study.name) if job.kind == "trial"]
    again = [NewJob(kind="trial", number=job.number, repeat=1, spec=job.spec) for job in jobs]
    shown.queue.put_jobs(shown.study.name, again)
    result = records.result(1.0).to_json()
    for _ in range(20):
        with shown.queue.engine.begin() as connection:
            for job in shown.queue.jobs(shown.study.name):
                if job.kind == "trial":
                    state = random.choice(["done", "done", "diverged", "dead", "waiting"])
                    fold = {} if folds is None else {"fold": {"number": job.repeat, "count": folds, "digest": "d"}}
                    values = {"id": job.id, "state": state, "spec": as_json(job.spec.to_json() | fold)}
                    score = as_json(result | {"best_val_nmse": float(random.choice([0.1, 0.2, 0.3]))})
                    values["result"] = score if state == "done" else None
                    change = "UPDATE hpo.job SET state = :state, result = :result, spec = :spec WHERE id = :id"
                    connection.execute(text(change), values)
        points = ranking.points(shown.queue.jobs(shown.study.name))
        counts = shown.queue.counts()[shown.study.name]
        expected = None if not points else points[0][1] if folds else points[0][0].result.best_val_nmse
        assert counts.best_val_nmse == expected
        assert sum(counts.states.values()) == 8 and counts.closing == State.WAITING


def test_a_result_that_met_a_dead_server_is_recorded_at_the_next_try_and_only_once(shown, held, tmp_path):
    tasks, job = held
    found = model(shown, job, tmp_path / "model")
    for _ in range(2):
        with pytest.raises(TrackingUnavailable):
            of(unreachable(shown)).record(job, found)
    assert shown.queue.require(job).result is None
    shown.tracker.ping(shown.study.facts.experiment_id)
    tasks.record(job, found)
    done = shown.queue.job(job.id)
    assert done.state == "done" and done.result.last_val_nmse == 1 / EPOCHS
    with pytest.raises(LeaseLost):
        tasks.record(job, found)
    folder = promotion.fetch(shown.tracker, done, tmp_path / "fetched")
    assert sha256_of(folder / "weights.safetensors") == done.result.files["weights.safetensors"]
    tasks.reconcile(job)
    history = shown.tracker.client.get_metric_history(done.run_id, "val/nmse")
    assert [metric.step for metric in history] == [1, 2, 3]


def test_what_a_trial_predicts_is_stored_before_it_counts_as_done(shown, held, tmp_path):
    tasks, job = held
    found = model(shown, job, tmp_path / "model")
    table = found.predictions
    text = table.read_bytes()
    table.unlink()
    with pytest.raises(FileNotFoundError):
        tasks.record(job, found)
    assert shown.queue.require(job).result is None
    table.write_bytes(text)
    tasks.record(job, found)
    done = shown.queue.job(job.id)
    assert "predictions" not in done.result.to_json(), "a path of this machine"
    assert shown.tracker.download_artifact(done.run_id, pictures.PREDICTIONS, tmp_path / "fetched").read_bytes() == text


def test_a_study_closes_without_the_pictures_that_cannot_be_drawn(shown, held, tmp_path, caplog, monkeypatch):
    tasks, job = held
    found = model(shown, job, tmp_path / "model")
    tasks.record(job, found)
    closing = shown.queue.claim(shown.study.name, worker="w", lease=60)  # stands in: what counts is that we hold it
    tested = tmp_path / "trial.csv"
    pandas.read_csv(found.predictions).assign(split=["validation"] * 4 + ["test"] * 5).to_csv(tested)
    run_id = shown.queue.job(job.id).run_id

    def log_plots(predictions: dict[int, Path], tracker: Tracker = shown.tracker) -> None:
        pictures.log_plots(shown.queue, tracker, shown.study, closing=closing, predictions=predictions)

    with pytest.raises(TrackingUnavailable):
        log_plots({job.number: tested}, unreachable(shown).tracker)
    for _ in range(2):
        log_plots({job.number: tested})
        names = ["plots/loss.png", "plots/parity-test.png", "plots/parity.png"]
        assert sorted(shown.tracker.files(run_id, "plots")) == names

    for folder in ("plots", "predictions"):  # as of a study that an earlier version ran
        shown.tracker.delete_artifact(run_id, folder)
    log_plots({})
    assert shown.tracker.files(run_id, "plots") == ["plots/loss.png"]
    assert "gets no" not in "".join(record.message for record in caplog.records if record.levelname == "WARNING")
    monkeypatch.setattr(figures, "loss_curves", lambda curves: 1 / 0)
    log_plots({})
    assert "gets no loss.png: division by zero" in caplog.text

    shown.queue.give_back(closing, AttemptOutcome.HANDED_BACK, reason="x")
    with pytest.raises(LeaseLost):
        log_plots({})


def test_a_run_that_somebody_deleted_keeps_nothing_else_from_being_mended(shown, held, caplog):
    _, job = held
    other = shown.queue.claim(shown.study.name, worker="w", lease=60)
    shown.reconcile_job(job)
    shown.tracker.client.delete_run(shown.queue.job(job.id).run_id)
    for each in (job, other):
        shown.queue.give_back(each, AttemptOutcome.HANDED_BACK, reason="x")
    shown.reconcile(lease=60, older_than=0)
    assert f"trial {job.number} of {shown.study.name} cannot be shown" in caplog.text
    status = shown.tracker.client.get_run(shown.queue.job(other.id).run_id).info.status
    assert status == "SCHEDULED"


def test_two_workers_that_make_a_run_at_once_agree_on_the_one_in_the_database(shown, held):
    _, job = held
    mirrors = [Reconciler(shown.queue, Tracker(shown.tracker.uri), shown.store, shown.study) for _ in range(4)]

    def make(mirror: Reconciler) -> str:
        while True:
            try:
                return mirror.ensure_run(shown.queue.job(job.id))
            except TrackingUnavailable:  # params that another writes at this moment: the recorder comes back
                continue

    found = at_once(*[partial(make, mirror) for mirror in mirrors])
    late = shown.tracker.client.create_run(  # of one whose clock is behind: the oldest by its own account
        shown.study.facts.experiment_id, tags={"hpo.key": job.key, "hpo.kind": "trial", "hpo.created": "1"}
    )
    kept = shown.queue.job(job.id).run_id
    assert set(found) == {kept} and kept != late.info.run_id
    stale = dataclasses.replace(shown.queue.job(job.id), run_id=None)
    assert shown.ensure_run(stale) == kept
    active = [run.info.run_id for run in shown.tracker.runs(shown.study.facts.experiment_id, kind="trial")]
    assert active == [kept]


def test_a_data_set_that_several_workers_show_on_a_run_at_once_is_shown_once(shown):
    trackers = [Tracker(shown.tracker.uri) for _ in range(4)]

    def show(tracker: Tracker, run_id: str) -> None:
        with suppress(TrackingUnavailable):  # another is writing it: the recorder comes back
            tracker.log_dataset(run_id, name="cells", digest="0" * 36, source='{"folder": "cells"}')

    for _ in range(5):
        run_id = shown.tracker.client.create_run(shown.study.facts.experiment_id).info.run_id
        at_once(*[partial(show, tracker, run_id) for tracker in trackers])
        assert len(shown.tracker.client.get_run(run_id).inputs.dataset_inputs) == 1


def test_what_was_shown_late_of_a_trial_that_went_on_is_put_right(shown, held):
    _, job = held
    shown.reconcile_job(shown.queue.job(job.id))
    stale = shown.queue.job(job.id)
    shown.queue.give_back(job, AttemptOutcome.HANDED_BACK, reason="x")
    shown.reconcile_job(stale)  # by a worker that was frozen before it could show RUNNING
    assert shown.tracker.client.get_run(stale.run_id).info.status == "SCHEDULED"


def test_a_dead_trial_that_is_tried_again_waits_in_optuna_too(shown, held):
    _, job = held
    study_id = shown.store.get_study_id_from_name(shown.study.name)

    def state() -> str:
        return shown.store.get_all_trials(study_id)[job.number].state.name

    shown.queue.give_back(job, AttemptOutcome.NOT_RECORDED, reason="exit 137")
    shown.reconcile_job(shown.queue.job(job.id))
    assert state() == "FAIL"
    shown.queue.revive(shown.study.name, trials=True)
    shown.reconcile_job(shown.queue.job(job.id))
    assert state() == "WAITING"


def test_a_study_that_closed_while_a_trial_waited_is_found_and_closes_again(shown, tmp_path):
    with shown.queue.engine.begin() as connection:
        connection.execute(text("UPDATE hpo.job SET state = 'done', result = '{}' WHERE kind = 'closing'"))
    read = settings.read({"HPO_HOME": str(tmp_path / "home")})
    (found,) = doctor._study(shown, read)
    name = shown.study.name
    assert found.kind == "I1" and f"closing of {name}: is done, but trial 0 of {name} is waiting" in found.what
    found.remedy()
    assert shown.queue.closing_state(name) == "waiting"
    assert list(doctor._study(shown, read)) == []


@pytest.mark.parametrize("stalls", ["before it lists the models", "before it deletes them"])
def test_who_shows_a_trial_cancelled_that_was_brought_back_deletes_nothing_of_it(
    shown, held, tmp_path, monkeypatch, stalls
):
    tasks, job = held
    found = model(shown, job, tmp_path / "model")
    experiment = shown.study.facts.experiment_id
    monkeypatch.setattr(shown.queue, "end", lambda *_, **__: 1 / 0)  # it was cancelled in mid-recording
    with pytest.raises(ZeroDivisionError):
        tasks.record(job, found)
    monkeypatch.undo()
    assert len(logged_models.of_experiment(shown.tracker, experiment)) == 1
    (cancelled,) = shown.queue.cancel(shown.study.name, job.number, None, by="anna")

    def meanwhile() -> None:
        shown.queue.undo_cancel(shown.study.name, job.number, None)
        again = shown.queue.claim(shown.study.name, worker="w", lease=60)
        assert again.id == job.id
        tasks.record(again, found)

    late = Reconciler(
        Queue(shown.queue.engine.url.render_as_string(False)), Tracker(shown.tracker.uri), shown.store, shown.study
    )
    delete, look = logged_models.delete_others, late.queue.job
    if stalls == "before it lists the models":

        def stall_and_delete(*arguments, **options):
            monkeypatch.setattr(logged_models, "delete_others", delete)
            meanwhile()
            return delete(*arguments, **options)

        monkeypatch.setattr(logged_models, "delete_others", stall_and_delete)
    else:
        looked = []

        def look_and_stall(job_id):
            row = look(job_id)
            if not looked:
                looked.append(row)
                meanwhile()
            return row

        monkeypatch.setattr(late.queue, "job", look_and_stall)
    late.reconcile_job(cancelled)
    late.queue.close()
    done = shown.queue.job(job.id)
    assert done.state == "done"
    promotion.fetch(shown.tracker, done, tmp_path / "fetched")
    tasks.reconcile(job)
    assert [each.model_id for each in logged_models.of_experiment(shown.tracker, experiment)] == [done.result.model_id]


def test_a_study_that_is_deleted_while_it_is_checked_has_nothing_that_does_not_hold(shown, monkeypatch):
    def runs(*_: object, **__: object) -> list:
        shown.queue.delete_study(shown.study.name)
        return []

    monkeypatch.setattr(shown.tracker, "runs", runs)
    assert invariants.check(shown) == []


@pytest.fixture
def recorder(shown, monkeypatch):
    """A recorder that tries again at once what it keeps, for four seconds."""
    monkeypatch.setattr(recorder_module, "KEPT_PAUSE", 0.05)
    monkeypatch.setattr(recorder_module, "FORWARD_INTERVAL", 0.5)
    outage = Outage(shown.queue, shown.study.name, store=None)
    reconcilers = Reconcilers(shown.queue, lease=30)
    reconcilers.add(shown)
    started = Recorder(reconcilers, Inbox(), outage, patience=4)
    started.start()
    yield started
    started.finish(10, reconcile=False)


def until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_result_that_meets_an_unforeseen_error_is_kept_and_recorded_later(shown, held, recorder):
    _, job = held
    errors, done = deque([ValueError("odd")] * 3), []

    def record() -> None:
        if errors:
            raise errors.popleft()
        done.append("kept")

    recorder.put(job, record, lambda reason: done.append(reason))
    recorder.put(job, lambda: done.append("another task"))
    until(lambda: len(done) == 2)
    assert done == ["another task", "kept"], "the others do not wait for it"
    assert shown.queue.job(job.id).reason == "its result cannot be recorded: odd"
    assert shown.queue.job(job.id).attempt == 1 and recorder._inbox.empty


def odd() -> None:
    raise ValueError("odd")


@pytest.mark.parametrize("others", ["recorded", "none"])
def test_a_result_that_alone_can_never_be_recorded_costs_its_trial_once(shown, held, recorder, others):
    _, job = held
    other = shown.queue.claim(shown.study.name, worker="w", lease=60)
    recorder.put(job, odd, lambda reason: shown.queue.give_back(job, AttemptOutcome.NOT_RECORDED, reason=reason))
    until(lambda: recorder.concern)
    assert not recorder.refuses(job.study), "another trial shows whether it is this one's fault"
    if others == "recorded":
        recorder.put(other, lambda: Ended(job=other, logged=True), lambda reason: None)
    until(lambda: shown.queue.job(job.id).state == "dead")
    assert shown.queue.job(job.id).reason == "its result cannot be recorded: odd"
    assert shown.queue.revive(shown.study.name, trials=True) == [job.number]
    until(lambda: recorder.concern is None)
    assert not [outcome for outcome in recorder._inbox.take() if isinstance(outcome, Refused | NothingRecorded)]


@pytest.mark.parametrize("refused", ["others, too", "what we write at the study"])
def test_no_trial_is_buried_when_nothing_can_be_recorded(shown, held, recorder, refused, monkeypatch):
    _, job = held
    other = shown.queue.claim(shown.study.name, worker="w", lease=60)
    pruned = shown.queue.claim(shown.study.name, worker="w", lease=60)
    buried: list[str] = []
    recorder.put(job, odd, buried.append)
    if refused == "others, too":
        recorder.put(other, odd, buried.append)
        until(lambda: recorder.refuses(job.study))
    else:
        monkeypatch.setattr(shown.tracker, "set_tags", lambda *_: odd_answer())
    # Of one that the pruner ended MLflow was not asked.
    recorder.put(pruned, lambda: Ended(job=pruned, logged=False), buried.append)
    until(lambda: recorder.concern)
    until(lambda: recorder.concern is None)
    *outcomes, last = [outcome for outcome in recorder._inbox.take() if not isinstance(outcome, Ended)]
    assert isinstance(last, NothingRecorded) and "its result cannot be recorded: odd" in last.reason and buried == []
    given_back = {outcome.job.id: outcome.disk_full for outcome in outcomes}
    assert given_back == dict.fromkeys([job.id, other.id] if refused == "others, too" else [job.id], False)
    assert recorder.concern is None and not recorder.refuses(job.study)


def odd_answer() -> None:
    raise MlflowException("odd", error_code=INVALID_PARAMETER_VALUE)


def test_a_run_that_somebody_deleted_keeps_no_other_trials_epochs_from_mlflow(shown, held, recorder, caplog):
    _, job = held
    other = shown.queue.claim(shown.study.name, worker="w", lease=60)
    for each in (job, other):
        shown.reconcile_job(shown.queue.job(each.id))
    for each, number in ((job, EPOCHS + 1), (other, 1)):
        shown.queue.add_epochs(each, [(number, 1_000_000 * number, {"val/nmse": 0.5})])
    shown.tracker.client.delete_run(shown.queue.job(job.id).run_id)
    for _ in range(2):
        recorder.watch([job, other])
        until(lambda: shown.tracker.curve(shown.queue.job(other.id).run_id, "val/nmse") == [(1, 0.5)])
        assert recorder._send_epochs() == 0
    assert caplog.text.count(f"epochs of trial {job.number} of {shown.study.name} cannot be shown") == 1


def test_a_table_of_optuna_that_somebody_has_locked_holds_up_no_lease(shown, held, database_url):
    _, job = held
    store = sampling.storage(database_url, patience=0.5)
    worker = Reconciler(shown.queue, shown.tracker, store, shown.study)
    with psycopg.connect(database_url) as connection:
        connection.execute("LOCK TABLE trial_intermediate_values IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(DatabaseLost, match="lock timeout"):
            worker.reconcile_job(shown.queue.job(job.id))
        assert shown.queue.renew([job], lease=60) == [], "its row is free"
    worker.reconcile_job(shown.queue.job(job.id))
    assert shown.queue.job(job.id).mirrored
    store.remove_session()
    store.engine.dispose()


def test_a_checkpoint_that_cannot_be_stored_for_another_reason_does_no_harm(shown, held, tmp_path, monkeypatch, caplog):
    tasks, job = held
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(b"state")

    def refuse(*_: object) -> str:
        raise MlflowException("odd", error_code=INVALID_PARAMETER_VALUE)

    monkeypatch.setattr(shown.tracker, "upload", refuse)
    tasks.store_checkpoint(job, path, epoch=3, sha256=sha256_of(path))
    assert shown.queue.job(job.id).checkpoint is None and "could not be stored: odd" in caplog.text


def test_a_curve_that_another_kind_of_machine_continues_gets_a_run_of_its_own(shown, held, tmp_path):
    tasks, job = held
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(b"weights")
    tasks.store_checkpoint(job, path, epoch=1, sha256=sha256_of(path))
    shown.reconcile_job(shown.queue.job(job.id))
    found = model(shown, job, tmp_path / "model")
    first, experiment = shown.queue.job(job.id).run_id, shown.study.facts.experiment_id
    logged_models.log(shown.tracker, first, experiment, tmp_path / "model", name="model", key=f"{job.key}/lost")
    shown.queue.give_back(job, AttemptOutcome.FAILED, reason="killed before the result was recorded")

    again = shown.queue.claim(shown.study.name, worker="v", lease=60)
    assert again.id == job.id
    scores = {"train/nmse": 0.2, "train/mse": 2.0, "val/mse": 3.0, "seconds": 1.0}
    epochs = [(number, 2_000_000 * number, scores | {"val/nmse": nmse}) for number, nmse in ((2, 0.4), (3, 0.3))]
    shown.queue.add_epochs(again, epochs)
    assert tasks.fetch(shown.queue.job(job.id), tmp_path / "fetched").checkpoint is not None
    tasks.record(again, dataclasses.replace(found, best_val_nmse=0.3, last_val_nmse=0.3, best_val_mse=3.0))
    tasks.reconcile(job)

    done = shown.queue.job(job.id)
    assert done.run_id != first and done.result.best_val_mse == 3.0
    assert shown.tracker.curve(done.run_id, "val/nmse") == [(1, 1.0), (2, 0.4), (3, 0.3)]
    assert [run.info.run_id for run in shown.tracker.runs(experiment, kind="trial")] == [done.run_id]
    assert [each.model_id for each in logged_models.of_experiment(shown.tracker, experiment)] == [done.result.model_id]
    assert shown.tracker.files(first, "checkpoints") == []
    # The services are of another home, so doctor asks the server for files.
    urls = {"HPO_DATABASE_URL": str(shown.queue.engine.url), "MLFLOW_TRACKING_URI": shown.tracker.uri}
    assert list(doctor._study(shown, settings.read({"HPO_HOME": str(tmp_path / "home")} | urls))) == []
