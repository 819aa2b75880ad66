"""The outbox: what Optuna and MLflow do not show yet."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy import text

from hpo.queue.database import Database
from hpo.queue.records import Job
from hpo.queue.rows import JOB

log = logging.getLogger("hpo")


class Outbox(Database):
    """Jobs and epochs that are not yet sent to Optuna and MLflow."""

    def unmirrored(self, study: str, *, older_than: float, also: Sequence[int] = ()) -> list[Job]:
        """Jobs that Optuna and MLflow do not show as they are, though they changed so long ago or are in `also`."""
        with self._transaction() as connection:
            rows = connection.execute(
                text(f"""
                    SELECT {JOB} FROM hpo.job WHERE study = :study AND kind = 'trial' AND (
                        NOT mirrored OR state <> 'running' AND EXISTS (
                            SELECT FROM hpo.epoch e WHERE e.job = job.id AND NOT forwarded))
                        AND (changed_at < clock_timestamp() - make_interval(secs => :age) OR id = ANY(:also))
                    ORDER BY number
                """),
                {"study": study, "age": older_than, "also": list(also)},
            )
            return [Job.from_row(row) for row in rows.mappings()]

    @contextmanager
    def frozen(self, job: Job) -> Iterator[bool]:
        """Hold the row still while its state is shown elsewhere; false if it has changed since `job` was read."""
        with self._transaction() as connection:
            row = connection.scalar(
                text("""
                    SELECT 1 FROM hpo.job WHERE id = :id AND fence = :fence AND state = :state
                    FOR SHARE  -- nobody may claim, renew or end it until we have shown its state
                """),
                {"id": job.id, "fence": job.fence, "state": job.state},
            )
            yield row is not None

    def set_mirrored(self, job: Job, run_id: str | None = None) -> None:
        """Note that Optuna and MLflow, in this run, show the state `job` has; if its row has another state or run by
        now, that they do not."""
        with self._transaction() as connection:
            connection.execute(
                text("""
                    UPDATE hpo.job SET mirrored = fence = :fence AND state = :state
                        AND (cast(:run AS text) IS NULL OR coalesce(run_id = :run, false))
                    WHERE id = :id
                """),
                {"id": job.id, "fence": job.fence, "state": job.state, "run": run_id},
            )

    def outbox(self, job_id: int, *, limit: int) -> list[tuple[int, int, dict[str, float]]]:
        """Epochs MLflow does not have yet: (number, milliseconds since 1970, metrics)."""
        with self._transaction() as connection:
            rows = connection.execute(
                text("""
                    SELECT number, round(extract(epoch FROM at) * 1000)::bigint, metrics
                    FROM hpo.epoch WHERE job = :job AND NOT forwarded ORDER BY number LIMIT :limit
                """),
                {"job": job_id, "limit": limit},
            )
            return [(number, at, metrics) for number, at, metrics in rows]

    def show_again(self, job: Job) -> None:
        """Let the job's state and its whole curve be shown once more, for something damaged them over there."""
        with self._transaction() as connection:
            connection.execute(text("UPDATE hpo.epoch SET forwarded = false WHERE job = :id"), {"id": job.id})
            connection.execute(text("UPDATE hpo.job SET mirrored = false WHERE id = :id"), {"id": job.id})

    def waiting_epochs(self, study: str | None) -> int:
        """How many epochs of the study, or of all, MLflow does not have yet."""
        with self._transaction() as connection:
            return int(
                connection.scalar(
                    text("""
                        SELECT count(*) FROM hpo.epoch e JOIN hpo.job j ON j.id = e.job
                        WHERE (cast(:study AS text) IS NULL OR j.study = :study) AND NOT e.forwarded
                    """),
                    {"study": study},
                )
                or 0
            )

    def set_forwarded(self, job_id: int, run_id: str, numbers: Sequence[int]) -> bool:
        """Note that MLflow has these epochs in this run; false, and nothing is noted, if that is not the job's run."""
        with self._transaction() as connection:
            held = "SELECT 1 FROM hpo.job WHERE id = :job AND run_id = :run FOR SHARE"  # it is not discarded meanwhile
            if connection.scalar(text(held), {"job": job_id, "run": run_id}) is None:
                return False
            connection.execute(
                text("UPDATE hpo.epoch SET forwarded = true WHERE job = :job AND number = ANY(:numbers)"),
                {"job": job_id, "numbers": list(numbers)},
            )
            return True
