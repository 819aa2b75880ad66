"""A small network, trained by the functions of the trainer process."""

import threading
from pathlib import Path

import records

from data_pipeline.dataset import Dataset
from data_pipeline.npz import save_npz
from hpo.recording.trained import Trained
from hpo.worker import protocol, train_trial


def network(data: Dataset, folder: Path, *, epochs: int) -> Trained:
    """Train a network on a data set; its exported model is in `folder`/trial/model."""
    save_npz(data, folder / "set.npz")
    request = protocol.Train(
        spec=records.spec(
            model={"family": "cnn", "filters": 4, "kernel_size": 3, "dropout": 0.0},
            training={"epochs": epochs, "threads": 1, "augmentation": "symmetry" if data.symmetries else "none"},
        ),
        data=folder / "set.npz",
        checkpoint=None,
        start=None,
        folder=folder / "trial",
        cache=folder / "cache",
        device="cpu",
        checkpoint_interval=60.0,
    )
    return train_trial.train(request, lambda message: None, threading.Event())
