"""Epochs: the stored curves of jobs."""

import json
import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, text

from hpo.queue.database import Database, as_json
from hpo.queue.records import Job, Judged, Pace
from hpo.queue.rows import CHANGED, hold

log = logging.getLogger("hpo")

PAGE = 100  # jobs whose curves are read by one statement


class Curves(Mapping[int, dict[str, dict[int, float]]]):
    """Curves of many jobs, kept in little memory: job id -> score -> {epoch: value}."""

    def __init__(self) -> None:
        self._stored: dict[int, dict[str, tuple[array[int], array[float]]]] = {}

    def put(self, job: int, scores: Sequence[str], score: str, number: int, value: float) -> None:
        """Append a value of one of the scores."""
        if job not in self._stored:
            self._stored[job] = {name: (array("i"), array("d")) for name in scores}
        numbers, values = self._stored[job][score]
        numbers.append(number)
        values.append(value)

    def __getitem__(self, job: int) -> dict[str, dict[int, float]]:
        stored = self._stored[job].items()
        return {score: dict(zip(numbers, values, strict=True)) for score, (numbers, values) in stored}

    def __iter__(self) -> Iterator[int]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class Epochs(Database):
    """The epoch table: curves, for pruners and reports."""

    def add_epochs(self, job: Job, epochs: Sequence[tuple[int, int, Mapping[str, float]]]) -> None:
        """Append (number, milliseconds since 1970, metrics). Raises LeaseLost.

        An epoch that is there already stays: a resumed trial computes its last epochs again, to the bit. If it comes
        out otherwise, as on another kind of CPU, the curve is cut back to the epoch before it, for the rest is of
        another network.
        """
        with self._transaction() as connection:
            hold(connection, job)
            stored = connection.execute(
                text("""
                    SELECT number, metrics FROM hpo.epoch WHERE job = :job AND number = ANY(:numbers) ORDER BY number
                """),
                {"job": job.id, "numbers": [number for number, _, _ in epochs]},
            ).all()
            again = {number: _scores(json.loads(as_json(metrics))) for number, _, metrics in epochs if stored}
            differs = (number for number, metrics in stored if _scores(metrics) != again[number])
            if (first := next(differs, None)) is not None:
                _cut(connection, job, first - 1)
            connection.execute(
                text("""
                    INSERT INTO hpo.epoch (job, number, at, metrics)
                    SELECT :job, number, to_timestamp(at / 1000.0), cast(metrics AS jsonb)
                    FROM unnest(cast(:numbers AS int[]), cast(:at AS bigint[]), cast(:metrics AS text[]))
                        AS arrived (number, at, metrics)
                    ON CONFLICT (job, number) DO NOTHING
                """),
                {
                    "job": job.id,
                    "numbers": [number for number, _, _ in epochs],
                    "at": [at for _, at, _ in epochs],
                    "metrics": [as_json(metrics) for _, _, metrics in epochs],
                },
            )
            connection.execute(
                text("""
                    UPDATE hpo.attempt SET epochs = greatest(epochs, :last), epoch_at = clock_timestamp()
                    WHERE job = :job AND fence = :fence
                """),
                {"job": job.id, "fence": job.fence, "last": max(number for number, _, _ in epochs)},
            )

    def cut(self, job: Job, epoch: int) -> None:
        """Forget what is stored beyond the last epoch of a job, if anything is. Raises LeaseLost."""
        with self._transaction() as connection:
            hold(connection, job)
            later_epochs = "SELECT EXISTS (SELECT FROM hpo.epoch WHERE job = :job AND number > :epoch)"
            if connection.scalar(text(later_epochs), {"job": job.id, "epoch": epoch}):
                _cut(connection, job, epoch)

    def curve(self, job_id: int) -> list[tuple[int, dict[str, float]]]:
        """The stored epochs of a job: (number, metrics)."""
        return self.curves_of([job_id])[job_id]

    def curves_of(self, job_ids: Sequence[int]) -> dict[int, list[tuple[int, dict[str, float]]]]:
        """The same of jobs, by their ids."""
        curves: dict[int, list[tuple[int, dict[str, float]]]] = {job_id: [] for job_id in job_ids}
        with self._transaction() as connection:
            rows = connection.execute(
                text("SELECT job, number, metrics FROM hpo.epoch WHERE job = ANY(:jobs) ORDER BY job, number"),
                {"jobs": list(job_ids)},
            )
            for job, number, metrics in rows:
                curves[job].append((number, metrics))
        return curves

    def curves(self, job_ids: Sequence[int], scores: Sequence[str]) -> Curves:
        """By job id and score: {epoch: value} of jobs with an epoch; a value that is not finite is left out."""
        curves = Curves()
        for first in range(0, len(job_ids), PAGE):
            with self._transaction() as connection:
                rows = connection.execute(
                    text("""
                        SELECT job, score, number, (metrics->>score)::float8
                        FROM hpo.epoch, unnest(cast(:scores AS text[])) AS score
                        WHERE job = ANY(:jobs) AND metrics->>score IS NOT NULL ORDER BY job, number
                    """),
                    {"jobs": list(job_ids[first : first + PAGE]), "scores": list(scores)},
                )
                for job, score, number, value in rows:
                    curves.put(job, scores, score, number, value)
        return curves

    def paces(self, study: str, *, after: float | None = None) -> tuple[float, dict[int, Pace]]:
        """Return the server's clock (seconds since 1970), and by job id how fast trials with an epoch are trained.

        With `after` (likewise): of trials that are running or have changed since then.
        """
        with self._transaction() as connection:
            now = float(connection.scalar(text("SELECT extract(epoch FROM clock_timestamp())::float8")) or 0.0)
            rows = connection.execute(
                text(f"""
                    SELECT e.job, avg((e.metrics->>'seconds')::float8) AS seconds,
                        min((e.metrics->>'val/nmse')::float8) AS best,
                        extract(epoch FROM min(e.at))::float8 AS first, extract(epoch FROM max(e.at))::float8 AS last
                    FROM hpo.epoch e JOIN hpo.job j ON j.id = e.job WHERE j.study = :study AND {CHANGED}
                    GROUP BY e.job
                """),
                {"study": study, "after": after},
            )
            return now, {row.job: Pace(row.seconds, row.best, row.first, row.last) for row in rows}

    def unjudged(self, job: Job, *, limit: int) -> tuple[Judged, list[tuple[int, float]]]:
        """What the pruner has made of our job so far, and the next epochs after that: (number, validation NMSE, NaN
        where it is not finite), `limit` at most. Raises LeaseLost."""
        with self._transaction() as connection:
            hold(connection, job)
            row = connection.scalar(text("SELECT judged FROM hpo.job WHERE id = :id"), {"id": job.id})
            judged = Judged.from_json(row or {})
            rows = connection.execute(
                text("""
                    SELECT number, coalesce((metrics->>'val/nmse')::float8, 'NaN') FROM hpo.epoch
                    WHERE job = :job AND number > :judged ORDER BY number LIMIT :limit
                """),
                {"job": job.id, "judged": judged.epoch, "limit": limit},
            )
            return judged, [(number, value) for number, value in rows]

    def at_rung(self, job: Job, rung: int) -> list[tuple[int, float]]:
        """The other trials of the job's study that have come to a rung: (number, validation NMSE there)."""
        with self._transaction() as connection:
            rows = connection.execute(
                text("""
                    SELECT number, (judged->'rungs'->>cast(:rung AS int))::float8 FROM hpo.job
                    WHERE study = :study AND id <> :id AND jsonb_array_length(judged->'rungs') > :rung
                """),
                {"study": job.study, "id": job.id, "rung": rung},
            )
            return [(number, value) for number, value in rows]

    def finished(self, study: str, *, without: Sequence[int]) -> list[tuple[int, list[int], list[float]]]:
        """The trials that are done, but for the jobs in `without`: (job id, epochs, validation NMSE of each)."""
        with self._transaction() as connection:
            rows = connection.execute(
                text("""
                    SELECT e.job, array_agg(e.number),
                        array_agg(coalesce((e.metrics->>'val/nmse')::float8, 'NaN'))
                    FROM hpo.epoch e JOIN hpo.job j ON j.id = e.job
                    WHERE j.study = :study AND j.kind = 'trial' AND j.state = 'done' AND NOT j.id = ANY(:without)
                    GROUP BY e.job
                """),
                {"study": study, "without": list(without)},
            )
            return [(job, numbers, values) for job, numbers, values in rows]


def _cut(connection: Connection, job: Job, epoch: int) -> None:
    """Forget all epochs of a job after this one. MLflow forgets nothing: the run is given up, for one that will be made
    again; and the job's checkpoint if it is of a later epoch. The caller holds the job's row."""
    log.warning(
        "trial %d of %s comes out otherwise here: its curve is cut back to epoch %d", job.number, job.study, epoch
    )
    values = {"job": job.id, "epoch": epoch}
    connection.execute(  # before the epochs, as a process that notes what MLflow has: none waits in a circle
        text("""
            UPDATE hpo.job SET run_id = NULL, discarded = discarded || array_remove(ARRAY[run_id], NULL),
                trained = NULL,
                checkpoint = CASE WHEN cast(checkpoint->>'epoch' AS int) > :epoch THEN NULL ELSE checkpoint END,
                -- the pruner sees what comes now from the start, unless it has ended the trial
                judged = CASE WHEN cast(judged->>'epoch' AS int) > :epoch AND judged->>'ends' IS NULL
                    THEN NULL ELSE judged END,
                mirrored = false
            WHERE id = :job
        """),
        values,
    )
    connection.execute(text("DELETE FROM hpo.epoch WHERE job = :job AND number > :epoch"), values)
    connection.execute(text("UPDATE hpo.epoch SET forwarded = false WHERE job = :job"), values)


def _scores(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What follows from the trial alone."""
    return {name: value for name, value in metrics.items() if name != "seconds"}
