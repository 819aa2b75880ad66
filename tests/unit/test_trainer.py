"""What a trainer process does with a request, called in this process."""

import threading

import pytest
import records
import torch

from data_pipeline import dataset, npz
from hpo.worker import probing, protocol, training

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_trial_is_trained_and_measured_with_the_threads_it_asks_for(tmp_path, data):
    path = tmp_path / "data.npz"
    npz.save_npz(dataset.load(data), path)
    seen = {}

    def send(message):
        seen[type(message)] = (torch.get_num_threads(), message)

    model = {"family": "cnn", "filters": 4, "kernel_size": 3, "dropout": 0.2}
    spec = records.spec(model=model, training={"epochs": 2, "threads": 3}, seed=1)
    probing.probe(protocol.Probe(specs=(spec,), data=path, device="cpu"), send, threading.Event())
    assert seen[protocol.Probed][0] == 3
    torch.set_num_threads(1)
    trained = {}
    for name in ("one", "another"):
        request = protocol.Train(
            spec=spec,
            data=path,
            checkpoint=None,
            start=None,
            folder=tmp_path / name,
            cache=tmp_path / "cache",
            device="cpu",
            checkpoint_interval=60.0,
        )
        trained[name] = training.train(request, send, threading.Event()).validation
        assert seen[protocol.EpochDone][0] == 3
    assert trained["one"] == trained["another"]
