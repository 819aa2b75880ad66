"""The folders under HPO_HOME/work, one for each worker, locked while it lives."""

import codecs
import fcntl
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

from hpo import ownership
from hpo.errors import SettingsError
from hpo.files import sha256_of
from hpo.queue import Job
from hpo.recording.trained import FINISHED, Trained
from hpo.text import utf8

ROOM = 64 * 2**20  # bytes that must be free under HPO_HOME before a trial is claimed after the disk was full
KEPT = 86400.0  # seconds a finished training that is not recorded stays in the folder of a dead worker
SILENT_HOST = 7 * 86400.0  # seconds another host's worker is not heard of until its folder counts as left
WORK_FOLDER = re.compile(r"(?P<host>.+)-\d+-[0-9a-f]{6}")  # HOST-PROCESS-RANDOM


class WorkFolder:
    """The folder of one worker, and in it one for each job that it holds."""

    def __init__(self, home: Path, process: str) -> None:
        self._home = home
        self.path = home / "work" / f"{socket.gethostname()}-{process}"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Make the folder and keep it locked; remove those of dead workers, and this one in the end.

        Raise SettingsError for a home in which PyTorch could not write.
        """
        _require_a_name_for_pytorch(self._home)
        ownership.folder(self._home, "cache", "features")
        parent = ownership.folder(self._home, "work")
        with own_folder(self.path):
            for other in parent.iterdir():
                if other != self.path:
                    sweep(other)
            try:
                yield
            finally:
                _clear(self.path)

    def of(self, job: Job) -> Path:
        return self.path / f"job-{job.id}-{job.fence}"

    def discard(self, job: Job) -> None:
        shutil.rmtree(self.of(job), ignore_errors=True)

    def adopt(self, job: Job, trained: Trained) -> Trained | None:
        """Take over what a dead worker of this home has trained of the job; None if it is not here, or not whole."""
        folder = trained.folder.parent
        left = self.path.parent / folder.parent.name
        if (lock := _lock_of_dead(left)) is None:
            return None
        with lock, suppress(OSError):
            if all(sha256_of(left / folder.name / path) == sha256 for path, sha256 in trained.files.items()):
                own = (left / folder.name).rename(self.of(job))
                return replace(trained, folder=own / trained.folder.name, predictions=own / trained.predictions.name)
        return None

    def touch(self) -> None:
        """Show that the worker lives to hosts that do not see that the folder is locked."""
        with suppress(OSError):
            os.utime(self.path / "lock")

    def lacks_room(self) -> bool:
        """Return whether the disk takes no other trial."""
        folders = (self._home, self.path.parent)  # the folder itself may be gone; then it is made again
        return any(
            not os.access(folder, os.W_OK, effective_ids=True) or shutil.disk_usage(folder).free < ROOM
            for folder in folders
        )


def _require_a_name_for_pytorch(home: Path) -> None:
    """Raise SettingsError for a name that PyTorch cannot open: it takes all names for UTF-8, whatever the locale."""
    encoding = sys.getfilesystemencoding()
    if not str(home).isascii() and codecs.lookup(encoding).name != "utf-8":
        raise SettingsError(
            "HPO_HOME: PyTorch writes there only if the name is in ASCII, or the locale in UTF-8: expected one, "
            f"found {utf8(str(home))} and {encoding}. Set LC_ALL=C.UTF-8, or choose another folder."
        )


def own_folder(folder: Path) -> IO[str]:
    """Make a work folder and lock it; the lock falls when the file is closed.

    To `sweep` that is one step: a folder that it removes before we hold the lock is made again.
    """
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError):
            lock = (folder / "lock").open("a")
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_at(lock, folder / "lock"):
                return lock
            lock.close()


def sweep(folder: Path, *, remove: bool = True) -> bool:
    """Remove a work folder whose worker is dead, so that its lock is free; return whether all of it may go.

    What the worker had trained and not recorded stays for a day: another one records it.
    """
    lock = _lock_of_dead(folder)
    if lock is None:
        return False  # it lives, or another worker sweeps it right now
    with lock:
        return _clear(folder) if remove else not _finished(folder)


def _clear(folder: Path) -> bool:
    """Remove a folder but for finished trainings, its lock held; return whether none is left."""
    finished = _finished(folder)
    if not finished:
        shutil.rmtree(folder, ignore_errors=True)
        return True
    for path in set(folder.iterdir()) - {*finished, folder / "lock"}:
        shutil.rmtree(path, ignore_errors=True)
    return False


def _finished(folder: Path) -> list[Path]:
    now = time.time()
    return [file.parent for file in folder.glob(f"*/{FINISHED}") if now - file.stat().st_mtime < KEPT]


def _lock_of_dead(folder: Path) -> IO[str] | None:
    """Return the locked lock of a work folder whose worker is dead; None if it lives.

    A file system may show the lock of another host's worker to that host alone: then nothing has been heard of it for a
    week, either.
    """
    named = WORK_FOLDER.fullmatch(folder.name)
    try:
        if named is None or named["host"] != socket.gethostname():
            last_sign = (folder / "lock").stat().st_mtime
            if time.time() - last_sign < SILENT_HOST:
                return None
        lock = (folder / "lock").open("a" if named else "r+")  # it may have died before it had one
    except OSError:
        return None
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(lock, folder / "lock"):
            return lock
    lock.close()
    return None


def _is_at(file: IO[str], path: Path) -> bool:
    """Return whether the open file is the one there now: a lock on a file that was removed guards nothing."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
