"""Workers: heartbeats, and what users ask of them."""

import logging
from collections.abc import Mapping, Sequence

from sqlalchemy import text

from hpo.queue.closing_result import BudgetEnd
from hpo.queue.database import Database
from hpo.queue.records import Job, OpenStudy, Orders, Present, Stop
from hpo.queue.rows import CREATED_AT, EXPIRED, WANTED_BY

log = logging.getLogger("hpo")

GAP = 2 / 3  # of a lease: after a shorter silence of the database no lease has run out, each being renewed at a sixth
_WANTED = WANTED_BY.format(budget="study.budget")  # of a trial that waits, beside its study's row
SILENT = 3600.0  # seconds after which a worker that died is not shown any more


class Workers(Database):
    """The worker table. It is for people: leases alone decide who may write."""

    def attend(self, worker: str, study: str | None, *, trainers: int, device: str, stops: int, lease: float) -> bool:
        """Note that a worker lives, one of the pool if `study` is None; it says so again several times within its lease
        (seconds).

        Returns whether it or another one has done so for a whole lease by now: then a lease that ran out was not
        renewed though it could have been. After an outage that Postgres itself knows nothing of (read-only, a failover)
        this is false for a lease.
        """
        with self._transaction() as connection:
            connection.execute(
                text(f"""
                    INSERT INTO hpo.worker (name, study, trainers, device, stops, lease, seen_at)
                    SELECT :name, cast(:study AS text), :trainers, :device, :stops, :lease, clock_timestamp()
                    {"" if study is None else "FROM hpo.study WHERE name = :study FOR KEY SHARE"}  -- it may be deleted
                    ON CONFLICT (name) DO UPDATE SET seen_at = excluded.seen_at, trainers = excluded.trainers,
                        since = CASE WHEN worker.seen_at < excluded.seen_at - make_interval(secs => :gap)
                            THEN excluded.seen_at ELSE worker.since END
                """),
                {
                    "name": worker,
                    "study": study,
                    "trainers": trainers,
                    "device": device,
                    "stops": stops,
                    "lease": lease,
                    "gap": GAP * lease,
                },
            )
            return bool(
                connection.scalar(
                    text("""
                        SELECT EXISTS (
                            SELECT FROM hpo.worker, clock_timestamp() AS now
                            WHERE seen_at > now - make_interval(secs => :gap)
                              AND since <= now - make_interval(secs => :lease)
                        )
                    """),
                    {"gap": GAP * lease, "lease": lease},
                )
            )

    def leave(self, worker: str) -> None:
        """Forget a worker that ends, and those that ended long ago without a word."""
        with self._transaction() as connection:
            connection.execute(text("DELETE FROM hpo.worker WHERE name = :name"), {"name": worker})
            connection.execute(
                text("""
                    DELETE FROM hpo.worker WHERE name IN (
                        SELECT name FROM hpo.worker
                        WHERE seen_at < clock_timestamp() - make_interval(secs => :silent)
                        FOR UPDATE SKIP LOCKED  -- somebody else forgets them
                    )
                """),
                {"silent": SILENT},
            )

    def workers(self, study: str | None = None) -> list[Present]:
        """The workers of a study and of the pool (all workers without `study`), those that fell silent lately as well;
        who joined first comes first."""
        with self._transaction() as connection:
            rows = connection.execute(
                text("""
                    SELECT name, trainers, device, stops, seen_at + make_interval(secs => lease) >= now AS alive,
                        extract(epoch FROM now - joined_at)::float8 AS here,
                        greatest(extract(epoch FROM now - seen_at), 0)::float8 AS silent, study IS NULL AS in_pool,
                        CASE WHEN study IS NULL THEN (
                            SELECT coalesce(json_object_agg(held.study, held.trials), '{}') FROM (
                                SELECT job.study, count(*) AS trials
                                FROM hpo.study JOIN hpo.job ON job.study = study.name AND job.state = 'running'
                                WHERE job.worker = worker.name AND job.study IS DISTINCT FROM :study GROUP BY job.study
                            ) AS held
                        ) ELSE '{}' END AS elsewhere
                    FROM hpo.worker, clock_timestamp() AS now
                    WHERE (cast(:study AS text) IS NULL OR study = :study OR study IS NULL)
                        AND seen_at > now - make_interval(secs => :silent)
                    ORDER BY joined_at, name
                """),
                {"study": study, "silent": SILENT},
            )
            return [Present(**row) for row in rows.mappings()]

    def places(self, study: str) -> dict[int, str]:
        """Return the device of each job that runs, by its id: "cpu", or the card."""
        with self._transaction() as connection:
            rows = connection.execute(
                text("SELECT job, device FROM hpo.attempt WHERE study = :study AND ended IS NULL"), {"study": study}
            )
            return {row.job: row.device for row in rows}

    def stop_pool(self, *, by: str) -> None:
        """Ask the workers of the pool to leave, and those that were handed in to a cluster and have not begun."""
        with self._transaction() as connection:
            connection.execute(
                text("""
                    UPDATE hpo.schema
                    SET pool_stops = pool_stops + 1, pool_stopped_by = :by, pool_stopped_at = clock_timestamp()
                """),
                {"by": by},
            )

    def pool_stops(self) -> int:
        """Return how often the pool was asked to leave."""
        with self._transaction() as connection:
            return int(connection.scalar(text("SELECT pool_stops FROM hpo.schema")) or 0)

    def pool_stop(self, stops: int) -> Stop | None:
        """Return the last request to the pool to leave, if there were more than `stops` of them."""
        with self._transaction() as connection:
            row = connection.execute(
                text("""
                    SELECT pool_stopped_by, extract(epoch FROM pool_stopped_at)::float8 FROM hpo.schema
                    WHERE pool_stops > :stops
                """),
                {"stops": stops},
            ).one_or_none()
        return None if row is None else Stop(by=row[0], at=row[1])

    def orders(self, worker: str, *, stops: Mapping[str, int], held: Sequence[Job]) -> Orders:
        """Return what people ask of a worker. `stops`: the studies that it serves, and how often each had been stopped
        when it joined."""
        with self._transaction() as connection:  # tables in the order in which a migration locks them
            cancelled = set(
                connection.scalars(
                    text("SELECT id FROM hpo.job WHERE id = ANY(:ids) AND state = 'cancelled'"),
                    {"ids": [job.id for job in held]},
                )
            )
            stopped = connection.execute(
                text("""
                    SELECT name, stopped_by, extract(epoch FROM stopped_at)::float8, budget
                    FROM hpo.study JOIN unnest(cast(:names AS text[]), cast(:stops AS int[])) AS served (study, before)
                        ON name = served.study AND stops > served.before
                """),
                {"names": list(stops), "stops": list(stops.values())},
            ).all()
            leave = connection.execute(
                text("""
                    SELECT pool_stopped_by, extract(epoch FROM pool_stopped_at)::float8 FROM hpo.worker, hpo.schema
                    WHERE name = :worker AND study IS NULL AND pool_stops > stops
                """),
                {"worker": worker},
            ).one_or_none()
        return Orders(
            leave=None if leave is None else Stop(by=leave[0], at=leave[1]),
            stopped={
                name: Stop(by=by, at=at, is_budget=budget is not None and by == BudgetEnd.from_json(budget).asks)
                for name, by, at, budget in stopped
            },
            cancelled=[job for job in held if job.id in cancelled],
        )

    # The pool

    def open_jobs(self, study: str | None = None) -> int:
        """Return how many jobs of a study, or of all studies that the pool is to serve, are still to be done."""
        left = f"kind = 'trial' AND state IN ('waiting', 'running') AND (state = 'running' OR {_WANTED})"
        with self._transaction() as connection:
            return int(
                connection.scalar(
                    text(f"""
                        SELECT coalesce(sum(greatest(1, (  -- at least the closing
                            SELECT count(*) FROM hpo.job WHERE job.study = study.name AND {left}
                        ))), 0)
                        FROM hpo.study JOIN hpo.job AS closing
                            ON closing.study = study.name AND closing.number = -1 AND closing.repeat = 0
                        WHERE closing.state IN ('waiting', 'running') AND NOT study.deleting
                            AND (study.name = :study OR cast(:study AS text) IS NULL AND NOT study.stopped
                                 AND coalesce((study.facts->>'planned')::boolean, false)
                                 AND (study.paused IS NULL OR NOT EXISTS (  -- it can be closed
                                     SELECT FROM hpo.job WHERE job.study = study.name AND {left})))
                    """),
                    {"study": study},
                )
                or 0
            )

    def open_studies(self, *, lease: float) -> list[OpenStudy]:
        """Return the studies that the pool is to serve, the ones to be claimed from first first.

        By priority, then by the fewest jobs that run (fair share), then by age. `lease` in seconds.
        """
        wanted = _WANTED
        left = f"""EXISTS (
            SELECT FROM hpo.job WHERE job.study = study.name AND kind = 'trial'
                AND state IN ('waiting', 'running') AND (state = 'running' OR {wanted})
        )"""
        with self._transaction() as connection:
            rows = connection.execute(
                text(f"""
                    SELECT study.name, study.stops, study.priority, {CREATED_AT} AS created_at,
                        CASE WHEN {left} THEN study.paused END AS paused,  -- which keeps nobody from closing it
                        (SELECT count(*) FROM hpo.job WHERE job.study = study.name AND state = 'running') AS running,
                        EXISTS (SELECT FROM hpo.job WHERE job.study = study.name AND kind = 'trial'
                                AND state = 'waiting' AND {wanted})
                            OR EXISTS (SELECT FROM hpo.job WHERE job.study = study.name AND {EXPIRED})
                            OR closing.state = 'waiting' AND NOT {left} AS has_work
                    FROM hpo.study JOIN hpo.job AS closing
                        ON closing.study = study.name AND closing.number = -1 AND closing.repeat = 0
                    WHERE closing.state IN ('waiting', 'running') AND NOT study.deleting AND NOT study.stopped
                        AND coalesce((study.facts->>'planned')::boolean, false)
                    ORDER BY study.priority DESC, running, study.created_at
                """),
                {"lease": lease},
            )
            return [OpenStudy(**row) for row in rows.mappings()]
