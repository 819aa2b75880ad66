"""Closing a study, as a worker does it: winners are fetched and checked, a trainer scores them, they are promoted.

A job of the queue like any other: it happens once however many workers there are, and is taken over if its worker
dies.
"""

from pathlib import Path
from typing import Any

from hpo import crash
from hpo.closing import pictures, promotion
from hpo.queue import Job, State
from hpo.recording.reconciler import Reconciler
from hpo.report import results
from hpo.scores import ranking


class Closing:
    """One closing under way: `fetch`, then a trainer's answer to each request of `next_request`, then `finish`."""

    def __init__(
        self, reconciler: Reconciler, job: Job, folder: Path, data: Path, report_by: list[str], *, lease: float
    ) -> None:
        self.reconciler, self.job, self.folder, self.data, self.report_by = reconciler, job, folder, data, report_by
        self.lease = lease  # seconds
        self._winners: list[Job] = []
        self._scored: dict[int, dict[str, Any]] = {}

    def fetch(self) -> None:
        """Reconcile what is half done, download the winners' models, every file checked. Repeatable."""
        self.reconciler.reconcile(lease=self.lease, older_than=0)
        self._winners = ranking.winners(self.reconciler.queue.jobs(self.job.study), self.report_by)
        self.folder.mkdir(parents=True, exist_ok=True)
        for winner in self._winners:
            promotion.fetch(self.reconciler.tracker, winner, self._model(winner))

    def next_request(self) -> dict[str, Any] | None:
        """What to ask the trainer's `score` for next; None when all winners are scored."""
        for winner in self._winners:
            if winner.number not in self._scored:
                predictions = self._predictions(winner.number)
                return {"folder": self._model(winner), "data": self.data, "predictions": predictions}
        return None

    def put(self, scored: dict[str, Any]) -> None:
        """Take the answer to the last request. Raises ValueError if the model is not the one that was recorded."""
        winner = next(job for job in self._winners if job.number not in self._scored)
        ranking.check_same(scored, winner)
        self._scored[winner.number] = scored
        crash.at("winner scored")

    def finish(self) -> None:
        """Register, move aliases, log pictures and tables, record the closing. Repeatable; raises LeaseLost."""
        queue = self.reconciler.queue
        predictions = {number: self._predictions(number) for number in self._scored}
        result = promotion.promote(self.reconciler, self.job, self._scored, predictions)
        queue.require(self.job)
        pictures.log_plots(self.reconciler, self.job, predictions)
        results.log_study(self.reconciler.queue, self.reconciler.tracker, self.reconciler.study, result)
        crash.at("study shown")
        queue.end(self.job, State.DONE, result=result)
        crash.at("closing recorded")

    def _model(self, winner: Job) -> Path:
        return self.folder / f"model-{winner.number}"

    def _predictions(self, number: int) -> Path:
        return self.folder / f"trial-{number}.csv"
