"""Files at a study's run that its trials begin with or run: cached under HPO_HOME by their digest.

A file is never believed by its name: its hash is compared whenever it is taken.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from hpo.errors import ModelError
from hpo.files import sha256_of
from hpo.ownership import folder
from hpo.tracking.client import Tracker


def fetch(home: Path, tracker: Tracker, run_id: str, source: str, files: Mapping[str, str]) -> Path:
    """Return a folder with these files, whose SHA-256 are given, of the folder `source` (KIND/DIGEST) of a run.

    Raise NotFound if one is missing there, ModelError if it is not the one that was planned.
    """
    cached = folder(home, "cache", *source.split("/"))
    for name, expected in files.items():
        path = cached / name
        if path.is_file() and sha256_of(path) == expected:
            continue
        with tempfile.TemporaryDirectory(dir=cached.parent, prefix=".fetched-") as temporary:
            arrived = tracker.download_artifact(run_id, f"{source}/{name}", Path(temporary))
            if (sha256 := sha256_of(arrived)) != expected:
                raise ModelError(
                    f"{source}/{name} of the run {run_id}: expected SHA-256 {expected:.8}, found {sha256:.8}."
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            arrived.replace(path)
    os.utime(cached)  # when it was last used
    return cached
