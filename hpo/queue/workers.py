"""Workers: heartbeats, and what users ask of them."""

import logging
from collections.abc import Sequence

from sqlalchemy import text

from hpo.queue.database import Database
from hpo.queue.records import Job, Present, Stop

log = logging.getLogger("hpo")

GAP = 2 / 3  # of a lease: after a shorter silence of the database no lease has run out, each being renewed at a sixth
SILENT = 3600.0  # seconds after which a worker that died is not shown any more


class Workers(Database):
    """The worker table. It is for people: leases alone decide who may write."""

    def attend(self, worker: str, study: str, *, trainers: int, device: str, stops: int, lease: float) -> bool:
        """Note that a worker lives; it says so again several times within its lease (seconds).

        Returns whether it or another one has done so for a whole lease by now: then a lease that ran out was not
        renewed though it could have been. After an outage that Postgres itself knows nothing of (read-only, a failover)
        this is false for a lease.
        """
        with self._transaction() as connection:
            connection.execute(
                text("""
                    INSERT INTO hpo.worker (name, study, trainers, device, stops, lease, seen_at)
                    SELECT :name, name, :trainers, :device, :stops, :lease, clock_timestamp()
                    FROM hpo.study WHERE name = :study  -- it may have been deleted
                    FOR KEY SHARE
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
            connection.execute(
                text("""
                    DELETE FROM hpo.worker
                    WHERE name = :name OR seen_at < clock_timestamp() - make_interval(secs => :silent)
                """),
                {"name": worker, "silent": SILENT},
            )

    def workers(self, study: str) -> list[Present]:
        """The workers of a study, those that fell silent lately as well; who joined first comes first."""
        with self._transaction() as connection:
            rows = connection.execute(
                text("""
                    SELECT name, trainers, device, stops, seen_at + make_interval(secs => lease) >= now AS alive,
                        extract(epoch FROM now - joined_at)::float8 AS here,
                        greatest(extract(epoch FROM now - seen_at), 0)::float8 AS silent
                    FROM hpo.worker, clock_timestamp() AS now
                    WHERE study = :study AND seen_at > now - make_interval(secs => :silent) ORDER BY joined_at, name
                """),
                {"study": study, "silent": SILENT},
            )
            return [Present(**row) for row in rows.mappings()]

    def orders(self, study: str, *, stops: int, held: Sequence[Job]) -> tuple[Stop | None, list[Job]]:
        """What people ask of a worker that joined after so many `stops`: to leave, and to drop which of its jobs."""
        with self._transaction() as connection:
            asked = connection.execute(
                text("""
                    SELECT stopped_by, extract(epoch FROM stopped_at)::float8 FROM hpo.study
                    WHERE name = :study AND stops > :stops
                """),
                {"study": study, "stops": stops},
            ).one_or_none()
            cancelled = set(
                connection.scalars(
                    text("SELECT id FROM hpo.job WHERE id = ANY(:ids) AND state = 'cancelled'"),
                    {"ids": [job.id for job in held]},
                )
            )
        stop = Stop(by=asked[0], at=asked[1]) if asked is not None else None
        return stop, [job for job in held if job.id in cancelled]
