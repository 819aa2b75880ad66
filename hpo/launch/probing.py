"""One worker on trial before others are handed in: whether the machines reach the services, and have the same hpo."""

import re
import secrets
import time
from collections.abc import Callable, Sequence
from importlib import metadata

from hpo.errors import ServiceError
from hpo.launch.engine import Engine, Fate, Fleet

LIMIT = 55.0  # seconds until the answer
PLACE_LIMIT = 20.0  # seconds that it may wait for a machine: a full cluster has one later
SETTLED = 5.0  # seconds that a shared disk may take to show what an ended worker wrote
INTERVAL = 0.5  # seconds between two looks
WORDS = ("worker", "--probe")
_WHO = re.compile(r"^This is hpo (\S+) on (\S+),", re.MULTILINE)
_REACHED = re.compile(r"^It reaches the database (\w+) and", re.MULTILINE)


def prove(engine: Engine, database: str, *, report: Callable[[str], object], interrupts: Sequence[int] = ()) -> None:
    """Hand in one worker that only answers, and take it back. Say if no machine is free for it. An interrupt ends that.

    `database`: the random name of the one here. Raise ServiceError if the machines could not work.
    """
    token = secrets.token_hex(4)
    fleet = Fleet(name=f"hpo.probe-{token}", label="a probe", folder=f".probe-{token}")
    try:
        engine.hand_in(fleet, [WORDS])
        text = _answer(engine, fleet, report, interrupts)
    finally:
        engine.take_back(fleet)
        engine.forget(fleet)
    if text is not None:
        _judge(engine, text, database)


def _answer(engine: Engine, fleet: Fleet, report: Callable[[str], object], interrupts: Sequence[int]) -> str | None:
    """Return what the probe wrote; None if no machine was free for it, or after an interrupt.

    Raise ServiceError if none ever can be.
    """
    begin = time.monotonic()
    ended: float | None = None
    while not interrupts:
        now, text, workers = time.monotonic(), engine.output(fleet), engine.placed(fleet)
        left = [worker for worker in workers if worker.fate != Fate.ENDED]
        ended = None if left else ended or now
        if _REACHED.search(text) or (ended is not None and (_error(text) or now - ended > SETTLED)):
            return text
        reason = next((worker.reason for worker in left if worker.fate == Fate.WAITING), "")
        if any(worker.is_hopeless for worker in left):
            raise ServiceError(f"{engine.title} has no machine for such a worker, now or later: {reason}. {_NOTHING}")
        if any(worker.fate == Fate.WAITING for worker in left) and now - begin > PLACE_LIMIT:
            report(
                f"No machine is free in {engine.title} ({reason or 'no reason is given'}), so none was tried. A worker "
                "that cannot work there ends when it starts, and says why."
            )
            return None
        if now - begin > LIMIT:
            said = text.strip().splitlines()[-1:] or ["it wrote nothing."]
            raise ServiceError(
                f"A worker on trial in {engine.title} gave no answer within {LIMIT:.0f} s: {said[0]} {_NOTHING}"
            )
        time.sleep(INTERVAL)
    return None


_NOTHING = "Nothing was handed in."


def _error(text: str) -> str:
    """Return the message that a command of hpo ended with."""
    return next((line.removeprefix("hpo: ") for line in reversed(text.splitlines()) if line.startswith("hpo: ")), "")


def _judge(engine: Engine, text: str, database: str) -> None:
    """Raise ServiceError unless the machine has this hpo, and reaches this database."""
    who, reached, here = _WHO.search(text), _REACHED.search(text), metadata.version("hpo")
    if who is not None and who[1] != here:
        raise ServiceError(
            f"{engine.title}: {who[2]} has hpo {who[1]}, and this is hpo {here}. Install the same version there. "
            + _NOTHING
        )
    if reached is None:
        host = "A worker on trial" if who is None else f"A worker on trial on {who[2]}"
        said = _error(text) or next(iter(text.strip().splitlines()[-1:]), "it wrote nothing.")
        raise ServiceError(f"{engine.title}: {host} cannot work: {said} {_NOTHING}")
    if not database.startswith(reached[1]):
        raise ServiceError(
            f"{engine.title}: the machines work for another database ({reached[1]}) than this command "
            f"({database[:8]}): compare HPO_CREDENTIALS there and here. {_NOTHING}"
        )
