"""The messages between a supervisor and its trainers and suggester: one JSON object a line, each way.

A request is answered by messages of the same process. A message that is unknown, or whose fields are not exactly those
declared here, is an error on either side.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hpo.closing.scored import NotScored, Score, Scored
from hpo.recording.trained import Trained
from hpo.records import Record, decoded
from hpo.study.records import TrialSpec
from models.metrics import Scores

# Requests to a trainer


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one trial. Answers: Started, then TooLarge, or EpochDone and CheckpointWritten, then Trained, Returned or
    Diverged."""

    spec: TrialSpec
    data: Path  # the data set, NPZ
    checkpoint: Path | None  # where the trial goes on
    start: Path | None  # folder of the model, or of the weights, that the trial starts from
    folder: Path  # for everything that the trainer writes
    cache: Path  # of the features of frozen backbones
    device: str  # "cpu", "auto" or "cuda"
    checkpoint_interval: float  # seconds, at least


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Time a few batches of each trial. Answers: Probed for each of them, then ProbesEnded."""

    specs: tuple[TrialSpec, ...]
    data: Path
    device: str


@dataclass(frozen=True, kw_only=True)
class Prove:
    """Show that trials can be trained here: train a small batch of one, and write into `folder`. Answer: Proved."""

    spec: TrialSpec
    data: Path
    folder: Path
    device: str


@dataclass(frozen=True, kw_only=True)
class Check:
    """Show on a few images that code of the user's can be trained, resumed and stored. Answer: Checked."""

    specs: tuple[TrialSpec, ...]
    data: Path
    folder: Path  # for everything that the trainer writes
    device: str


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Hand the present trial back at the next batch. Answer: Returned."""


# Request to a suggester


@dataclass(frozen=True, kw_only=True)
class Fill:
    """Let the sampler choose the point of a claimed job. Answer: Filled, ClaimLost, DatabaseAway or NotFilled."""

    database_url: str
    study: str
    job: int
    fence: int


# Messages of a trainer


@dataclass(frozen=True, kw_only=True)
class Ready:
    """Everything is imported; requests are taken. A suggester says the same."""


@dataclass(frozen=True, kw_only=True)
class Alive:
    """Work goes on, though an epoch takes long."""


@dataclass(frozen=True, kw_only=True)
class Started:
    epoch: int  # the last one of the checkpoint; 0 without one
    parameters: int


@dataclass(frozen=True, kw_only=True)
class EpochDone:
    number: int
    at: int  # milliseconds since 1970
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class CheckpointWritten:
    path: Path
    epoch: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Returned:
    """The trial was stopped; its checkpoint came before if there is an epoch to keep."""

    epoch: int


@dataclass(frozen=True, kw_only=True)
class Diverged:
    epoch: int


@dataclass(frozen=True, kw_only=True)
class TooLarge:
    """The network is beyond a bound of its study, which only its making shows. It is not trained."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Failed:
    reason: str


@dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """The card or the host has no memory left for the request."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class DiskFull:
    reason: str


@dataclass(frozen=True, kw_only=True)
class DataDamaged:
    """The data set's file is not the one that was planned."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Probed:
    index: int  # in the request
    parameters: int
    seconds: float  # of one epoch
    once: float  # seconds before the first epoch: features of a frozen backbone, for example
    memory: float  # GB this process has needed so far; not a GPU's
    device: str  # the GPU's name, else ""


@dataclass(frozen=True, kw_only=True)
class ProbesEnded:
    """The last probe was measured."""


@dataclass(frozen=True, kw_only=True)
class Proved:
    """Device, packages, data set and disk are sound."""

    device: str  # the GPU's name, else ""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The user's code keeps to what is expected of it."""

    digest: str  # SHA-256 of what the first network has learned: the same in every process


# Answers of a suggester, for a claim: the job's id and its fence


@dataclass(frozen=True, kw_only=True)
class Filled:
    job: int
    fence: int
    spec: TrialSpec
    cost: float


@dataclass(frozen=True, kw_only=True)
class ClaimLost:
    job: int
    fence: int


@dataclass(frozen=True, kw_only=True)
class DatabaseAway:
    job: int
    fence: int


@dataclass(frozen=True, kw_only=True)
class NotFilled:
    job: int
    fence: int
    reason: str


Request = Train | Score | Probe | Prove | Check | Stop | Fill
Answer = Filled | ClaimLost | DatabaseAway | NotFilled
Message = (
    Request | Answer | Ready | Alive | Started | EpochDone | CheckpointWritten | Trained | Returned | Diverged
    | TooLarge | Failed | OutOfMemory | DiskFull | DataDamaged | Scored | NotScored | Probed | ProbesEnded | Proved
    | Checked
)  # fmt: skip
KINDS: dict[str, Any] = {kind.__name__: kind for kind in get_args(Message)}


class ProtocolError(Exception):
    """A line from the other process is no message, or is none that this version of hpo knows."""


def encode(message: Message) -> bytes:
    """Return the message as one line of JSON, with its line break."""
    return json.dumps({"message": type(message).__name__, **vars(message)}, default=_plain).encode() + b"\n"


def decode(line: str | bytes) -> Message:
    """Return the message of one line. Raise ProtocolError."""
    try:
        values = json.loads(line)
        kind = KINDS[values.pop("message")]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ProtocolError(f"expected one of the messages {', '.join(KINDS)}, found {line[:200]!r}") from None
    expected = _fields(kind)
    if values.keys() != expected.keys():
        raise ProtocolError(f"{kind.__name__}: expected the fields {sorted(expected)}, found {sorted(values)}")
    return kind(**{name: _restored(expected[name], value) for name, value in values.items()})


@cache
def _fields(kind: type) -> dict[str, Any]:
    """Return the type of each field of a message."""
    return get_type_hints(kind)


def _restored(hint: Any, value: Any) -> Any:
    """Return a JSON value as what its field holds."""
    if hint in (Path, Path | None):
        return None if value is None else Path(value)
    return decoded(hint, value)


def _plain(value: Path | Record | Scores) -> Any:
    """Return the JSON form of a field's value."""
    if isinstance(value, Record):
        return value.to_json()
    return value.to_dict() if isinstance(value, Scores) else str(value)
