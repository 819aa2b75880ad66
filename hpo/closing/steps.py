"""Closing a study, as a worker does it: winners are fetched and checked, a trainer scores them, they are promoted.

A job of the queue like any other: it happens once however many workers there are, and is taken over if its worker
dies.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from hpo import crash
from hpo.closing import pictures, promotion
from hpo.closing.promotion import Winner
from hpo.closing.scored import NotScored, Score, Scored
from hpo.errors import ModelError, NotFound
from hpo.queue import Job, NewJob, Queue, State, StudyRow
from hpo.queue.closing_result import ScoredVersion
from hpo.report import results
from hpo.scores import champion, lineage, ranking
from hpo.scores.candidates import Candidate
from hpo.study import trial_spec
from hpo.study.records import SplitScores, version_key
from hpo.text import first_line
from hpo.tracking.client import Tracker


class Closing:
    """One closing under way: `fetch`, then a trainer's answer to each request of `next_request`, then `finish`."""

    def __init__(
        self,
        queue: Queue,
        tracker: Tracker,
        study: StudyRow,
        *,
        job: Job,
        folder: Path,
        data: Path,
        reconcile: Callable[[], object],
    ) -> None:
        """`folder`: for the files of the closing; `data`: the data set, NPZ; `reconcile` completes what other workers
        left half done of the study."""
        self.queue, self.tracker, self.study, self.job = queue, tracker, study, job
        self.folder, self.data, self._reconcile = folder, data, reconcile
        self._requests: list[tuple[Job, Score]] = []  # not answered yet
        self._winners: list[Winner] = []
        self.tested: list[ScoredVersion] = []  # on old and new test images
        self._older: ScoredVersion | None = None  # of an earlier data set, scored beside the winners

    def fetch(self) -> bool:
        """Reconcile what is half done, download the winners' models, every file checked. Repeatable.

        Return False if, after a cross-validation, a winner is to be trained again first: that is planned then.
        """
        self._reconcile()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._requests, self._winners, self.tested, self._older = [], [], [], None
        jobs = self.queue.jobs(self.job.study)
        winners = ranking.winners(jobs, self.study.specification.report_by)
        networks = [ranking.network(jobs, winner) for winner in winners]
        if missing := [winner for winner, job in zip(winners, networks, strict=True) if job is None]:
            self._plan_refits(jobs, missing)
            return False
        earlier = self._fetch_older() if networks else None
        for job in filter(None, networks):
            model = promotion.fetch(self.tracker, job, self.folder / f"model-{job.number}")
            table = self.folder / f"trial-{job.number}.csv"
            errors, folds = table.with_suffix(".npz"), ranking.folds_of(job)
            request = Score(
                folder=model, data=self.data, predictions=table, errors=errors, folds=folds, earlier=earlier
            )
            self._requests.append((job, request))
        return True

    def is_overtaken(self) -> bool:
        """Return whether a network of an earlier data set has become champion since `fetch`, which found none to score
        beside the winners: then all of it is to be done again."""
        return bool(self._winners) and self._older is None and self._find_older() is not None

    def _find_older(self) -> tuple[Candidate, Job] | None:
        """Return the champion with its trial if it was trained on an earlier data set; once this study has the
        champion, the best version of an earlier data set."""
        row = self.study
        if not row.facts.data.earlier:
            return None
        contest = champion.Contest(self.queue, self.tracker, row)
        candidates = contest.candidates()
        present = contest.present(candidates)
        if present is None:
            return None
        has_won = present.job.study == row.name  # in this closing, whose worker died then, or in one before more trials
        keys = [version.key for version in row.facts.data.earlier]
        for one in candidates if has_won else [present]:
            # The election reads jobs without the hashes of their files.
            job = self.queue.by_run(one.version.run_id)
            if job is not None and job.spec is not None and _data_of(job) in keys and contest.stands(one):
                return one, job
        return None

    def _fetch_older(self) -> str | None:
        """Download what `_find_older` finds, and ask for its scores; return the key of its data set. What is wrong with
        it is said in the result and keeps nothing from being closed."""
        if (older := self._find_older()) is None:
            return None
        candidate, job = older
        key = _data_of(job)
        self._older = ScoredVersion(
            run_id=candidate.version.run_id,
            study=job.study,
            model=candidate.model,
            version=candidate.version.number,
            data=candidate.data,
        )
        try:
            folder = promotion.fetch(self.tracker, job, self.folder / "older-champion")
        except (ModelError, NotFound) as error:
            self.tested.append(replace(self._older, fault=first_line(error)))
            return key
        table = self.folder / "older-champion.csv"
        errors = table.with_suffix(".npz")  # that no election asks for
        request = Score(folder=folder, data=self.data, predictions=table, errors=errors, earlier=key, is_older=True)
        self._requests.append((job, request))
        return key

    def _plan_refits(self, jobs: Sequence[Job], winners: Sequence[Job]) -> None:
        """Plan to train the configurations of these trials again, on the images of all folds."""
        row, folds = self.study, ranking.repeats(jobs)
        planned, refits = row.specification, []
        for job in winners:
            assert job.spec is not None
            refit = ranking.refit_of(folds[job.number])
            spec, cost = trial_spec(planned, row.identity, row.facts, job.spec.point, config=job.config, refit=refit)
            refits.append(
                NewJob(kind="trial", number=job.number, repeat=refit.folds, config=job.config, cost=cost, spec=spec)
            )
        self.queue.put_jobs(row.name, refits, closing=self.job)
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
            self.tested.append(replace(self._older, **answer))
            return
        ranking.check_same(scored.model, job)
        if request.earlier is not None:
            data = lineage.title(self.study.facts.data)
            entry = ScoredVersion(run_id=str(job.run_id), study=job.study, data=data, tests=scored.tests)
            self.tested.append(entry)
        if job.is_refit and job.result is not None:  # no network of a cross-validation is scored on its own images
            predictors = self.study.facts.predictors
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
        queue, tracker, study = self.queue, self.tracker, self.study
        result = promotion.promote(queue, tracker, study, closing=self.job, winners=self._winners, tested=self.tested)
        queue.require(self.job)
        tables = {winner.job.number: winner.predictions for winner in self._winners}
        pictures.log_plots(queue, tracker, study, closing=self.job, predictions=tables)
        results.log_study(queue, tracker, study, result)
        crash.at("study shown")
        queue.end(self.job, State.DONE, result=result)
        crash.at("closing recorded")


def _data_of(job: Job) -> str:
    """Return the key of the data set that a trial was trained on."""
    assert job.spec is not None
    return version_key(job.spec.data, job.spec.split)
