"""Statements on the job table that several modules share. Each takes the connection of its caller's transaction.

Every transaction locks rows in one order, so that nobody waits in a circle: the study, its jobs by id, and then what
belongs to these (attempts, epochs, workers). A transaction that locks several jobs names them in that order.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, text

from hpo.queue.attempts import Attempt, AttemptOutcome, is_exhausted
from hpo.queue.database import LeaseLost
from hpo.queue.records import Job
from hpo.text import utf8

REASON = 500  # characters kept of why a job was given back or ended

# A lease that ran out. After the server's own start every lease gets its full length once more: while the server was
# away nobody could renew, and a restart must not cost each running trial an attempt.
EXPIRED = """
    state = 'running'
    AND greatest(lease_until, pg_postmaster_start_time() + make_interval(secs => :lease)) < clock_timestamp()
"""

# A study is the one that a worker knows: a deleted one may have been planned again under its name, on other data.
CREATED_AT = "extract(epoch FROM study.created_at)::float8"
SAME = f"{CREATED_AT} = coalesce(cast(:created_at AS float8), {CREATED_AT})"

TRIAL = "study = :study AND kind = 'trial' AND number = :number AND repeat = coalesce(:repeat, repeat)"

# Of trials that wait: after the end of a study's budget only those are claimed that its closing has planned.
WANTED_BY = "({budget} IS NULL OR spec->'refit' IS NOT NULL)"
WANTED = WANTED_BY.format(budget="(SELECT budget FROM hpo.study WHERE name = :study)")

# Trials that are still to be trained before the study can close.
LEFT = f"""
    study = :study AND kind = 'trial' AND state IN ('waiting', 'running') AND (state = 'running' OR {WANTED})
"""

# What may differ from what was read at :after, if that is not null.
CHANGED = """
    (cast(:after AS float8) IS NULL OR state = 'running' OR kind = 'closing' OR changed_at > to_timestamp(:after))
"""

JOB = """
    id, study, kind, number, repeat, config, cost, spec, state, fence, worker, run_id, checkpoint, result,
    reason, mirrored, discarded, judged, trained, state = 'running' AND lease_until >= clock_timestamp() AS alive,
    coalesce((SELECT max(e.number) FROM hpo.epoch e WHERE e.job = job.id), 0) AS epochs,
    (SELECT count(*) FROM hpo.attempt a WHERE a.job = job.id AND NOT forgiven
     AND outcome IS DISTINCT FROM 'handed back' AND outcome IS DISTINCT FROM 'place failed') AS attempt,
    extract(epoch FROM changed_at)::float8 AS changed_at
"""

# The same without what a list of trials does not need, and what is most of a result: hashes of files, scores by target.
BRIEF = JOB.replace(
    " result,",
    """ CASE WHEN kind = 'trial' AND result->>'model_id' IS NOT NULL THEN
        ((result::jsonb || '{"files": {}}') #- '{validation,per_target}' #- '{last_validation,per_target}')::json
    ELSE result END AS result,""",
)


def change(connection: Connection, job: Job, changes: str, **values: Any) -> None:
    changed = connection.execute(
        text(f"""
            UPDATE hpo.job SET {changes}, changed_at = clock_timestamp()
            WHERE id = :id AND fence = :fence AND state = 'running'
        """),
        {"id": job.id, "fence": job.fence, **values},
    )
    if changed.rowcount == 0:
        raise LeaseLost(f"trial {job.number} of {job.study}")


def lock_study(connection: Connection, study: str, how: str = "FOR NO KEY UPDATE") -> bool:
    """Held to its end by every transaction that makes a closed study of an open one, or the reverse: what one reads of
    the trials and the closing, no other changes meanwhile. Whether the study is being deleted."""
    return bool(connection.scalar(text(f"SELECT deleting FROM hpo.study WHERE name = :study {how}"), {"study": study}))


def all_ended(connection: Connection, study: str) -> bool:
    # In the order of an index: else the planner may read the whole table.
    one = text(f"SELECT id FROM hpo.job WHERE {LEFT} ORDER BY state LIMIT 1")
    return connection.scalar(one, {"study": study}) is None


def reopen_closing(connection: Connection, study: str) -> None:
    """Let a study close again, and its closing have all its attempts, if trials of it have come back. The caller holds
    the study's lock."""
    connection.execute(  # what it answers for stays so (hpo.scores.standings)
        text(f"""
            UPDATE hpo.study SET facts = facts || jsonb_build_object('closed', true,
                'openings', coalesce((facts->>'openings')::int, (facts->'closed' = 'true')::int, 0)
                    + (closing.result->>'winner' IS NOT NULL)::int)  -- without one the test split stayed closed
            FROM hpo.job AS closing
            WHERE name = :study AND closing.study = :study AND kind = 'closing' AND state = 'done'
              AND EXISTS (SELECT FROM hpo.job WHERE {LEFT})
        """),
        {"study": study},
    )
    reopened = connection.execute(
        text(f"""
            UPDATE hpo.job SET state = 'waiting', result = NULL, lease_until = NULL,
                fence = fence + 1  -- the worker that is closing the study now has lost it
            WHERE study = :study AND kind = 'closing' AND state <> 'waiting'
              AND EXISTS (SELECT FROM hpo.job WHERE {LEFT})
            RETURNING id
        """),
        {"study": study},
    ).scalars()
    forgive(connection, list(reopened))


def hold(connection: Connection, job: Job) -> None:
    """Lock our row so that nobody takes the job over while we write. Raises LeaseLost."""
    row = connection.scalar(
        text("SELECT 1 FROM hpo.job WHERE id = :id AND fence = :fence AND state = 'running' FOR SHARE"),
        {"id": job.id, "fence": job.fence},
    )
    if row is None:
        raise LeaseLost(f"trial {job.number} of {job.study}")


# Attempts. The caller has changed the rows of their jobs in this transaction, so nobody else writes them.


def end_attempts(
    connection: Connection, jobs: Sequence[int], outcome: AttemptOutcome, reason: str | None, *, alone: bool = True
) -> None:
    """End the present attempt of each job; those that have failed too often are dead.

    A job that the pruner has ended needs no attempt: its next claim records it.
    """
    if not jobs:
        return
    connection.execute(
        text("""
            UPDATE hpo.attempt SET ended = clock_timestamp(), outcome = :outcome, reason = :reason, alone = :alone
            WHERE job = ANY(:jobs) AND ended IS NULL
        """),
        {"jobs": list(jobs), "outcome": outcome, "reason": reason and utf8(reason)[:REASON], "alone": alone},
    )
    if outcome in (AttemptOutcome.FAILED, AttemptOutcome.OUT_OF_MEMORY):
        connection.execute(
            text("UPDATE hpo.job SET failures = failures + 1 WHERE id = ANY(:jobs)"), {"jobs": list(jobs)}
        )
    if outcome.failed:
        by_job = attempts_of(connection, "job = ANY(:jobs)", jobs=list(jobs))
        exhausted = [job for job, attempts in by_job.items() if is_exhausted(attempts)]
        connection.execute(
            text("""
                UPDATE hpo.job SET state = 'dead' WHERE id = ANY(:jobs) AND state = 'waiting'
                    AND judged->>'ends' IS NULL
            """),
            {"jobs": exhausted},
        )


def attempts_of(connection: Connection, where: str, **values: Any) -> dict[int, list[Attempt]]:
    """Return attempts by job, in their order; `where` is a condition on the attempt table."""
    rows = connection.execute(
        text(f"""
            SELECT job, fence, host, device, extract(epoch FROM began)::float8 AS began,
                extract(epoch FROM ended)::float8 AS ended, epochs, extract(epoch FROM epoch_at)::float8 AS epoch_at,
                checkpoint, outcome, alone, forgiven, reason
            FROM hpo.attempt WHERE {where} ORDER BY job, fence
        """),
        values,
    )
    by_job: dict[int, list[Attempt]] = {}
    for row in rows.mappings():
        outcome = None if row["outcome"] is None else AttemptOutcome(row["outcome"])
        by_job.setdefault(row["job"], []).append(Attempt(**{**row, "outcome": outcome}))
    return by_job


def forgive(connection: Connection, jobs: Sequence[int]) -> None:
    """Let the attempts of these jobs so far count no more; one that runs has lost its job."""
    end_attempts(connection, jobs, AttemptOutcome.HANDED_BACK, "the job was brought back")
    connection.execute(text("UPDATE hpo.attempt SET forgiven = true WHERE job = ANY(:jobs)"), {"jobs": list(jobs)})
    connection.execute(text("UPDATE hpo.job SET failures = 0 WHERE id = ANY(:jobs)"), {"jobs": list(jobs)})
