"""Files: written whole or not at all, checked before they are read."""

import os
import secrets
import stat
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that other processes, and the system after a power cut, see all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    file = temporary.open("xb")  # a new file, never the target of somebody else's link
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def not_a_file(path: Path) -> str:
    """Return why this is no regular file, "" if it is one. Reading a pipe or device would block or never end."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"cannot be read ({error.strerror})."
    return "" if stat.S_ISREG(mode) else "expected a regular file, found a folder, pipe or device."
