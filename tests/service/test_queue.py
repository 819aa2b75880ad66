"""The queue on a real Postgres: leases, fences, attempts, the outbox."""

import dataclasses
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import records
from optuna.study import StudyDirection
from shell import at_once, read_only
from sqlalchemy import event, text
from sqlalchemy.exc import ProgrammingError

from hpo import study
from hpo.errors import NotFound, ServiceError, StudyConflict
from hpo.queue import (
    SCHEMA_VERSION,
    AttemptOutcome,
    BudgetEnd,
    DatabaseLost,
    LeaseLost,
    NewJob,
    Queue,
    State,
    database,
)
from hpo.queue.attempts import COUNTED_LIMIT, LIMIT
from hpo.queue.closing_result import ClosingResult
from hpo.queue.rows import hold
from hpo.search import sampling
from hpo.study.records import Refit

pytestmark = pytest.mark.service

FAILED, HANDED_BACK = AttemptOutcome.FAILED, AttemptOutcome.HANDED_BACK
RESULT = records.result(0.1)
ONES = np.ones(2, np.int64)
SPEC = records.spec(point={"filters": 8, "a": 1})


@pytest.fixture(autouse=True)
def _closed(monkeypatch):
    """Close every queue a test opened."""
    opened, make = [], Queue.__init__

    def remember(queue, url):
        make(queue, url)
        opened.append(queue)

    monkeypatch.setattr(Queue, "__init__", remember)
    yield
    for queue in opened:
        queue.close()


def planned(url: str, count: int, *, name: str = "s") -> Queue:
    queue = Queue(url)
    queue.install()
    queue.put_study(records.study_row(name))
    jobs = [NewJob(kind="trial", number=n, config=n, cost=float(n), spec=SPEC) for n in range(count)]
    queue.put_jobs(name, [*jobs, NewJob(kind="closing", number=-1)])
    return queue


def claim(queue, worker="w", lease=30.0):
    return queue.claim("s", worker=worker, lease=lease)


def test_planning_twice_inserts_each_point_once(database_url):
    planned(database_url, 5)
    assert len(planned(database_url, 5).jobs("s")) == 6


def test_the_dearest_trial_is_claimed_first_and_the_order_of_a_point_survives(database_url):
    queue = planned(database_url, 3)
    job = claim(queue)
    assert job.number == 2
    assert list(job.spec.point) == ["filters", "a"]


@pytest.mark.parametrize("is_trained_since", [True, pytest.param(False, id="nothing since a failure")])
def test_a_claim_reads_a_few_rows_of_a_large_study(database_url, is_trained_since):
    queue = planned(database_url, 3000)
    with queue.engine.begin() as connection:  # two thirds have ended, a failure among them
        connection.exec_driver_sql("""
            UPDATE hpo.job SET state = 'done' WHERE number >= 1000;
            INSERT INTO hpo.attempt (job, study, fence, host, device, ended, epochs, epoch_at, outcome)
            SELECT id, study, 1, 'w', 'cpu', clock_timestamp(), 1, clock_timestamp(),
                CASE WHEN number = 1500 THEN 'failed' ELSE 'recorded' END
            FROM hpo.job WHERE state = 'done' ORDER BY number;
            ANALYZE hpo.attempt  -- as the server does within a minute
        """)
    if not is_trained_since:
        queue.give_back(claim(queue), FAILED, reason="exit 1")
    with rows_read(queue) as counts:
        assert claim(queue).number == (999 if is_trained_since else 998)
    assert sum(counts.values()) < 100


@contextmanager
def rows_read(queue):
    """The rows of each table of hpo that the one transaction in the block reads."""
    counts, ends = Counter(), []

    def count(connection) -> None:
        total = "SELECT relname, seq_tup_read + coalesce(idx_tup_fetch, 0) FROM pg_stat_xact_user_tables"
        ends.append(Counter(dict(connection.exec_driver_sql(f"{total} WHERE schemaname = 'hpo'").all())))

    for moment in ("begin", "commit"):
        event.listen(queue.engine, moment, count)
    yield counts
    for moment in ("begin", "commit"):
        event.remove(queue.engine, moment, count)
    counts.update(ends[1] - ends[0])


def test_a_claim_reads_no_attempt_of_the_many_that_run(database_url):
    queue = planned(database_url, 3000)
    with queue.engine.begin() as connection:
        connection.exec_driver_sql("""
            UPDATE hpo.job SET state = 'running', lease_until = clock_timestamp() + interval '1 hour'
            WHERE number >= 1000;
            INSERT INTO hpo.attempt (job, study, fence, host, device)
            SELECT id, study, 1, 'w', 'cpu' FROM hpo.job WHERE state = 'running';
            ANALYZE hpo.attempt
        """)
    for _ in range(3):
        queue.give_back(claim(queue), FAILED, reason="exit 1")
    with rows_read(queue) as counts:
        claim(queue)
    assert counts["attempt"] < 20


def test_failures_that_an_earlier_hpo_stored_still_wait_for_the_others(database_url):
    queue = planned(database_url, 3)
    for _ in range(2):
        queue.give_back(claim(queue), FAILED, reason="exit 1")
    with queue.engine.begin() as connection:
        connection.exec_driver_sql("""
            ALTER TABLE hpo.job DROP COLUMN failures;
            ALTER TABLE hpo.attempt DROP COLUMN study;
            UPDATE hpo.schema SET version = 5
        """)
    Queue(database_url).install()
    assert [claim(queue).number for _ in range(3)] == [0, 2, 1]


def test_sixteen_claimers_at_once_get_each_job_once(database_url):
    planned(database_url, 60)
    claimed: list[int] = []

    def work() -> None:
        own = Queue(database_url)
        while job := own.claim("s", worker="w", lease=30):
            claimed.append(job.number)

    at_once(*[work] * 16)
    assert sorted(claimed) == list(range(60))


def test_the_closing_waits_until_every_trial_has_ended(database_url):
    queue = planned(database_url, 2)
    first, second = claim(queue), claim(queue)
    assert claim(queue) is None
    queue.end(first, "done", result={})
    assert claim(queue) is None
    queue.end(second, "diverged", result={"epoch": 1}, reason="diverged at epoch 1")
    assert claim(queue).kind == "closing"


def test_a_job_whose_lease_expired_is_claimed_again_and_its_first_holder_is_fenced(database_url):
    queue = planned(database_url, 1)
    old = claim(queue, "frozen", lease=0.2)
    queue.add_epochs(old, [(1, 1000, {"val/nmse": 1.0})])
    time.sleep(0.3)
    new = claim(queue, "other", lease=0.2)
    queue.renew([new], lease=30)
    assert new.id == old.id and new.attempt == 2 and new.fence == old.fence + 1
    for write in (
        lambda: queue.add_epochs(old, [(2, 2000, {"val/nmse": 0.5})]),
        lambda: queue.checkpoint(old, records.checkpoint(1)),
        lambda: queue.end(old, "done", result={}),
        lambda: queue.give_back(old, HANDED_BACK, reason="x"),
        lambda: queue.fill(old, records.spec(), 0),
    ):
        with pytest.raises(LeaseLost):
            write()
    assert queue.renew([old, new], lease=30) == [old]
    assert queue.curve(old.id) == [(1, {"val/nmse": 1.0})]


def test_a_lease_that_is_renewed_is_not_taken_over(database_url):
    queue = planned(database_url, 1)
    job = claim(queue, lease=1)
    assert queue.renew([job], lease=60) == []
    time.sleep(1.1)
    assert claim(queue) is None


def test_a_recorded_result_is_final_with_its_errors_of_the_validation_split(database_url):
    queue = planned(database_url, 1)
    job = claim(queue)
    errors = np.array([[0.25, np.nan, np.inf], [1e300, 0.0, 4.0]])
    queue.end(job, "done", result=records.result(0.1), validation={"network": errors})
    with pytest.raises(LeaseLost):
        queue.end(job, "done", result=records.result(0.2), validation={"network": 2 * errors})
    assert queue.job(job.id).result.best_val_nmse == 0.1
    closing = claim(queue)
    queue.put_validation(closing, {job.id: {"network": errors + 1}, closing.id: {"mean": errors[:1], "groups": ONES}})
    lost = dataclasses.replace(closing, fence=closing.fence - 1)
    with pytest.raises(LeaseLost):
        queue.put_validation(lost, {closing.id: {"volume fraction": errors}})
    stored = queue.validation([job.id, closing.id])
    assert stored[job.id].keys() == {"network"} and np.array_equal(stored[job.id]["network"], errors, equal_nan=True)
    assert stored[closing.id].keys() == {"mean", "groups"} and stored[closing.id]["groups"].tolist() == [1, 1]
    queue.delete_study("s")
    assert queue.validation([job.id]) == {job.id: {}}


def close(queue, **result) -> None:
    closing = claim(queue)
    assert closing.kind == "closing"
    queue.end(closing, "done", result=result)


def test_more_trials_reopen_a_closed_study_and_its_looks_at_test_data_are_counted(database_url):
    queue = planned(database_url, 1)
    for trials, result, tests in ((2, {"winner": None}, 0), (3, {"winner": {}}, 1), (4, {"winner": {}}, 2)):
        queue.end(claim(queue), "done", result=records.result(0.1))
        queue.close_again("s")
        close(queue, **result)
        before = [queue.repeats("s", number) for number in range(trials - 1)]
        for _ in range(2):  # planning again changes nothing
            queue.extend("s", trials, [NewJob(kind="trial", number=number) for number in range(trials)])
        row, jobs = queue.study("s"), queue.jobs("s")
        assert (row.trials, row.specification.trials, row.facts.openings, row.facts.closed) == (
            trials,
            trials,
            tests,
            True,
        )
        assert row.canonical["sampler"]["trials"] == 1, "its identity stays"
        assert jobs[0].state == "waiting" and [queue.repeats("s", number) for number in range(trials - 1)] == before
        assert [job.number for job in jobs[1:]] == list(range(trials))


def test_trials_are_added_to_queue_and_optuna_together_or_not_at_all(database_url):
    queue, more = planned(database_url, 1), [NewJob(kind="trial", number=1)]

    def dies(connection):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        queue.extend("s", 2, more, also=dies)
    assert queue.study("s").trials is None and queue.repeats("s", 1) == []


def test_a_worker_that_knows_an_earlier_study_of_the_name_gets_nothing(database_url):
    queue = planned(database_url, 1)
    earlier = queue.study("s").created_at
    queue.delete_study("s")
    planned(database_url, 1)
    (now,) = queue.studies()
    assert queue.claim("s", worker="w", lease=60, stops=0, created_at=earlier) is None
    assert queue.closing_state("s", created_at=earlier) is None
    assert queue.closing_state("s", created_at=now.created_at) == "waiting"
    assert queue.claim("s", worker="w", lease=60, stops=0, created_at=now.created_at).number == 0


def test_after_a_budget_the_closing_alone_is_claimed_until_it_is_lifted(database_url):
    queue, end = planned(database_url, 3), BudgetEnd(budget="--max-hours 1", reached="1 hours")
    queue.amend_facts("s", {"planned": True})  # for the pool
    queue.end(claim(queue), "done", result=records.result(0.1))
    running = claim(queue)
    assert queue.end_by_budget("s", end) and not queue.end_by_budget("s", end)
    assert claim(queue) is None, "the closing waits for the trial that runs"
    stop = queue.orders("w", stops={"s": 0}, held=[running]).stopped["s"]
    assert (stop.by, stop.is_budget) == ("the budget --max-hours 1", True)
    assert [one.has_work for one in queue.open_studies(lease=60)] == [False], "nor is it for the pool"
    queue.give_back(running, AttemptOutcome.HANDED_BACK, reason="stopped")
    closing = claim(queue)
    assert closing.kind == "closing", closing
    refit = Refit(epochs=1, folds=5, nmse=0.1, mse=1.0, deviation=0.0, validation=RESULT.validation)
    planned_then = NewJob(kind="trial", number=2, repeat=5, spec=records.spec(refit=refit))
    queue.put_jobs("s", [planned_then], closing=closing)  # as after a cross-validation
    with pytest.raises(LeaseLost):
        queue.end(closing, "done", result={})
    queue.give_back(closing, AttemptOutcome.HANDED_BACK, reason="the winner is trained again first")
    job = claim(queue)
    assert job.is_refit
    queue.lift_budget("s")
    for number in (0, 1):
        queue.cancel("s", number, 0, by="anna")
    assert not queue.end_by_budget("s", end), "no budget ends a study whose winner alone is trained again"
    for number in (0, 1):
        queue.undo_cancel("s", number, 0)
    assert queue.end_by_budget("s", end)
    assert not queue.open_studies(lease=60)[0].has_work
    queue.end(job, "done", result=records.result(0.1))
    assert queue.open_studies(lease=60)[0].has_work, "its closing"
    close(queue)
    row, jobs = queue.study("s"), queue.jobs("s")
    assert row.budget == end and row.still_to_train(jobs) == []
    assert [job.state for job in jobs] == ["done", "waiting", "waiting", "done", "done"]
    queue.lift_budget("s")
    assert queue.study("s").budget is None and len(row.still_to_train(jobs)) == 0
    assert queue.closing_state("s") == "waiting" and claim(queue).kind == "trial"


def test_the_best_complete_configuration_has_all_its_repeats(database_url):
    queue = planned(database_url, 3)
    queue.put_jobs("s", [NewJob(kind="trial", number=0, repeat=1, spec=SPEC)])
    assert queue.best_complete("s") is None
    for score in (0.5, 0.3, 0.1):  # of 2, 1, and 0: the most expensive first
        queue.end(claim(queue), "done", result=records.result(score))
    assert queue.best_complete("s") == (1, 0.3), "a repeat of 0 still waits"
    queue.end(claim(queue), "done", result=records.result(0.2))
    assert queue.best_complete("s") == (0, pytest.approx(0.15))


def test_after_three_failures_of_its_own_a_job_is_dead_with_its_reason(database_url):
    queue = planned(database_url, 1)
    for attempt in range(1, COUNTED_LIMIT + 1):
        job = claim(queue)
        assert job.attempt == attempt
        queue.give_back(job, FAILED, reason=f"exit {attempt}")
    assert (queue.job(job.id).state, queue.job(job.id).reason) == ("dead", "exit 3")
    assert claim(queue).kind == "closing", "a dead trial does not block the closing"


@pytest.mark.parametrize(("hosts", "attempts"), [(3, COUNTED_LIMIT), (1, LIMIT)])
def test_a_job_that_lost_three_places_or_six_workers_is_dead(database_url, hosts, attempts):
    queue = planned(database_url, 1)
    for attempt in range(attempts):
        job = claim(queue, f"host-{attempt % hosts}:7", lease=0.1)
        assert job.attempt == attempt + 1
        time.sleep(0.15)
    queue.expire("s", lease=0)
    assert (queue.job(job.id).state, queue.job(job.id).reason) == ("dead", "worker lost")
    (stored,) = queue.attempts("s").values()
    assert [(attempt.host, attempt.outcome) for attempt in stored] == [
        (f"host-{number % hosts}", AttemptOutcome.LOST) for number in range(attempts)
    ]
    assert claim(queue).kind == "closing"


def test_an_attempt_is_a_row_with_its_place_its_progress_and_its_end(database_url):
    queue = planned(database_url, 1)
    job = queue.claim("s", worker="lab:7-abc", device="cuda:1", lease=30)
    queue.add_epochs(job, [(1, 1000, {"val/nmse": 1.0}), (2, 2000, {"val/nmse": 0.5})])
    queue.checkpoint(job, records.checkpoint(2))
    queue.give_back(job, AttemptOutcome.OUT_OF_MEMORY, reason="no memory", alone=False)
    again = claim(queue)
    first, second = queue.attempts("s")[job.id]
    assert (first.host, first.device, first.fence) == ("lab", "cuda:1", job.fence)
    assert (first.epochs, first.checkpoint, first.outcome, first.alone) == (2, 2, AttemptOutcome.OUT_OF_MEMORY, False)
    assert first.reason == "no memory" and first.began <= first.epoch_at <= first.ended
    assert (second.fence, second.outcome, second.ended, second.epochs) == (again.fence, None, None, 0)
    queue.end(again, "done", result=RESULT)
    assert queue.attempts("s")[job.id][1].outcome is AttemptOutcome.RECORDED


def test_a_brought_back_job_has_all_its_attempts_again(database_url):
    queue = planned(database_url, 1)
    for _ in range(COUNTED_LIMIT):
        queue.give_back(claim(queue), FAILED, reason="x")
    assert queue.revive("s", trials=True) == [0]
    for attempt in range(COUNTED_LIMIT):
        job = claim(queue)
        assert job.kind == "trial" and job.attempt == attempt + 1
        queue.give_back(job, FAILED, reason="x")
    assert queue.job(job.id).state == "dead"


def test_the_count_of_an_earlier_hpo_goes_on_as_rows(database_url):
    queue = planned(database_url, 3)
    running, tried = claim(queue), claim(queue)
    with queue.engine.begin() as connection:
        connection.exec_driver_sql(f"""
            ALTER TABLE hpo.job ADD COLUMN attempt int NOT NULL DEFAULT 0;
            UPDATE hpo.job SET attempt = 2, fence = 3 WHERE id IN ({running.id}, {tried.id});
            UPDATE hpo.job SET state = 'waiting', reason = 'exit 1' WHERE id = {tried.id};
            DROP TABLE hpo.attempt;
            UPDATE hpo.schema SET version = 4
        """)
    Queue(database_url).install()
    assert [queue.job(job.id).attempt for job in (running, tried)] == [2, 2]
    now = queue.job(running.id)
    queue.give_back(now, HANDED_BACK, reason="handed back")
    assert (queue.job(now.id).state, queue.job(now.id).attempt) == ("waiting", 1)
    assert queue.job(tried.id).state == "waiting"
    while (job := claim(queue)).id != tried.id:
        pass
    queue.give_back(job, FAILED, reason="exit 1")
    assert (queue.job(tried.id).state, queue.job(tried.id).attempt) == ("dead", 3)


def test_handing_back_does_not_count_as_an_attempt(database_url):
    queue = planned(database_url, 1)
    for _ in range(2 * LIMIT):
        job = claim(queue)
        assert job.attempt == 1
        queue.give_back(job, HANDED_BACK, reason="handed back")
    assert queue.job(job.id).state == "waiting"


def test_epochs_computed_again_double_nothing_and_the_outbox_empties_once(database_url):
    queue = planned(database_url, 1)
    job = claim(queue)
    rows = [(n, 1000 * n, {"val/nmse": 1 / n}) for n in range(1, 6)]
    queue.add_epochs(job, rows)
    queue.add_epochs(job, [(n, at + 7, scores) for n, at, scores in rows[2:]] + [(6, 6000, {"val/nmse": 0.1})])
    assert queue.outbox(job.id, limit=150) == [*rows, (6, 6000, {"val/nmse": 0.1})]
    queue.set_run(job.id, "run")
    assert not queue.set_forwarded(job.id, "another run", [4])
    queue.set_forwarded(job.id, "run", [1, 2, 3])
    assert [number for number, _, _ in queue.outbox(job.id, limit=150)] == [4, 5, 6]
    assert queue.job(job.id).epochs == 6


def test_a_curve_that_comes_out_otherwise_is_cut_back_to_where_it_does(database_url):
    queue = planned(database_url, 1)
    job = claim(queue)
    rows = [(n, 1000 * n, {"val/nmse": 1 / n, "seconds": 1.0}) for n in range(1, 6)]
    queue.add_epochs(job, rows)
    queue.set_run(job.id, "first")
    queue.set_forwarded(job.id, "first", [1, 2, 3, 4])
    queue.checkpoint(job, records.checkpoint(2))
    queue.set_mirrored(queue.job(job.id), "first")
    same, other = [(3, 3007, {"val/nmse": 1 / 3, "seconds": 2.0})], [(4, 4007, {"val/nmse": 0.24, "seconds": 2.0})]
    queue.add_epochs(job, same + other)
    found = queue.job(job.id)
    assert (found.run_id, found.discarded, found.epochs, found.checkpoint.epoch) == (None, ["first"], 4, 2)
    assert queue.outbox(job.id, limit=150) == [*rows[:3], *other], "MLflow gets the whole curve, in another run"
    assert not queue.set_forwarded(job.id, "first", [1]), "by who had just sent it to the old one"
    queue.set_mirrored(found, "first")
    assert not queue.job(job.id).mirrored
    assert queue.set_run(job.id, "first") is None and queue.set_run(job.id, "second") == "second"
    queue.cut(job, 4)
    assert queue.job(job.id).run_id == "second", "nothing lies beyond"
    queue.cut(job, 1)
    found = queue.job(job.id)
    assert (found.run_id, found.discarded, found.epochs) == (None, ["first", "second"], 1)
    assert found.checkpoint is None, "it is of an epoch that is not there"


def test_a_state_that_is_not_shown_elsewhere_yet_is_found(database_url):
    queue = planned(database_url, 2)
    job = claim(queue)
    assert [each.id for each in queue.unmirrored("s", older_than=0)] == [job.id]
    assert queue.unmirrored("s", older_than=60) == []
    queue.set_mirrored(job)
    assert queue.unmirrored("s", older_than=0) == []
    queue.end(job, "done", result={})
    queue.set_mirrored(job)  # an old image of it does not count
    assert [each.state for each in queue.unmirrored("s", older_than=0)] == ["done"]


def test_a_dead_closing_runs_again_and_dead_trials_when_asked_for(database_url):
    queue = planned(database_url, 1)
    for _ in range(COUNTED_LIMIT):
        job = claim(queue)
        queue.give_back(job, FAILED, reason="x")
    for _ in range(COUNTED_LIMIT):
        closing = claim(queue)
        queue.give_back(closing, FAILED, reason="y")
    assert queue.closing_state("s") == "dead"
    assert queue.revive("s", trials=False) == []
    assert (queue.closing_state("s"), queue.job(job.id).state) == ("waiting", "dead")
    queue.end(claim(queue), "done", result={})
    assert queue.revive("s", trials=False) == []
    assert queue.closing_state("s") == "done", "a done closing stays"
    assert queue.revive("s", trials=True) == [0]
    assert (queue.closing_state("s"), queue.job(job.id).state) == ("waiting", "waiting")


def test_a_score_that_is_no_number_is_stored_as_null(database_url):
    queue = planned(database_url, 1)
    job = claim(queue)
    scores = dataclasses.replace(RESULT.validation, r2=float("nan"), per_target={"mape": [1.0, float("inf")]})
    queue.end(job, "done", result=dataclasses.replace(RESULT, validation=scores))
    stored = queue.job(job.id).result.validation
    assert (stored.r2, stored.per_target) == (None, {"mape": [1.0, None]})


def test_a_name_stands_for_one_specification(database_url):
    queue = planned(database_url, 1)
    with pytest.raises(StudyConflict, match="hpo delete --study s"):
        queue.put_study(records.study_row("s", "other"))
    assert queue.study("s").identity == "i"


def test_an_unknown_study_is_named_with_those_there_are(database_url):
    with pytest.raises(NotFound, match=r"No study 'x' has been planned here\. There are: s"):
        planned(database_url, 1).study("x")


def test_another_schema_version_is_refused_and_left_alone(database_url):
    queue = planned(database_url, 1)
    with queue.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE hpo.schema SET version = 99")
    with pytest.raises(ServiceError, match=f"schema version 99 of hpo, this program needs {SCHEMA_VERSION}"):
        Queue(database_url).install()
    assert len(queue.jobs("s")) == 2


def test_a_database_of_the_first_version_takes_pruned_and_cancelled_trials(database_url):
    queue = planned(database_url, 2)
    with queue.engine.begin() as connection:
        connection.exec_driver_sql("""
            ALTER TABLE hpo.job DROP CONSTRAINT job_state_check;
            ALTER TABLE hpo.job ADD CONSTRAINT job_state_check
                CHECK (state IN ('waiting', 'running', 'done', 'diverged', 'dead'));
            ALTER TABLE hpo.study DROP COLUMN stops, DROP COLUMN stopped_at, DROP COLUMN stopped_by;
            DROP TABLE hpo.worker, hpo.attempt;
            ALTER TABLE hpo.job ADD COLUMN attempt int NOT NULL DEFAULT 0;
            CREATE TYPE hpo.trialstate AS ENUM ('RUNNING');
            CREATE TABLE hpo.trials (trial_id serial, state hpo.trialstate);
            UPDATE hpo.schema SET version = 1
        """)
    Queue(database_url).install()
    with queue.engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO public.trials (state) VALUES ('RUNNING'::public.trialstate)")
    job = claim(queue)
    queue.end(job, "pruned", result={"epoch": 3}, reason="why")
    assert (queue.job(job.id).state, len(queue.jobs("s"))) == ("pruned", 3)
    assert [each.state for each in queue.cancel("s", 0, None, by="anna")] == ["cancelled"]
    assert queue.stop("s", by="anna") == 1
    assert claim(queue).kind == "closing", "pruned and cancelled trials have ended"


def test_what_a_pruner_saw_before_it_stood_in_the_rows_is_taken_over(database_url):
    queue = planned(database_url, 2)
    store = sampling.storage(database_url)
    study_id = store.create_new_study([StudyDirection.MINIMIZE], "s")
    trials = [store.create_new_trial(study_id) for _ in range(2)]
    for epoch, value in enumerate((0.9, 0.3, 0.5), start=1):
        store.set_trial_intermediate_value(trials[1], epoch, value)
    for rung, value in enumerate((0.9, 0.3)):
        store.set_trial_system_attr(trials[1], f"completed_rung_{rung}", value)
    with queue.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE hpo.job DROP COLUMN judged; UPDATE hpo.schema SET version = 3")
    for _ in range(2):
        Queue(database_url).install()
        _, first, second = queue.jobs("s")
        assert first.judged is None
        assert second.judged.to_json() == {"epoch": 3, "value": 0.3, "rungs": [0.9, 0.3]}
        with queue.engine.begin() as connection:
            connection.exec_driver_sql("UPDATE hpo.schema SET version = 3")
    store.remove_session()
    store.engine.dispose()


def waits_for_a_lock(queue):
    with queue.engine.begin() as connection:
        found = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        return connection.exec_driver_sql(found).scalar_one() > 0


def test_tables_are_brought_up_to_date_beside_a_worker_of_an_earlier_hpo(database_url):
    queue = planned(database_url, 1)
    with queue.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE hpo.schema SET version = 3")
    with queue.engine.begin() as claiming, ThreadPoolExecutor(1) as thread:
        claiming.exec_driver_sql("UPDATE hpo.job SET fence = fence")
        installed = thread.submit(Queue(database_url).install)
        while not waits_for_a_lock(queue) and not installed.done():
            time.sleep(0.02)
        claiming.exec_driver_sql("SELECT stops FROM hpo.study")
        claiming.commit()
        installed.result()
    assert len(queue.jobs("s")) == 2


def test_two_first_workers_make_the_tables_once(database_url):
    at_once(*[lambda: Queue(database_url).install()] * 6)


def test_a_database_that_is_away_is_told_from_a_mistake():
    with pytest.raises(DatabaseLost):
        Queue("postgresql://nobody:x@127.0.0.1:9/none").install()
    with pytest.raises(ServiceError, match=r"expected a postgresql:// URL, found sqlite://"):
        Queue("sqlite:///x.db")
    with pytest.raises(ServiceError, match="expected a URL like postgresql://"):
        Queue("not a url")


def test_a_database_that_takes_nothing_is_lost_and_one_that_refuses_the_role_is_not(services, database_url):
    queue, store = planned(database_url, 1), sampling.storage(database_url)
    job = claim(queue)
    chosen = study.load("grid")
    sampling.plan(store, "s", chosen)
    with read_only(services, database_url):
        for write in (
            lambda: queue.renew([job], lease=30.0),
            lambda: claim(queue),
            lambda: sampling.plan(store, "another", chosen),
            lambda: sampling.update_trial(store, chosen, job, [job]),
        ):
            with pytest.raises(DatabaseLost):
                for _ in range(2):  # the first may meet a connection that was dropped
                    write()
        with pytest.raises(DatabaseLost, match="read-only transaction"):
            claim(queue)
        assert queue.jobs("s"), "what is there can be read"
    queue.jobs("s")  # on a new connection
    assert queue.renew([job], lease=30.0) == []
    sampling.update_trial(store, chosen, job, [job])
    with pytest.raises(ProgrammingError, match="permission denied"), queue._transaction() as connection:
        connection.exec_driver_sql("SET LOCAL ROLE pg_monitor")
        connection.exec_driver_sql("SELECT * FROM hpo.job")
    store.remove_session()
    store.engine.dispose()


def test_sessions_speak_utc(database_url):
    with planned(database_url, 1).engine.begin() as connection:
        assert connection.exec_driver_sql("SHOW timezone").scalar() == "UTC"


def test_a_worker_that_froze_between_a_write_and_its_commit_does_not_keep_its_trial(database_url, monkeypatch):
    queue = planned(database_url, 1)
    with queue.engine.connect() as connection:
        assert connection.exec_driver_sql("SHOW idle_in_transaction_session_timeout").scalar() == "30s"
    store = sampling.storage(database_url)
    with store.engine.connect() as connection:
        assert connection.exec_driver_sql("SHOW idle_in_transaction_session_timeout").scalar() == "30s"
    store.engine.dispose()
    monkeypatch.setattr(database, "FREEZE_LIMIT", 3.0)
    frozen = Queue(database_url)
    job = claim(frozen, "frozen", lease=0.1)
    with pytest.raises(DatabaseLost), frozen._transaction() as connection:
        hold(connection, job)
        time.sleep(0.2)
        assert claim(queue, "other") is None, "its lease has run out, but it is writing"
        end = time.monotonic() + 60
        while (taken := claim(queue, "other")) is None and time.monotonic() < end:
            time.sleep(0.1)
        assert taken.attempt == 2


def test_a_lease_gets_its_length_once_more_after_the_server_started(database_url):
    queue = planned(database_url, 1)
    job = claim(queue, lease=0.1)
    time.sleep(0.2)
    age = "SELECT extract(epoch FROM clock_timestamp() - pg_postmaster_start_time())"
    with queue.engine.connect() as connection:
        started = float(connection.exec_driver_sql(age).scalar())
    assert claim(queue, "other", lease=started + 5) is None, "nobody could renew while the server was away"
    assert queue.expire("s", lease=started + 5) == []
    assert queue.renew([job], lease=0.1) == [], "its holder has it still"
    time.sleep(0.2)
    assert claim(queue, "other", lease=0.1).attempt == 2


def test_a_job_whose_claim_was_never_answered_waits_again_and_no_attempt_is_counted(database_url):
    queue = planned(database_url, 3)
    known, unheard, others = claim(queue, "me"), claim(queue, "me"), claim(queue, "other")
    assert queue.disown("me", [known]) == 1
    assert (queue.job(unheard.id).state, queue.job(unheard.id).attempt) == ("waiting", 0)
    assert queue.renew([known, others], lease=30) == []


def test_a_job_nobody_takes_over_waits_again_once_its_lease_ran_out(database_url):
    queue = planned(database_url, 1)
    job = claim(queue, lease=0.1)
    time.sleep(0.2)
    assert queue.expire("s", lease=0) == [job.id]
    assert (queue.job(job.id).state, queue.job(job.id).reason) == ("waiting", "worker lost")
    assert queue.renew([job], lease=30) == [job], "its holder has lost it"


def test_leases_may_be_taken_over_only_once_somebody_could_renew_for_a_whole_lease(database_url):
    queue = planned(database_url, 1)

    def attend(worker: str) -> bool:
        return queue.attend(worker, "s", trainers=1, device="cpu", stops=0, lease=60)

    def shift(seconds: float, *columns: str) -> None:
        changes = ", ".join(f"{column} = {column} - make_interval(secs => {seconds})" for column in columns)
        with queue.engine.begin() as connection:
            connection.exec_driver_sql(f"UPDATE hpo.worker SET {changes}")

    assert not attend("a"), "whoever is silent may have met what kept everybody from writing"
    for passed in (30, 31):  # without a gap
        shift(passed, "seen_at", "since")
        assert attend("a") == (passed == 31)
    assert attend("fresh"), "a lives, and could have renewed all the time"
    shift(45, "seen_at", "since")  # an outage: nobody could write
    assert not attend("fresh") and not attend("a")
    shift(60, "since")
    shift(3000, "seen_at")
    assert not attend("late"), "those that wrote so long are silent now"


def test_a_worker_that_goes_on_with_fewer_trainers_is_shown_so(database_url):
    queue = planned(database_url, 1)
    for trainers in (4, 2):
        queue.attend("w", "s", trainers=trainers, device="cuda", stops=0, lease=60)
    assert [worker.trainers for worker in queue.workers("s")] == [2]


def end_all(queue, name, count):
    for _ in range(count):
        queue.end(queue.claim(name, worker="w", lease=30.0), State.DONE, result=RESULT)


def mark_planned(queue, *names):
    for name in names:
        queue.amend_facts(name, {"planned": True})


def test_the_pool_sees_open_studies_by_priority_then_by_their_running_jobs(database_url):
    queue = planned(database_url, 2, name="first")
    for name in ("second", "urgent", "unfinished"):
        planned(database_url, 2, name=name)
    mark_planned(queue, "first", "second", "urgent")
    queue.offer("urgent", priority=3)
    queue.claim("first", worker="w", lease=30.0)
    seen = queue.open_studies(lease=30.0)
    assert [study.name for study in seen] == ["urgent", "second", "first"], "one is not planned to its end"
    assert [(study.priority, study.running, study.has_work) for study in seen] == [
        (3, 0, True),
        (0, 0, True),
        (0, 1, True),
    ]
    queue.stop("second", by="anna")
    queue.offer("urgent", priority=-1)
    assert [study.name for study in queue.open_studies(lease=30.0)] == ["first", "urgent"]
    assert not queue.orders("w", stops={"second": 0}, held=[]).stopped["second"].is_budget
    queue.offer("second")  # `hpo run` of it
    assert next((study.name, study.stops) for study in queue.open_studies(lease=30.0)) == ("second", 1)
    with queue.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE hpo.study SET paused = 'several failed' WHERE name = 'second'")
    assert queue.open_studies(lease=30.0)[0].paused == "several failed"
    for number in range(2):
        queue.cancel("second", number, None, by="anna")
    closing = queue.open_studies(lease=30.0)[0]
    assert (closing.name, closing.has_work, closing.paused) == ("second", True, None), "its closing alone waits"
    queue.end(queue.claim("second", worker="w", lease=30.0), State.DONE, result=ClosingResult())
    assert "second" not in [study.name for study in queue.open_studies(lease=30.0)]


def test_a_worker_of_the_pool_is_shown_with_what_it_holds_elsewhere(database_url):
    queue = planned(database_url, 2, name="first")
    planned(database_url, 2, name="second")
    queue.attend("h:1", None, trainers=3, device="cpu", stops=0, lease=30)
    queue.attend("h:2", "first", trainers=1, device="cpu", stops=0, lease=30)
    queue.claim("second", worker="h:1", lease=30.0)
    pool, own = queue.workers("first")
    assert (pool.in_pool, pool.elsewhere, pool.trainers_left) == (True, {"second": 1}, 2)
    assert not own.in_pool and [worker.name for worker in queue.workers("second")] == ["h:1"]
    assert len(queue.workers()) == 2
    queue.delete_study("first")
    assert [worker.name for worker in queue.workers()] == ["h:1"], "it goes on with the others"
    assert queue.orders("h:1", stops={"second": 0}, held=[]).leave is None
    queue.stop_pool(by="anna")
    assert queue.orders("h:1", stops={"second": 0}, held=[]).leave.by == "anna"


def test_the_pool_grows_for_jobs_that_a_worker_of_it_would_claim(database_url):
    queue = planned(database_url, 2, name="first")
    planned(database_url, 3, name="second")
    for name in ("first", "second"):
        queue.amend_facts(name, {"planned": True})
    assert (queue.open_jobs("first"), queue.open_jobs("second"), queue.open_jobs()) == (2, 3, 5)
    queue.amend_facts("second", {"planned": False})
    assert queue.open_jobs() == 2, "nobody claims of a study that is not planned to its end"
    queue.amend_facts("second", {"planned": True})
    with queue.engine.begin() as connection:
        connection.execute(text("UPDATE hpo.study SET paused = 'x' WHERE name = 'first'"))
    assert queue.open_jobs() == 3, "nor of one that is paused"
    with queue.engine.begin() as connection:
        connection.execute(text("UPDATE hpo.job SET state = 'done' WHERE study = 'first' AND kind = 'trial'"))
    assert queue.open_jobs() == 4, "but its closing is work"
    assert {study.name for study in queue.open_studies(lease=30.0)} == {"first", "second"}
