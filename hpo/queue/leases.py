"""Claims and leases of jobs, and reading them."""

import logging
from collections.abc import Sequence

from sqlalchemy import Connection, text

from hpo.queue.attempts import Attempt, AttemptOutcome
from hpo.queue.database import Database, LeaseLost
from hpo.queue.pauses import IN_A_ROW, doubtful_since, is_tried, pause_reason
from hpo.queue.records import Job, State
from hpo.queue.rows import (
    BRIEF,
    CHANGED,
    EXPIRED,
    JOB,
    LEFT,
    REASON,
    SAME,
    WANTED,
    all_ended,
    attempts_of,
    end_attempts,
    lock_study,
)
from hpo.text import utf8

log = logging.getLogger("hpo")


CLAIM = f"""
    UPDATE hpo.job SET state = 'running', fence = fence + 1, worker = :worker,
        lease_until = clock_timestamp() + make_interval(secs => :lease),
        mirrored = false, changed_at = clock_timestamp()
    WHERE id = (
        SELECT id FROM hpo.job
        WHERE study = :study AND state = 'waiting'
          -- a worker that is asked to leave takes nothing more, nor one that knows an earlier study of this name
          AND EXISTS (
              SELECT FROM hpo.study WHERE name = :study AND stops = coalesce(cast(:stops AS int), stops) AND {SAME}
          )
          -- a study closes when every trial has ended: seen before the lock, and still so under it
          AND (kind = 'trial' AND {WANTED}
               OR kind = 'closing' AND :closes AND NOT EXISTS (SELECT FROM hpo.job WHERE {LEFT}))
        -- what was begun goes on first; what has failed waits for the others, which show whether
        -- anything works; then the most expensive, so that the last ones are short; the cheapest if one
        -- after the other fails
        ORDER BY {{cheapest_first}} checkpoint IS NULL, failures, cost DESC, number
        LIMIT 1
        FOR UPDATE SKIP LOCKED  -- a row another worker is claiming right now is not waited for
    )
    RETURNING id, fence
"""


class Leases(Database):
    """Jobs as workers claim, renew and lose them."""

    def claim(
        self,
        study: str,
        *,
        worker: str,
        device: str = "cpu",
        lease: float,
        stops: int | None = None,
        created_at: float | None = None,
        take_over: bool = True,
    ) -> Job | None:
        """Claim the most expensive waiting job for `lease` seconds, with `take_over` after letting those wait whose
        lease has expired.

        `worker`: its name, which begins with its host; `device`: with the host the place of the attempt. Return None if
        there is nothing to claim, or if the study is paused, was stopped more often than the `stops` times the worker
        knows of, is being deleted, or was planned again after the one that the worker knows (`created_at`).
        """
        with self._transaction() as connection:
            closes = all_ended(connection, study)
            # Claims of trials do not wait for each other, but for a deletion.
            if lock_study(connection, study, "FOR NO KEY UPDATE" if closes else "FOR KEY SHARE"):
                return None
            is_doubtful = False if closes else _is_doubtful(connection, study)  # before jobs are locked, as others do
            if take_over:
                _expire(connection, study, lease=lease)
            if is_doubtful is None:
                return None
            values = {"study": study, "worker": worker, "lease": lease, "closes": closes}
            values |= {"stops": stops, "created_at": created_at}
            claim = CLAIM.format(cheapest_first="cost," if is_doubtful else "")  # else the index has their order
            claimed = connection.execute(text(claim), values).one_or_none()
            if claimed is None:
                return None
            connection.execute(
                text("""
                    INSERT INTO hpo.attempt (job, study, fence, host, device)
                    VALUES (:job, :study, :fence, :host, :device)
                """),
                {
                    "job": claimed.id,
                    "study": study,
                    "fence": claimed.fence,
                    "host": worker.partition(":")[0],
                    "device": device,
                },
            )
            rows = connection.execute(text(f"SELECT {JOB} FROM hpo.job WHERE id = :id"), {"id": claimed.id})
            return Job.from_row(rows.mappings().one())

    def renew(self, jobs: Sequence[Job], *, lease: float) -> list[Job]:
        """Renew the leases of all these jobs in one statement; return those that it no longer holds."""
        if not jobs:
            return []
        with self._transaction() as connection:
            kept = {
                (row.id, row.fence)
                for row in connection.execute(
                    text("""
                        UPDATE hpo.job SET lease_until = clock_timestamp() + make_interval(secs => :lease)
                        WHERE id IN (
                            SELECT job.id FROM hpo.job
                            JOIN unnest(cast(:ids AS bigint[]), cast(:fences AS bigint[])) AS mine (id, fence)
                                ON job.id = mine.id AND job.fence = mine.fence AND state = 'running'
                            ORDER BY job.id FOR UPDATE OF job
                        )
                        RETURNING id, fence
                    """),
                    {"ids": [job.id for job in jobs], "fences": [job.fence for job in jobs], "lease": lease},
                )
            }
        return [job for job in jobs if (job.id, job.fence) not in kept]

    def require(self, job: Job) -> Job:
        """The job's row as it is now. Raises LeaseLost unless this lease still holds it."""
        current = self.job(job.id)
        if current is None or current.fence != job.fence or current.state != "running":
            raise LeaseLost(f"{job.kind} {job.number} of {job.study}")
        return current

    def expired(self, study: str, *, lease: float) -> list[int]:
        """Ids of running jobs whose lease (seconds) ran out."""
        with self._transaction() as connection:
            return list(
                connection.scalars(
                    text(f"SELECT id FROM hpo.job WHERE study = :study AND {EXPIRED}"),
                    {"study": study, "lease": lease},
                )
            )

    def expire(self, study: str, *, lease: float, sparing: str = "") -> list[int]:
        """Let jobs wait again whose lease (seconds) has expired; those that have failed too often are dead. Return
        their ids.

        A claim does so, too: this is for what people see while nobody claims. Jobs of the worker `sparing` are left
        alone: it is awake, and renews them if nobody has taken them.
        """
        with self._transaction() as connection:
            return _expire(connection, study, lease=lease, sparing=sparing)

    def disown(self, worker: str, held: Sequence[Job]) -> int:
        """Let jobs wait again that this worker claimed without learning of it: the answer to a commit was lost.

        No attempt is counted. `held`: those the worker knows of. Return how many there were.
        """
        with self._transaction() as connection:
            jobs = list(
                connection.scalars(
                    text("""
                        UPDATE hpo.job SET state = 'waiting', lease_until = NULL, mirrored = false,
                            changed_at = clock_timestamp()
                        WHERE id IN (
                            SELECT id FROM hpo.job WHERE worker = :worker AND state = 'running' AND NOT id = ANY(:held)
                            ORDER BY id FOR UPDATE
                        )
                        RETURNING id
                    """),
                    {"worker": worker, "held": [job.id for job in held]},
                )
            )
            end_attempts(connection, jobs, AttemptOutcome.HANDED_BACK, "the answer to its claim was lost")
        return len(jobs)

    def attempts(self, study: str) -> dict[int, list[Attempt]]:
        """Return the attempts of all jobs of a study, by job id, in their order."""
        with self._transaction() as connection:
            return attempts_of(connection, "study = :study", study=study)

    def jobs(self, study: str, *, after: float | None = None, brief: bool = False) -> list[Job]:
        """All jobs of a study by number; the closing comes first, as number -1.

        With `after` (seconds since 1970, server clock): those that are running or have changed since then, and the
        closing. With `brief` results come without the hashes of their files and without the scores by target.
        """
        with self._transaction() as connection:
            rows = connection.execute(
                text(f"""
                    SELECT {BRIEF if brief else JOB} FROM hpo.job WHERE study = :study AND {CHANGED}
                    ORDER BY number, repeat
                """),
                {"study": study, "after": after},
            )
            return [Job.from_row(row) for row in rows.mappings()]

    def marks(self, study: str) -> dict[int, tuple[State, int, bool, str | None]]:
        """By job id of a study: what of a row changes with its job's life (state, fence, mirrored, run_id)."""
        with self._transaction() as connection:
            rows = connection.execute(
                text("SELECT id, state, fence, mirrored, run_id FROM hpo.job WHERE study = :study"), {"study": study}
            )
            return {row.id: (State(row.state), row.fence, row.mirrored, row.run_id) for row in rows}

    def repeats(self, study: str, number: int) -> list[Job]:
        """All jobs of one configuration, by repeat."""
        with self._transaction() as connection:
            rows = connection.execute(
                text(f"SELECT {JOB} FROM hpo.job WHERE study = :study AND number = :number ORDER BY repeat"),
                {"study": study, "number": number},
            )
            return [Job.from_row(row) for row in rows.mappings()]

    def job(self, job_id: int) -> Job | None:
        with self._transaction() as connection:
            rows = connection.execute(text(f"SELECT {JOB} FROM hpo.job WHERE id = :id"), {"id": job_id})
            return next((Job.from_row(row) for row in rows.mappings()), None)

    def by_run(self, run_id: str) -> Job | None:
        """The job with this MLflow run."""
        with self._transaction() as connection:
            rows = connection.execute(text(f"SELECT {JOB} FROM hpo.job WHERE run_id = :run"), {"run": run_id})
            return next((Job.from_row(row) for row in rows.mappings()), None)

    def closing_state(self, study: str, *, created_at: float | None = None) -> State | None:
        """State of the study's closing; None if there is no such study, or it is not planned to its end.

        With `created_at` another study of the same name, planned after a deletion, is none.
        """
        with self._transaction() as connection:
            state = connection.scalar(
                text(f"""
                    SELECT state FROM hpo.job JOIN hpo.study ON study.name = job.study
                    WHERE job.study = :study AND kind = 'closing' AND {SAME}
                """),
                {"study": study, "created_at": created_at},
            )
            return None if state is None else State(state)


def _expire(connection: Connection, study: str, *, lease: float, sparing: str = "") -> list[int]:
    jobs = list(
        connection.scalars(
            text(f"""
                UPDATE hpo.job SET state = 'waiting', reason = 'worker lost', lease_until = NULL, mirrored = false,
                    changed_at = clock_timestamp()
                WHERE id IN (
                    SELECT id FROM hpo.job WHERE study = :study AND {EXPIRED} AND worker <> :sparing
                    FOR UPDATE SKIP LOCKED  -- a frozen worker may hold its row locked: the others do not wait
                )
                RETURNING id
            """),
            {"study": study, "lease": lease, "sparing": sparing},
        )
    )
    end_attempts(connection, jobs, AttemptOutcome.LOST, "worker lost")
    return jobs


# In an index of its own. Failures of a faulty place do not count (`hpo.queue.pauses`).
_FAILED = """
    SELECT count(DISTINCT job) FROM hpo.attempt
    WHERE study = :study AND outcome IN ('failed', 'out of memory', 'lost', 'not recorded') AND ended >= :since
"""
# Attempts of trials that tell whether failures come in a row: those that run, and those that ended since the last epoch
# of the latest attempt with one. What ended before had an epoch after it, or an end of the pause.
_SINCE = """
    study = :study AND (ended IS NULL OR ended >= :since)
    AND (SELECT kind FROM hpo.job WHERE id = attempt.job) = 'trial'
"""
_LATEST_EPOCH = """
    SELECT epoch_at FROM hpo.attempt WHERE study = :study AND ended IS NOT NULL AND epoch_at IS NOT NULL
    ORDER BY ended DESC LIMIT 1  -- in the order of an index: it reads what failed since then
"""


def _is_doubtful(connection: Connection, study: str) -> bool | None:
    """Return whether so many trials have failed in a row that the cheapest is to be tried next.

    None: no trial is to be claimed, for that one runs now or the study is paused. This pauses it.
    """
    row = connection.execute(
        text(f"""
            SELECT paused, extract(epoch FROM resumed_at)::float8 AS resumed_at,
                coalesce(greatest(resumed_at, ({_LATEST_EPOCH})), 'epoch') AS since
            FROM hpo.study WHERE name = :study
        """),
        {"study": study},
    ).one_or_none()
    if row is None or row.paused is not None:
        return None
    if (connection.scalar(text(_FAILED), {"study": study, "since": row.since}) or 0) < IN_A_ROW:
        return False  # without reading the attempts of all workers
    by_job = attempts_of(connection, _SINCE, study=study, since=row.since)
    attempts = [attempt for attempts in by_job.values() for attempt in attempts]
    since = doubtful_since(attempts, resumed_at=row.resumed_at or 0.0)
    if since is None:
        return False
    reason = pause_reason(attempts, resumed_at=row.resumed_at or 0.0)
    if reason is not None:
        connection.execute(
            text("UPDATE hpo.study SET paused = :reason WHERE name = :study AND paused IS NULL"),
            {"study": study, "reason": utf8(reason)[:REASON]},
        )
    return None if reason is not None or is_tried(attempts, since) else True
