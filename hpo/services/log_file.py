"""`python -I -S log_file.py PIPE LOG FILE LIMIT`: a service's log, which never takes more than twice LIMIT bytes.

What arrives at the descriptor PIPE goes to the descriptor LOG, the end of FILE, which becomes FILE.1 when it is full; a
full disk loses lines and holds nobody up. Where it cannot become FILE.1, or no new FILE can be made, the old one goes
on, and begins again at twice LIMIT. It ends with the last process that writes, and holds FILE's lock until then.
Needs the standard library alone, and 10 ms to start.
"""

import fcntl
import os
import signal
import sys
from contextlib import suppress


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # what the service says at its end, too
    pipe, log, path, limit = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    while chunk := os.read(pipe, 1 << 16):
        size = os.fstat(log).st_size + len(chunk)
        with suppress(OSError):
            if size > limit and _is_at(log, path):
                os.replace(path, path + ".1")
        with suppress(OSError):
            if not _is_at(log, path):  # or somebody else moved or removed it
                new = opened(path)
                os.close(log)
                log, size = new, 0
        with suppress(OSError):
            if size > 2 * limit:
                os.ftruncate(log, 0)
            os.write(log, chunk)


def opened(path: str) -> int:
    """Descriptor at the end of a log, which holds its lock unless another process does."""
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    with suppress(BlockingIOError):
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return log


def _is_at(log: int, path: str) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(log), os.lstat(path))
    return False


if __name__ == "__main__":
    main()
