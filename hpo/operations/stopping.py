"""Ending work from anywhere, through the queue: all workers of a study, or one trial. Workers look once a second."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hpo.errors import NotFound
from hpo.machine import who
from hpo.operations.connection import connect
from hpo.queue import Job, Queue, State
from hpo.report import names

INTERVAL = 1.0  # seconds between two looks

log = logging.getLogger("hpo.api")


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """What `stop` came to."""

    study: str
    left: list[str]  # workers that have not left yet, with what they hold
    done: int  # finished trials
    trials: int
    is_recorded: bool  # in Optuna and MLflow; else a worker does it later


@dataclass(frozen=True, kw_only=True)
class Cancelled:
    """What `cancel` changed."""

    jobs: list[Job]  # as they are now
    is_recorded: bool  # in Optuna and MLflow; else a worker does it later


def stop(study: str, *, wait: bool = True, say: Callable[[str], object] = log.info) -> Stopped:
    """Ask all workers of a study, on every machine, to hand back their trials and leave; those of the pool go on with
    other studies.

    With `wait` return when they have left. Raise NotFound if there is no such study.
    """
    with connect(mlflow=False) as connection:
        row = connection.queue.study(study)
        left: list[str] = []
        before: list[str] | None = None
        for left in _leaving(connection.queue, row.name, lease=connection.settings.lease):
            if left and left != before:
                say(f"Asked to stop: {', '.join(left)}.")
            before = left
            if not wait:
                break
        trials = [job for job in connection.queue.jobs(row.name) if job.kind == "trial"]
        done = sum(job.state == State.DONE for job in trials)
        is_recorded = wait and connection.record(row)
        return Stopped(study=row.name, left=left, done=done, trials=len(trials), is_recorded=is_recorded)


def stop_pool(*, wait: bool = True, say: Callable[[str], object] = log.info) -> None:
    """Ask all workers of the pool, on every machine, to hand back and leave; with `wait` return when they have."""
    with connect(mlflow=False) as connection:
        queue, before = connection.queue, ""
        queue.stop_pool(by=who())
        asked = {worker.name for worker in queue.workers() if worker.in_pool and worker.alive}
        while left := [worker.name for worker in queue.workers() if worker.name in asked and worker.alive]:
            if (line := f"Asked to stop: {', '.join(left)}.") != before:
                say(line)
            before = line
            if not wait:
                break
            time.sleep(INTERVAL)


def cancel(study: str, trial: str, *, undo: bool = False) -> Cancelled:
    """End a trial for good, or with `undo` bring a cancelled one back.

    `trial` is its number (`"3"`), or number and repeat (`"3/1"`). Raise NotFound if it does not exist or has ended.
    """
    with connect(mlflow=False) as connection:
        queue, row = connection.queue, connection.queue.study(study)
        job = names.trial(queue, row, trial)
        repeat = job.repeat if "/" in trial else None
        if undo:
            changed = queue.undo_cancel(row.name, job.number, repeat)
        else:
            changed = queue.cancel(row.name, job.number, repeat, by=who())
        if not changed:
            state, which = (queue.job(job.id) or job).state, "one that has not ended can be cancelled"
            which = "a cancelled trial can be brought back" if undo else which
            raise NotFound(f"Nothing was changed: {job.title} is {state}. Only {which}.")
        return Cancelled(jobs=changed, is_recorded=connection.record(row))


def _leaving(queue: Queue, study: str, *, lease: float) -> Iterator[list[str]]:
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


def _left(queue: Queue, study: str, stops: int, lease: float) -> list[str]:
    """Workers that joined before the last of so many stops, with what they hold."""
    workers = queue.workers(study)
    present = {worker.name: worker for worker in workers if not worker.in_pool}
    # The pool holds trials of it after the stop only if somebody has taken the study up again.
    newer_pool = set() if queue.study(study).stopped else {worker.name for worker in workers if worker.in_pool}
    lapsed = set(queue.expired(study, lease=lease))
    held: dict[str, list[str]] = {
        worker.name: [] for worker in present.values() if worker.alive and worker.stops < stops
    }
    for job in queue.jobs(study):
        newer = job.worker in newer_pool or (job.worker in present and present[job.worker].stops >= stops)
        if job.state == State.RUNNING and job.id not in lapsed and not newer:
            held.setdefault(str(job.worker), []).append("closing" if job.kind == "closing" else f"trial {job.number}")
    return [f"{name} ({', '.join(jobs) or 'idle'})" for name, jobs in held.items()]
