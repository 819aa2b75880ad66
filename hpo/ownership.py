"""Folders that hpo may use: those of its own user, which nobody else may write."""

import grp
import os
import pwd
import stat
from contextlib import suppress
from pathlib import Path

from hpo.errors import ServiceError


def folder(path: Path, *names: str) -> Path:
    """The folder `names` in the home at `path`; each that is missing is made, for this user alone. ServiceError if hpo
    may not use one of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in (path, *(path.joinpath(*names[: count + 1]) for count in range(len(names)))):
        with suppress(FileExistsError):
            part.mkdir(mode=0o700)
        require_ours(part)
    return path.joinpath(*names)


def is_ours(path: Path) -> bool:
    """Whether what lies there, a link itself, belongs to this process's user."""
    return path.lstat().st_uid == os.geteuid()


def require_ours(path: Path) -> None:
    """ServiceError if what is at `path`, or a link there, is another user's, or may be written by others."""
    link = path.lstat()
    if stat.S_ISLNK(link.st_mode) and link.st_uid not in (0, os.geteuid()):  # root may lead us
        raise ServiceError(other_user(path, link.st_uid))
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise ServiceError(other_user(path, status.st_uid))
    if _others_write(status):
        shared = status.st_mode & stat.S_ISVTX or path.resolve() in (Path.home(), Path("/"))  # not hpo's to close
        raise ServiceError(
            f"Others may write {path} (mode {stat.S_IMODE(status.st_mode):04o}), so what hpo reads and runs there "
            "might be theirs. "
            + (
                f"Set HPO_HOME to a folder of its own in it, such as {path / 'hpo'}."
                if shared
                else f"If it is yours: chmod go-w {path} (some file systems ignore that); else set HPO_HOME to a "
                "folder of your own."
            )
        )


def _others_write(status: os.stat_result) -> bool:
    """Whether anybody but the owner and root may; a group that bears its only member's name is nobody else."""
    if not status.st_mode & stat.S_IWGRP:
        return bool(status.st_mode & stat.S_IWOTH)
    try:
        group, owner = grp.getgrgid(status.st_gid), pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        return True
    return bool(status.st_mode & stat.S_IWOTH) or group.gr_name != owner or bool({*group.gr_mem} - {owner})


def other_user(path: Path, uid: int) -> str:
    """Return the message that a path belongs to another user, the one of this number."""
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = f"number {uid}"
    return f"{path} belongs to the user {name}: run hpo as that user, or set HPO_HOME to a folder of your own."
