"""What a worker cannot reach now, and what it says about that."""

import logging
import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

from hpo.object_store import TOLD
from hpo.queue import DatabaseLost, Queue
from hpo.text import first_line
from hpo.tracking.errors import Refused, StoreRefuses, TrackingUnavailable

REMINDER = 60.0  # seconds between two log lines about the same outage

log = logging.getLogger("hpo")


class Outage:
    """An outage of the database, of MLflow or of its artifact store, from the first error until all answer again."""

    def __init__(self, queue: Queue, study: str | None, *, store: Path | None) -> None:
        """`study`: None for all of the database; `store`: the artifact store's folder, if it is on this machine."""
        self._queue, self._study, self._store = queue, study, store
        self.text: str | None = None  # for people; None if nothing is wrong
        self.store_full = False
        self._since = self._said_at = 0.0  # monotonic seconds
        self._causes: set[type] = set()  # errors of the database that were said in this outage
        self._noting = threading.Lock()  # several threads meet it

    @property
    def seconds(self) -> float:
        """Seconds since the first error; 0 when nothing is wrong."""
        return time.monotonic() - self._since if self.text else 0.0

    def note(self, error: Exception) -> None:
        """Remember that a service could not be reached, and say so: at once, then once a minute.

        Of a database also when another cause comes up: a connection is dropped, for example, and then nothing may be
        written.
        """
        text = self._words(error)  # asks the database, which may take its time: not while others wait for us
        with self._noting:
            now = time.monotonic()
            if self.text is None:
                self._since, self._said_at = now, float("-inf")
                self._causes.clear()
            if isinstance(error, DatabaseLost):
                cause = type(getattr(error.__cause__, "orig", None))
                if cause not in self._causes:
                    self._causes.add(cause)
                    self._said_at = float("-inf")
            if isinstance(error, TrackingUnavailable):  # of the store a lost database tells nothing
                if self.store_full != isinstance(error, StoreRefuses):
                    self._said_at = float("-inf")
                self.store_full = isinstance(error, StoreRefuses)
            self.text = text
            if now - self._said_at >= REMINDER:
                self._said_at = now
                is_told = getattr(error, "cause", None) is not None
                log.warning("%s%s", self.text, "" if is_told else f" ({first_line(error)})")

    def over(self) -> None:
        """Note that the services have answered."""
        with self._noting:
            if self.text is not None:
                log.warning("all services answer again, after %.0f s", self.seconds)
            self.text, self.store_full = None, False

    def _words(self, error: Exception) -> str:
        if isinstance(error, StoreRefuses):
            return f"{self._store_words(error)}; no trial is claimed until it takes files again"
        if isinstance(error, DatabaseLost):
            return "database lost, retrying"
        waiting = ""
        with suppress(DatabaseLost):
            waiting = f", {self._queue.waiting_epochs(self._study)} epochs waiting"
        return f"MLflow {error.answer if isinstance(error, Refused) else 'unreachable'}{waiting}"

    def _store_words(self, error: StoreRefuses) -> str:
        """Return what is wrong with the artifact store."""
        needed = error.needed / 1e6
        if error.cause is not None:
            return f"{TOLD}{error.cause}" + (f", {needed:.1f} MB needed" if needed else "")
        if self._store is None:
            return f"the MLflow server stores no files (full or read-only?): {needed:.1f} MB needed"
        if not os.access(self._store, os.W_OK):
            return f"store read-only: {needed:.1f} MB needed in {self._store}"
        free = shutil.disk_usage(self._store).free / 1e6
        if free < needed + 1:
            return f"store full: {needed:.1f} MB needed, {free:.1f} MB free in {self._store}"
        return f"the MLflow server stores no files in {self._store}: {needed:.1f} MB needed, {free:.1f} MB free"
