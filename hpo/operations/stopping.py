"""Ending work from anywhere, through the queue: all workers of a study, or one trial. Workers look once a second."""

import time
from collections.abc import Iterator

import optuna

from hpo.errors import NotFound
from hpo.machine import who
from hpo.queue import DatabaseLost, Job, Queue, State, StudyRow
from hpo.recording.reconciler import Reconciler
from hpo.report import names
from hpo.tracking.client import Tracker
from hpo.tracking.errors import TrackingUnavailable

INTERVAL = 1.0  # seconds between two looks


def stop(queue: Queue, study: str, *, lease: float) -> Iterator[list[str]]:
    """Ask all workers of a study to leave, then yield who has not yet, until nobody is left; then let wait what frozen
    or dead workers held. `lease` in seconds."""
    stops = queue.stop(study, by=who())
    quiet = 0
    while quiet < 2:  # twice: a claim may have been under way when we asked
        left = _left(queue, study, stops, lease)
        yield left
        quiet = 0 if left else quiet + 1
        time.sleep(INTERVAL)
    queue.expire(study, lease=lease)


def cancel(queue: Queue, study: StudyRow, trial: str, *, undo: bool = False) -> list[Job]:
    """End a trial (`3`, or `3/1` for one repeat of it) for good, or bring a cancelled one back; return its jobs as they
    are now. Raises NotFound if there is none, or if it has ended otherwise."""
    found = names.trial(queue, study, trial)
    repeat = found.repeat if "/" in trial else None
    if undo:
        changed = queue.undo_cancel(study.name, found.number, repeat)
    else:
        changed = queue.cancel(study.name, found.number, repeat, by=who())
    if not changed:
        state = (queue.job(found.id) or found).state
        raise NotFound(
            f"Nothing was changed: {found.title} is {state}. "
            + (
                "Only a cancelled trial can be brought back."
                if undo
                else "Only one that has not ended can be cancelled."
            )
        )
    return changed


def show(queue: Queue, tracker: Tracker, store: optuna.storages.RDBStorage, study: StudyRow, *, lease: float) -> bool:
    """Let Optuna and MLflow show at once what has changed; false if they are away: a worker does it later."""
    try:
        Reconciler(queue, tracker, store, study).reconcile(lease=lease, older_than=0, expire=False)
    except (TrackingUnavailable, DatabaseLost):
        return False
    return True


def _left(queue: Queue, study: str, stops: int, lease: float) -> list[str]:
    """Workers that joined before the last of so many stops, with what they hold."""
    present = {worker.name: worker for worker in queue.workers(study)}
    lapsed = set(queue.expired(study, lease=lease))
    held: dict[str, list[str]] = {
        worker.name: [] for worker in present.values() if worker.alive and worker.stops < stops
    }
    for job in queue.jobs(study):
        newer = job.worker in present and present[job.worker].stops >= stops
        if job.state == State.RUNNING and job.id not in lapsed and not newer:
            held.setdefault(str(job.worker), []).append("closing" if job.kind == "closing" else f"trial {job.number}")
    return [f"{name} ({', '.join(jobs) or 'idle'})" for name, jobs in held.items()]
