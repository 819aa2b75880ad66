"""Backup and restore: the databases and the artifacts in one file, as one instant left them.

Workers go on meanwhile. For a moment nobody may write the queue's tables, and in that moment a snapshot of each
database begins: together they are what a power failure of all workers at once would leave, which every worker knows
how to go on from. Of artifacts, what these snapshots name is taken; such files are only added. The two that are also
removed are treated apart: checkpoints, which are fetched first, and what `hpo delete` removes, which waits for us.
"""

import gzip
import hashlib
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import IO, Any

import psycopg
import sqlalchemy

from hpo import home as homes
from hpo import postgres
from hpo.errors import BackupError, NotFound
from hpo.queue import Queue, postgres_url
from hpo.services import Services
from hpo.settings import Settings
from hpo.tracking import Store, sha256_of

FORMAT = 1
MANIFEST = "manifest.json"  # the last file of a backup: one that was cut short has none
LOCK = "backup"  # held while a backup is made, and by whatever removes files for good
PATIENCE = "5s"  # that writers of the queue may take to end a transaction
INSTANTS = 5  # tries to catch an instant whose checkpoints are all still there
KEPT = ("done", "diverged", "pruned")  # states whose checkpoints are removed
MARK = "public.hpo_restore"  # table in the queue's database while a restore is under way

Report = Callable[[str], object]


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


def place(settings: Settings, services: Services) -> Place:
    """The databases and the server of these settings. Raises BackupError if MLflow's database is not known."""
    if settings.embedded:
        home = homes.read(settings.home.resolve())
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


# Backup


def backup(of: Place, target: Path, report: Report) -> dict[str, Any]:
    """Write the file `target`, whole or not at all; return its manifest. Raises BackupError."""
    if target.exists():
        raise BackupError(f"{target} exists already: a backup replaces nothing. Give another name, or remove it.")
    if not target.parent.is_dir():
        raise BackupError(f"There is no folder {target.parent} to write {target.name} into.")
    partial = target.with_name(target.name + ".partial")
    queue, store = Queue(of.databases["hpo"]), Store(of.tracking_uri)
    try:
        with (
            queue.lock(LOCK),
            tempfile.TemporaryDirectory(dir=target.parent, prefix=".hpo-backup-") as scratch,
            _private(partial) as stream,
            tarfile.open(fileobj=stream, mode="w") as tar,
        ):
            manifest = _write(of, _Archive(tar), store, Path(scratch), report)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        queue.close()
    partial.rename(target)
    folder = os.open(target.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    return manifest


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
        file.write_text(json.dumps(manifest | {"files": self.files}, indent=1))
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
            gone = [
                path
                for path, sha256 in needed.checkpoints.items()
                if f"artifacts/{path}" not in archive.files and _add_artifact(archive, store, path, scratch) != sha256
            ]
            if gone and attempt < INSTANTS - 1:
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
            if PurePosixPath(path).parent.name != "checkpoints" and f"artifacts/{path}" not in archive.files:
                _add_artifact(archive, store, path, scratch)
    saved = {name.removeprefix("artifacts/"): each["sha256"] for name, each in archive.files.items()}
    faults = [f"the checkpoint {path} is missing: its trial will start again from its beginning" for path in gone]
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
        writers = stack.enter_context(_connect(of.databases["hpo"]))
        connections = {name: stack.enter_context(_connect(url)) for name, url in of.databases.items()}
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
    found = Needed()
    runs: dict[str, str] = {}
    models: dict[str, str] = {}
    roots = "SELECT 'run', run_uuid, artifact_uri FROM runs UNION ALL SELECT 'model', model_id, artifact_location FROM "
    for kind, name, uri in mlflow.execute(roots + "logged_models WHERE lifecycle_stage = 'active'"):
        if not str(uri).startswith("mlflow-artifacts:/"):
            found.elsewhere += 1
            continue
        folder = str(uri).removeprefix("mlflow-artifacts:").strip("/")
        (runs if kind == "run" else models)[name] = folder
        found.folders.append(folder)
    jobs = "SELECT state, checkpoint, result FROM hpo.job WHERE checkpoint IS NOT NULL OR result IS NOT NULL"
    for state, checkpoint, result in hpo.execute(jobs):
        if state == "done" and result is not None and result.get("model_id") in models:
            folder = models[result["model_id"]]
            found.recorded |= {f"{folder}/{path}": sha256 for path, sha256 in result["files"].items()}
        if checkpoint is not None and state not in KEPT and checkpoint["run_id"] in runs:
            found.checkpoints[f"{runs[checkpoint['run_id']]}/{checkpoint['path']}"] = checkpoint["sha256"]
    return found


def _about(hpo: psycopg.Connection, mlflow: psycopg.Connection) -> dict[str, Any]:
    rows = hpo.execute("""
        SELECT s.name, count(*) FILTER (WHERE j.state = 'done'), count(j.id)
        FROM hpo.study s LEFT JOIN hpo.job j ON j.study = s.name AND j.kind = 'trial' GROUP BY s.name ORDER BY s.name
    """)
    return {
        "format": FORMAT,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: metadata.version(name) for name in ("hpo", "mlflow", "optuna")},
        "mlflow_schema": _schema(mlflow),
        "studies": {name: {"done": done, "trials": trials} for name, done, trials in rows},
    }


def _add_artifact(archive: _Archive, store: Store, path: str, scratch: Path) -> str | None:
    """The SHA-256 of a file that is now in the archive; None if it is gone from the store."""
    file = scratch / "file"
    try:
        store.fetch(path, file)
    except NotFound:
        return None
    return archive.add(f"artifacts/{path}", file)


def _dump(url: str, snapshot: str, file: Path) -> None:
    options = ("--format=plain", "--no-owner", "--no-privileges", "--no-comments", "--compress=gzip")
    _postgres("pg_dump", url, f"--snapshot={snapshot}", *options, f"--file={file}")


@contextmanager
def _private(path: Path) -> Iterator[IO[bytes]]:
    """A new file that only we can read, on the disk when it is closed."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


# Restore


def check(source: Path) -> dict[str, Any]:
    """The manifest of a backup after every byte of it was compared with it. Raises BackupError."""
    found: dict[str, dict[str, Any]] = {}
    manifest: dict[str, Any] | None = None
    try:
        with tarfile.open(source, "r:") as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None
                if member.name == MANIFEST:
                    manifest = json.load(stream)
                else:
                    sha256 = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
                    found[member.name] = {"sha256": sha256, "bytes": member.size}
    except (tarfile.TarError, ValueError, AssertionError, EOFError) as error:
        raise _damaged(source, str(error) or type(error).__name__) from None
    if manifest is None:
        raise _damaged(source, "its list of files, which comes last, is missing: it was cut short")
    if manifest.get("format") != FORMAT:
        raise BackupError(f"{source} has format {manifest.get('format')}, this hpo reads {FORMAT}. Use the hpo of it.")
    files = manifest["files"]
    if wrong := sorted(name for name in files.keys() | found.keys() if files.get(name) != found.get(name)):
        raise _damaged(source, f"{len(wrong)} of its files are not as they were saved, such as {wrong[0]}")
    return manifest


def restore(into: Place, source: Path, manifest: dict[str, Any], report: Report) -> None:
    """Fill empty databases and the artifact store from a checked backup. Goes on with a restore of the same file that
    was interrupted. Raises BackupError if something is there already."""
    mark = hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest()
    with _connect(into.databases["hpo"]) as hpo, _connect(into.databases["mlflow"]) as mlflow:
        _require_empty(into, hpo, mlflow, mark)
        found, expected = _schema(mlflow), manifest["mlflow_schema"]
        if found != expected:
            version = manifest["versions"]["mlflow"]
            raise BackupError(
                f"{source} was made with MLflow {version} (schema {expected}), the server at {into.tracking_uri} has "
                f"schema {found}. Nothing was restored. Restore it with MLflow {version}; then `mlflow db upgrade`."
            )
        with hpo.transaction():
            hpo.execute(f"DROP TABLE IF EXISTS {MARK}")
            hpo.execute(f"CREATE TABLE {MARK} AS SELECT %s AS backup", (mark,))
    store = Store(into.tracking_uri)
    report(f"Restoring {sum(name.startswith('artifacts/') for name in manifest['files'])} files.")
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(source, "r:") as tar:
        for member in tar:
            kind, _, path = member.name.partition("/")
            stream = tar.extractfile(member)
            if stream is None or kind not in ("artifacts", "databases"):
                continue
            file = Path(scratch, PurePosixPath(path).name)
            with file.open("wb") as copy:
                while chunk := stream.read(1 << 20):
                    copy.write(chunk)
            if kind == "artifacts":
                store.put(path, file)
                file.unlink()
        for name in ("mlflow", "hpo"):  # the queue last: with it the studies are there
            report(f"Restoring the database of {'the queue' if name == 'hpo' else 'MLflow'}.")
            _load(into.databases[name], Path(scratch, f"{name}.sql.gz"))
    queue = Queue(into.databases["hpo"])
    queue.install()  # brings tables of an earlier hpo up to date
    queue.give_all_back("its worker stayed with the original")
    queue.close()


def _require_empty(into: Place, hpo: psycopg.Connection, mlflow: psycopg.Connection, mark: str) -> None:
    found = []
    for connection, table, enough, what in (
        (hpo, "hpo.study", 0, "studies"),
        (hpo, "public.trials", 0, "trials of Optuna"),
        (mlflow, "public.experiments", 1, "experiments"),  # a server makes one
        (mlflow, "public.runs", 0, "runs"),
        (mlflow, "public.registered_models", 0, "registered models"),
    ):
        count = _count(connection, table)
        if count > enough:
            found.append(f"{count} {what}")
    if not found:
        return
    marked = _count(hpo, MARK) and hpo.execute(f"SELECT backup FROM {MARK}").fetchone() == (mark,)
    if not marked:
        raise BackupError(
            f"A backup is restored into empty databases only; expected nothing at {into.tracking_uri} and in the "
            f"queue's database, found {', '.join(found)}. Nothing was changed. Use another HPO_HOME, or databases that "
            "are empty."
        )


def _count(connection: psycopg.Connection, table: str) -> int:
    if connection.execute("SELECT to_regclass(%s)", (table,)).fetchone() == (None,):
        return 0
    (count,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone() or (0,)
    return int(count)


# What a server made when it started on the empty database goes first. The objects are dropped one by one, since who
# restores may own them without owning the schema.
_EMPTY = """
DROP SCHEMA IF EXISTS hpo CASCADE;
DO $$ DECLARE each record; BEGIN
    FOR each IN SELECT relname FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') LOOP
        EXECUTE format('DROP TABLE IF EXISTS public.%I CASCADE', each.relname);
    END LOOP;
    FOR each IN SELECT typname FROM pg_type WHERE typnamespace = 'public'::regnamespace AND typtype = 'e' LOOP
        EXECUTE format('DROP TYPE IF EXISTS public.%I CASCADE', each.typname);
    END LOOP;
    FOR each IN SELECT oid::regprocedure AS name FROM pg_proc WHERE pronamespace = 'public'::regnamespace LOOP
        EXECUTE 'DROP FUNCTION IF EXISTS ' || each.name || ' CASCADE';
    END LOOP;
END $$;
"""


def _load(url: str, dump: Path) -> None:
    """Replace what is in a database by a dump, in one transaction."""

    def script(to: IO[bytes]) -> None:
        to.write(_EMPTY.encode())
        with gzip.open(dump) as lines:
            for line in lines:
                if not line.startswith(b"SET transaction_timeout"):  # which a Postgres before 17 does not know
                    to.write(line)

    _postgres("psql", url, "--no-psqlrc", "--quiet", "--single-transaction", "--set=ON_ERROR_STOP=1", script=script)


def _damaged(source: Path, why: str) -> BackupError:
    return BackupError(f"{source} is not a whole backup ({why}). Nothing was restored. Use another copy of it.")


# Databases


def _url(url: str) -> sqlalchemy.URL:
    return postgres_url(url).set(drivername="postgresql")


def _connect(url: str) -> psycopg.Connection:
    """In autocommit mode. Raises BackupError."""
    try:
        return psycopg.connect(
            _url(url).render_as_string(hide_password=False),
            autocommit=True,
            options="-c timezone=UTC -c idle_in_transaction_session_timeout=0",  # an instant lasts as long as its dump
            connect_timeout=5,
        )
    except psycopg.OperationalError as error:
        raise BackupError(f"{_url(url).render_as_string()} cannot be reached: {error}") from None


def _schema(mlflow: psycopg.Connection) -> str | None:
    if mlflow.execute("SELECT to_regclass('public.alembic_version')").fetchone() == (None,):
        return None
    (found,) = mlflow.execute("SELECT version_num FROM public.alembic_version").fetchone() or (None,)
    return found


def _postgres(program: str, url: str, *options: str, script: Callable[[IO[bytes]], None] | None = None) -> None:
    """Run one of Postgres' programs on a database; its password goes by the environment. Raises BackupError."""
    parsed = _url(url)
    environment = os.environ | ({"PGPASSWORD": str(parsed.password)} if parsed.password else {})
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
