"""Deleting a study: everything of it, nothing of another one, and in steps that may be repeated until all are done."""

from collections.abc import Callable, Iterator

import optuna

from hpo import crash
from hpo.errors import NotFound, StudyConflict
from hpo.machine import who
from hpo.operations.backup import LOCK, WAITS
from hpo.planning.plans import lock_plan
from hpo.queue import Queue, State, StudyRow
from hpo.scores import champion, standings
from hpo.search import sampling
from hpo.tracking import experiments, registry
from hpo.tracking.client import OWNER, Tracker


def check(queue: Queue, tracker: Tracker, row: StudyRow, *, lease: float, in_mlflow: bool = True) -> None:
    """Raise NotFound or StudyConflict if the study cannot be deleted now. `lease` in seconds; without `in_mlflow` the
    server need not have its experiment."""
    lost = queue.expired(row.name, lease=lease)
    if any(job.state == State.RUNNING and job.id not in lost for job in queue.jobs(row.name)):
        raise _busy(row)
    if others := dependents(queue, row):
        raise StudyConflict(
            f"{row.name} is not deleted: {' and '.join(others)} {'begin' if len(others) > 1 else 'begins'} with its "
            f"networks or points. Delete {'those' if len(others) > 1 else 'that'} first."
        )
    if in_mlflow and not experiments.exists(tracker, row.facts.experiment_id):
        raise NotFound(
            f"The MLflow server at {tracker.uri} has no experiment {row.facts.experiment_id}, which is "
            f"{row.name}'s: is it the server you mean? If it has lost it, --not-in-mlflow deletes what is left."
        )


def delete(
    queue: Queue,
    tracker: Tracker,
    store: optuna.storages.RDBStorage,
    row: StudyRow,
    *,
    lease: float,
    in_mlflow: bool = True,
    report: Callable[[str], object],
) -> None:
    """Delete the study's versions, runs, models, trials and rows; what the user was asked about is checked again first.

    From then on nobody claims a trial of it. Cut short, it is half deleted until this is called again.
    """
    # A backup under way still reads the files.
    with queue.lock(LOCK, waits=lambda: report(WAITS)), lock_plan(queue, row.name):
        check(queue, tracker, row, lease=lease, in_mlflow=in_mlflow)
        if not queue.begin_deletion(row.name, lease=lease, by=who()):
            raise _busy(row)
        crash.at("deletion begun")
        owner = queue.database_id()
        runs = {job.run_id for job in queue.jobs(row.name)}
        for name in champion.own_models(queue, tracker, standings.rivals(queue, row)):
            for version in registry.versions(tracker, name):
                # The run of one whose run the database never noted is known by its name alone.
                ours = version.run_id in runs or version.tags.get("hpo.study") == row.name
                if ours and version.tags.get(OWNER) == owner:
                    registry.delete_version(tracker, name, version.number)
        crash.at("versions deleted")
        champion.settle(queue, tracker, row, leaving=row.name)
        experiments.delete(tracker, row.facts.experiment_id)
        crash.at("experiment deleted")
        sampling.delete(store, row.name)
        queue.delete_study(row.name)


def dependents(queue: Queue, row: StudyRow) -> list[str]:
    """Names of the studies that begin with this one's networks, or train its best points again."""
    runs = {job.run_id for job in queue.jobs(row.name) if job.run_id is not None}
    return [
        other.name for other in queue.studies() if other.name != row.name and any(run in runs for run in _taken(other))
    ]


def _taken(row: StudyRow) -> Iterator[str]:
    """Runs of another study that this one has taken networks or points from."""
    yield from (network.run_id for network in (row.facts.starts_from or {}).values())
    yield from (source.run_id for source in row.facts.best_of or ())


def _busy(row: StudyRow) -> NotFound:
    return NotFound(
        f"Workers are training {row.name} right now. Let them leave first (`hpo stop --study {row.name}`); then delete."
    )
