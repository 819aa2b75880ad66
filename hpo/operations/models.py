"""Registered models."""

from dataclasses import dataclass
from pathlib import Path

from hpo.errors import NotFound
from hpo.operations.connection import Connection, connect
from hpo.operations.reports import closed
from hpo.scores import champion
from hpo.tracking import registry
from hpo.tracking.registry import Version


@dataclass(frozen=True, kw_only=True)
class Download:
    """A registered model that was downloaded."""

    name: str  # in MLflow's registry
    version: Version
    folder: Path
    files: int  # each as recorded in the database


def download(folder: Path, *, alias: str = "champion", model: str | None = None, study: str | None = None) -> Download:
    """Download a registered model into a new folder, and check every file against its hash in the database.

    `alias` may be a version number. Without `model` it is the newest study's model that has such a version. `study`:
    the best model of this study instead. Raise NotFound if there is none, ModelError if a file is not as recorded.
    """
    with connect() as connection:
        queue, tracker = connection.queue, connection.tracker
        if study is not None:
            name, alias = _winner(connection, study)
        else:
            name = _with_alias(connection, alias, [model] if model else champion.downloadable(queue, tracker))
        version = registry.find(tracker, name, alias)
        job = queue.by_run(version.run_id)
        if job is None or job.result is None:
            raise NotFound(
                f"{name} version {version.number} was not made by a study of this database: its hashes are unknown."
            )
        hashes = job.result.files
        path = registry.download(
            tracker, model_name=name, version=version.number, folder=folder, expected_sha256=hashes
        )
        return Download(name=name, version=version, folder=path, files=len(hashes))


def _with_alias(connection: Connection, alias: str, candidates: list[str]) -> str:
    """Return the first of these registered models that has the alias, else the first."""
    if not candidates:
        done = "closed" if connection.queue.studies() else "planned"
        raise NotFound(f"No study has been {done} here, so there is no model. `hpo run --study grid` makes one.")
    with_alias = (name for name in candidates if registry.get_alias(connection.tracker, name, alias) is not None)
    return next(with_alias, candidates[0])


def _winner(connection: Connection, study: str) -> tuple[str, str]:
    """Return registered model and version of a closed study's best trial. Raise NotFound, with the reason, if none."""
    row = connection.queue.study(study)
    result = closed(row, connection.queue.jobs(row.name)).closing
    if result is None or result.winner is None or result.winner.version is None or result.model_name is None:
        raise NotFound(f"The study {row.name} has registered no model: {result.reason if result else 'unknown'}.")
    return result.model_name, str(result.winner.version)
