"""Backup: the databases and the artifacts in one file, as one instant left them.

Workers go on meanwhile. For a moment nobody may write the queue's tables, and in that moment a snapshot of each
database begins: together they are what a power failure of all workers at once would leave, which every worker knows
how to go on from. Of artifacts, what these snapshots name is taken; such files are only added. The two that are also
removed are treated apart: checkpoints, which are fetched first, and what `hpo delete` removes, which waits for us.
"""

import glob
import json
import logging
import os
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self

import psycopg
import sqlalchemy

from hpo.errors import BackupError, NotFound, ServiceError, disk_is_full
from hpo.files import PRIVATE, new_file, sha256_of, sync
from hpo.operations.connection import connect
from hpo.queue import SCHEMA_VERSION, Queue, State, postgres_url
from hpo.services import daemon, foreign, postgres
from hpo.services import home as homes
from hpo.services.serving import Services
from hpo.settings import Settings
from hpo.tracking.artifacts import Store
from hpo.tracking.foreign import STORE

FORMAT = 1
ALIVE = "backup.life"  # lock of the process that writes; marks the folder as a backup's
MANIFEST = "manifest.json"  # the last file of a backup: one that was cut short has none
LOCK = "backup"  # held while a backup is made or restored, and by whatever removes files for good
WAITS = "Waiting for a backup, a restore or a deletion that is under way on this database."
PATIENCE = "5s"  # that writers of the queue may take to end a transaction
INSTANTS = 5  # tries to catch an instant whose checkpoints are all still there
KEPT = (State.DONE, State.DIVERGED, State.PRUNED)  # states whose checkpoints are removed
MARK = "public.hpo_restore"  # table in both databases while a restore is under way

Report = Callable[[str], object]

log = logging.getLogger("hpo.api")


@dataclass(frozen=True, kw_only=True)
class Backup:
    """What is in a backup file."""

    at: str  # time of the snapshot
    studies: Mapping[str, tuple[int, int]]  # finished and planned trials, by the study's name
    artifacts: int  # files
    faults: list[str]  # what was missing or damaged already

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Self:
        """Return the contents that a manifest lists."""
        return cls(
            at=manifest["at"],
            studies={name: (study["done"], study["trials"]) for name, study in manifest["studies"].items()},
            artifacts=sum(name.startswith("artifacts/") for name in manifest["files"]),
            faults=manifest.get("faults", []),
        )


@dataclass(frozen=True)
class Place:
    """What is backed up or restored into."""

    databases: dict[str, str] = field(repr=False)  # URL of each, with passwords: hpo and mlflow
    tracking_uri: str


@dataclass
class Needed:
    """What the snapshots say of artifacts."""

    folders: list[str] = field(default_factory=list)  # of runs and models, relative to the store
    checkpoints: dict[str, str] = field(default_factory=dict)  # SHA-256 by path
    recorded: dict[str, str] = field(default_factory=dict)  # of models: SHA-256 by path
    elsewhere: int = 0  # runs and models whose files are not behind the MLflow server


def backup(file: Path, *, say: Report = log.info) -> Backup:
    """Save the databases and all artifacts in a new file, while workers continue.

    `say` gets a line for each step. Raise BackupError if the file exists or cannot be written.
    """
    with connect() as connection:
        return Backup.of(write(place(connection.settings, connection.services), file.absolute(), say))


def place(settings: Settings, services: Services) -> Place:
    """Return the databases and the server of these settings. Raise BackupError if MLflow's database is not known."""
    if settings.embedded:
        home = homes.read(homes.resolved(settings.home))
        assert home is not None, "its services run"
        mlflow: str | None = postgres.url(home, "mlflow")
    else:
        mlflow = settings.mlflow_database_url
    if mlflow is None:
        raise BackupError(
            "HPO_DATABASE_URL and MLFLOW_TRACKING_URI are set, so the database of that MLflow server has to be named, "
            "too: set MLFLOW_BACKEND_STORE_URI to the postgresql:// URL the server was started with. (Or unset the "
            "two, if the services of HPO_HOME are meant.)"
        )
    return Place({"hpo": services.database_url, "mlflow": mlflow}, services.tracking_uri)


def write(of: Place, target: Path, report: Report) -> dict[str, Any]:
    """Write the file `target`, whole or not at all; return its manifest. Raise BackupError."""
    _require_absent(target)
    if not target.parent.is_dir():
        raise BackupError(f"There is no folder {target.parent} to write {target.name} into.")
    queue, store = Queue(of.databases["hpo"]), Store(of.tracking_uri)
    try:
        with (
            queue.lock(LOCK, waits=partial(report, WAITS)),
            _scratch(target) as scratch,
        ):
            whole = scratch / "whole"
            with new_file(whole, mode=PRIVATE) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
                manifest = _write(of, _Archive(tar), store, scratch, report)
            _put(whole, target)
    except Exception as error:
        if disk_is_full(error):
            raise BackupError(
                f"{target} cannot be written: the disk is full or read-only. Nothing is left of it."
            ) from error
        raise
    finally:
        queue.close()
    sync(target.parent)
    return manifest


def _require_absent(target: Path) -> None:
    if os.path.lexists(target):  # a link that leads nowhere, too
        raise BackupError(f"{target} exists already: a backup replaces nothing. Give another name, or remove it.")


def _put(whole: Path, target: Path) -> None:
    """Give the file its name, if nobody else has taken that meanwhile."""
    try:
        os.link(whole, target)  # unlike a rename it replaces nothing
    except FileExistsError:
        _require_absent(target)
    except OSError:  # a file system without hard links
        _require_absent(target)
        whole.rename(target)


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """An empty folder beside the target that only we can read, removed afterwards; so are those of killed backups."""
    ending = ".partial"
    for other in target.parent.glob(f".{glob.escape(target.name)}.*{ending}"):
        about = other.lstat()
        if stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and (other / ALIVE).exists():
            with suppress(ServiceError), daemon.taken(other / ALIVE):  # unless it goes on
                shutil.rmtree(other, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=ending, dir=target.parent))
    try:
        with daemon.taken(folder / "lock") as _:
            (folder / "lock").rename(folder / ALIVE)  # never seen unlocked while we live
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Archive:
    """A tar file being written, and what is in it so far."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self.tar = tar
        self.files: dict[str, dict[str, Any]] = {}

    def add(self, name: str, file: Path) -> str:
        """Move a file in; returns its SHA-256."""
        sha256, size = sha256_of(file), file.stat().st_size
        self._add(name, file)
        self.files[name] = {"sha256": sha256, "bytes": size}
        file.unlink()
        return sha256

    def finish(self, manifest: dict[str, Any], scratch: Path) -> None:
        file = scratch / MANIFEST
        file.write_text(json.dumps(manifest | {"files": self.files}, indent=1), encoding="utf-8")
        self._add(MANIFEST, file)

    def _add(self, name: str, file: Path) -> None:
        about = tarfile.TarInfo(name)
        about.size, about.mode, about.mtime = file.stat().st_size, 0o600, int(file.stat().st_mtime)
        with file.open("rb") as stream:
            self.tar.addfile(about, stream)


def _write(of: Place, archive: _Archive, store: Store, scratch: Path, report: Report) -> dict[str, Any]:
    for attempt in range(INSTANTS):
        with _instant(of) as snapshots:
            hpo, mlflow = (connection for connection, _ in snapshots.values())
            needed, manifest = _needed(hpo, mlflow), _about(hpo, mlflow)
            sums = {path: _add_artifact(archive, store, path, scratch) for path in needed.checkpoints}
            if None in sums.values() and attempt < INSTANTS - 1:
                continue  # its worker has just replaced it: another instant
            for name, (_, snapshot) in snapshots.items():
                report(f"Saving the database of {'the queue' if name == 'hpo' else 'MLflow'}.")
                file = scratch / f"{name}.sql.gz"
                _dump(of.databases[name], snapshot, file)
                archive.add(f"databases/{file.name}", file)
        break
    report(f"Saving the files of {len(needed.folders)} runs and models.")
    for folder in needed.folders:
        for path in store.walk(folder):
            if PurePosixPath(path).parent.name != "checkpoints":
                _add_artifact(archive, store, path, scratch)
    saved = {name.removeprefix("artifacts/"): entry["sha256"] for name, entry in archive.files.items()}
    faults = [
        f"the checkpoint {path} is {'missing' if sums[path] is None else 'damaged'}: its trial will start again from "
        "its beginning"
        for path, sha256 in needed.checkpoints.items()
        if sums[path] != sha256
    ]
    faults += [
        f"{path} is {'missing' if path not in saved else 'not the file that was recorded'}"
        for path, sha256 in needed.recorded.items()
        if saved.get(path) != sha256
    ]
    if needed.elsewhere:
        faults.append(f"{needed.elsewhere} runs or models keep their files elsewhere than behind the MLflow server")
    manifest["faults"] = faults
    archive.finish(manifest, scratch)
    return manifest | {"files": archive.files}


@contextmanager
def _instant(of: Place) -> Iterator[dict[str, tuple[psycopg.Connection, str]]]:
    """A read-only transaction on each database, all of one instant, and the names of their snapshots."""
    with ExitStack() as stack:
        snapshots = {}
        writers = stack.enter_context(open_database(of.databases["hpo"]))
        connections = {name: stack.enter_context(open_database(url)) for name, url in of.databases.items()}
        for connection in connections.values():
            connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        try:
            writers.execute("BEGIN")
            writers.execute(f"SET LOCAL lock_timeout = '{PATIENCE}'")
            writers.execute("LOCK TABLE hpo.study, hpo.job, hpo.epoch IN SHARE MODE")  # reading goes on
        except psycopg.errors.LockNotAvailable:
            raise BackupError(
                f"A worker has held the queue's tables for {PATIENCE}; it may be frozen. Try again in half a minute."
            ) from None
        for name, connection in connections.items():
            (snapshot,) = connection.execute("SELECT pg_export_snapshot()").fetchone() or ("",)
            snapshots[name] = (connection, snapshot)
        writers.execute("COMMIT")
        yield snapshots


def _needed(hpo: psycopg.Connection, mlflow: psycopg.Connection) -> Needed:
    needed = Needed()
    runs: dict[str, str] = {}
    models: dict[str, str] = {}
    for kind, name, uri in foreign.artifact_folders(mlflow):
        if not uri.startswith(STORE):
            needed.elsewhere += 1
            continue
        folder = uri.removeprefix(STORE).strip("/")
        (runs if kind == "run" else models)[name] = folder
        needed.folders.append(folder)
    jobs = "SELECT state, checkpoint, result FROM hpo.job WHERE checkpoint IS NOT NULL OR result IS NOT NULL"
    for state, checkpoint, result in hpo.execute(jobs):
        if state == State.DONE and result is not None and result.get("model_id") in models:
            folder = models[result["model_id"]]
            needed.recorded |= {f"{folder}/{path}": sha256 for path, sha256 in result["files"].items()}
        if checkpoint is not None and state not in KEPT and checkpoint["run_id"] in runs:
            needed.checkpoints[f"{runs[checkpoint['run_id']]}/{checkpoint['path']}"] = checkpoint["sha256"]
    return needed


def _about(hpo: psycopg.Connection, mlflow: psycopg.Connection) -> dict[str, Any]:
    rows = hpo.execute("""
        SELECT s.name, count(*) FILTER (WHERE j.state = 'done'), count(j.id)
        FROM hpo.study s LEFT JOIN hpo.job j ON j.study = s.name AND j.kind = 'trial' GROUP BY s.name ORDER BY s.name
    """)
    return {
        "format": FORMAT,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: metadata.version(name) for name in ("hpo", "mlflow", "optuna")},
        "queue_schema": SCHEMA_VERSION,  # which the tables were brought to before
        "optuna_schema": foreign.schema(hpo),
        "mlflow_schema": foreign.schema(mlflow),
        "studies": {name: {"done": done, "trials": trials} for name, done, trials in rows},
    }


def _add_artifact(archive: _Archive, store: Store, path: str, scratch: Path) -> str | None:
    """The SHA-256 of a file that is now in the archive; None if it is gone from the store."""
    if entry := archive.files.get(f"artifacts/{path}"):
        return str(entry["sha256"])
    file = scratch / "file"
    try:
        store.fetch(path, file)
    except NotFound:
        return None
    return archive.add(f"artifacts/{path}", file)


def _dump(url: str, snapshot: str, file: Path) -> None:
    options = ("--format=plain", "--no-owner", "--no-privileges", "--no-comments", "--compress=gzip")
    mark = f"--exclude-table={MARK}"  # an interrupted restore is none of the copy's business
    run("pg_dump", url, f"--snapshot={snapshot}", *options, mark, f"--file={file}")


# Databases


def _url(url: str) -> sqlalchemy.URL:
    return postgres_url(url).set(drivername="postgresql")


def open_database(url: str) -> psycopg.Connection:
    """Return a connection to one database, in autocommit mode.

    Raise BackupError, also where a pooler (pgbouncer) drops what a session relies on.
    """
    try:
        connection = psycopg.connect(
            _url(url).render_as_string(hide_password=False),
            autocommit=True,
            # An instant lasts as long as its dump.
            options="-c timezone=UTC -c idle_in_transaction_session_timeout=0 -c hpo.direct=yes",
            client_encoding="utf8",
            connect_timeout=5,
        )
    except psycopg.OperationalError as error:
        if "startup parameter" not in str(error):
            raise BackupError(f"{_url(url).render_as_string()} cannot be reached: {error}") from None
    else:
        if connection.execute("SELECT current_setting('hpo.direct', true)").fetchone() == ("yes",):
            return connection
        connection.close()
    raise BackupError(
        f"{_url(url).render_as_string()} is a pooler (pgbouncer), and a backup needs whole sessions: name the port "
        "of Postgres itself in HPO_DATABASE_URL and MLFLOW_BACKEND_STORE_URI for this command. Nothing was changed."
    )


def run(program: str, url: str, *options: str, script: Callable[[IO[bytes]], None] | None = None) -> None:
    """Run one of Postgres' programs on a database; its password goes by the environment. Raises BackupError."""
    parsed = _url(url)
    environment = os.environ | {"PGCLIENTENCODING": "UTF8"}
    environment |= {"PGPASSWORD": str(parsed.password)} if parsed.password else {}
    address = parsed._replace(password=None).render_as_string()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [str(postgres.program(program)), f"--dbname={address}", *options],
            stdin=subprocess.PIPE if script else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            env=environment,
        )
        try:
            if script is not None:
                assert process.stdin is not None
                try:
                    script(process.stdin)
                    process.stdin.close()
                except BrokenPipeError:
                    pass  # it ended early, and has said why
        except BaseException:
            process.kill()  # so that a script that is not whole is not committed
            raise
        finally:
            process.wait()
        if process.returncode:
            said.seek(0)
            raise BackupError(f"{program} failed on {address}: {said.read().decode(errors='replace').strip()}")
