"""The model registry: versions registered once, aliases, and downloads checked against the database's hashes."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities.model_registry import ModelVersion, RegisteredModel

from hpo import files
from hpo.errors import ModelError, NotFound
from hpo.files import sha256_of, sha256_of_files
from hpo.text import cut, cut_table
from hpo.tracking import artifacts, foreign, transfers
from hpo.tracking.client import KEY, OWNER, Tracker, pages, quoted
from hpo.tracking.errors import ABSENT, EXISTS, passing, server

CHAMPION = "champion"  # alias of the best version of all studies on a problem
SUMS = "SHA256SUMS"  # marks a folder as a download
TABLE = "\n\n| version |"


@dataclass(frozen=True, kw_only=True)
class Version:
    """One version of a registered model."""

    number: int
    key: str
    run_id: str
    model_id: str
    description: str
    aliases: tuple[str, ...]
    tags: dict[str, str]


@server()
def ensure_registered_model(
    tracker: Tracker, name: str, *, description: str, tags: Mapping[str, Any], owner: str
) -> bool:
    """Make the registered model, or bring the description and tags of an existing one up to date; false, and nothing is
    touched, if it belongs to another queue's database than `owner`.

    A table of versions at the end of the description stays.
    """
    words = {tag: cut(str(value), foreign.LONGEST_MODEL_TAG) for tag, value in tags.items()} | {OWNER: owner}
    with passing(EXISTS):
        tracker.client.create_registered_model(name, tags=words, description=_page(description))
        return True
    if not belongs(tracker, name, owner):
        return False
    model = tracker.client.get_registered_model(name)
    _, mark, table = (model.description or "").partition(TABLE)
    _describe(tracker, model, _page(description, mark + table))
    for tag, value in words.items():
        if model.tags.get(tag) != value:
            tracker.client.set_registered_model_tag(name, tag, value)
    return True


@server()
def belongs(tracker: Tracker, name: str, owner: str) -> bool:
    """Whether there is a registered model of this name that belongs to this queue's database.

    One that an earlier hpo made does not say so; then its versions do. With no version of another's it is anybody's.
    """
    with passing(ABSENT):
        owners = {tracker.client.get_registered_model(name).tags.get(OWNER)} - {None}
        owners = owners or {version.tags[OWNER] for version in _versions(tracker, name) if OWNER in version.tags}
        return not owners or owner in owners
    return False


@server()
def describe_versions(tracker: Tracker, name: str, table: str) -> None:
    """Close the registered model's description with this table of its versions, which begins like TABLE, or with none.

    MLflow's page cuts the versions' own descriptions off after 32 letters. Of many versions the first rows are shown.
    """
    model = tracker.client.get_registered_model(name)
    _describe(tracker, model, _page((model.description or "").partition(TABLE)[0], table))


def _describe(tracker: Tracker, model: RegisteredModel, text: str) -> None:
    if text != (model.description or ""):
        tracker.client.update_registered_model(model.name, text)


def _page(text: str, table: str = "") -> str:
    """Return as much of a registered model's description as MLflow takes: the text first, then rows of the table."""
    text = cut(text, foreign.LONGEST_DESCRIPTION // 2)
    return text + (f"\n\n{cut_table(table.strip(), foreign.LONGEST_DESCRIPTION - len(text) - 2)}" if table else "")


@server()
def register(
    tracker: Tracker,
    *,
    model_name: str,
    owner: str,
    key: str,
    model_id: str,
    run_id: str,
    description: str,
    tags: Mapping[str, Any],
) -> int:
    """Return the number of the one version of this run with this key of the queue's database `owner`.

    It is made of the finished model if need be.

    Two at once agree on the lower number and delete the other, as they do with one that a deleted study left under the
    key. Description and tags are brought up to date. A version of an earlier hpo has the key alone, and is adopted.
    """
    description = cut(description, foreign.LONGEST_DESCRIPTION)
    words = {name: cut(str(value), foreign.LONGEST_VERSION_TAG) for name, value in tags.items()}
    words |= {KEY: f"{owner}/{key}", OWNER: owner}

    def ours() -> list[ModelVersion]:
        same = {OWNER: (owner,), KEY: (words[KEY], key)}
        versions = _versions(tracker, model_name)
        return [one for one in versions if all(one.tags.get(tag) in values for tag, values in same.items())]

    if not any(version.run_id == run_id for version in ours()):
        tracker.client.create_model_version(
            model_name,
            source=f"models:/{model_id}",
            run_id=run_id,
            model_id=model_id,
            tags=words,
            description=description,
            await_creation_for=0,
        )
    versions = ours()
    kept = next((version for version in versions if version.run_id == run_id), None)
    if kept is None:
        raise NotFound(f"The version of {model_name} that was just registered is gone: somebody deleted it.")
    for version in versions:
        if version is not kept:
            tracker.client.delete_model_version(model_name, version.version)
    if kept.description != description:
        tracker.client.update_model_version(model_name, kept.version, description)
    set_tags(tracker, model_name, _version(kept, {}), words)
    return int(kept.version)


@server()
def set_tags(tracker: Tracker, model_name: str, version: Version, tags: Mapping[str, Any]) -> None:
    """Set those tags of a version that it does not have like this yet."""
    for tag, value in tags.items():
        word = cut(str(value), foreign.LONGEST_VERSION_TAG)
        if version.tags.get(tag) != word:
            tracker.client.set_model_version_tag(model_name, str(version.number), tag, word)


@server()
def versions(tracker: Tracker, model_name: str) -> list[Version]:
    """Return all versions, the oldest first; none if no such model is registered."""
    with passing(ABSENT):
        aliases = tracker.client.get_registered_model(model_name).aliases  # the versions of a search come without
        return [_version(version, aliases) for version in _versions(tracker, model_name)]
    return []


def _versions(tracker: Tracker, model_name: str) -> list[ModelVersion]:
    condition = f"name = {quoted(model_name)}"
    versions = pages(lambda token: tracker.client.search_model_versions(condition, page_token=token))
    return sorted(versions, key=lambda version: int(version.version))


def _version(version: ModelVersion, aliases: Mapping[str, str]) -> Version:
    return Version(
        number=int(version.version),
        key=version.tags.get(KEY, ""),
        run_id=version.run_id or "",
        model_id=version.model_id or (version.source or "").removeprefix("models:/"),  # a search gives no id
        description=version.description or "",
        aliases=tuple(sorted(alias for alias, number in aliases.items() if int(number) == int(version.version))),
        tags=dict(version.tags),
    )


@server()
def get_alias(tracker: Tracker, model_name: str, alias: str) -> Version | None:
    """Return the version the alias points at; None if there is no such alias or model."""
    return next((version for version in versions(tracker, model_name) if alias in version.aliases), None)


def find(tracker: Tracker, model_name: str, alias: str) -> Version:
    """Return a version by alias or number. Raise NotFound, naming what there is."""
    registered = versions(tracker, model_name)
    for version in registered:
        if alias in version.aliases or alias == str(version.number):
            return version
    names = [f"@{name}" for version in registered for name in version.aliases]
    names += [str(version.number) for version in registered]
    raise NotFound(
        f"{model_name} has no version '{alias}'. There are: {', '.join(names) or 'none yet'}.{why_without(alias)}"
    )


def why_without(alias: str) -> str:
    """Return a further sentence for the message that no version has an alias: a command that says why."""
    return f" `hpo promote --study NAME` says why none is @{CHAMPION}." if alias == CHAMPION else ""


@server()
def set_alias(tracker: Tracker, model_name: str, alias: str, version: int) -> None:
    tracker.client.set_registered_model_alias(model_name, alias, str(version))


@server()
def delete_alias(tracker: Tracker, model_name: str, alias: str) -> None:
    """Remove the alias; one that is not there is no error."""
    tracker.client.delete_registered_model_alias(model_name, alias)


@server()
def delete_version(tracker: Tracker, model_name: str, version: int) -> None:
    """Delete one version and its aliases; one that is not there is no error."""
    with passing(ABSENT):
        tracker.client.delete_model_version(model_name, str(version))


def download(
    tracker: Tracker, *, model_name: str, version: int | str, folder: Path, expected_sha256: Mapping[str, str]
) -> Path:
    """Download a version (number or alias) to `folder`, as `download_model` does. Raise NotFound."""
    model_id = find(tracker, model_name, str(version)).model_id
    return download_model(tracker, model_id=model_id, folder=folder, expected_sha256=expected_sha256)


def download_model(tracker: Tracker, *, model_id: str, folder: Path, expected_sha256: Mapping[str, str]) -> Path:
    """Download a finished model, registered or not: every file of `expected_sha256`, checked, and no other.

    Nothing is at `folder` until all is well. What is there already must be empty or an earlier, untouched download, and
    is replaced. Raise NotFound if there is no such model, ModelError if files are missing, changed or unexpected, or
    the folder is taken.
    """
    uri = _model_uri(tracker, model_id)
    folder = Path(os.path.abspath(folder))  # not resolved: a link is refused below
    for path in expected_sha256:
        _check_path(path)
    _check_target(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name[:40]}-") as temporary:
        new = Path(temporary, "new")
        new.mkdir()
        _fetch(tracker, uri, f"model {model_id}", new, expected_sha256)
        _verify(new, expected_sha256)
        files.write(new / SUMS, expected_sha256)
        _check_target(folder)  # it may have changed during the download
        if folder.exists():
            folder.rename(Path(temporary, "old"))
        new.rename(folder)
    return folder


def _check_path(path: str) -> None:
    """ModelError unless it is a plain relative path below the model's folder, on any system, and one line of SUMS."""
    if not files.is_plain(path) or path == SUMS:
        raise ModelError(f"The list of the model's files has the odd path {path!r}: nothing was downloaded.")


def _check_target(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ModelError(f"{folder} exists and is not a folder: name another one, or one that does not exist yet.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    listed = files.listed(folder / SUMS)
    files_there = sha256_of_files(folder).items()
    # Python leaves a cache beside the lines that plain MLflow runs for a model with inputs.
    present = {path: {sha256} for path, sha256 in files_there if path != SUMS and "__pycache__" not in path.split("/")}
    if not listed or present != listed or any(path.is_symlink() for path in folder.rglob("*")):
        raise ModelError(
            f"{folder} exists and is not an unchanged earlier download: nothing in it was touched. "
            "Name another folder, or move this one away."
        )


@server()
def _model_uri(tracker: Tracker, model_id: str) -> str:
    """Return where the files of a finished model lie. Raise NotFound."""
    with passing(ABSENT):
        return tracker.client.get_logged_model(model_id).artifact_location
    raise NotFound(f"MLflow has no model {model_id}.")


@server()
def _fetch(tracker: Tracker, uri: str, what: str, folder: Path, expected_sha256: Mapping[str, str]) -> None:
    repository = tracker.repository(uri)
    stored = {info.path: info for info in artifacts.stored_files(repository)}
    if missing := sorted(expected_sha256.keys() - stored.keys()):
        raise ModelError(f"{what} lacks files in the artifact store: {', '.join(missing)}. Nothing was downloaded.")
    if unexpected := sorted(stored.keys() - expected_sha256.keys()):
        raise ModelError(f"{what} has files that were not logged with it: {', '.join(unexpected)}. Do not use it.")
    for path in sorted(expected_sha256):
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        transfers.download_file(repository, path, file, size=stored[path].file_size or 0)
    artifacts.check_sizes({path: folder / path for path in expected_sha256}, stored.values())


def _verify(folder: Path, expected_sha256: Mapping[str, str]) -> None:
    for path, expected in expected_sha256.items():
        file = folder / path
        inside = file.resolve() == Path(folder.resolve(), path)  # no link on the way
        if not (inside and file.is_file()):
            raise ModelError(f"{path} did not arrive as a plain file. Nothing was downloaded.")
        if (actual := sha256_of(file)) != expected:
            raise ModelError(
                f"{path} is not the file that was logged: expected SHA-256 {expected}, found {actual}. "
                "It was changed or damaged in the artifact store. Nothing was downloaded."
            )
