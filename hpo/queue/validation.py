"""What networks and baseline predictors miss of the validation split, image by image: it decides who is champion.

The numbers stand in a table of their own, for the rows of jobs are read by every listing.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from sqlalchemy import Connection, text

from hpo.queue.database import Database
from hpo.queue.records import Job
from hpo.queue.rows import hold

Arrays = Mapping[str, np.ndarray]


class Validation(Database):
    """Arrays of the validation split by job and name."""

    def put_validation(self, closing: Job, arrays: Mapping[int, Arrays]) -> None:
        """Store arrays by job and name; those that are there already stay. Raise LeaseLost if the closing is lost."""
        with self._transaction() as connection:
            hold(connection, closing)
            for job, own in arrays.items():
                store(connection, job, own)

    def validation(self, jobs: Sequence[int]) -> dict[int, dict[str, np.ndarray]]:
        """Return the arrays of these jobs by name; an empty dictionary of a job that has none."""
        result: dict[int, dict[str, np.ndarray]] = {job: {} for job in jobs}
        with self._transaction() as connection:
            rows = connection.execute(
                text("SELECT job, name, shape, numbers FROM hpo.validation WHERE job = ANY(:jobs)"),
                {"jobs": list(jobs)},
            )
            for row in rows:
                result[row.job][row.name] = np.frombuffer(row.numbers, "<f8").reshape(row.shape)
        return result


def store(connection: Connection, job: int, arrays: Arrays) -> None:
    """Insert arrays of a job that the caller holds; those that are there already stay."""
    for name, array in arrays.items():
        connection.execute(
            text("""
                INSERT INTO hpo.validation (job, name, shape, numbers) VALUES (:job, :name, :shape, :numbers)
                ON CONFLICT DO NOTHING
            """),
            {"job": job, "name": name, "shape": list(array.shape), "numbers": array.astype("<f8").tobytes()},
        )
