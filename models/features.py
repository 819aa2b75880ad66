"""What a frozen backbone sees of a set of images, computed once and kept in a file for all trainings of a machine."""

import fcntl
import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from models.transfer import TransferNet

BATCH = 32  # images; always the same, so that the numbers are
TICK = 0.5  # seconds between two looks whether another training has computed them
PATIENCE = 900.0  # seconds after which they are computed by whoever waits: the other one may be frozen


def compute(network: "TransferNet", images: Tensor, cache: Path | None, alive: Callable[[], object]) -> Tensor:
    """`network.see(images)` (n, channels) in inference mode, from the file in the folder `cache` if there is one.

    The file's name is the digest of everything the features depend on: the backbone's structure and every number in
    it, the normalisation, the pixels, the kind of device, the number of threads, torch's version. So it cannot be
    stale. Of several trainings that need it at once one computes it and the others wait. A damaged file is computed
    again.
    `alive` is called again and again meanwhile.
    """

    def run() -> Tensor:
        seen = []
        with torch.no_grad():
            for batch in images.split(BATCH):
                seen.append(network.see(batch))
                alive()
        return torch.cat(seen).contiguous()

    network.backbone.eval()
    if cache is None:
        return run()
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{_key(network, images)}.safetensors"
    with path.with_suffix(".lock").open("w", encoding="utf-8") as lock:
        until = time.monotonic() + PATIENCE
        while not _locked(lock) and time.monotonic() < until:
            alive()
            time.sleep(TICK)
        found = _read(path, len(images))
        if found is None:
            found = run()
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            save_file({"features": found.cpu()}, temporary, metadata={"sha256": _sha256(found)})
            temporary.replace(path)
    return found.to(images.device)


def _locked(file: IO[str]) -> bool:
    """Whether we have the lock now; it falls when the process dies."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(path: Path, count: int) -> Tensor | None:
    try:
        with safe_open(path, framework="pt") as file:
            expected, found = (file.metadata() or {})["sha256"], file.get_tensor("features")
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
    if found.ndim != 2 or len(found) != count or _sha256(found) != expected:
        return None
    with suppress(OSError):
        os.utime(path)  # what is not used for long is taken for a stale cache
    return found


def _key(network: "TransferNet", images: Tensor) -> str:
    where = f"{torch.__version__} {images.device.type} {tuple(images.shape)}"
    if torch.get_num_threads() > 1:  # some sums depend on it
        where += f" {torch.get_num_threads()} threads"
    digest = hashlib.sha256(f"{where} {network.backbone}".encode())
    for tensor in (*network.backbone.state_dict().values(), network.mean, network.std, images):
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().numpy().reshape(-1)  # hashed without a copy
