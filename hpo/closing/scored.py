"""What a closing asks a trainer for, and the answer."""

from dataclasses import dataclass
from pathlib import Path

from hpo.study.records import Scores, SplitScores


@dataclass(frozen=True, kw_only=True)
class Score:
    """Predict the validation and the test split with a downloaded model. Answer: Scored.

    Of a refit the images that it was trained on stand in the place of the validation split; the arrays are of the
    baseline predictors alone, each fold's of its own images, fold after fold.
    """

    folder: Path  # of the model
    data: Path  # the data set, NPZ
    predictions: Path  # CSV to be written
    errors: Path  # NPZ to be written: arrays of the validation split by their names in hpo.study.records
    folds: int | None = None  # of the cross-validation after which it was trained again
    earlier: str | None = None  # key of an earlier data set: its test images are scored apart from the others
    is_older: bool = False  # the model was trained on that one. Answer: Scored or NotScored


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Scores of a downloaded model, and of each baseline predictor, by name."""

    model: SplitScores
    predictors: dict[str, SplitScores]
    tests: dict[str, Scores] | None = None  # of the model: on OLD and NEW test images (ScoredVersion)


@dataclass(frozen=True, kw_only=True)
class NotScored:
    """An older model cannot be scored on this data set: the closing goes on without it."""

    reason: str
