"""The learning curve of a study that trained one configuration on several shares of the training images."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpo.queue import Job, StudyRow
from hpo.scores import power_law, ranking
from hpo.scores.power_law import PowerLaw
from hpo.study.records import Point
from models.metrics import Scores

SHARE = "share"  # the parameter
ALL = "all"  # the quantity that no single target has: the mean NRMSE


@dataclass(frozen=True, kw_only=True)
class Errors:
    """The validation errors of one target, or of all together, by the number of training images."""

    name: str  # of the target; ALL: the mean NRMSE
    unit: str  # of the errors; none of ALL
    values: tuple[float, ...]  # RMSE of each training
    means: tuple[float, ...]  # of the repeats of each share
    baselines: Mapping[str, float | None]  # of the baseline predictors, by name
    law: PowerLaw | None  # None if there are too few shares or trainings


@dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """What a configuration's error is on shares of the training images, and would be with twice of them."""

    study: str
    point: Point  # without the share
    share_of: tuple[float, ...]  # of the training images, for each training, ascending
    trained_on: tuple[int, ...]  # images, for each training
    errors: tuple[Errors, ...]  # ALL first

    @property
    def sizes(self) -> tuple[int, ...]:
        """Training images of each share; their mean where groups make them differ from seed to seed."""
        by_share: dict[float, list[int]] = {}
        for share, images in zip(self.share_of, self.trained_on, strict=True):
            by_share.setdefault(share, []).append(images)
        return tuple(round(statistics.fmean(images)) for images in by_share.values())

    @property
    def images(self) -> int:
        """The most images that were trained on."""
        return max(self.trained_on)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def of_study(row: StudyRow, jobs: Sequence[Job]) -> LearningCurve | None:
    """Return the learning curve of the study's best configuration; None if it was trained on fewer than two shares."""
    done = [job for jobs_ in ranking.repeats(jobs).values() for job in jobs_]
    ranked = [job for job in ranking.ranked(jobs) if job.spec is not None and SHARE in job.spec.point]
    if not ranked:
        return None
    recipe = _recipe(ranked[0])
    trials = sorted((job for job in done if _recipe(job) == recipe), key=_share)
    shares = [_share(job) for job in trials]
    if len(set(shares)) < 2:
        return None
    trained_on = tuple(_images(row, job) for job in trials)
    scored = [job.result.validation for job in trials if job.result is not None]
    names = [ALL, *row.facts.data.target_names, *(scored[0].in_unit or {})]
    every = [_errors(row, name, scored, shares, trained_on) for name in names]
    point = {key: value for key, value in (ranked[0].spec.point if ranked[0].spec else {}).items() if key != SHARE}
    return LearningCurve(
        study=row.name,
        point=point,
        share_of=tuple(shares),
        trained_on=trained_on,
        errors=tuple(errors for errors in every if errors is not None),
    )


def _errors(
    row: StudyRow, name: str, scored: Sequence[Scores], shares: Sequence[float], trained_on: Sequence[int]
) -> Errors | None:
    """Return the errors of a target, or of all; None if a training has none."""
    data = row.facts.data
    values = [error for scores in scored if (error := _error(scores, name, data.target_names)) is not None]
    if len(values) < len(scored):
        return None
    means = [
        statistics.fmean(value for value, own in zip(values, shares, strict=True) if own == share)
        for share in dict.fromkeys(shares)
    ]
    return Errors(
        name=name,
        unit=data.unit if name in data.target_names else "",  # that of a target with a transform stands in its name
        values=tuple(values),
        means=tuple(means),
        baselines={
            key: _error(predictor.validation, name, data.target_names)
            for key, predictor in row.facts.predictors.items()
        },
        law=power_law.fit(trained_on, values, shares),
    )


def _error(scores: Scores, name: str, targets: Sequence[str]) -> float | None:
    """Return the RMSE of a target in its unit, or the mean NRMSE; None if it does not exist."""
    if name == ALL:
        return scores.nrmse
    if name in targets:
        mse = scores.per_target["mse"][list(targets).index(name)]
        return None if mse is None else mse**0.5
    return (scores.in_unit or {}).get(name, {}).get("rmse")


def _recipe(job: Job) -> str:
    """Return a trial's configuration without the share, as a key."""
    point = job.spec.point if job.spec is not None else {}
    return json.dumps({key: value for key, value in point.items() if key != SHARE})


def _share(job: Job) -> float:
    assert job.spec is not None
    return float(job.spec.point[SHARE])


def _images(row: StudyRow, job: Job) -> int:
    """Return on how many images a trial was trained."""
    assert job.result is not None
    return row.facts.data.sizes[0] if job.result.images is None else job.result.images
