"""Records of the queue for tests that need some, whatever their values."""

from typing import Any

from hpo.queue import Checkpoint, StudyRow, TrialResult
from hpo.study.records import DataFacts, StudyFacts, TrialSpec
from models.metrics import Scores

DATA = DataFacts(
    name="data",
    digest="d" * 64,
    split="s" * 64,
    unit="GPa",
    target_names=("C11",),
    image_shape=(1, 8, 8),
    sizes=(16, 4, 4),
    source="{}",
    profile="{}",
)


def facts(**changes: Any) -> StudyFacts:
    """Facts of a study with some replaced."""
    return StudyFacts(**{"data": DATA, "model_name": "model", "predictors": {}} | changes)


def canonical(**changes: Any) -> dict[str, Any]:
    """The canonical specification of a study with some values replaced."""
    values = {
        "data": {"digest": DATA.digest, "image_size": None},
        "split": DATA.split,
        "seed": 0,
        "model": {"family": "cnn"},
        "sampler": {"name": "grid", "trials": 1},
        "space": [],
        "training": {"epochs": 3},
        "report_by": [],
        "numerics": 1,
    }
    return values | changes


def study_row(name: str, identity: str = "i", **changes: Any) -> StudyRow:
    """The row of a study that was not planned to its end."""
    return StudyRow(**{"name": name, "identity": identity, "canonical": canonical(), "facts": facts()} | changes)


def spec(**changes: Any) -> TrialSpec:
    """The specification of a trial with some values replaced."""
    values = {
        "point": {},
        "config": None,
        "model": {"family": "cnn"},
        "training": {"epochs": 3},
        "seed": 0,
        "parameters": 1,
        "data": DATA.digest,
        "split": DATA.split,
        "identity": "i",
        "numerics": 1,
    }
    return TrialSpec(**values | changes)


def checkpoint(epoch: int, **changes: Any) -> Checkpoint:
    """A checkpoint after so many epochs."""
    return Checkpoint(**{"path": "checkpoints/c", "sha256": "c" * 64, "epoch": epoch, "run_id": "run"} | changes)


def result(best_val_nmse: float, **changes: Any) -> TrialResult:
    """The result of a finished trial."""
    names = changes.get("target_names", DATA.target_names)
    means = {"nmse": best_val_nmse, "mse": 1.0, "r2": 0.0, "nrmse": 1.0, "mae": 1.0, "mape": 1.0}
    scores = Scores(**means, per_target={score: [mean] * len(names) for score, mean in means.items()})
    values = {
        "best_val_nmse": best_val_nmse,
        "best_val_mse": 1.0,
        "best_epoch": 1,
        "last_val_nmse": best_val_nmse,
        "last_val_mse": 1.0,
        "validation": scores,
        "last_validation": scores,
        "epochs": 1,
        "seconds": 1.0,
        "target_names": DATA.target_names,
        "model_id": "m-1",
        "files": {},
    }
    return TrialResult(**values | changes)
