"""A study's data set on this machine: cached under HPO_HOME by its digest, fetched from the study's run if need be."""

import os
import shutil
import time
from pathlib import Path

from data_pipeline.dataset import Dataset, load_npz, save_npz
from hpo.errors import ServiceError
from hpo.home import folder
from hpo.queue import StudyRow
from hpo.tracking import Tracker


def cached(home: Path, digest: str) -> Path:
    return home / "cache" / "data" / f"{digest}.npz"


def keep(home: Path, dataset: Dataset) -> Path:
    """Put a data set into the cache; return its file, which bears its digest."""
    path = cached(home, dataset.digest)
    folder(home, "cache", "data")
    if path.exists():
        os.utime(path)  # when it was last used
    else:
        save_npz(dataset, path)
        path.chmod(0o600)
    return path


def discard(path: Path, *, unused: float) -> None:
    """Remove a file or folder of the cache if it has not been used for so many seconds."""
    if not path.exists() or time.time() - path.stat().st_mtime < unused:
        return
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def fetch(home: Path, tracker: Tracker, row: StudyRow) -> Path:
    """The study's data set as a local file. Raises ServiceError if what arrives has another digest."""
    digest = row.facts["data"]["digest"]
    path = cached(home, digest)
    if not path.exists():
        arriving = folder(home, "cache", "data") / f".{digest[:12]}-{os.getpid()}"
        try:
            arrived = tracker.download_artifact(row.facts["study_run_id"], f"data/{digest}.npz", arriving)
            if load_npz(arrived).digest != digest:
                raise ServiceError(
                    f"The data set of {row.name} was damaged on its way: expected digest {digest}. Try again."
                )
            arrived.replace(path)
        finally:
            shutil.rmtree(arriving, ignore_errors=True)
    return path
