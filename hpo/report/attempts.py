"""The attempts of a trial, a line each."""

import time
from collections.abc import Sequence

from hpo.queue import Attempt
from hpo.queue.attempts import counted
from hpo.text import duration, one_line


def lines(attempts: Sequence[Attempt]) -> list[str]:
    """Return a line for each attempt: where and when it ran, what came of it, and whether it counts."""
    counting = counted(attempts)
    return [
        f"attempt {number}: {_text(attempt)}{' (counts)' if attempt in counting else ''}"
        for number, attempt in enumerate(attempts, start=1)
    ]


def _text(attempt: Attempt) -> str:
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.began))
    words = [f"{' '.join(attempt.place).strip() or 'place not known'}, {began}"]
    if attempt.ended is not None:
        words.append(duration(attempt.ended - attempt.began))
    words.append(f"epoch {attempt.epochs}" if attempt.epochs else "no epoch")
    words.append(str(attempt.outcome or "running"))
    if not attempt.alone:
        words[-1] += " beside other trials"
    if attempt.forgiven:
        words.append("forgiven")
    reason = attempt.reason if attempt.reason != attempt.outcome else None
    return ", ".join(words) + (f": {one_line(reason)}" if reason else "")
