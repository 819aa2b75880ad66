"""Features of images that a frozen backbone computes: once per machine, stored in a file for all trainings."""

import fcntl
import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

BATCH = 32  # images; constant, because the sums depend on it
TICK = 0.5  # seconds between two attempts to lock the file
PATIENCE = 900.0  # seconds to wait for another training's features; it may be frozen, so then compute them here


class FrozenNet(Protocol):
    """A network with a frozen backbone, such as models.transfer.TransferNet."""

    backbone: nn.Module
    mean: Tensor  # of the normalisation
    std: Tensor

    def extract(self, images: Tensor) -> Tensor: ...


def compute(network: FrozenNet, images: Tensor, cache: Path | None, alive: Callable[[], object]) -> Tensor:
    """Return `network.extract(images)` (n, channels) in inference mode, from its file in the folder `cache` if any.

    The file's name is the digest of everything the features depend on: the backbone's structure and every number in
    it, the normalisation, the pixels, the kind of device, the number of threads, torch's version. So a file is never
    stale. Of several trainings that need the same features at once, one computes them and the others wait. A damaged
    file is computed again. `alive` is called at least every batch, and every TICK while waiting.
    """
    network.backbone.eval()
    if cache is None:
        return _extract(network, images, alive)
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{_key(network, images)}.safetensors"
    with path.with_suffix(".lock").open("w", encoding="utf-8") as lock:
        until = time.monotonic() + PATIENCE
        while not _locked(lock) and time.monotonic() < until:
            alive()
            time.sleep(TICK)
        features = _stored(path, len(images))
        if features is None:
            features = _extract(network, images, alive)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            save_file({"features": features.cpu()}, temporary, metadata={"sha256": _sha256(features)})
            temporary.replace(path)
    return features.to(images.device)


def _extract(network: FrozenNet, images: Tensor, alive: Callable[[], object]) -> Tensor:
    batches = []
    with torch.no_grad():
        for batch in torch.split(images, BATCH):
            batches.append(network.extract(batch))
            alive()
    return torch.cat(batches).contiguous()


def _locked(file: IO[str]) -> bool:
    """Lock the file if nobody else has; return whether we have. The lock ends with the process."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _stored(path: Path, count: int) -> Tensor | None:
    """Return the features of so many images in the file; None if it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            expected = (file.metadata() or {})["sha256"]
            features: Tensor = file.get_tensor("features")
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
    if features.ndim != 2 or len(features) != count or _sha256(features) != expected:
        return None
    with suppress(OSError):
        os.utime(path)  # a file that is not used for long is deleted as a stale cache
    return features


def _key(network: FrozenNet, images: Tensor) -> str:
    facts = f"{torch.__version__} {images.device.type} {tuple(images.shape)}"
    if torch.get_num_threads() > 1:  # some sums depend on it
        facts += f" {torch.get_num_threads()} threads"
    digest = hashlib.sha256(f"{facts} {network.backbone}".encode())
    for tensor in (*network.backbone.state_dict().values(), network.mean, network.std, images):
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().numpy().reshape(-1)  # hashed without a copy
