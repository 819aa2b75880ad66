"""Files and their hashes; lists of the files in a folder that hpo wrote, which `sha256sum --check` reads, too."""

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from data_pipeline.files import PRIVATE, new_file, sync, write_atomically

__all__ = [
    "PRIVATE",
    "is_plain",
    "listed",
    "new_file",
    "sha256_of",
    "sha256_of_files",
    "sync",
    "write",
    "write_atomically",
]


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_files(folder: Path) -> dict[str, str]:
    """Hexadecimal SHA-256 of every file below `folder`, by relative path with forward slashes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def tail(log: Path, *, lines: int) -> str:
    """Return the last lines of a log file, indented, for an error message."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        text = ""
    return "\n".join("  " + line for line in text.splitlines()[-lines:]) or "  (empty)"


def listed(sums: Path) -> dict[str, set[str]]:
    """Hashes by plain relative path; where the writer was interrupted a file may have two. {} if there is no list."""
    sums_by_path: dict[str, set[str]] = {}
    if sums.is_file() and not sums.is_symlink():
        for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
            sha256, _, path = line.partition("  ")
            if is_plain(path):
                sums_by_path.setdefault(path, set()).add(sha256)
    return sums_by_path


def write(sums: Path, files: Mapping[str, str], earlier: Mapping[str, set[str]] | None = None) -> None:
    """Write a list: the hash of each file by its path, and what an earlier list says besides."""
    lines = {(path, sha256) for path, sha256 in files.items()}
    lines |= {(path, sha256) for path, hashes in (earlier or {}).items() for sha256 in hashes}
    write_atomically(sums, "".join(f"{sha256}  {path}\n" for path, sha256 in sorted(lines)).encode())


def is_plain(path: str) -> bool:
    """Whether it leads to one place below a folder, on any system, and is one line of a list."""
    parts = PurePosixPath(path).parts
    plain = path.isprintable() and not set("\\:") & set(path)  # no zero byte, no line end, no drive
    return bool(parts) and path == "/".join(parts) and not path.startswith("/") and ".." not in parts and plain
