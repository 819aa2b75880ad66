"""Files on their way to and from an artifact store: the inside of MLflow's client that this takes.

All of it was checked with MLflow 3.17; tests/service/test_tracking_foreign.py checks it with the installed version.
MLflow is imported where it is used, since that takes a second.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.tracking.foreign import error_code

if TYPE_CHECKING:
    import requests
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

# Bytes a second: a server answers only when its object store has taken, or given, the whole file.
SLOWEST = 250_000


def download_file(repository: "ArtifactRepository", path: str, to: Path, *, size: int = 0) -> None:
    """Download one file, of `size` bytes if that is known.

    The public call lists its folder first, takes every error for a file that is missing, and waits as long for the
    first byte of a large file as for any answer.
    """
    from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

    if not isinstance(repository, MlflowArtifactsRepository) or repository._is_multipart_download_enabled():
        repository._download_file(path, str(to))
        return
    answer = _transfer(repository, path, "GET", size=size, stream=True)
    with to.open("wb") as file:
        for part in answer.iter_content(2**20):
            file.write(part)


def _transfer(repository: Any, path: str, method: str, *, size: int, **what: Any) -> Any:
    """Return the server's answer about a file of `size` bytes, which begins when its store has all of the file."""
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT
    from mlflow.utils.rest_utils import augmented_raise_for_status, http_request

    usual = MLFLOW_HTTP_REQUEST_TIMEOUT.get()
    timeout = (usual, usual + size / SLOWEST)  # seconds: to connect, to wait
    answer = http_request(repository._host_creds, f"/{path}", method, timeout=timeout, **what)
    augmented_raise_for_status(answer)
    return answer


def put_file(repository: "ArtifactRepository", file: Path, folder: str | None) -> bool:
    """Upload one file into a folder of the store; return whether the answer is the one of MLflow's own server.

    The public call looks at the status alone, and a login page has a status that says all is well.
    """
    from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
    from mlflow.utils.mime_type_utils import _guess_mime_type

    if not isinstance(repository, HttpArtifactRepository) or repository._should_multipart_upload(str(file)):
        repository.log_artifact(str(file), folder)
        return False
    path, kind = (f"{folder}/" if folder else "") + file.name, {"Content-Type": _guess_mime_type(file.name)}
    with file.open("rb") as data:
        answer = _transfer(repository, path, "PUT", size=file.stat().st_size, data=data, extra_headers=kind)
    return answer.content.strip() in (b"", b"{}")


def delete_files(repository: "ArtifactRepository", path: str | None = None) -> None:
    """Delete a file or folder, or all there is. Some stores raise requests.HTTPError for one that is missing."""
    delete: Callable[..., None] = repository.delete_artifacts
    delete(path)


def is_missing(error: "requests.HTTPError") -> bool:
    """Whether MLflow itself says that there is no such file."""
    response = error.response
    return response is not None and response.status_code == 404 and error_code(response.text) is not None
