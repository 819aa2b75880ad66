"""Code of users that a study runs: on this machine only if it is trusted, and every file of it checked."""

from pathlib import Path

from hpo.errors import Untrusted
from hpo.ownership import folder
from hpo.queue import StudyRow
from hpo.tracking import foreign, study_files
from hpo.tracking.client import Tracker
from models import user


def folder_in(home: Path) -> Path:
    """Return the folder that has code of users, each in a folder that is called as its digest."""
    return folder(home, "cache", "code")


def fetch_trusted(home: Path, tracker: Tracker, row: StudyRow) -> None:
    """Fetch the code of the user's that a study runs. Raise Untrusted if it is not to run here, else as `fetch`."""
    for digest in row.specification.code:
        run_id = row.facts.study_run_id
        if not user.is_trusted(digest):
            page = foreign.file_link(row.facts.experiment_id, run_id, f"code/{digest}/{user.SUMS}")
            raise Untrusted(
                f"The study {row.name} runs code of its author, which this worker does not trust: it takes no "
                f"trial of it. Read the code: {tracker.uri}/{page} (all files of that folder). If you trust "
                f"it, add --trust-code {digest}"
            )
        fetch(home, tracker, run_id, digest)


def fetch(home: Path, tracker: Tracker, run_id: str, digest: str) -> Path:
    """Return a folder with the code of this digest, every file checked. Raise as `study_files.fetch`. Nothing of it
    runs."""
    source = f"code/{digest}"
    cached = study_files.fetch(home, tracker, run_id, source, {user.SUMS: digest})
    return study_files.fetch(home, tracker, run_id, source, user.listed((cached / user.SUMS).read_bytes()))
