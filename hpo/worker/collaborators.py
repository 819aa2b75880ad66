"""What a supervisor works with: passed in, so that a test drives it without processes, servers or time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpo.closing.steps import Closing
from hpo.queue import Job, Queue
from hpo.recording.outcomes import Inbox
from hpo.recording.recorder import Recorder
from hpo.recording.tasks import Tasks
from hpo.search.pruning import Pruning
from hpo.settings import Settings
from hpo.study.records import TrialSpec
from hpo.worker.children import Clock, Suggester, Trainers
from hpo.worker.data_file import DataFile
from hpo.worker.work_folder import WorkFolder


@dataclass(frozen=True, kw_only=True)
class Collaborators:
    """Everything outside a supervisor that it calls."""

    settings: Settings
    queue: Queue
    recorder: Recorder
    inbox: Inbox  # where the recorder posts
    tasks: Tasks  # for the recorder
    pruning: Pruning
    trainers: Trainers
    start_suggester: Callable[[], Suggester]
    start_closing: Callable[[Job, Path, Path], Closing]  # of a claimed job, with its folder and the data set's file
    folder: WorkFolder
    data: DataFile
    device: str  # "cpu", "auto" or "cuda"
    proof: TrialSpec  # the smallest network of the study, which shows whether a place can train
    log_file: Path  # where the children's output goes
    wait: Callable[[Sequence[Any], float], Sequence[Any]]  # as multiprocessing.connection.wait
    clock: Clock
