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
from hpo.closing.scored import NotScored, Score, Scored
from hpo.errors import ModelError, NotFound
from hpo.queue import Job, NewJob, State
from hpo.queue.closing_result import ScoredVersion
from hpo.recording.reconciler import Reconciler
from hpo.report import results
from hpo.scores import champion, lineage, ranking
from hpo.study import trial_spec
from hpo.study.records import SplitScores, version_key
from hpo.text import first_line


class Closing:
    """One closing under way: `fetch`, then a trainer's answer to each request of `next_request`, then `finish`."""

    def __init__(
        self, reconciler: Reconciler, job: Job, folder: Path, data: Path, report_by: list[str], *, lease: float
    ) -> None:
        self.reconciler, self.job, self.folder, self.data, self.report_by = reconciler, job, folder, data, report_by
        self.lease = lease  # seconds
        self._requests: list[tuple[Job, Score]] = []  # not answered yet
        self._winners: list[Winner] = []
        self._tested: list[ScoredVersion] = []
        self._older: ScoredVersion | None = None  # the champion, if it was trained on an earlier data set

    def fetch(self) -> bool:
        """Reconcile what is half done, download the winners' models, every file checked. Repeatable.

        Return False if, after a cross-validation, a winner is to be trained again first: that is planned then.
        """
        self.reconciler.reconcile(lease=self.lease, older_than=0)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._requests, self._tested = [], []
        jobs = self.reconciler.queue.jobs(self.job.study)
        winners = ranking.winners(jobs, self.report_by)
        networks = [ranking.network(jobs, winner) for winner in winners]
        if missing := [winner for winner, job in zip(winners, networks, strict=True) if job is None]:
            self._plan_refits(jobs, missing)
            return False
        earlier = self._fetch_older() if networks else None
        for job in filter(None, networks):
            model = promotion.fetch(self.reconciler.tracker, job, self.folder / f"model-{job.number}")
            table = self.folder / f"trial-{job.number}.csv"
            errors, folds = table.with_suffix(".npz"), ranking.folds_of(job)
            request = Score(
                folder=model, data=self.data, predictions=table, errors=errors, folds=folds, earlier=earlier
            )
            self._requests.append((job, request))
        return True

    def _fetch_older(self) -> str | None:
        """Download the champion if it was trained on an earlier data set, and ask for its scores; return the key of
        that data set. What is wrong with it is said in the result and keeps nothing from being closed."""
        tracker, row = self.reconciler.tracker, self.reconciler.study
        if not row.facts.data.earlier:
            return None
        contest = champion.Contest(self.reconciler.queue, tracker, row)
        candidate = contest.present(contest.candidates())
        # The election reads jobs without the hashes of their files.
        job = None if candidate is None else self.reconciler.queue.by_run(candidate.version.run_id)
        if candidate is None or job is None or job.spec is None:
            return None
        key = version_key(job.spec.data, job.spec.split)
        if key not in [version.key for version in row.facts.data.earlier]:
            return None
        self._older = ScoredVersion(
            run_id=candidate.version.run_id,
            study=job.study,
            model=candidate.model,
            version=candidate.version.number,
            data=candidate.data,
        )
        try:
            folder = promotion.fetch(tracker, job, self.folder / "older-champion")
        except (ModelError, NotFound) as error:
            self._tested.append(replace(self._older, fault=first_line(error)))
            return key
        table = self.folder / "older-champion.csv"
        errors = table.with_suffix(".npz")  # that no election asks for
        request = Score(folder=folder, data=self.data, predictions=table, errors=errors, earlier=key, is_older=True)
        self._requests.append((job, request))
        return key

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

    def put(self, scored: Scored | NotScored) -> None:
        """Take the answer to the last request. Raise ValueError if the model is not the one that was recorded."""
        job, request = self._requests.pop(0)
        if request.is_older or isinstance(scored, NotScored):
            assert self._older is not None
            answer = {"fault": scored.reason} if isinstance(scored, NotScored) else {"tests": scored.tests}
            self._tested.append(replace(self._older, **answer))
            return
        ranking.check_same(scored.model, job)
        if request.earlier is not None:
            data = lineage.title(self.reconciler.study.facts.data)
            entry = ScoredVersion(run_id=str(job.run_id), study=job.study, data=data, tests=scored.tests)
            self._tested.append(entry)
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
        crash.at("winner scored")

    def finish(self) -> None:
        """Register, move aliases, log pictures and tables, record the closing. Repeatable; raises LeaseLost."""
        queue = self.reconciler.queue
        result = promotion.promote(self.reconciler, self.job, self._winners, self._tested)
        queue.require(self.job)
        tables = {winner.job.number: winner.predictions for winner in self._winners}
        pictures.log_plots(self.reconciler, self.job, tables)
        results.log_study(queue, self.reconciler.tracker, self.reconciler.study, result)
        crash.at("study shown")
        queue.end(self.job, State.DONE, result=result)
        crash.at("closing recorded")
