"""What a closing asks a trainer for, and the answer."""

from dataclasses import dataclass
from pathlib import Path

from hpo.study.records import SplitScores


@dataclass(frozen=True, kw_only=True)
class Score:
    """Predict the validation and the test split with a downloaded model. Answer: Scored.

    Of a refit the images that it was trained on stand in the place of the validation split.
    """

    folder: Path  # of the model
    data: Path  # the data set, NPZ
    predictions: Path  # CSV to be written
    is_refit: bool = False


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Scores of a downloaded model, and of each baseline predictor, by name."""

    model: SplitScores
    predictors: dict[str, SplitScores]
