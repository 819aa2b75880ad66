"""What a closing asks a trainer for, and the answer."""

from dataclasses import dataclass
from pathlib import Path

from hpo.study.records import SplitScores


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


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Scores of a downloaded model, and of each baseline predictor, by name."""

    model: SplitScores
    predictors: dict[str, SplitScores]
