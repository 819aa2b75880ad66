"""What becomes of a claimed job: configuration, checkpoint, result, return to the queue; and what users decide."""

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sqlalchemy import text

from hpo.queue.attempts import AttemptOutcome
from hpo.queue.database import Database, LeaseLost, as_json, limit_idle
from hpo.queue.records import Checkpoint, Job, Judged, State
from hpo.queue.rows import (
    JOB,
    REASON,
    TRIAL,
    all_ended,
    change,
    end_attempts,
    forgive,
    hold,
    lock_study,
    reopen_closing,
)
from hpo.queue.validation import Arrays, store
from hpo.records import Record
from hpo.study.records import Point, TrialSpec
from hpo.text import utf8

log = logging.getLogger("hpo")

FILLING = 5.0  # seconds who froze while it stores a point may keep the others from it
POINT = "SELECT spec->'point' FROM hpo.job WHERE study = :study AND number = :number AND spec IS NOT NULL LIMIT 1"


class Outcomes(Database):
    """Jobs as workers fill, end and return them, and as users cancel and revive them."""

    def point(self, job: Job) -> Point | None:
        """The point of the job's slot, if it or another repeat of it has been filled."""
        with self._transaction() as connection:
            point: Point | None = connection.scalar(text(POINT), {"study": job.study, "number": job.number})
            return point

    def fill(self, job: Job, spec: TrialSpec, cost: float) -> Point:
        """Store what the sampler chose for this slot, unless another repeat of it has another point; return the point
        that stands. Raises LeaseLost."""
        # Of two repeats that are filled at once the second waits, its row unlocked, and finds the first.
        with self._transaction() as connection:
            limit_idle(connection, FILLING)
            named = {"what": f"hpo.fill.{job.study}.{job.number}"}
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext(:what))"), named)
            hold(connection, job)
            point = connection.scalar(text(POINT), {"study": job.study, "number": job.number})
            if point is None or point == spec.point:
                connection.execute(
                    text(
                        "UPDATE hpo.job SET spec = :spec, cost = :cost, changed_at = clock_timestamp() WHERE id = :id"
                    ),
                    {"id": job.id, "spec": as_json(spec.to_json()), "cost": cost},
                )
        return dict(spec.point) if point is None else point

    def set_run(self, job_id: int, run_id: str) -> str | None:
        """Note the MLflow run of a job, unless that was discarded; the first one stays. Returns which one that is; None
        if there is none, or the job is gone."""
        with self._transaction() as connection:
            stored: str | None = connection.scalar(
                text("""
                    UPDATE hpo.job SET run_id = coalesce(run_id,
                        CASE WHEN cast(:run AS text) <> ALL (discarded) THEN cast(:run AS text) END)
                    WHERE id = :id RETURNING run_id
                """),
                {"id": job_id, "run": run_id},
            )
            return stored

    def checkpoint(self, job: Job, checkpoint: Checkpoint) -> None:
        """Commit an uploaded checkpoint. Raise LeaseLost."""
        with self._transaction() as connection:
            change(connection, job, "checkpoint = :checkpoint", checkpoint=as_json(checkpoint.to_json()))
            connection.execute(
                text("UPDATE hpo.attempt SET checkpoint = :epoch WHERE job = :job AND fence = :fence"),
                {"job": job.id, "fence": job.fence, "epoch": checkpoint.epoch},
            )

    def judge(self, job: Job, judged: Judged) -> None:
        """Store what the pruner has made of the job. Raise LeaseLost."""
        self._store(job, "judged", as_json(judged.to_json()))

    def set_trained(self, job: Job, trained: str) -> None:
        """Store what the trainer says of a finished training, for the worker that records it. Raise LeaseLost."""
        self._store(job, "trained", trained)

    def _store(self, job: Job, column: str, value: str) -> None:
        with self._transaction() as connection:
            changed = connection.execute(
                text(f"UPDATE hpo.job SET {column} = :value WHERE id = :id AND fence = :fence AND state = 'running'"),
                {"id": job.id, "fence": job.fence, "value": value},
            )
            if changed.rowcount == 0:
                raise LeaseLost(f"trial {job.number} of {job.study}")

    def end(
        self,
        job: Job,
        state: State,
        *,
        result: Record | Mapping[str, Any],
        reason: str | None = None,
        validation: Arrays = MappingProxyType({}),
    ) -> None:
        """Record the one result of a job ('done', 'diverged' or 'pruned'), with its arrays of the validation split.

        Raise LeaseLost: of a closing also while a trial of its study is still to be trained.
        """
        with self._transaction() as connection:
            if job.kind == "closing":
                lock_study(connection, job.study)
                if not all_ended(connection, job.study):
                    raise LeaseLost(f"closing of {job.study}")
            change(
                connection,
                job,
                "state = :state, result = :result, reason = :reason, lease_until = NULL, mirrored = false, "
                "trained = NULL",
                state=state,
                result=as_json(result.to_json() if isinstance(result, Record) else result),
                reason=reason and utf8(reason)[:REASON],
            )
            store(connection, job.id, validation)
            end_attempts(connection, [job.id], AttemptOutcome.RECORDED, reason)

    def give_back(self, job: Job, outcome: AttemptOutcome, *, reason: str, alone: bool = True) -> None:
        """Return a job to the queue; it is dead if too many of its attempts have failed.

        `alone`: the trial had its card or host for itself. Raise LeaseLost.
        """
        with self._transaction() as connection:
            changes = "state = 'waiting', reason = :reason, lease_until = NULL, mirrored = false"
            change(connection, job, changes, reason=utf8(reason)[:REASON])
            end_attempts(connection, [job.id], outcome, reason, alone=alone)

    def note(self, job: Job, reason: str) -> None:
        """Say in the row of a job that this lease still holds what it waits for. Raises LeaseLost."""
        with self._transaction() as connection:
            change(connection, job, "reason = :reason", reason=utf8(reason)[:REASON])

    def revive(self, study: str, *, trials: bool) -> list[int]:
        """Let a dead closing run again, and with `trials` dead trials too; return the revived trials' numbers."""
        with self._transaction() as connection:
            lock_study(connection, study)
            revived = connection.execute(
                text("""
                    UPDATE hpo.job SET state = 'waiting', mirrored = false, changed_at = clock_timestamp()
                    WHERE id IN (
                        SELECT id FROM hpo.job
                        WHERE study = :study AND state = 'dead' AND (:trials OR kind = 'closing')
                        ORDER BY id FOR UPDATE
                    )
                    RETURNING kind, number, id
                """),
                {"study": study, "trials": trials},
            ).all()
            forgive(connection, [job for _, _, job in revived])
            if trials:
                reopen_closing(connection, study)
        return [number for kind, number, _ in revived if kind == "trial"]

    def cancel(self, study: str, number: int, repeat: int | None, *, by: str) -> list[Job]:
        """End a trial for good that has not ended, all its repeats or one; its worker has lost it then. Returns the
        jobs that this ended."""
        with self._transaction() as connection:
            lock_study(connection, study)
            cancelled = connection.execute(
                text(f"""
                    UPDATE hpo.job SET state = 'cancelled', reason = :reason, lease_until = NULL, mirrored = false,
                        changed_at = clock_timestamp()
                    WHERE id IN (
                        SELECT id FROM hpo.job WHERE {TRIAL} AND state IN ('waiting', 'running')
                        ORDER BY id FOR UPDATE
                    )
                    RETURNING {JOB}
                """),
                {"study": study, "number": number, "repeat": repeat, "reason": utf8(f"cancelled by {by}")[:REASON]},
            )
            jobs = [Job.from_row(row) for row in cancelled.mappings()]
            end_attempts(connection, [job.id for job in jobs], AttemptOutcome.CANCELLED, f"cancelled by {by}")
        return jobs

    def undo_cancel(self, study: str, number: int, repeat: int | None) -> list[Job]:
        """Let a cancelled trial wait again, and its study close again. Returns the jobs."""
        with self._transaction() as connection:
            lock_study(connection, study)
            revived = connection.execute(
                text(f"""
                    UPDATE hpo.job SET state = 'waiting', reason = NULL, mirrored = false,
                        changed_at = clock_timestamp(),
                        fence = fence + 1  -- it may have a run that was never claimed: only a first claim searches none
                    WHERE id IN (SELECT id FROM hpo.job WHERE {TRIAL} AND state = 'cancelled' ORDER BY id FOR UPDATE)
                    RETURNING {JOB}
                """),
                {"study": study, "number": number, "repeat": repeat},
            )
            jobs = [Job.from_row(row) for row in revived.mappings()]
            forgive(connection, [job.id for job in jobs])
            reopen_closing(connection, study)
        return jobs

    def close_again(self, study: str) -> None:
        """Let the study close once more if a trial of it is still to be trained."""
        with self._transaction() as connection:
            lock_study(connection, study)
            reopen_closing(connection, study)
