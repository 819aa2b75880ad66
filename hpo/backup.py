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
import secrets
import shutil
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
from hpo import postgres, sampling
from hpo.errors import BackupError, NotFound, disk_is_full
from hpo.queue import GIVE_ALL_BACK, SCHEMA_VERSION, Queue, postgres_url
from hpo.services import Services
from hpo.settings import Settings
from hpo.tracking import Store, TrackingUnavailable, sha256_of

FORMAT = 1
MANIFEST = "manifest.json"  # the last file of a backup: one that was cut short has none
LOCK = "backup"  # held while a backup is made or restored, and by whatever removes files for good
PATIENCE = "5s"  # that writers of the queue may take to end a transaction
LOAD_PATIENCE = "30s"  # that others may hold tables which a restore replaces
INSTANTS = 5  # tries to catch an instant whose checkpoints are all still there
KEPT = ("done", "diverged", "pruned")  # states whose checkpoints are removed
MARK = "public.hpo_restore"  # table in both databases while a restore is under way

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
    _require_absent(target)
    if not target.parent.is_dir():
        raise BackupError(f"There is no folder {target.parent} to write {target.name} into.")
    queue, store = Queue(of.databases["hpo"]), Store(of.tracking_uri)
    try:
        with queue.lock(LOCK), _scratch(target.with_name(target.name + ".partial")) as scratch:
            whole = scratch / "whole"
            with _private(whole) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
                manifest = _write(of, _Archive(tar), store, scratch, report)
            _require_absent(target)  # another backup may have ended while we waited for it
            whole.rename(target)
    except Exception as error:
        if disk_is_full(error):
            raise BackupError(
                f"{target} cannot be written: the disk is full or read-only. Nothing is left of it."
            ) from error
        raise
    finally:
        queue.close()
    folder = os.open(target.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    return manifest


def _require_absent(target: Path) -> None:
    if target.exists():
        raise BackupError(f"{target} exists already: a backup replaces nothing. Give another name, or remove it.")


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty folder that only we can read, removed afterwards."""
    shutil.rmtree(folder, ignore_errors=True)  # of a backup that was killed
    folder.mkdir(mode=0o700)
    try:
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
            found = {path: _add_artifact(archive, store, path, scratch) for path in needed.checkpoints}
            if None in found.values() and attempt < INSTANTS - 1:
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
    saved = {name.removeprefix("artifacts/"): each["sha256"] for name, each in archive.files.items()}
    faults = [
        f"the checkpoint {path} is {'missing' if found[path] is None else 'damaged'}: its trial will start again from "
        "its beginning"
        for path, sha256 in needed.checkpoints.items()
        if found[path] != sha256
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
        "queue_schema": SCHEMA_VERSION,  # which the tables were brought to before
        "optuna_schema": _schema(hpo),
        "mlflow_schema": _schema(mlflow),
        "studies": {name: {"done": done, "trials": trials} for name, done, trials in rows},
    }


def _add_artifact(archive: _Archive, store: Store, path: str, scratch: Path) -> str | None:
    """The SHA-256 of a file that is now in the archive; None if it is gone from the store."""
    if known := archive.files.get(f"artifacts/{path}"):
        return str(known["sha256"])
    file = scratch / "file"
    try:
        store.fetch(path, file)
    except NotFound:
        return None
    return archive.add(f"artifacts/{path}", file)


def _dump(url: str, snapshot: str, file: Path) -> None:
    options = ("--format=plain", "--no-owner", "--no-privileges", "--no-comments", "--compress=gzip")
    mark = f"--exclude-table={MARK}"  # an interrupted restore is none of the copy's business
    _postgres("pg_dump", url, f"--snapshot={snapshot}", *options, mark, f"--file={file}")


@contextmanager
def _private(path: Path) -> Iterator[IO[bytes]]:
    """A new file that only we can read, on the disk when it is closed."""
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
                if stream is None:
                    raise _damaged(source, f"{member.name} in it is no file")
                if member.name == MANIFEST:
                    manifest = json.load(stream)
                else:
                    sha256 = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
                    found[member.name] = {"sha256": sha256, "bytes": member.size}
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise _damaged(source, str(error) or type(error).__name__) from None
    if not isinstance(manifest, dict):
        raise _damaged(source, "its list of files, which comes last, is missing: it was cut short")
    if manifest.get("format") != FORMAT:
        raise BackupError(f"{source} has format {manifest.get('format')}, this hpo reads {FORMAT}. Use the hpo of it.")
    files = manifest["files"]
    if wrong := sorted(name for name in files.keys() | found.keys() if files.get(name) != found.get(name)):
        raise _damaged(source, f"{len(wrong)} of its files are not as they were saved, such as {wrong[0]}")
    return manifest


def restore(into: Place, source: Path, manifest: dict[str, Any], report: Report) -> None:
    """Fill empty databases and the artifact store from a checked backup. Goes on with a restore of the same file that
    was interrupted. Raises BackupError if something is there already.

    First the files, then MLflow's database, then the queue's; a database is loaded in one transaction, which finds it
    empty or does nothing. What was there before, or came meanwhile, is never replaced.
    """
    with _connect(into.databases["hpo"]) as hpo, _connect(into.databases["mlflow"]) as mlflow:
        if hpo.execute("SELECT pg_try_advisory_lock(hashtext(%s))", (f"hpo.{LOCK}",)).fetchone() != (True,):
            raise BackupError("Another backup, restore or `hpo delete` is under way on this database: try again later.")
        backup = hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest()
        token, loaded = _progress(into, backup, hpo, mlflow)
        _require_schemas(into, source, manifest, mlflow)
        with hpo.transaction():
            hpo.execute(f"DROP TABLE IF EXISTS {MARK}")
            hpo.execute(f"CREATE TABLE {MARK} AS SELECT %s AS backup, %s AS token", (backup, token))
        with tempfile.TemporaryDirectory() as scratch, tarfile.open(source, "r:") as tar:
            try:
                dumps = _unpack(tar, into, Path(scratch), files=not loaded, report=report)
            except OSError as error:
                if disk_is_full(error):
                    raise BackupError(f"{scratch} is full or read-only; set TMPDIR to a folder with room.") from error
                raise
            if not loaded:
                report("Restoring the database of MLflow.")
                _load(into.databases["mlflow"], dumps["mlflow"], f"CREATE TABLE {MARK} AS SELECT '{token}' AS token;")
            report("Restoring the database of the queue.")
            _load(into.databases["hpo"], dumps["hpo"], GIVE_ALL_BACK)  # and the mark is gone with what was there
        mlflow.execute(f"DROP TABLE IF EXISTS {MARK}")
    queue = Queue(into.databases["hpo"])
    queue.install()  # brings tables of an earlier hpo up to date
    queue.close()


def _progress(into: Place, backup: str, hpo: psycopg.Connection, mlflow: psycopg.Connection) -> tuple[str, bool]:
    """The token of this restore, and whether it was interrupted after MLflow's part, which has the same token then.
    BackupError if something is there that this restore has not put there."""
    token, interrupted = secrets.token_hex(16), False
    if _exists(hpo, MARK) and (row := hpo.execute(f"SELECT backup, token FROM {MARK}").fetchone()):
        interrupted = row[0] == backup
        token = row[1] if interrupted else token
    loaded = interrupted and _exists(mlflow, MARK)
    loaded = loaded and mlflow.execute(f"SELECT token FROM {MARK}").fetchone() == (token,)
    for connection, whose in ((hpo, "the queue's"), (mlflow, f"MLflow's ({into.tracking_uri})")):
        try:
            if connection is hpo or not loaded:
                connection.execute(_REQUIRE_EMPTY)
        except psycopg.errors.RaiseException as error:
            since = " A restore of it was interrupted here; since then they have been used." if interrupted else ""
            raise BackupError(
                f"A backup is restored into empty databases only; {error.diag.message_primary} of {whose}.{since} "
                "Nothing was changed. Use another HPO_HOME, or databases that are empty."
            ) from None
    return token, loaded


def _require_schemas(into: Place, source: Path, manifest: dict[str, Any], mlflow: psycopg.Connection) -> None:
    """BackupError if these programs cannot work with what the backup holds."""
    versions = manifest["versions"]
    if manifest.get("queue_schema", SCHEMA_VERSION) > SCHEMA_VERSION:
        raise BackupError(
            f"{source} was made by a newer hpo ({versions['hpo']}, queue schema {manifest['queue_schema']}); this one "
            f"knows {SCHEMA_VERSION}. Nothing was restored. Restore it with that hpo."
        )
    found, expected = _schema(mlflow), manifest["mlflow_schema"]
    if found != expected:
        raise BackupError(
            f"{source} was made with MLflow {versions['mlflow']} (schema {expected}), the server at "
            f"{into.tracking_uri} has schema {found}. Nothing was restored. Restore it with MLflow "
            f"{versions['mlflow']}; then `mlflow db upgrade`."
        )
    ours, theirs = sampling.schema(into.databases["hpo"]), manifest.get("optuna_schema")
    if theirs not in (None, ours):  # none: nothing was planned yet
        raise BackupError(
            f"{source} was made with Optuna {versions['optuna']} (schema {theirs}), the one installed here makes "
            f"schema {ours}. Nothing was restored. Restore it with Optuna {versions['optuna']}; then `optuna storage "
            "upgrade`."
        )


def _unpack(tar: tarfile.TarFile, into: Place, scratch: Path, *, files: bool, report: Report) -> dict[str, Path]:
    """Put the files into the store, if they are wanted; return the dump of each database."""
    store = Store(into.tracking_uri)
    if files:
        report("Restoring the files.")
    dumps = {}
    for member in tar:
        kind, _, path = member.name.partition("/")
        stream = tar.extractfile(member)
        if stream is None or kind not in ("artifacts", "databases") or (kind == "artifacts" and not files):
            continue
        file = scratch / PurePosixPath(path).name
        with file.open("wb") as copy:
            shutil.copyfileobj(stream, copy, 1 << 20)
        if kind == "databases":
            dumps[file.name.removesuffix(".sql.gz")] = file
            continue
        try:
            store.put(path, file)
        except TrackingUnavailable as error:
            raise BackupError(
                f"The MLflow server at {into.tracking_uri} is away, or its store takes no file ({path}, "
                f"{file.stat().st_size / 1e6:.1f} MB): is its disk full? The same command goes on."
            ) from error
        file.unlink()
    return dumps


def _exists(connection: psycopg.Connection, table: str) -> bool:
    return connection.execute("SELECT to_regclass(%s)", (table,)).fetchone() != (None,)


_TABLES = """
        SELECT format('%I.%I', nspname, relname) AS name FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
        WHERE nspname IN ('hpo', 'public') AND relkind IN ('r', 'p')
          AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = c.oid AND deptype = 'e')  -- of an extension
        ORDER BY nspname, relname
"""

# Without a plan or a run there are only rows that servers make when they start on an empty database.
_REQUIRE_EMPTY = f"""
DO $$ DECLARE each record; rows bigint; found text[]; BEGIN
    FOR each IN {_TABLES} LOOP
        CONTINUE WHEN each.name IN
            ('hpo.schema', 'public.alembic_version', 'public.version_info', '{MARK}');
        EXECUTE format('SELECT count(*) FROM %s %s', each.name, CASE each.name
            WHEN 'public.experiments' THEN 'WHERE experiment_id <> 0'
            WHEN 'public.workspaces' THEN 'WHERE name <> $w$default$w$' END) INTO rows;
        IF rows > 0 THEN found := found || format('%s (%s)', each.name, rows); END IF;
    END LOOP;
    IF found IS NOT NULL THEN
        RAISE EXCEPTION 'found rows in %', array_to_string(found[:5], ', ');
    END IF;
END $$;
"""

# Nobody may plan or write between our look and our commit. Whoever makes the queue's tables waits for the first lock.
# What a server made goes; one by one, since who restores may own the objects without owning the schema.
_BEGIN = f"""
BEGIN;
SET LOCAL lock_timeout = '{LOAD_PATIENCE}';
SELECT pg_advisory_xact_lock(hashtext('hpo.schema'));
DO $$ DECLARE each record; BEGIN
    FOR each IN {_TABLES} LOOP EXECUTE 'LOCK TABLE ' || each.name; END LOOP;
END $$;
{_REQUIRE_EMPTY}
DROP SCHEMA IF EXISTS hpo CASCADE;
DO $$ DECLARE each record; BEGIN
    FOR each IN {_TABLES} LOOP EXECUTE format('DROP TABLE IF EXISTS %s CASCADE', each.name); END LOOP;
    FOR each IN SELECT typname FROM pg_type WHERE typnamespace = 'public'::regnamespace AND typtype = 'e' LOOP
        EXECUTE format('DROP TYPE IF EXISTS public.%I CASCADE', each.typname);
    END LOOP;
    FOR each IN SELECT oid::regprocedure AS name FROM pg_proc p WHERE pronamespace = 'public'::regnamespace
        AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = p.oid AND deptype = 'e') LOOP
        EXECUTE 'DROP FUNCTION IF EXISTS ' || each.name || ' CASCADE';
    END LOOP;
END $$;
"""


def _load(url: str, dump: Path, then: str) -> None:
    """Fill an empty database from a dump, with a statement after it, in one transaction."""

    def script(to: IO[bytes]) -> None:
        to.write(_BEGIN.encode())
        with gzip.open(dump) as lines:
            for line in lines:
                if not line.startswith(b"SET transaction_timeout"):  # which a Postgres before 17 does not know
                    to.write(line)
        to.write(f"\n{then}\nCOMMIT;\n".encode())  # ours, not psql's, which commits what comes before we are killed

    _postgres("psql", url, "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", script=script)


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
