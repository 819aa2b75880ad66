"""What closing a study decides: its winners are registered and compared with the champion of all studies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from hpo import crash
from hpo.closing import descriptions
from hpo.closing.scored import Scored
from hpo.queue import Job, State
from hpo.queue.closing_result import ClosingEntry, ClosingResult, FailedTrial, Gain, ScoredVersion
from hpo.recording.reconciler import Reconciler, in_unit
from hpo.scores import alarms, champion, gains, lineage, ranking
from hpo.study import provenance
from hpo.study.records import NETWORK, Scores, SplitScores
from hpo.tracking import registry
from hpo.tracking.client import Tracker
from models.metrics import DESCRIPTORS

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


def verdict(
    validation: Scores, predictors: Mapping[str, SplitScores], certain: Mapping[str, Gain] = MappingProxyType({})
) -> str:
    """Return how a network compares with the baseline predictors; `certain`: its gains over them, as far as known.

    'below mean' is never registered, 'not distinguishable from the mean' is registered and never champion. 'good' is
    promoted, all others are promoted and marked. Ridge on descriptors counts where the gain over it is known.
    """
    for name in ("mean", "volume fraction", *({DESCRIPTORS} & certain.keys())):
        nmse, limit = validation.nmse, predictors[name].validation.nmse
        if nmse is None or limit is None or not nmse < limit:
            return f"below {name}"
        if name in certain and not certain[name].is_certain:
            return f"not distinguishable from the {name}"
    return "good"


def promote(
    reconciler: Reconciler, closing: Job, winners: Sequence[Winner], tested: Sequence[ScoredVersion]
) -> ClosingResult:
    """Register the winners, the best first, and move the aliases; return the closing's result. Idempotent.

    `tested` stands in the result as it is: no alias depends on it.

    Raise LeaseLost if another worker closes the study now.
    """
    queue, tracker, study = reconciler.queue, reconciler.tracker, reconciler.study
    jobs = queue.jobs(study.name)
    trials = [job for job in jobs if job.kind == "trial"]
    failed = _failed(trials)
    pruned = sum(job.state == State.PRUNED for job in trials)
    row = queue.study(study.name)  # as it is now
    budget = row.budget and replace(row.budget, left=sum(job.state == State.WAITING for job in trials))
    if not winners:
        what = "configuration has a score of every fold" if study.specification.folds else "trial was finished"
        return ClosingResult(failed=failed, pruned=pruned, reason=f"no {what}", alarms=(), budget=budget)
    repeats = ranking.repeats(jobs)
    means = [replace(job, result=ranking.result_of(repeats[job.number])) for job in ranking.ranked(jobs)]
    warnings = alarms.alarms(means, study.facts.predictors, winners[0].predictions)
    with champion.lock(queue, study):
        queue.require(closing)
        newest = lineage.newest(study, champion.competing(queue, study))
        model_name = champion.claim_model(queue, tracker, study, description=descriptions.of_model(newest))
    baselines = {name: array for name, array in winners[0].arrays().items() if name != NETWORK}
    networks = {winner.job.id: {NETWORK: winner.arrays()[NETWORK]} for winner in winners if not winner.job.is_refit}
    queue.put_validation(closing, {closing.id: baselines, **networks})
    groups = []
    for winner in winners:
        entry = _entry(winner, trials, gains.of_trial(queue, jobs, winner.job))
        if entry.verdict != "below mean":
            queue.require(closing)
            text = descriptions.of_version(study, winner.job, entry, winner.scored.predictors, alarms=warnings)
            version = _register(tracker, winner.job, entry, model_name, owner=queue.database_id(), description=text)
            entry = replace(entry, version=version)
            crash.at("version registered")
        groups.append(entry)
        tracker.upload(study.facts.study_run_id, winner.predictions, "predictions")
        _log_test_scores(tracker, winner.job, entry)
    sound = {str(winner.job.run_id) for winner in winners}
    election = champion.settle(queue, tracker, study, closing=closing, sound=sound).elected
    crash.at("champion elected")
    return ClosingResult(
        winner=groups[0],
        failed=failed,
        pruned=pruned,
        reason=descriptions.VERDICTS[groups[0].verdict],
        groups=tuple(groups),
        alarms=tuple(warnings),
        model_name=model_name,
        predictors=winners[0].scored.predictors,
        tested=tuple(tested) or None,
        openings=1 + (row.facts.openings or 0),
        budget=budget,
        election=election,
    )


def _failed(trials: Sequence[Job]) -> tuple[FailedTrial, ...]:
    """Return the trials that ended without a network."""
    return tuple(
        FailedTrial(number=job.number, state=job.state, reason=job.reason)
        for job in trials
        if job.state.failed or job.state == State.CANCELLED
    )


def _entry(winner: Winner, trials: Sequence[Job], certain: dict[str, Gain] | None) -> ClosingEntry:
    """Return what the result says of a winner before it is registered; of `trials` those of its configuration count."""
    job, scores = winner.job, winner.scored.model
    assert job.spec is not None and scores.test is not None
    repeats = [trial for trial in trials if trial.number == job.number]
    mean, deviation = ranking.spread(ranking.repeats(repeats)[job.number])
    return ClosingEntry(
        number=job.number,
        config=job.config,
        point=job.spec.point,
        parameters=job.spec.parameters,
        weights=provenance(job.spec.model),
        verdict=verdict(scores.validation, winner.scored.predictors, certain or {}),
        validation=scores.validation,
        test=scores.test,
        version=None,
        point_nmse=mean,
        point_deviation=deviation,
        incomplete=ranking.incomplete(repeats),
        unstable=bool(ranking.diverged(repeats)),
        gains=certain,
    )


def _register(tracker: Tracker, job: Job, entry: ClosingEntry, model_name: str, *, owner: str, description: str) -> int:
    """Return the number of the winner's version, created or brought up to date."""
    assert job.result is not None and job.spec is not None
    tags = {
        "hpo.study": job.study,
        "hpo.trial": job.number,
        "hpo.verdict": entry.verdict,
        "hpo.weights": entry.weights or "random",
        "hpo.beats_volume_fraction": str(not entry.verdict.endswith(("mean", "volume fraction"))).lower(),
    }
    if (origin := job.spec.best_of) is not None:  # the trial of another study that has this configuration
        tags["hpo.best_of"] = f"{origin.study}/{origin.trial}"
    return registry.register(
        tracker,
        model_name=model_name,
        owner=owner,
        key=job.key,
        model_id=job.result.model_id,
        run_id=str(job.run_id),
        description=description,
        tags=tags,
    )


def _log_test_scores(tracker: Tracker, job: Job, entry: ClosingEntry) -> None:
    assert job.result is not None
    tracker.log_summary(
        str(job.run_id),
        {f"test_{name}": getattr(entry.test, name) for name in SCORES} | in_unit("test", entry.test),
        timestamp_ms=round(job.changed_at * 1000),
        step=job.result.best_epoch,
    )
