"""Statements on the job table that several modules share. Each takes the connection of its caller's transaction."""

from typing import Any

from sqlalchemy import Connection, text

from hpo.queue.database import LeaseLost
from hpo.queue.records import Job

ATTEMPTS = 3  # a job that lost three workers is dead
REASON = 500  # characters kept of why a job was given back or ended

# A lease that ran out. After the server's own start every lease gets its full length once more: while the server was
# away nobody could renew, and a restart must not cost each running trial an attempt.
EXPIRED = """
    state = 'running'
    AND greatest(lease_until, pg_postmaster_start_time() + make_interval(secs => :lease)) < clock_timestamp()
"""

# Whether a job may be tried no more. One that the pruner has ended needs no attempt: its next claim records it.
EXHAUSTED = "attempt >= :attempts AND judged->>'ends' IS NULL"

TRIAL = "study = :study AND kind = 'trial' AND number = :number AND repeat = coalesce(:repeat, repeat)"

LEFT = "study = :study AND kind = 'trial' AND state IN ('waiting', 'running')"  # trials that are still to be trained

JOB = """
    id, study, kind, number, repeat, config, cost, spec, state, attempt, fence, worker, run_id, checkpoint, result,
    reason, mirrored, discarded, judged, state = 'running' AND lease_until >= clock_timestamp() AS alive,
    coalesce((SELECT max(e.number) FROM hpo.epoch e WHERE e.job = job.id), 0) AS epochs,
    extract(epoch FROM changed_at)::float8 AS changed_at
"""


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
    return not connection.scalar(text(f"SELECT EXISTS (SELECT FROM hpo.job WHERE {LEFT})"), {"study": study})


def reopen_closing(connection: Connection, study: str) -> None:
    """Let a study close again, and its closing have all its attempts, if trials of it have come back. The caller holds
    the study's lock."""
    connection.execute(  # what it answers for stays so (hpo.scores.standings)
        text("""
            UPDATE hpo.study SET facts = facts || '{"closed": true}' WHERE name = :study
              AND EXISTS (SELECT FROM hpo.job WHERE study = :study AND kind = 'closing' AND state = 'done')
        """),
        {"study": study},
    )
    connection.execute(
        text(f"""
            UPDATE hpo.job SET state = 'waiting', attempt = 0, result = NULL, lease_until = NULL,
                fence = fence + 1  -- whoever is closing the study right now has lost it
            WHERE study = :study AND kind = 'closing' AND state <> 'waiting'
              AND EXISTS (SELECT FROM hpo.job WHERE {LEFT})
        """),
        {"study": study},
    )


def hold(connection: Connection, job: Job) -> None:
    """Lock our row so that nobody takes the job over while we write. Raises LeaseLost."""
    found = connection.scalar(
        text("SELECT 1 FROM hpo.job WHERE id = :id AND fence = :fence AND state = 'running' FOR SHARE"),
        {"id": job.id, "fence": job.fence},
    )
    if found is None:
        raise LeaseLost(f"trial {job.number} of {job.study}")
