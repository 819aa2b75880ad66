"""What a supervisor works with: passed in, so that a test drives it without processes, servers or time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpo.queue import Queue
from hpo.recording.outcomes import Inbox
from hpo.recording.recorder import Recorder
from hpo.settings import Settings
from hpo.worker.children import Clock, Suggester, Trainers
from hpo.worker.studies import Studies
from hpo.worker.work_folder import WorkFolder


@dataclass(frozen=True, kw_only=True)
class Collaborators:
    """Everything outside a supervisor that it calls."""

    settings: Settings
    queue: Queue
    recorder: Recorder
    inbox: Inbox  # where the recorder posts
    studies: Studies
    trainers: Trainers
    start_suggester: Callable[[], Suggester]
    folder: WorkFolder
    device: str  # "cpu", "auto" or "cuda"
    log_file: Path  # where the children's output goes
    wait: Callable[[Sequence[Any], float], Sequence[Any]]  # as multiprocessing.connection.wait
    clock: Clock
    stops: int = 0  # of the pool when a worker of it was asked for
