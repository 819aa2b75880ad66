"""What a trainer's requests start from: the data set, the tensors of a trained network, the device."""

import tempfile
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DatasetError
from data_pipeline.folds import digest, folds, whole, with_split
from data_pipeline.npz import load_npz, sha256_in
from data_pipeline.shares import training_share
from data_pipeline.split import Split
from hpo.study.records import Fold, TrialSpec
from models import bundle, weights
from models.specs import SpecError

LARGEST_OWN = 2**26  # bytes of images that each trainer holds for itself


@lru_cache(maxsize=4)  # a trainer of the pool may change its study with every trial
def load_data(path: Path) -> tuple[Dataset, Split]:
    """Return the data set of a file and its split. Raise DatasetError if the file is damaged."""
    dataset = load_npz(path, sha256=sha256_in(path))
    if dataset.images.nbytes > LARGEST_OWN:
        with suppress(OSError):  # without room on the disk, each trainer has its own
            dataset = replace(dataset, images=_shared(dataset.images, path.with_suffix(".images.npy")))
    return dataset, dataset.split


def trial_data(path: Path, spec: TrialSpec) -> Dataset:
    """Return the data set of a file with the split of the trial: a fold, or for a refit all images that are not for
    the test. Raise DatasetError if the file is damaged or of another data set, SpecError if the folds are not those
    that were planned."""
    dataset, parts = load_data(path)
    named = path.stem.partition("-")[0]  # its digest: the file is what its name says
    if sha256_in(path) is not None and named != spec.data:
        raise DatasetError(f"{path}: expected the data set {spec.data:.8} of the trial, found {named:.8}.")
    if spec.refit is not None:
        return with_split(dataset, whole(parts))
    return dataset if spec.fold is None else with_split(dataset, _fold(path, spec.fold))


def _fold(path: Path, fold: Fold) -> Split:
    parts, computed = _folds(path, fold.count)
    if computed != fold.digest:
        raise SpecError(
            f"{path}: expected the {fold.count} folds that were planned ({fold.digest:.8}), found others "
            f"({computed:.8}): train with the version of hpo that planned the study."
        )
    return parts[fold.number]


@lru_cache(maxsize=2)
def _folds(path: Path, count: int) -> tuple[tuple[Split, ...], str]:
    parts = folds(load_data(path)[0], count)
    return parts, digest(parts)


def trained_part(dataset: Dataset, train: np.ndarray, spec: TrialSpec) -> np.ndarray:
    """Return which of the training images a trial is trained on."""
    return training_share(dataset, train, spec.training.get("share", 1.0), seed=spec.seed)


def _shared(images: np.ndarray, path: Path) -> np.ndarray:
    """Return the images mapped from a file, so that all trainers of a machine hold them once; write it if need be."""
    try:
        if np.array_equal(mapped := np.load(path, mmap_mode="r"), images):
            path.touch()  # in use
            return mapped
    except (OSError, ValueError, EOFError):
        pass  # none, or a damaged one
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".images-") as folder:
        np.save(Path(folder, "images.npy"), images)
        return np.load(Path(folder, "images.npy").replace(path), mmap_mode="r")


def initial_tensors(spec: TrialSpec, start: Path | None) -> dict[str, torch.Tensor] | None:
    """Return the tensors of the network that a trial begins with; None if it begins at random.

    `start` is the folder of the model, or of the user's weights, that it starts from.
    """
    if (own := spec.own_weights) is not None:
        assert start is not None
        return weights.load(start / own.name, spec.model["backbone"])
    if start is not None:
        return dict(bundle.load(start)[0].network.state_dict())
    if spec.weights is None:
        return None
    path, sha256 = weights.find(spec.weights.name)
    if sha256 != spec.weights.sha256:
        raise SpecError(f"{path}: expected SHA-256 {spec.weights.sha256}, as the study was planned, found {sha256}.")
    return weights.load(path, spec.model["backbone"])


def device(wish: str) -> str:
    """Return torch's name of the device; `auto` is a GPU if there is one."""
    if wish == "auto":
        wish = "cuda" if torch.cuda.is_available() else "cpu"
    if wish == "cuda":
        # What is trained on a GPU must score the same on the CPU that checks it: no shortened numbers.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return wish


def gpu_name(device: torch.device) -> str:
    """Return the GPU's name; empty for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""
