"""Files in MLflow's artifact store: the store as a whole, and checks of what a server lists."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import requests
from mlflow.entities import FileInfo
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from hpo import machine
from hpo.errors import ModelError, NotFound
from hpo.tracking import foreign, transfers
from hpo.tracking.errors import TrackingUnavailable, server

UPLOADS = 4  # requests at a time
MOST_ENTRIES = 200  # files and folders of a model, which has a dozen: a listing need not end by itself


class Store:
    """The artifact store behind an MLflow server as a whole, paths relative to its root; for backups."""

    def __init__(self, uri: str) -> None:
        foreign.configure(retries=2)  # 6 seconds; by default a full disk holds us for minutes
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # it announces each retry
        self._root = get_artifact_repository(foreign.STORE, tracking_uri=uri)

    def walk(self, folder: str) -> Iterator[str]:
        """Yield the paths of all files below a folder."""
        with server():
            entries = self._root.list_artifacts(folder)
        for info in entries:
            if info.is_dir:
                yield from self.walk(info.path)
            else:
                yield info.path

    @server()
    def fetch(self, path: str, to: Path) -> None:
        """Download one file. Raise NotFound if there is none."""
        try:
            transfers.download_file(self._root, path, to)
        except requests.HTTPError as error:
            if transfers.is_missing(error):
                raise NotFound(f"The artifact store has no file {path}.") from None
            raise

    @server()
    def put(self, path: str, file: Path) -> None:
        """Upload one file, whose name is the path's last part; an existing one is replaced."""
        parent = str(PurePosixPath(path).parent)
        self._root.log_artifact(str(file), None if parent == "." else parent)


def upload(repository: ArtifactRepository, files: Mapping[str, Path], *, is_proved: bool) -> None:
    """Upload files, by their paths in the store, UPLOADS of them at a time if so many threads may be started.

    Raise TrackingUnavailable where they have not arrived. `is_proved`: this store has kept what it was given before,
    and is asked again only about files that MLflow does not say it has stored.
    """

    def put(path: str) -> bool:
        return transfers.put_file(repository, files[path], path.rpartition("/")[0] or None)

    if len(files) > 1 and machine.may_start(UPLOADS):
        with ThreadPoolExecutor(UPLOADS) as threads:
            answers = list(threads.map(put, files))
    else:
        answers = [put(path) for path in files]
    unsure = {
        path: file for (path, file), answer in zip(files.items(), answers, strict=True) if not (answer and is_proved)
    }
    if unsure:
        folders = {path.rpartition("/")[0] or None for path in unsure}
        check_sizes(unsure, [info for folder in folders for info in repository.list_artifacts(folder)])


@server()
def delete(repository: ArtifactRepository, path: str | None = None) -> None:
    """Delete a file or folder, or all files there are; none is no error."""
    try:
        transfers.delete_files(repository, path)
    except requests.HTTPError as error:
        if not transfers.is_missing(error):
            raise


@server()
def entries(repository: ArtifactRepository, folder: str) -> list[str]:
    """Return the paths of the files and folders in a folder; none if there is no such folder."""
    return [info.path for info in repository.list_artifacts(folder)]


@server()
def paths(repository: ArtifactRepository) -> set[str]:
    """Return the paths of the files of one model, as `stored_files` does."""
    return {info.path for info in stored_files(repository)}


def stored_files(repository: ArtifactRepository) -> Iterator[FileInfo]:
    """Yield the files of one model that lie in the artifact store. Raise ModelError where there are far too many."""
    folders: list[str | None] = [None]
    entries = 0
    while folders:
        for info in repository.list_artifacts(folders.pop()):
            entries += 1
            if entries > MOST_ENTRIES:
                raise ModelError(
                    f"The artifact store lists more than {MOST_ENTRIES} files in one model. Do not use it."
                )
            if info.is_dir:
                folders.append(info.path)
            else:
                yield info


def check_sizes(files: Mapping[str, Path], listed: Iterable[FileInfo]) -> None:
    """Raise TrackingUnavailable unless these files, by path in the store, are as large as the store lists them.

    A login page answers a download with a status that says all is well.
    """
    sizes = {info.path: info.file_size for info in listed}
    for path, file in files.items():
        size = file.stat().st_size
        if path not in sizes or sizes[path] not in (None, size):
            raise TrackingUnavailable(
                f"the artifact store has {sizes.get(path, 0)} bytes of {path}, here it has {size}"
            )
