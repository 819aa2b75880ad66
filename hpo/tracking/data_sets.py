"""A study's data set on this machine: cached under HPO_HOME, fetched from the study's run if need be.

A file is never believed by its name: its hash, which the study's facts record, is compared whenever it is taken.
"""

import logging
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from data_pipeline import dataset as data_sets
from data_pipeline.dataset import Dataset
from data_pipeline.errors import DatasetError
from data_pipeline.npz import load_npz, save_npz
from hpo.errors import NotFound, ServiceError
from hpo.files import sha256_of
from hpo.ownership import folder
from hpo.study import DEFAULT_DATA
from hpo.study.records import DataFacts, StudyFacts
from hpo.tracking.client import Tracker

log = logging.getLogger("hpo")


def cached(home: Path, digest: str, sha256: str | None) -> Path:
    """Return where the data set of a study lies on this machine, if it does.

    The name is the digest, of pixels and labels, and the SHA-256 of the file, which covers the names, phases and
    symmetries, too; studies that were planned before that was recorded have the digest alone.
    """
    return home / "cache" / "data" / f"{'-'.join(filter(None, (digest, sha256)))}.npz"


def keep(home: Path, dataset: Dataset) -> Path:
    """Write a data set into the cache, over whatever lies there; return its file."""
    with tempfile.TemporaryDirectory(dir=folder(home, "cache", "data"), prefix=".new-") as temporary:
        file = Path(temporary, "data.npz")
        save_npz(dataset, file)
        file.chmod(0o600)
        return file.replace(cached(home, dataset.digest, sha256_of(file)))


def upload(tracker: Tracker, run_id: str, path: Path) -> None:
    """Put a file of the cache at a study's run, under the name of its digest."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".upload-") as temporary:
        named = Path(temporary, f"{path.stem.partition('-')[0]}.npz")
        shutil.copyfile(path, named)
        tracker.upload(run_id, named, "data")


def discard(path: Path, *, unused: float) -> None:
    """Remove a file or folder of the cache if it has not been used for so many seconds."""
    if not path.exists() or time.time() - path.stat().st_mtime < unused:
        return
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def fetch(home: Path, tracker: Tracker, study: str, facts: StudyFacts) -> Path:
    """The study's data set as a local file, checked. ServiceError if there is no sound one here nor at its run."""
    path = cached(home, facts.data.digest, facts.data.sha256)
    wrong = _wrong(path, facts.data)
    if wrong is None:
        with suppress(OSError):
            os.utime(path)  # when it was last used
        return path
    if path.exists():
        log.warning("%s The data set of %s is fetched again.", wrong, study)
    with tempfile.TemporaryDirectory(dir=folder(home, "cache", "data"), prefix=".fetched-") as temporary:
        return download(tracker, study, facts, Path(temporary)).replace(path)


def download(tracker: Tracker, study: str, facts: StudyFacts, to: Path) -> Path:
    """The data set as it lies at the study's run. ServiceError, naming the run and what helps, if it is not sound."""
    run_id, file = facts.study_run_id, f"data/{facts.data.digest}.npz"
    try:
        arrived = tracker.download_artifact(run_id, file, to)
    except NotFound:
        wrong: str | None = "it is not there"
    else:
        wrong = _wrong(arrived, facts.data)
        if wrong is None:
            return arrived
    raise ServiceError(
        f"The data set of {study}, {file} of its MLflow run {run_id}, cannot be used: {wrong} "
        f"`hpo doctor --fix --study {study}` puts it there again on a machine that has a sound copy in its cache or "
        "the folder it was made of; else restore it from a backup."
    )


def copy_here(home: Path, data: DataFacts, image_size: int | None) -> Path | None:
    """A sound copy of the study's data set on this machine: in its cache, or put there from the study's folder."""
    if _wrong(cached(home, data.digest, data.sha256), data) is None:
        return cached(home, data.digest, data.sha256)
    with suppress(DatasetError, OSError, ValueError, KeyError):
        made_of = data_sets.DEFAULT if data.uri == DEFAULT_DATA else Path(data.uri)
        data_set = data_sets.load(made_of, image_size=image_size)
        if data_set.digest == data.digest:
            return keep(home, data_set)
    return None


def _wrong(path: Path, data: DataFacts) -> str | None:
    """What is wrong with a file that should be the data set of a study's facts, as a sentence; None if nothing is."""
    expected = data.sha256
    try:
        if expected is None and (actual := load_npz(path).digest) != data.digest:
            return f"{path}: expected the digest {data.digest:.8}, found {actual:.8}."
        if expected is not None and (actual := sha256_of(path)) != expected:
            return f"{path}: expected the SHA-256 {expected:.8}, found {actual:.8}: the file was damaged or replaced."
    except (DatasetError, OSError) as error:
        return str(error)
    return None
