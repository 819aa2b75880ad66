"""Closing a study, as a worker does it: winners are fetched and checked, a trainer scores them, they are promoted.

A job of the queue like any other: it happens once however many workers there are, and is taken over if its worker
dies.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hpo import crash
from hpo.closing import pictures, promotion
from hpo.closing.promotion import Winner
from hpo.closing.scored import Score, Scored
from hpo.queue import Job, NewJob, State
from hpo.recording.reconciler import Reconciler
from hpo.report import results
from hpo.scores import ranking
from hpo.study import trial_spec
from hpo.study.records import SplitScores


class Closing:
    """One closing under way: `fetch`, then a trainer's answer to each request of `next_request`, then `finish`."""

    def __init__(
        self, reconciler: Reconciler, job: Job, folder: Path, data: Path, report_by: list[str], *, lease: float
    ) -> None:
        self.reconciler, self.job, self.folder, self.data, self.report_by = reconciler, job, folder, data, report_by
        self.lease = lease  # seconds
        self._requests: list[tuple[Job, Score]] = []  # not answered yet
        self._winners: list[Winner] = []

    def fetch(self) -> bool:
        """Reconcile what is half done, download the winners' models, every file checked. Repeatable.

        Return False if, after a cross-validation, a winner is to be trained again first: that is planned then.
        """
        self.reconciler.reconcile(lease=self.lease, older_than=0)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._requests = []
        jobs = self.reconciler.queue.jobs(self.job.study)
        winners = ranking.winners(jobs, self.report_by)
        networks = [ranking.network(jobs, winner) for winner in winners]
        if missing := [winner for winner, job in zip(winners, networks, strict=True) if job is None]:
            self._plan_refits(jobs, missing)
            return False
        for job in filter(None, networks):
            model = promotion.fetch(self.reconciler.tracker, job, self.folder / f"model-{job.number}")
            table = self.folder / f"trial-{job.number}.csv"
            errors = table.with_suffix(".npz")
            request = Score(folder=model, data=self.data, predictions=table, errors=errors, folds=ranking.folds_of(job))
            self._requests.append((job, request))
        return True

    def _plan_refits(self, jobs: Sequence[Job], winners: Sequence[Job]) -> None:
        """Plan to train the configurations of these trials again, on the images of all folds."""
        row, folds = self.reconciler.study, ranking.repeats(jobs)
        planned, refits = row.specification, []
        for job in winners:
            assert job.spec is not None
            refit = ranking.refit_of(folds[job.number])
            spec, cost = trial_spec(planned, row.identity, row.facts, job.spec.point, config=job.config, refit=refit)
            refits.append(
                NewJob(kind="trial", number=job.number, repeat=refit.folds, config=job.config, cost=cost, spec=spec)
            )
        self.reconciler.queue.put_jobs(row.name, refits, closing=self.job)
        crash.at("refits planned")

    def next_request(self) -> Score | None:
        """Return what to ask the trainer next; None when all winners are scored."""
        return self._requests[0][1] if self._requests else None

    def put(self, scored: Scored) -> None:
        """Take the answer to the last request. Raise ValueError if the model is not the one that was recorded."""
        job, request = self._requests[0]
        ranking.check_same(scored.model, job)
        if job.is_refit and job.result is not None:  # no network of a cross-validation is scored on its own images
            predictors = self.reconciler.study.facts.predictors
            scored = Scored(
                model=SplitScores(validation=job.result.validation, test=scored.model.test),
                predictors={
                    name: replace(scores, validation=predictors[name].validation) if name in predictors else scores
                    for name, scores in scored.predictors.items()
                },
            )
        winner = Winner(job=job, scored=scored, predictions=request.predictions, errors=request.errors)
        self._winners.append(winner)
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
