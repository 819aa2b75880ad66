"""The result of a training as its trainer hands it over, before anything of it is recorded."""

from dataclasses import dataclass
from pathlib import Path

from hpo.study.records import Scores

FINISHED = "finished"  # file in the folder of a trial: it is trained, and its files are whole


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trainer's last message on a trial. Scores are those of the validation split."""

    folder: Path  # the packaged model: weights.safetensors, spec.json, model.pt2
    predictions: Path  # CSV of what the model predicts of the validation split; of a refit: of the training images
    epochs: int  # trained; fewer than planned if patience ran out
    best_epoch: int  # whose weights are in the folder
    best_val_nmse: float
    best_val_mse: float  # unit²
    last_val_nmse: float  # of the last epoch's weights
    last_val_mse: float  # unit²
    validation: Scores  # of the best epoch's weights
    last_validation: Scores  # of the last epoch's weights
    files: dict[str, str]  # SHA-256 of the files above by their path beside `predictions`, of MLmodel none: it gets ids
    device: str | None  # the GPU it was trained on; None for the CPU
    training: Scores | None = None  # of a refit, whose others are means over the folds
    images: int | None = None  # it was trained on; None for all of the training split
    common: dict[str, float] | None = None  # NMSE on the validation images of earlier data sets, by DataVersion.key
    parameters: int | None = None  # of a network that code of the user's makes: the plan does not know it
    multiply_adds: int | None = None  # likewise, if its study asks for them
