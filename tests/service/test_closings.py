"""Studies on two versions of a data set that close, on real services: they have one model and one champion."""

import threading
from collections.abc import Sequence
from pathlib import Path

import cells
import pytest
from shell import at_once

from data_pipeline import dataset, npz
from hpo import settings, study
from hpo.closing import promotion
from hpo.closing.promotion import Winner
from hpo.closing.steps import Closing
from hpo.planning import plans
from hpo.planning.preparation import prepare
from hpo.queue import Queue, State
from hpo.queue.closing_result import ScoredVersion
from hpo.recording.reconciler import Reconciler
from hpo.recording.tasks import Tasks
from hpo.scores import champion, ranking
from hpo.search import sampling
from hpo.search.pruning import Pruning
from hpo.study.records import NEW, OLD
from hpo.tracking.client import Tracker
from hpo.worker import protocol, scoring, train_trial

pytestmark = pytest.mark.service


def trained(folder: Path, data: Path, url: str, tracker: Tracker) -> tuple[Reconciler, Winner]:
    """Plan a study called as `folder` and train it; return it with its best trial, scored for the closing."""
    queue = Queue(url)
    queue.install()
    file = cells.study(folder, folder.name, data=data, epochs=60, rates="[1e-2]")
    file.write_text(file.read_text().replace("[2, 4]", "[4]"))
    plan = prepare(study.load(str(file)))
    row = plans.plan(plan, queue, tracker, settings.read({"HPO_HOME": str(folder / "home")}), url)
    reconciler = Reconciler(queue, tracker, sampling.storage(url), row)
    tasks = Tasks(reconciler, Pruning(queue, row.name, row.specification), Path())
    npz.save_npz(dataset.load(data), file := folder / "data.npz")
    while (job := queue.claim(row.name, worker="w", lease=600)) and job.kind == "trial":
        request = protocol.Train(
            spec=job.spec, data=file, checkpoint=None, start=None, folder=folder / f"{job.number}",
            cache=folder / "cache", device="cpu", checkpoint_interval=600.0,
        )  # fmt: skip
        messages: list = []
        result = train_trial.train(request, messages.append, threading.Event())
        epochs = [message for message in messages if isinstance(message, protocol.EpochDone)]
        queue.add_epochs(job, [(epoch.number, epoch.at, epoch.metrics) for epoch in epochs])
        tasks.record(job, result)
    best = ranking.best_network(queue.jobs(row.name))
    model = promotion.fetch(tracker, queue.by_run(best.run_id), folder / "model")
    table, errors = folder / "predictions.csv", folder / "errors.npz"
    request = protocol.Score(folder=model, data=file, predictions=table, errors=errors)
    scored = scoring.score(request, messages.append, threading.Event())
    return reconciler, Winner(job=best, scored=scored, predictions=table, errors=errors)


def fetched(reconciler: Reconciler, folder: Path, data: Path) -> Closing:
    """A closing of the study that has all scores it asked for."""
    queue, name = reconciler.queue, reconciler.study.name
    job = next(job for job in queue.jobs(name) if job.kind == "closing")
    closing = Closing(
        queue, reconciler.tracker, queue.study(name), job=job, folder=folder, data=data, reconcile=lambda: None
    )
    assert closing.fetch()
    while (request := closing.next_request()) is not None:
        closing.put(scoring.answer(request, lambda message: None, threading.Event()))
    return closing


@pytest.mark.usefixtures("one_thread")
def test_old_and_new_data_have_one_champion_whichever_study_closes_first(database_url, tracking_uri, tmp_path):
    first = cells.make(tmp_path / "first", seed=12)
    second = cells.make(tmp_path / "second", seed=12, count=80, extends="../first")
    tracker, studies = Tracker(tracking_uri), []
    for name, data in (("closes-old", first), ("closes-new", second)):
        (tmp_path / name).mkdir()
        studies.append(trained(tmp_path / name, data, database_url, tracker))
    old, new = (reconciler for reconciler, _ in studies)
    common = [winner.job.result.common for _, winner in studies]
    scores = [studies[0][1].job.result.best_val_nmse, common[1][old.study.facts.data.key]]
    best = str(studies[scores.index(min(scores))][1].job.run_id)

    def close(reconciler: Reconciler, winner: Winner, tested: Sequence[ScoredVersion] = ()) -> None:
        queue, name = reconciler.queue, reconciler.study.name
        closing = next(job for job in queue.jobs(name) if job.kind == "closing")
        result = promotion.promote(
            queue, reconciler.tracker, reconciler.study, closing=closing, winners=[winner], tested=tested
        )
        queue.end(closing, State.DONE, result=result)

    def begin() -> None:
        """Let a worker hold both closings; nothing is registered."""
        with old.queue.engine.begin() as connection:
            connection.exec_driver_sql(
                "UPDATE hpo.job SET state = 'running', result = NULL, lease_until = now() + interval '1 hour' "
                "WHERE kind = 'closing'"
            )

    for order in (studies[::-1], studies, None):
        begin()
        if order is None:
            at_once(*(lambda one=one: close(*one) for one in studies))
        else:
            for one in order:
                close(*one)
        rows = [reconciler.queue.study(reconciler.study.name) for reconciler, _ in studies]
        (name,) = {row.facts.model_name for row in rows}
        aliases = tracker.client.get_registered_model(name).aliases
        versions = tracker.client.search_model_versions(f"name = '{name}'")
        assert len(versions) == 2 and aliases.keys() == {"champion", "closes-old", "closes-new"}
        assert {version.run_id for version in versions if version.version == aliases["champion"]} == {best}
        assert [message for row in rows for message in champion.faults(new.queue, tracker, row)] == []
        if order is not None:
            tracker.client.delete_registered_model(name)
    (other,) = [version.version for version in versions if version.run_id != best]
    tracker.client.set_registered_model_alias(name, "champion", other)  # by hand, on MLflow's page
    for row in rows:
        (message,) = champion.faults(new.queue, tracker, row)
        assert message == f"@champion is {name} version {other}, but {name} version {aliases['champion']} is better"
    tracker.client.delete_registered_model(name)
    begin()
    first_try = fetched(new, tmp_path / "first-try", tmp_path / "closes-new" / "data.npz")
    assert first_try.next_request() is None and not first_try.is_overtaken(), "there is no champion"
    close(*studies[0])
    assert first_try.is_overtaken(), "the old data's study closed meanwhile"
    for attempt in ("second-try", "after-its-worker-died"):  # when all but the closing's result was written
        again = fetched(new, tmp_path / attempt, tmp_path / "closes-new" / "data.npz")
        assert not again.is_overtaken()
        close(*studies[1], tested=again.tested)
        begin()
        older, newer = again.tested
        assert (older.run_id, newer.run_id) == tuple(str(winner.job.run_id) for _, winner in studies)
        assert older.tests.keys() == newer.tests.keys() == {OLD, NEW} and older.tests[NEW] != newer.tests[NEW]
    for reconciler in (old, new):
        reconciler.store.remove_session()
        reconciler.store.engine.dispose()
        reconciler.queue.close()
