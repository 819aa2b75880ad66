"""Claims and leases of jobs, and reading them."""

import logging
from collections.abc import Sequence

from sqlalchemy import text

from hpo.queue.database import Database, LeaseLost
from hpo.queue.records import Job, State
from hpo.queue.rows import ATTEMPTS, EXHAUSTED, EXPIRED, JOB, LEFT, all_ended, lock_study

log = logging.getLogger("hpo")


class Leases(Database):
    """Jobs as workers claim, renew and lose them."""

    def claim(
        self, study: str, *, worker: str, lease: float, stops: int | None = None, take_over: bool = True
    ) -> Job | None:
        """Take the dearest waiting job, or with `take_over` one whose lease (seconds) ran out. None if there is nothing
        to take, or if the study was stopped more often than the `stops` times the worker knows of, or is being deleted.
        """
        with self._transaction() as connection:
            closes = all_ended(connection, study)
            # Claims of trials do not wait for each other, but for a deletion.
            if lock_study(connection, study, "FOR NO KEY UPDATE" if closes else "FOR KEY SHARE"):
                return None
            row = connection.execute(
                text(f"""
                    UPDATE hpo.job SET state = 'running', attempt = attempt + 1, fence = fence + 1, worker = :worker,
                        reason = CASE WHEN state = 'running' THEN 'worker lost' ELSE reason END,
                        lease_until = clock_timestamp() + make_interval(secs => :lease),
                        mirrored = false, changed_at = clock_timestamp()
                    WHERE id = (
                        SELECT id FROM hpo.job candidate
                        WHERE study = :study AND NOT ({EXHAUSTED})
                          AND (state = 'waiting' OR :take_over AND ({EXPIRED}))
                          -- who is asked to leave takes nothing more
                          AND (cast(:stops AS int) IS NULL
                               OR :stops = (SELECT stops FROM hpo.study WHERE name = :study))
                          -- a study closes when every trial has ended: seen before the lock, and still so under it
                          AND (kind = 'trial' OR :closes AND NOT EXISTS (SELECT FROM hpo.job WHERE {LEFT}))
                        -- what was begun goes on first; then the dearest, so that the last ones are short
                        ORDER BY checkpoint IS NULL, cost DESC, number
                        LIMIT 1
                        FOR UPDATE SKIP LOCKED  -- a row another worker is claiming right now is not waited for
                    )
                    RETURNING {JOB}
                """),
                {
                    "study": study,
                    "worker": worker,
                    "lease": lease,
                    "attempts": ATTEMPTS,
                    "stops": stops,
                    "closes": closes,
                    "take_over": take_over,
                },
            )
            return next((Job.from_row(found) for found in row.mappings()), None)

    def renew(self, jobs: Sequence[Job], *, lease: float) -> list[Job]:
        """Renew the leases of all these jobs in one statement; return those that are no longer ours."""
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
                            ORDER BY job.id FOR UPDATE OF job  -- always in this order: nobody waits in a circle
                        )
                        RETURNING id, fence
                    """),
                    {"ids": [job.id for job in jobs], "fences": [job.fence for job in jobs], "lease": lease},
                )
            }
        return [job for job in jobs if (job.id, job.fence) not in kept]

    def require(self, job: Job) -> Job:
        """The job's row as it is now. Raises LeaseLost unless it is still ours."""
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
        """Let jobs wait again whose lease (seconds) ran out; those of a third lost worker are dead. Returns their ids.

        A claim takes such a job directly: this is for what is shown of it while nobody claims. Jobs of the worker
        `sparing` are left alone: it is awake, and renews them if nobody has taken them.
        """
        with self._transaction() as connection:
            expired = connection.scalars(
                text(f"""
                    UPDATE hpo.job SET state = CASE WHEN {EXHAUSTED} THEN 'dead' ELSE 'waiting' END,
                        lease_until = NULL, mirrored = false, changed_at = clock_timestamp(),
                        reason = CASE WHEN {EXHAUSTED}
                            THEN 'worker lost, attempt ' || attempt || ' of ' || :attempts ELSE 'worker lost' END
                    WHERE id IN (
                        SELECT id FROM hpo.job WHERE study = :study AND {EXPIRED} AND worker <> :sparing
                        FOR UPDATE SKIP LOCKED  -- a frozen worker may hold its row locked: the others do not wait
                    )
                    RETURNING id
                """),
                {"study": study, "attempts": ATTEMPTS, "lease": lease, "sparing": sparing},
            )
            return list(expired)

    def disown(self, worker: str, held: Sequence[Job]) -> int:
        """Let jobs wait again that this worker claimed without learning of it: the answer to a commit was lost.

        No attempt is counted. `held`: those the worker knows of. Returns how many there were.
        """
        with self._transaction() as connection:
            return connection.execute(
                text("""
                    UPDATE hpo.job SET state = 'waiting', attempt = attempt - 1, lease_until = NULL, mirrored = false,
                        changed_at = clock_timestamp()
                    WHERE id IN (
                        SELECT id FROM hpo.job WHERE worker = :worker AND state = 'running' AND NOT id = ANY(:held)
                        ORDER BY id FOR UPDATE
                    )
                """),
                {"worker": worker, "held": [job.id for job in held]},
            ).rowcount

    def jobs(self, study: str) -> list[Job]:
        """All jobs of a study by number; the closing comes first, as number -1."""
        with self._transaction() as connection:
            rows = connection.execute(
                text(f"SELECT {JOB} FROM hpo.job WHERE study = :study ORDER BY number, repeat"), {"study": study}
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

    def closing_state(self, study: str) -> State | None:
        """State of the study's closing; None if there is no such study, or it is not planned to its end."""
        with self._transaction() as connection:
            state = connection.scalar(
                text("SELECT state FROM hpo.job WHERE study = :study AND kind = 'closing'"), {"study": study}
            )
            return None if state is None else State(state)
