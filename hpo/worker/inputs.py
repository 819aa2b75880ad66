"""What a trainer's requests start from: the data set, the tensors of a trained network, the device."""

from functools import lru_cache
from pathlib import Path

import torch

from data_pipeline.dataset import Dataset
from data_pipeline.npz import load_npz, sha256_in
from data_pipeline.split import Split
from hpo.study.records import TrialSpec
from models import bundle, weights
from models.specs import SpecError


@lru_cache(maxsize=2)
def load_data(path: Path) -> tuple[Dataset, Split]:
    """Return the data set of a file and its split. Raise DatasetError if the file is damaged."""
    dataset = load_npz(path, sha256=sha256_in(path))
    return dataset, dataset.split


def initial_tensors(spec: TrialSpec, start: Path | None) -> dict[str, torch.Tensor] | None:
    """Return the tensors of the network that a trial begins with; None if it begins at random."""
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
