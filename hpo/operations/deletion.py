"""Deleting a study: everything of it, nothing of another one, and in steps that may be repeated until all are done."""

import logging
from collections.abc import Callable, Iterator

from hpo import crash
from hpo.errors import NotFound, StudyConflict
from hpo.machine import who
from hpo.operations.backup import LOCK, WAITS
from hpo.operations.connection import Connection, connect
from hpo.queue import State, StudyRow
from hpo.scores import champion
from hpo.search import sampling
from hpo.tracking import experiments, registry
from hpo.tracking.client import OWNER

log = logging.getLogger("hpo.api")


def delete(
    study: str,
    *,
    in_mlflow: bool = True,
    confirm: Callable[[StudyRow, int], object] | None = None,
    say: Callable[[str], object] = log.info,
) -> None:
    """Delete a study: its versions, runs, models, trials and rows. From its beginning on nobody claims a trial of it.

    `confirm` gets the study and its number of finished trials before anything is deleted, and may raise an error.
    Without `in_mlflow` the server need not have the study's experiment. Cut short, the study is half deleted until this
    is called again. Raise NotFound or StudyConflict if the study cannot be deleted now.
    """
    with connect() as connection:
        queue, tracker = connection.queue, connection.tracker
        row = queue.study(study)
        _check(connection, row, in_mlflow=in_mlflow)
        if confirm is not None:
            confirm(row, sum(job.state == State.DONE for job in queue.jobs(row.name) if job.kind == "trial"))
        # A backup under way still reads the files.
        with queue.lock(LOCK, waits=lambda: say(WAITS)), queue.plan_lock(row.name):
            _check(connection, row, in_mlflow=in_mlflow)
            if not queue.begin_deletion(row.name, lease=connection.settings.lease, by=who()):
                raise _busy(row)
            crash.at("deletion begun")
            _delete_versions(connection, row)
            crash.at("versions deleted")
            champion.settle(queue, tracker, row, leaving=row.name)
            experiments.delete(tracker, row.facts.experiment_id)
            crash.at("experiment deleted")
            sampling.delete(connection.store, row.name)
            queue.delete_study(row.name)


def _check(connection: Connection, row: StudyRow, *, in_mlflow: bool) -> None:
    """Raise NotFound or StudyConflict if the study cannot be deleted now."""
    queue, tracker = connection.queue, connection.tracker
    lost = queue.expired(row.name, lease=connection.settings.lease)
    if any(job.state == State.RUNNING and job.id not in lost for job in queue.jobs(row.name)):
        raise _busy(row)
    runs = {job.run_id for job in queue.jobs(row.name) if job.run_id is not None}
    if others := [other.name for other in queue.studies() if other.name != row.name and runs & {*_taken(other)}]:
        raise StudyConflict(
            f"{row.name} is not deleted: {' and '.join(others)} {'begin' if len(others) > 1 else 'begins'} with its "
            f"networks or points. Delete {'those' if len(others) > 1 else 'that'} first."
        )
    if in_mlflow and not experiments.exists(tracker, row.facts.experiment_id):
        raise NotFound(
            f"The MLflow server at {tracker.uri} has no experiment {row.facts.experiment_id}, which is "
            f"{row.name}'s: is it the server you mean? If it has lost it, --not-in-mlflow deletes what is left."
        )


def _taken(row: StudyRow) -> Iterator[str]:
    """Runs of another study that this one has taken networks or points from."""
    yield from (network.run_id for network in (row.facts.starts_from or {}).values())
    yield from (source.run_id for source in row.facts.best_of or ())


def _delete_versions(connection: Connection, row: StudyRow) -> None:
    queue, tracker = connection.queue, connection.tracker
    owner, runs = queue.database_id(), {job.run_id for job in queue.jobs(row.name)}
    for name in champion.own_models(queue, tracker, champion.competing(queue, row)):
        for version in registry.versions(tracker, name):
            # The run of one whose run the database never noted is known by its name alone.
            ours = version.run_id in runs or version.tags.get("hpo.study") == row.name
            if ours and version.tags.get(OWNER) == owner:
                registry.delete_version(tracker, name, version.number)


def _busy(row: StudyRow) -> NotFound:
    return NotFound(
        f"Workers are training {row.name} right now. Let them leave first (`hpo stop --study {row.name}`); then delete."
    )
