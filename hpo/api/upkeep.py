"""Stop, cancel, delete, check, back up and restore what is there."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hpo.operations.backup
import hpo.operations.restore
from hpo import settings
from hpo.api.connection import Connection, connect, opened
from hpo.operations import deletion, stopping
from hpo.operations.backup import place
from hpo.operations.doctor import Finding, examine
from hpo.queue import Job, State, StudyRow
from hpo.services import serving

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


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """What `doctor` came to."""

    findings: list[Finding]  # what is not as it should be, after the repairs
    repaired: int
    failures: list[str]  # one message for each repair that failed

    @property
    def is_healthy(self) -> bool:
        return not self.findings


@dataclass(frozen=True, kw_only=True)
class Backup:
    """What is in a backup file."""

    at: str  # time of the snapshot
    studies: Mapping[str, tuple[int, int]]  # finished and planned trials, by the study's name
    artifacts: int  # files
    faults: list[str]  # what was missing or damaged already


def stop(study: str, *, wait: bool = True, say: Callable[[str], object] = log.info) -> Stopped:
    """Ask all workers of a study, on every machine, to hand back their trials and leave.

    With `wait` return when they have left. Raise NotFound if there is no such study.
    """
    with connect(mlflow=False) as connection:
        row = connection.queue.study(study)
        left: list[str] = []
        before: list[str] | None = None
        for left in stopping.stop(connection.queue, row.name, lease=connection.settings.lease):
            if left and left != before:
                say(f"Asked to stop: {', '.join(left)}.")
            before = left
            if not wait:
                break
        trials = [job for job in connection.queue.jobs(row.name) if job.kind == "trial"]
        done = sum(job.state == State.DONE for job in trials)
        recorded = wait and _record(connection, row)
        return Stopped(study=row.name, left=left, done=done, trials=len(trials), is_recorded=recorded)


def cancel(study: str, trial: str, *, undo: bool = False) -> Cancelled:
    """End a trial for good, or with `undo` bring a cancelled one back.

    `trial` is its number (`"3"`), or number and repeat (`"3/1"`). Raise NotFound if it does not exist or has ended.
    """
    with connect(mlflow=False) as connection:
        row = connection.queue.study(study)
        changed = stopping.cancel(connection.queue, row, trial, undo=undo)
        return Cancelled(jobs=changed, is_recorded=_record(connection, row))


def _record(connection: Connection, row: StudyRow) -> bool:
    """Record the study's changes in Optuna and MLflow; return whether they answered."""
    tracker = connection.tracker_if_up
    return tracker is not None and stopping.show(
        connection.queue, tracker, connection.store, row, lease=connection.settings.lease
    )


def delete(
    study: str,
    *,
    in_mlflow: bool = True,
    confirm: Callable[[StudyRow, int], object] | None = None,
    say: Callable[[str], object] = log.info,
) -> None:
    """Delete a study: its trials, runs, models and versions.

    `confirm` gets the study and its number of finished trials before anything is deleted, and may raise an error.
    Without `in_mlflow` the server need not have the study's experiment. Raise NotFound or StudyConflict if the study
    cannot be deleted now.
    """
    with connect() as connection:
        queue, tracker, lease = connection.queue, connection.tracker, connection.settings.lease
        row = queue.study(study)
        deletion.check(queue, tracker, row, lease=lease, in_mlflow=in_mlflow)
        if confirm is not None:
            confirm(row, sum(job.state == State.DONE for job in queue.jobs(row.name) if job.kind == "trial"))
        deletion.delete(queue, tracker, connection.store, row, lease=lease, in_mlflow=in_mlflow, report=say)


def doctor(study: str | None = None, *, fix: bool = False) -> Checkup:
    """Check services, versions and one study or everything; with `fix` repair what can be repaired."""
    repaired, failures = 0, []
    with connect() as connection:
        findings = list(examine(connection.settings, connection.services, study=study))
        if fix:
            for finding in findings:
                try:
                    if finding.remedy is not None:
                        finding.remedy()
                        repaired += 1
                except Exception as error:  # the other findings can still be repaired; this one is found again below
                    failures.append(f"{finding.kind}: {finding.what}: could not be repaired: {error}")
            findings = list(examine(connection.settings, connection.services, study=study))
        return Checkup(findings=findings, repaired=repaired, failures=failures)


def backup(file: Path, *, say: Callable[[str], object] = log.info) -> Backup:
    """Save the databases and all artifacts in a new file, while workers continue.

    `say` gets a line for each step. Raise BackupError if the file exists or cannot be written.
    """
    with connect() as connection:
        source = place(connection.settings, connection.services)
        return _contents(hpo.operations.backup.backup(source, file.absolute(), say))


def restore(file: Path, *, say: Callable[[str], object] = log.info) -> tuple[Backup, str]:
    """Fill an empty home, or empty databases, from a backup; return its contents and the URL of the MLflow server.

    Raise BackupError if the file is damaged, or something is there already.
    """
    say(f"Checking {file}.")
    manifest = hpo.operations.restore.check(file)
    chosen = settings.read()
    services, _ = serving.up(chosen, report=say)
    hpo.operations.restore.restore(place(chosen, services), file, manifest, say)
    with opened(chosen, services) as connection:
        tracker, store = connection.tracker, connection.store
        for row in connection.queue.studies():
            if row.facts.planned:
                stopping.show(connection.queue, tracker, store, row, lease=chosen.lease)
        return _contents(manifest), services.tracking_uri


def _contents(manifest: Mapping[str, Any]) -> Backup:
    return Backup(
        at=manifest["at"],
        studies={name: (study["done"], study["trials"]) for name, study in manifest["studies"].items()},
        artifacts=sum(name.startswith("artifacts/") for name in manifest["files"]),
        faults=manifest.get("faults", []),
    )
