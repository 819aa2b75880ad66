"""The growing delay of a worker that is started again and again at a place where workers failed."""

from sqlalchemy import text

from hpo.queue.database import Database
from hpo.queue.records import PlaceFailures
from hpo.queue.rows import REASON
from hpo.text import utf8

FIRST_DELAY, LONGEST_DELAY = 5.0, 300.0  # seconds; it doubles with each failure
FORGOTTEN = 3 * LONGEST_DELAY  # seconds after which a failure begins a new row


class Delays(Database):
    """The place table. It slows down programs that restart workers, and decides nothing about trials."""

    def note_failure(self, study: str, *, host: str, device: str, reason: str) -> None:
        """Note that a worker could not work at a place."""
        with self._transaction() as connection:
            connection.execute(
                text("""
                    INSERT INTO hpo.place (study, host, device, failures, failed_at, reason)
                    SELECT name, :host, :device, 1, clock_timestamp(), :reason
                    FROM hpo.study WHERE name = :study  -- it may have been deleted
                    FOR KEY SHARE
                    ON CONFLICT (study, host, device) DO UPDATE SET failed_at = excluded.failed_at,
                        reason = excluded.reason, failures = 1 + CASE
                            WHEN place.failed_at < excluded.failed_at - make_interval(secs => :forgotten) THEN 0
                            ELSE place.failures END
                """),
                {
                    "study": study,
                    "host": host,
                    "device": device,
                    "reason": utf8(reason)[:REASON],
                    "forgotten": FORGOTTEN,
                },
            )

    def note_success(self, study: str, *, host: str, device: str) -> None:
        """Forget the failures of a place: a worker has ended there in peace."""
        with self._transaction() as connection:
            connection.execute(
                text("DELETE FROM hpo.place WHERE study = :study AND host = :host AND device = :device"),
                {"study": study, "host": host, "device": device},
            )

    def failures(self, study: str, *, host: str, device: str) -> PlaceFailures | None:
        """Return the latest failures at a place, and how long the next worker there should wait; None without any."""
        with self._transaction() as connection:
            row = connection.execute(
                text("""
                    SELECT failures, reason, extract(epoch FROM clock_timestamp() - failed_at)::float8 AS age
                    FROM hpo.place WHERE study = :study AND host = :host AND device = :device
                """),
                {"study": study, "host": host, "device": device},
            ).one_or_none()
        if row is None or row.age > FORGOTTEN:
            return None
        return PlaceFailures(
            count=row.failures, reason=row.reason, seconds_left=max(0.0, delay(row.failures) - row.age)
        )


def delay(failures: int) -> float:
    """Return the seconds to wait after so many failures in a row."""
    return min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(failures - 1, 16))
