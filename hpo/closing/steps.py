"""Closing a study, as a worker does it: winners are fetched and checked, a trainer scores them, they are promoted.

A job of the queue like any other: it happens once however many workers there are, and is taken over if its worker
dies.
"""

from pathlib import Path

from hpo import crash
from hpo.closing import pictures, promotion
from hpo.closing.promotion import Winner
from hpo.closing.scored import Score, Scored
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
        self._requests: list[tuple[Job, Score]] = []  # not answered yet
        self._winners: list[Winner] = []

    def fetch(self) -> None:
        """Reconcile what is half done, download the winners' models, every file checked. Repeatable."""
        self.reconciler.reconcile(lease=self.lease, older_than=0)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._requests = []
        for job in ranking.winners(self.reconciler.queue.jobs(self.job.study), self.report_by):
            model = promotion.fetch(self.reconciler.tracker, job, self.folder / f"model-{job.number}")
            table = self.folder / f"trial-{job.number}.csv"
            self._requests.append((job, Score(folder=model, data=self.data, predictions=table)))

    def next_request(self) -> Score | None:
        """Return what to ask the trainer next; None when all winners are scored."""
        return self._requests[0][1] if self._requests else None

    def put(self, scored: Scored) -> None:
        """Take the answer to the last request. Raise ValueError if the model is not the one that was recorded."""
        job, request = self._requests[0]
        ranking.check_same(scored.model, job)
        self._winners.append(Winner(job=job, scored=scored, predictions=request.predictions))
        del self._requests[0]
        crash.at("winner scored")

    def finish(self) -> None:
        """Register, move aliases, log pictures and tables, record the closing. Repeatable; raises LeaseLost."""
        queue = self.reconciler.queue
        result = promotion.promote(self.reconciler, self.job, self._winners)
        queue.require(self.job)
        tables = {winner.job.number: winner.predictions for winner in self._winners}
        pictures.log_plots(self.reconciler, self.job, tables)
        results.log_study(queue, self.reconciler.tracker, self.reconciler.study, result)
        crash.at("study shown")
        queue.end(self.job, State.DONE, result=result)
        crash.at("closing recorded")
