"""Restore: empty databases and an artifact store filled from a backup, or left as they are."""

import gzip
import hashlib
import json
import secrets
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import IO, Any

import psycopg

from hpo import settings
from hpo.errors import BackupError, disk_is_full
from hpo.operations.backup import (
    FORMAT,
    LOCK,
    MANIFEST,
    MARK,
    Backup,
    Place,
    Report,
    log,
    open_database,
    place,
    run,
)
from hpo.operations.connection import opened
from hpo.queue import GIVE_ALL_BACK, SCHEMA_VERSION, Queue
from hpo.search import sampling
from hpo.services import foreign, serving
from hpo.tracking.artifacts import Store
from hpo.tracking.errors import TrackingUnavailable

LOAD_PATIENCE = "30s"  # that others may hold tables which a restore replaces


def restore(file: Path, *, say: Report = log.info) -> tuple[Backup, str]:
    """Fill an empty home, or empty databases, from a backup; return its contents and the URL of the MLflow server.

    Raise BackupError if the file is damaged, or something is there already.
    """
    say(f"Checking {file}.")
    manifest = check(file)
    chosen = settings.read()
    services, _ = serving.up(chosen, report=say)
    load(place(chosen, services), file, manifest, say)
    with opened(chosen, services) as connection:
        for row in connection.queue.studies():
            if row.facts.planned:
                connection.record(row)
    return Backup.of(manifest), services.tracking_uri


def check(source: Path) -> dict[str, Any]:
    """Return the manifest of a backup after every byte of it was compared with it. Raise BackupError."""
    members: dict[str, dict[str, Any]] = {}
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
                    members[member.name] = {"sha256": sha256, "bytes": member.size}
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise _damaged(source, str(error) or type(error).__name__) from None
    if not isinstance(manifest, dict):
        raise _damaged(source, "its list of files, which comes last, is missing: it was cut short")
    if manifest.get("format") != FORMAT:
        raise BackupError(f"{source} has format {manifest.get('format')}, this hpo reads {FORMAT}. Use the hpo of it.")
    files = manifest["files"]
    if wrong := sorted(name for name in files.keys() | members.keys() if files.get(name) != members.get(name)):
        raise _damaged(source, f"{len(wrong)} of its files are not as they were saved, such as {wrong[0]}")
    return manifest


def load(into: Place, source: Path, manifest: dict[str, Any], report: Report) -> None:
    """Fill empty databases and the artifact store from a checked backup. Goes on with a restore of the same file that
    was interrupted. Raises BackupError if something is there already.

    First the files, then MLflow's database, then the queue's; a database is loaded in one transaction, which finds it
    empty or does nothing. What was there before, or came meanwhile, is never replaced.
    """
    with open_database(into.databases["hpo"]) as hpo, open_database(into.databases["mlflow"]) as mlflow:
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
    present, expected = foreign.schema(mlflow), manifest["mlflow_schema"]
    if present != expected:
        raise BackupError(
            f"{source} was made with MLflow {versions['mlflow']} (schema {expected}), the server at "
            f"{into.tracking_uri} has schema {present}. Nothing was restored. Restore it with MLflow "
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

# Nobody may plan or write between our look and our commit. What makes the queue's tables waits for the first lock.
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
        to.write(f"\n{then}\nCOMMIT;\n".encode())  # psql would commit what comes before a kill

    run("psql", url, "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", script=script)


def _damaged(source: Path, why: str) -> BackupError:
    return BackupError(f"{source} is not a whole backup ({why}). Nothing was restored. Use another copy of it.")
