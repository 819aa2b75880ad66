"""Files: written whole or not at all, checked before they are read."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

PRIVATE = 0o600  # mode of a file that only its owner may read


@contextmanager
def new_file(path: Path, *, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """Open a file that must not exist yet, not even as a link. When closed it is on the disk; after an error, gone."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def write_atomically(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Write a file so that other processes, and the system after a power cut, see all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with new_file(temporary, mode=mode) as file:
        file.write(content)
    try:
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Put the names of a folder's files on the disk, so that they survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def not_a_file(path: Path) -> str:
    """Return why this is no regular file, "" if it is one. Reading a pipe or device would block or never end."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"cannot be read ({error.strerror})."
    return "" if stat.S_ISREG(mode) else "expected a regular file, found a folder, pipe or device."
