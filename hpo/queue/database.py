"""The database of the queue: connections, transactions, named locks, and the errors that callers act on."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sqlalchemy
from sqlalchemy import Connection, CreateEnginePlugin, Engine, text
from sqlalchemy.dialects import plugins
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from hpo.errors import DatabaseUnreachable, ServiceError
from hpo.queue.schema import FIRST_VERSION, MIGRATIONS, SCHEMA, SCHEMA_VERSION

log = logging.getLogger("hpo")

FREEZE_LIMIT = 30.0  # seconds a transaction may stay open, and its rows locked, by somebody who does nothing

# What a server or a role has as its default must not change what a lock means: what is read after it is new.
ISOLATION: IsolationLevel = "READ COMMITTED"
CONNECT = {
    "client_encoding": "utf8",  # whatever PGCLIENTENCODING says
    "connect_timeout": 5,  # seconds
    "application_name": "hpo",
    "prepare_threshold": None,  # behind a pooler the next transaction may be another server process's
    # A network that swallows packets must not hold the thread that renews leases.
    "keepalives_idle": 5,  # seconds
    "keepalives_interval": 2,  # seconds
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,  # milliseconds
}


# Said in each transaction: a pooler (pgbouncer) gives each to another session, and admits no options at their start.
# The path is for Optuna's tables; those of hpo are named with their schema. A process that froze (or lost the network)
# between a write and its commit must not keep the row: nobody could take the trial over.
_SESSION = (
    "SET LOCAL timezone = 'UTC'; SET LOCAL search_path = public; "
    "SET LOCAL idle_in_transaction_session_timeout = {freeze_limit}; "  # milliseconds, like the next
    "SET LOCAL lock_timeout = {patience}"
)


class Transactions(CreateEnginePlugin):
    """What every transaction of an engine of hpo begins with."""

    def __init__(self, url: sqlalchemy.URL, kwargs: dict[str, Any]) -> None:
        super().__init__(url, kwargs)
        self._patience = kwargs.pop("patience")

    def update_url(self, url: sqlalchemy.URL) -> sqlalchemy.URL:
        """Return the URL as it is: nothing of it is for this plugin."""
        return url

    def engine_created(self, engine: Engine) -> None:
        """Have the engine's transactions begin so."""
        begin = _SESSION.format(freeze_limit=round(1000 * FREEZE_LIMIT), patience=round(1000 * self._patience))
        sqlalchemy.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))


plugins.register("hpo", __name__, Transactions.__name__)


class LeaseLost(Exception):
    """Somebody else holds this job now (or it ended): stop, and write nothing."""


class DatabaseLost(DatabaseUnreachable):
    """The database cannot be reached, or takes nothing, at the moment: the caller tries again."""


# Classes of SQLSTATE that tell of the server's state and not of what was asked for: connection, transaction (a server
# that is read-only for now), rollback, resources, operator, system.
_PASSING = ("08", "25", "40", "53", "57", "58")


def lost(error: DBAPIError) -> DatabaseLost | None:
    """What an error means that passes by itself; None for an error of hpo, or of its role's rights."""
    state = getattr(error.orig, "sqlstate", None) or ""
    if error.connection_invalidated or isinstance(error, sqlalchemy.exc.OperationalError) or state[:2] in _PASSING:
        return DatabaseLost(" ".join(str(error.orig).split()))
    return None


class Database:
    """The connections to one database. Every public method is one short transaction."""

    def __init__(self, url: str) -> None:
        self.engine = engine(url)

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            with self.engine.begin() as connection:
                yield connection
        except DBAPIError as error:
            if (explained := lost(error)) is None:
                raise
            raise explained from error

    def close(self) -> None:
        """Close the connections."""
        self.engine.dispose()

    def install(self) -> None:
        """Make the tables if they are not there. Raises ServiceError if they are another version's."""
        with self._transaction() as connection:
            # Two first workers would both find no tables: the second waits here, and then finds them.
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('hpo.schema'))"))
            created = False
            if connection.scalar(text("SELECT to_regclass('hpo.schema')")) is None:
                _require_room(connection)
                connection.execute(text(SCHEMA))
                connection.execute(text("INSERT INTO hpo.schema (version) VALUES (:n)"), {"n": FIRST_VERSION})
                created = True
            version = connection.scalar(text("SELECT version FROM hpo.schema"))
            if version in MIGRATIONS and not created:
                log.warning("Bringing the queue's tables from schema version %d to %d.", version, SCHEMA_VERSION)
                # In the order in which a claim of an earlier hpo takes them: neither waits for the other in a circle.
                connection.execute(text("LOCK TABLE hpo.job, hpo.study"))
            while version in MIGRATIONS:
                connection.execute(text(MIGRATIONS[version]))
                version += 1
                connection.execute(text("UPDATE hpo.schema SET version = :n"), {"n": version})
            if version != SCHEMA_VERSION:
                raise ServiceError(
                    f"The database holds schema version {version} of hpo, this program needs {SCHEMA_VERSION}. "
                    "Nothing was changed. Use the hpo version that made it, or an empty database."
                )

    def installed(self) -> bool:
        """Whether the tables are there; makes nothing."""
        with self._transaction() as connection:
            return connection.scalar(text("SELECT to_regclass('hpo.job')")) is not None

    def server_version(self) -> int:
        """Major version of the Postgres server."""
        with self._transaction() as connection:
            return int(connection.scalar(text("SHOW server_version_num")) or 0) // 10_000

    def database_id(self) -> str:
        """A random name of this database: what tells its experiments on a shared MLflow server from those of others."""
        with self._transaction() as connection:
            return str(connection.scalar(text("SELECT id FROM hpo.schema")))

    @contextmanager
    def lock(
        self, what: str, *, patience: float = 0, waits: Callable[[], object] = lambda: None
    ) -> Iterator[Callable[[], None]]:
        """Hold a named lock across processes; it falls when the process dies, or `patience` seconds after it froze.

        What it gives is to be called between steps: it raises DatabaseLost if the lock has fallen, and starts the
        patience again. `waits` is called if somebody else holds the lock.
        """
        with self._transaction() as connection:
            limit_idle(connection, patience)
            named = {"what": f"hpo.{what}"}
            if not connection.scalar(text("SELECT pg_try_advisory_xact_lock(hashtext(:what))"), named):
                waits()
                connection.execute(text("SELECT pg_advisory_xact_lock(hashtext(:what))"), named)

            def hold() -> None:
                connection.execute(text("SELECT 1"))

            yield hold


def _require_room(connection: Connection) -> None:
    """Raise ServiceError where hpo and Optuna cannot make their tables, or where others have made theirs."""
    room = connection.execute(text(_ROOM)).one()
    if room.of_mlflow:
        raise ServiceError(
            "The database of HPO_DATABASE_URL holds MLflow's tables. Optuna's and MLflow's tables cannot share a "
            f"database: give hpo its own, for example with `createdb --owner={room.role} hpo`. Nothing was changed."
        )
    if room.of_others:
        raise ServiceError(
            f"The schema hpo of the database {room.database} was not made by hpo: it holds {room.of_others}, but no "
            "table hpo.schema. Give hpo a database of its own, or rename that schema. Nothing was changed."
        )
    missing = [
        f"GRANT CREATE ON {what} TO {room.role};"
        for is_missing, what in (
            (not room.may_make_schema, f"DATABASE {room.database}"),
            (not room.may_make_tables, "SCHEMA public"),
        )
        if is_missing
    ]
    if missing:
        raise ServiceError(
            f"The role {room.role} of HPO_DATABASE_URL may not make hpo's tables. The owner of the database "
            f"{room.database} gives it the right with: {' '.join(missing)} Nothing was changed."
        )


# What a database without hpo's tables holds, and what the role may do in it.
_ROOM = """
    SELECT quote_ident(current_user) AS role, quote_ident(current_database()) AS database,
        to_regclass('public.experiments') IS NOT NULL AND to_regclass('public.runs') IS NOT NULL AS of_mlflow,
        (SELECT min(relname) FROM pg_class WHERE relnamespace = to_regnamespace('hpo')) AS of_others,
        coalesce(has_schema_privilege(to_regnamespace('hpo'), 'CREATE'),
            has_database_privilege(current_database(), 'CREATE')) AS may_make_schema,
        coalesce(has_schema_privilege(to_regnamespace('public'), 'CREATE'), false)
            OR to_regclass('public.trials') IS NOT NULL AS may_make_tables
"""


def postgres_url(url: str) -> sqlalchemy.URL:
    """The URL with psycopg 3 as its driver. Raises ServiceError if it is no URL of a Postgres."""
    try:
        parsed = sqlalchemy.engine.make_url(url)
    except SQLAlchemyError:
        raise ServiceError("HPO_DATABASE_URL: expected a URL like postgresql://user:password@host:5432/hpo.") from None
    if parsed.get_backend_name() != "postgresql":
        raise ServiceError(
            f"HPO_DATABASE_URL: expected a postgresql:// URL, found {parsed.get_backend_name()}://. "
            "The queue needs Postgres: its row locks are what makes a trial be recorded once."
        )
    return parsed.set(drivername="postgresql+psycopg")


def engine_arguments(*, patience: float = 0) -> dict[str, Any]:
    """Arguments of an engine for `postgres_url`, whose transactions speak UTC and are read committed.

    A statement that waits longer than `patience` seconds for a lock (0: without end) raises an error.
    """
    return {
        "pool_pre_ping": True,
        "connect_args": CONNECT,
        "isolation_level": ISOLATION,
        "plugins": ["hpo"],
        "patience": patience,
    }


def engine(url: str) -> Engine:
    """An engine for the Postgres at this URL."""
    return sqlalchemy.create_engine(postgres_url(url), **engine_arguments())


def as_json(value: Any) -> str:
    """JSON as Postgres takes it."""
    return json.dumps(finite(value), allow_nan=False)


def finite(value: Any) -> Any:
    """The value as every JSON takes it: a number that is not finite becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(element) for name, element in value.items()}
    return [finite(element) for element in value] if isinstance(value, (list, tuple)) else value


def limit_idle(connection: Connection, seconds: float) -> None:
    """Let the server end this transaction if its client does nothing for so long (0: never); it may be frozen."""
    connection.execute(
        text("SELECT set_config('idle_in_transaction_session_timeout', :ms, true)"), {"ms": str(round(1000 * seconds))}
    )
