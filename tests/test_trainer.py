"""What a trainer process does with a request, called in this process."""

import threading

import pytest
import torch

from data_pipeline import dataset
from hpo.worker import trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_trial_is_trained_and_measured_with_the_threads_it_asks_for(tmp_path, data):
    path = tmp_path / "data.npz"
    dataset.save_npz(dataset.load(data), path)
    seen = {}

    def emit(event, **fields):
        seen[event] = (torch.get_num_threads(), fields)

    spec = {
        "model": {"family": "cnn", "filters": 4, "kernel_size": 3, "dropout": 0.2},
        "training": {"epochs": 2, "threads": 3},
        "seed": 1,
    }
    trainer.probe(emit, threading.Event(), specs=[spec], data=str(path), device="cpu")
    assert seen["probed"][0] == 3
    torch.set_num_threads(1)
    trained = {}
    for name in ("one", "another"):
        trainer.train(
            emit,
            threading.Event(),
            spec=spec,
            data=str(path),
            checkpoint=None,
            start=None,
            folder=str(tmp_path / name),
            cache=str(tmp_path / "cache"),
            device="cpu",
            checkpoint_interval=60.0,
        )
        assert seen["epoch"][0] == 3
        trained[name] = seen["trained"][1]["validation"]
    assert trained["one"] == trained["another"]
