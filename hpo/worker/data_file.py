"""The data set's file of a worker, fetched again when a trainer finds it damaged."""

import os
from contextlib import suppress
from pathlib import Path

from hpo.errors import ServiceError
from hpo.queue import Job

FETCH_ATTEMPTS = 3  # fetches in a row after which no trainer could read the file


class DataFile:
    """Where the data set lies, how often it was fetched again, and the jobs that wait for the next fetch.

    Several trainers meet the same damaged file: it is fetched once for all of them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fetches = 0  # again
        self._sound = 0  # the number of fetches when a trainer read the file last
        self.waiting: list[
            tuple[Job | None, str]
        ] = []  # jobs with the reason why they wait; None for a trainer's proof

    def touch(self) -> None:
        """Show that the file is in use: no cache to be cleared."""
        with suppress(OSError):
            os.utime(self.path)

    def is_sound(self) -> None:
        """Note that a trainer has read it."""
        self._sound = self.fetches

    def wait(self, job: Job | None, reason: str) -> bool:
        """Let a job, or the proof of a trainer, wait for the next fetch; return whether that is to begin now.

        Raise ServiceError if it was fetched FETCH_ATTEMPTS times and nobody could read it.
        """
        self.waiting.append((job, reason))
        if self.fetches - self._sound == FETCH_ATTEMPTS:
            raise ServiceError(f"{reason} It was fetched {FETCH_ATTEMPTS} times: is HPO_HOME's disk sound?")
        return len(self.waiting) == 1

    def fetched(self, path: Path) -> None:
        self.path = path
        self.fetches += 1

    def take_waiting(self) -> list[tuple[Job, str]]:
        """Return the jobs that have waited, with the reasons."""
        waiting, self.waiting = self.waiting, []
        return [(job, reason) for job, reason in waiting if job is not None]
