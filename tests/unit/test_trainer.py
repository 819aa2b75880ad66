"""What a trainer process does with a request, called in this process."""

import dataclasses
import errno
import json
import threading

import folders
import numpy as np
import pandas
import pytest
import records
import torch
import trained

from data_pipeline import dataset, npz
from data_pipeline.errors import DatasetError
from hpo import files
from hpo.operations.predict import predict
from hpo.worker import inputs, probing, protocol, scoring, train_trial, trainer
from models import bundle, regressor, specs
from models.sizes import size

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
        trained[name] = train_trial.train(request, send, threading.Event()).validation
        assert seen[protocol.EpochDone][0] == 3
    assert trained["one"] == trained["another"]


def test_no_trial_is_trained_on_the_data_set_of_another_study(tmp_path, data):
    content = dataset.load(data)
    npz.save_npz(content, tmp_path / "data.npz")
    sha256 = files.sha256_of(tmp_path / "data.npz")
    path = (tmp_path / "data.npz").rename(tmp_path / f"{content.digest}-{sha256}.npz")
    assert inputs.trial_data(path, records.spec(data=content.digest)).digest == content.digest
    with pytest.raises(DatasetError, match=r"expected the data set 00000000 of the trial, found "):
        inputs.trial_data(path, records.spec(data="0" * 64))


def test_a_fit_is_probed_proved_and_scored_beside_ridge_on_descriptors(tmp_path, data):
    path, seen = tmp_path / "data.npz", []
    npz.save_npz(dataset.load(data), path)
    model = {"family": "descriptors", "regressor": "trees", "edges": "periodic"}
    spec = records.spec(model=model, training={"epochs": 1})
    probing.probe(protocol.Probe(specs=(spec,), data=path, device="cpu"), seen.append, threading.Event())
    assert seen[0].parameters == size(specs.from_dict(model), (1, 16, 16), 9).parameters and seen[0].seconds > 0
    prove = protocol.Prove(spec=spec, data=path, folder=tmp_path / "proof", device="cpu")
    assert probing.prove(prove, seen.append, threading.Event()) == protocol.Proved(device="")
    request = protocol.Train(
        spec=spec, data=path, checkpoint=None, start=None, folder=tmp_path / "trial", cache=tmp_path / "cache",
        device="cpu", checkpoint_interval=60.0,
    )  # fmt: skip
    ended = train_trial.train(request, seen.append, threading.Event())
    assert (ended.epochs, ended.best_epoch) == (1, 1) and ended.best_val_nmse == ended.last_val_nmse
    ask = protocol.Score(
        folder=ended.folder, data=path, predictions=tmp_path / "both.csv", errors=tmp_path / "errors.npz"
    )
    scored = scoring.score(ask, seen.append, threading.Event())
    assert scored.model.validation.nmse == pytest.approx(ended.best_val_nmse, rel=1e-5)
    table, names = pandas.read_csv(tmp_path / "both.csv"), dataset.load(data).target_names
    test = table[table["split"] == "test"]
    r2 = [
        1 - ((test[f"{name} descriptors"] - test[f"{name} true"]) ** 2).mean() / test[f"{name} true"].var(ddof=0)
        for name in names
    ]
    assert r2 == pytest.approx(scored.predictors["descriptors"].test.per_target["r2"])


def test_a_share_of_the_images_is_trained_on_and_scored_like_all_of_them(tmp_path, data):
    path = tmp_path / "data.npz"
    npz.save_npz(dataset.load(data), path)
    model = {"family": "cnn", "filters": 4, "kernel_size": 3, "dropout": 0.2}
    ended = {}
    for share in (1.0, 0.25):
        training = {"epochs": 2, "batch_size": 16} | ({"share": share} if share < 1 else {})
        request = protocol.Train(
            spec=records.spec(model=model, training=training, seed=1),
            data=path,
            checkpoint=None,
            start=None,
            folder=tmp_path / str(share),
            cache=tmp_path / "cache",
            device="cpu",
            checkpoint_interval=60.0,
        )
        ended[share] = train_trial.train(request, lambda message: None, threading.Event())
    whole, part = ended[1.0], ended[0.25]
    assert (whole.images, part.images) == (None, 10)
    assert part.best_val_nmse == pytest.approx(part.validation.nmse, rel=1e-5), "in the unit of all training labels"
    assert part.best_val_nmse != whole.best_val_nmse
    spec = json.loads((part.folder / "spec.json").read_text())
    assert spec["training"]["images"] == 10 and spec["training"]["variance"] == pytest.approx(
        json.loads((whole.folder / "spec.json").read_text())["training"]["variance"]
    )


PREDICTED = {  # case: what a user gives to `hpo predict`, and the first image of the data set that it is
    "npy and names": ("images/cell0.npy", 0),
    "ids": ("images/TRAIN_000003.png", 3),
    "phases": ("micrographs/m5.png", 5),
    "hdf5": ("data.h5:/val/images[2]", 27),
    "text": ("images.txt", 0),
    "tiff and excel": ("scans/scan_4.tif", 4),
    "numbered": ("0001_a.png", 0),
    "course with header": ("7_cell.png", 7),
    "simulations": ("steps/sim1_step0.png", 6),
    "permeability": ("rock_2.bmp", 2),
    "logarithms": ("rock_2.bmp", 2),
    "train and test": ("test.npz:images[3]", 3),
}


@pytest.mark.parametrize("case", PREDICTED)
def test_a_model_predicts_the_same_from_the_folder_as_from_the_data_set(tmp_path, case):
    folders.CASES[case](tmp_path)
    data = dataset.load(tmp_path)
    trained.network(data, tmp_path, epochs=1)
    model, _ = bundle.load(tmp_path / "trial" / "model")
    given, index = PREDICTED[case]
    frame = predict(tmp_path / "trial" / "model", [tmp_path / given])
    expected = regressor.predict(model, data.images[index : index + 1])
    names = data.target_names
    if case == "logarithms":
        names, expected = ("k",), 10**expected
        assert (frame.attrs["unit"], frame.attrs["units"]) == ("m²", {"k": "m²"})
    assert tuple(frame.columns) == ("image", *names)
    words = {
        "phases": "a channel a phase, 1 where the pixel is [20, 20, 20]",
        "tiff and excel": "(pixel - 1000) / 40000",
    }
    readme = (tmp_path / "trial" / "model" / "README.md").read_text()
    assert words.get(case, data.description.layout.pixels()) in readme
    assert np.allclose(frame[list(names)].to_numpy()[:1], expected, rtol=1e-5)


def prove(tmp_path, path, **changes):
    model = {"family": "cnn", "filters": 4, "kernel_size": 3, "dropout": 0.2}
    training_settings = {"epochs": 2, "batch_size": 32} | changes.pop("training", {})
    request = protocol.Prove(
        spec=records.spec(model=model, training=training_settings, seed=1),
        data=path,
        folder=tmp_path / "proof",
        **{"device": "cpu"} | changes,
    )
    return probing.prove(request, lambda message: None, threading.Event())


def test_a_proof_trains_a_small_batch_writes_and_leaves_nothing(tmp_path, data):
    path = tmp_path / "data.npz"
    npz.save_npz(dataset.load(data), path)
    assert prove(tmp_path, path) == protocol.Proved(device="")
    assert list((tmp_path / "proof").iterdir()) == []


@pytest.mark.parametrize("batch_size", [1, 32])
def test_a_proof_is_given_on_images_that_share_a_label_whatever_the_batch(tmp_path, data, batch_size):
    loaded = dataset.load(data)
    targets = loaded.targets.copy()
    targets[:, 0] = np.arange(len(targets)) == loaded.split.train[-1]  # of a class that one image alone is of
    path = tmp_path / "data.npz"
    npz.save_npz(dataclasses.replace(loaded, targets=targets), path)
    assert prove(tmp_path, path, training={"batch_size": batch_size}) == protocol.Proved(device="")


def test_a_proof_fails_as_a_trial_would_and_the_trainer_says_why(tmp_path, data):
    path = tmp_path / "data.npz"
    npz.save_npz(dataset.load(data), path)
    (tmp_path / "proof").write_text("a file where a folder is needed")
    with pytest.raises(FileExistsError):
        prove(tmp_path, path)
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)) as error:
            prove(tmp_path / "other", path, device="cuda")
        assert isinstance(trainer.failure(error.value), protocol.Failed)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(dataset.DatasetError) as error:
        inputs.load_data.cache_clear()
        prove(tmp_path / "other", path)
    assert isinstance(trainer.failure(error.value), protocol.DataDamaged)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: …"),
    ],
)
def test_a_trainer_tells_a_lack_of_memory_from_other_failures(error):
    assert isinstance(trainer.failure(error), protocol.OutOfMemory)
    assert isinstance(trainer.failure(RuntimeError("odd")), protocol.Failed)


def test_a_proof_is_given_where_a_trial_of_this_study_diverges(tmp_path, data):
    path = tmp_path / "data.npz"
    npz.save_npz(dataset.load(data), path)
    assert prove(tmp_path, path, training={"learning_rate": 1e15}) == protocol.Proved(device="")


def test_trainers_share_large_images_through_a_mapped_file(tmp_path, data, monkeypatch):
    monkeypatch.setattr(inputs, "LARGEST_OWN", 0)
    loaded = dataset.load(data)
    npz.save_npz(loaded, tmp_path / "x.npz")
    mapped = tmp_path / "x.images.npy"
    for content in (None, None, b"damaged", b""):  # the first trainer writes it, the second one finds it
        if content is not None:
            mapped.write_bytes(content)
        inputs.load_data.cache_clear()
        images = inputs.load_data(tmp_path / "x.npz")[0].images
        assert isinstance(images, np.memmap) and np.array_equal(images, loaded.images)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x.images.npy", "x.npz"]
    mapped.unlink()

    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(inputs.np, "save", no_room)
    inputs.load_data.cache_clear()
    assert not isinstance(inputs.load_data(tmp_path / "x.npz")[0].images, np.memmap)
    inputs.load_data.cache_clear()
