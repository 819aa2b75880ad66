"""The order of a study's configurations by their validation scores, from the rows of its jobs alone.

A configuration that is trained several times has one finished trial for each seed, or for each fold of a
cross-validation: its repeats. They share a number. After a cross-validation the best one is trained once more, on the
images of all folds: its refit has the same number, and is none of the repeats.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from hpo.queue import Job, State, TrialResult
from hpo.study.records import Refit, SplitScores
from hpo.text import score_text
from models.metrics import mean_of


def nmse(job: Job) -> float:
    """Return the validation NMSE of a finished trial."""
    assert job.result is not None
    return float(job.result.best_val_nmse)


def repeats(jobs: Sequence[Job]) -> dict[int, list[Job]]:
    """Return the finished trials of each configuration, by its number."""
    by_number: dict[int, list[Job]] = {}
    for job in jobs:
        if job.kind == "trial" and job.state == State.DONE and job.result and not job.is_refit:
            by_number.setdefault(job.number, []).append(job)
    return by_number


def refits(jobs: Sequence[Job]) -> dict[int, Job]:
    """Return the refit of each configuration that has one, in any state, by its number."""
    return {job.number: job for job in jobs if job.is_refit}


def spread(repeats: Sequence[Job]) -> tuple[float, float | None]:
    """Return mean and standard deviation (None of a single one) of the validation NMSE of a configuration's repeats."""
    values = [nmse(job) for job in repeats]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def diverged(jobs: Sequence[Job]) -> set[int]:
    """Return the numbers of the configurations of which a repeat diverged, or a fold has no score."""
    return lacking(jobs) | {
        job.number for job in jobs if job.kind == "trial" and job.state == State.DIVERGED and not job.is_refit
    }


def lacking(jobs: Sequence[Job]) -> set[int]:
    """Return the numbers of the configurations of which a fold has no score."""
    finished = repeats(jobs)
    return {
        job.number
        for job in jobs
        if job.spec and job.spec.fold and len(finished.get(job.number, ())) < job.spec.fold.count
    }


def points(jobs: Sequence[Job]) -> list[tuple[Job, float]]:
    """Return the best finished trial of each configuration and the configuration's score, the best one first.

    The score is the mean validation NMSE of the finished repeats; repeats that are dead or cancelled are left out.
    Configurations of which a repeat diverged come behind all others, equal ones by their number.
    """
    unstable = diverged(jobs)
    scored = [(min(finished, key=nmse), spread(finished)[0]) for finished in repeats(jobs).values()]
    return sorted(scored, key=lambda entry: (entry[0].number in unstable, entry[1], entry[0].number))


def ranked(jobs: Sequence[Job]) -> list[Job]:
    """Return the best finished trial of each configuration, in the order of `points`."""
    return [job for job, _ in points(jobs)]


def winners(jobs: Sequence[Job], report_by: Sequence[str]) -> list[Job]:
    """Return the best trial of each combination of values of the `report_by` parameters, the best of all first.

    A configuration that lacks a fold, or whose refit has failed, is none of them.
    """
    best: dict[tuple[str, ...], Job] = {}
    without = lacking(jobs)
    without |= {number for number, job in refits(jobs).items() if job.state.ended and job.state != State.DONE}
    for job in ranked(jobs):
        assert job.spec is not None
        if job.number in without:
            continue
        best.setdefault(tuple(repr(job.spec.point.get(name)) for name in report_by), job)
    return list(best.values())


def network(jobs: Sequence[Job], best: Job) -> Job | None:
    """Return the trial whose network stands for a configuration: after a cross-validation its refit, None if that is
    not done; else `best`, its best trial."""
    if best.spec is None or best.spec.fold is None:
        return best
    refit = refits(jobs).get(best.number)
    return refit if refit is not None and refit.state == State.DONE else None


def folds_of(job: Job) -> int | None:
    """Return how many folds the cross-validation had after which a trial is trained again; None of any other trial."""
    return job.spec.refit.folds if job.spec is not None and job.spec.refit is not None else None


def out_of_fold(jobs: Sequence[Job], job: Job) -> list[Job]:
    """Return the trials whose errors on their own validation images are those of a trial's configuration: its folds, in
    their order, or the trial itself."""
    if job.spec is None or (job.spec.fold is None and not job.is_refit):
        return [job]
    return sorted(repeats(jobs)[job.number], key=lambda fold: fold.repeat)


def result_of(repeats: Sequence[Job]) -> TrialResult:
    """Return the result that stands for a configuration: that of its best finished repeat; of folds their means."""
    best = min(repeats, key=nmse)
    assert best.result is not None and best.spec is not None
    if best.spec.fold is None:
        return best.result
    results, means = [job.result for job in repeats if job.result is not None], refit_of(repeats)
    return replace(
        best.result,
        best_val_nmse=means.nmse,
        best_val_mse=means.mse,
        best_epoch=means.epochs,
        last_val_nmse=statistics.fmean(result.last_val_nmse for result in results),
        last_val_mse=statistics.fmean(result.last_val_mse for result in results),
        validation=means.validation,
        seconds=sum(result.seconds for result in results),
    )


def best_network(jobs: Sequence[Job]) -> Job | None:
    """Return the trial whose network is a study's best; None if there is none."""
    return next(filter(None, (network(jobs, job) for job in ranked(jobs))), None)


def refit_of(folds: Sequence[Job]) -> Refit:
    """Return what the finished folds of a configuration tell of its refit."""
    results = [job.result for job in folds if job.result is not None]
    mean, deviation = spread(folds)
    return Refit(
        epochs=statistics.median_low(result.best_epoch for result in results),
        folds=len(folds),
        nmse=mean,
        mse=statistics.fmean(result.best_val_mse for result in results),
        deviation=deviation or 0.0,
        validation=mean_of([result.validation for result in results]),
        common=_mean_common(results),
    )


def _mean_common(results: Sequence[TrialResult]) -> dict[str, float] | None:
    """Return the mean NMSE of the folds on the images of each earlier data set; None without one."""
    scores = [result.common or {} for result in results]
    keys = [key for key in scores[0] if all(key in fold for fold in scores)]
    return {key: statistics.fmean(fold[key] for fold in scores) for key in keys} or None


def incomplete(repeats: Sequence[Job]) -> str:
    """Say how many repeats of a configuration its score is the mean of, and what became of the others.

    `repeats` are all of them, in any state. Return an empty text if all are finished.
    """
    repeats = [job for job in repeats if not job.is_refit]
    others = Counter(job.state for job in repeats if job.state != State.DONE)
    words = ", ".join(f"{count} {state}" for state, count in sorted(others.items()))
    kind = "folds" if any(job.spec and job.spec.fold for job in repeats) else "repeats"
    return f"{len(repeats) - others.total()} of {len(repeats)} {kind}, {words}" if words else ""


def check_same(scores: SplitScores, job: Job) -> None:
    """Raise ValueError unless the downloaded model gives the validation score its trial was recorded with.

    Of a refit it is the score of the images that it was trained on, in the place of the validation split.
    """
    assert job.result is not None
    part = "training" if job.is_refit else "validation"
    recorded, computed = (job.result.training or job.result.validation).nmse, scores.validation.nmse
    if computed is None or recorded is None or not abs(computed - recorded) <= 1e-4 * recorded:
        raise ValueError(
            f"trial {job.number}: its downloaded model has a {part} NMSE of {score_text(computed, '.6g')}, "
            f"recorded is {score_text(recorded, '.6g')}"
        )
