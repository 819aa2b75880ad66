"""What closing a study decides: its winners are registered and compared with the champion of all studies."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from hpo import crash
from hpo.closing import descriptions
from hpo.closing.scored import Scored
from hpo.queue import Job, Queue, State, StudyRow
from hpo.queue.closing_result import ClosingResult, FailedTrial, ScoredVersion
from hpo.scores import alarms, champion, gains, lineage, ranking, verdict
from hpo.study.records import NETWORK
from hpo.tracking import registry
from hpo.tracking.client import Tracker, in_unit

SCORES = ("nmse", "mse", "r2", "nrmse")  # of the test split, shown at a winner's run


@dataclass(frozen=True, kw_only=True)
class Winner:
    """The best trial of a group, scored on the test split."""

    job: Job
    scored: Scored
    predictions: Path  # CSV of the validation and the test split
    errors: Path  # NPZ of arrays of the validation split

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of the validation split by their names in hpo.queue.validation."""
        with np.load(self.errors, allow_pickle=False) as content:
            return dict(content)


def fetch(tracker: Tracker, job: Job, folder: Path) -> Path:
    """Download the model of a finished trial, every file checked against the database's hash; return its folder."""
    assert job.result is not None
    return registry.download_model(
        tracker, model_id=job.result.model_id, folder=folder, expected_sha256=job.result.files
    )


def promote(
    queue: Queue,
    tracker: Tracker,
    study: StudyRow,
    *,
    closing: Job,
    winners: Sequence[Winner],
    tested: Sequence[ScoredVersion],
) -> ClosingResult:
    """Register the winners, the best first, and move the aliases; return the closing's result. Idempotent.

    `tested` stands in the result as it is: no alias depends on it.

    Raise LeaseLost if another worker closes the study now.
    """
    jobs, row = queue.jobs(study.name), queue.study(study.name)  # as they are now
    trials = [job for job in jobs if job.kind == "trial"]
    result = _without_winner(row, trials)
    if not winners:
        return result
    _put_errors(queue, closing, winners)
    repeats = ranking.repeats(jobs)
    means = [replace(job, result=ranking.result_of(repeats[job.number])) for job in ranking.ranked(jobs)]
    warnings = alarms.alarms(means, study.facts.predictors, winners[0].predictions)
    model_name = _claim_model(queue, tracker, study, closing)
    register = partial(registry.register, tracker, model_name=model_name, owner=queue.database_id())
    groups = []
    for winner in winners:
        job, scored = winner.job, winner.scored
        assert job.result is not None
        certain = gains.of_trial(queue, jobs, job)
        entry = verdict.entry(job, scored.model, scored.predictors, trials=trials, certain=certain)
        if entry.verdict != "below mean":
            tags = descriptions.tags_of_version(job, entry)
            text = descriptions.of_version(study, job, entry, scored.predictors, alarms=warnings)
            queue.require(closing)
            model_id, run_id = job.result.model_id, str(job.run_id)
            version = register(key=job.key, model_id=model_id, run_id=run_id, description=text, tags=tags)
            entry = replace(entry, version=version)
            crash.at("version registered")
        groups.append(entry)
        tracker.upload(study.facts.study_run_id, winner.predictions, "predictions")
        scores = {f"test_{name}": getattr(entry.test, name) for name in SCORES} | in_unit("test", entry.test.in_unit)
        at, epoch = round(job.changed_at * 1000), job.result.best_epoch
        tracker.log_summary(str(job.run_id), scores, timestamp_ms=at, step=epoch)
    sound = {str(winner.job.run_id) for winner in winners}
    election = champion.settle(queue, tracker, study, closing=closing, sound=sound).elected
    crash.at("champion elected")
    return replace(
        result,
        winner=groups[0],
        reason=descriptions.VERDICTS[groups[0].verdict],
        groups=tuple(groups),
        alarms=tuple(warnings),
        model_name=model_name,
        predictors=winners[0].scored.predictors,
        tested=tuple(tested) or None,
        openings=1 + (row.facts.openings or 0),
        election=election,
    )


def _without_winner(row: StudyRow, trials: Sequence[Job]) -> ClosingResult:
    """Return the result of a closing as far as it is known from the trials: no network was trained."""
    what = "configuration has a score of every fold" if row.specification.folds else "trial was finished"
    return ClosingResult(
        failed=tuple(
            FailedTrial(number=job.number, state=job.state, reason=job.reason)
            for job in trials
            if job.state.failed or job.state == State.CANCELLED
        ),
        pruned=sum(job.state == State.PRUNED for job in trials),
        reason=f"no {what}",
        alarms=(),
        budget=row.budget and replace(row.budget, left=sum(job.state == State.WAITING for job in trials)),
    )


def _claim_model(queue: Queue, tracker: Tracker, study: StudyRow, closing: Job) -> str:
    """Return the name of the registered model for the study's winners, made and described if need be."""
    with champion.lock(queue, study):
        queue.require(closing)
        newest = lineage.newest(study, champion.competing(queue, study))
        return champion.claim_model(queue, tracker, study, description=descriptions.of_model(newest))


def _put_errors(queue: Queue, closing: Job, winners: Sequence[Winner]) -> None:
    """Store the squared errors of winners and baseline predictors on the validation split."""
    baselines = {name: array for name, array in winners[0].arrays().items() if name != NETWORK}
    networks = {winner.job.id: {NETWORK: winner.arrays()[NETWORK]} for winner in winners if not winner.job.is_refit}
    queue.put_validation(closing, {closing.id: baselines, **networks})
