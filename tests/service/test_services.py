"""The embedded services: shared, recovered, refused, stopped. Real Postgres, real MLflow, real kills."""

import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import psycopg
import pytest

from hpo.errors import ServiceError
from hpo.services import daemon, foreign, mlflow_server, postgres
from hpo.services import home as homes
from hpo.services.home import Home
from hpo.services.serving import down, erase, export_lines, running, up
from hpo.settings import Settings, read

pytestmark = pytest.mark.service
ROOT = os.geteuid() == 0
UP = (
    "from hpo import settings; from hpo.services import serving;"
    "s, new = serving.up(settings.read()); print(s.database_url, new)"
)


def settings_of(path: Path) -> Settings:
    return read({"HPO_HOME": str(path)})


def silent(line: str) -> None:
    pass


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """A home with a Postgres that runs, without MLflow."""
    path = (tmp_path / "home").resolve()
    (path / "services").mkdir(parents=True)
    try:
        yield postgres.start(homes.settle(path, silent, postgres.stop), silent)[0]
    finally:
        for left in tmp_path.iterdir():
            if (left / "services").exists():
                erase(settings_of(left))


def postmaster(home: Home) -> psutil.Process:
    return psutil.Process(int((home.data / "postmaster.pid").read_text().split()[0]))


def gone(process: psutil.Process) -> bool:
    """Whether it has ended; an init process may take its time to collect it."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def save(home: Home, value: int, database: str = "hpo") -> None:
    with postgres.connect(home, database) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS saved (value int)")
        connection.execute("INSERT INTO saved VALUES (%s)", (value,))


def saved(home: Home, database: str = "hpo") -> list[int]:
    with postgres.connect(home, database) as connection:
        if connection.execute("SELECT to_regclass('saved')").fetchone() == (None,):
            return []
        return [value for (value,) in connection.execute("SELECT value FROM saved ORDER BY value")]


# --- Both services of the session


def test_postgres_speaks_utc_syncs_listens_on_loopback_and_wants_the_password(services):
    with psycopg.connect(services.database_url) as connection:
        shown = {
            name: connection.execute(f"SHOW {name}").fetchone()[0]
            for name in ("timezone", "fsync", "synchronous_commit", "listen_addresses", "unix_socket_directories")
        }
        (stored,) = connection.execute("SELECT rolpassword FROM pg_authid WHERE rolname = 'hpo'").fetchone()
        assert {"hpo", "mlflow"} <= {name for (name,) in connection.execute("SELECT datname FROM pg_database")}
    assert shown == {
        "timezone": "UTC",
        "fsync": "on",
        "synchronous_commit": "on",
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
    }
    assert stored.startswith("SCRAM-SHA-256$")
    url = urlsplit(services.database_url)
    for password in ("", "wrong", None):
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(host=url.hostname, port=url.port, user="hpo", dbname="hpo", password=password)


def test_the_password_is_on_no_command_line_and_its_file_is_for_the_owner_only(services):
    password = urlsplit(services.database_url).password
    lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert any("mlflow" in line for line in lines)
    assert not [line for line in lines if password in line]
    (server,) = {
        line for line in lines if "mlflow server" in line and f"--port {urlsplit(services.tracking_uri).port}" in line
    }
    home = Path(server.partition("--artifacts-destination file://")[2].partition("/artifacts ")[0])
    assert (home / "services" / "state.json").stat().st_mode & 0o777 == 0o600
    holders = [file for file in home.rglob("*") if file.is_file() and password.encode() in file.read_bytes()]
    assert holders == [home / "services" / "state.json"]


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1", 200), ("localhost", 200), ("evil.example", 403)])
def test_mlflow_serves_loopback_names_and_refuses_others(tracking_uri, host, status):
    url = urlsplit(tracking_uri)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=10)
    body = json.dumps({"max_results": 1})
    connection.request(
        "POST",
        "/api/2.0/mlflow/experiments/search",
        body,
        {"Host": f"{host}:{url.port}", "Content-Type": "application/json"},
    )
    assert connection.getresponse().status == status
    connection.close()


def test_a_request_on_a_kept_connection_is_answered_at_once(tracking_uri):
    """Without TCP_NODELAY an answer's second packet waits for the client's delayed acknowledgement, 40 ms on Linux."""
    url = urlsplit(tracking_uri)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=10)
    seconds = []
    for _ in range(60):
        begin = time.perf_counter()
        assert mlflow_server.search(connection, user=None) == 200
        seconds.append(time.perf_counter() - begin)
    connection.close()
    assert min(seconds[20:]) < 0.03  # the first ones are acknowledged at once; the least, since others use the cores


def test_each_test_gets_an_empty_database_of_its_own(database_url, services):
    assert database_url != services.database_url
    with psycopg.connect(database_url) as connection:
        tables = "SELECT count(*) FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        assert connection.execute(tables).fetchone() == (0,)


def test_the_export_lines_mean_the_same_to_a_shell(services):
    script = export_lines(services) + '\nprintf "%s %s" "$HPO_DATABASE_URL" "$MLFLOW_TRACKING_URI"'
    shown = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown == f"{services.database_url} {services.tracking_uri}"


def test_urls_of_other_services_are_used_as_they_are(tmp_path):
    urls = {"HPO_DATABASE_URL": "postgresql://u:p@db/hpo", "MLFLOW_TRACKING_URI": "http://mlflow:5000"}
    settings = read({"HPO_HOME": str(tmp_path / "home"), **urls})
    found, started = up(settings)
    assert (found.database_url, found.tracking_uri, started) == (*urls.values(), False)
    assert down(settings) is False
    assert not (tmp_path / "home").exists()


def test_asking_and_stopping_leave_nothing_behind_where_nothing_was(tmp_path):
    settings = settings_of(tmp_path / "home")
    assert running(settings) is None
    assert down(settings) is False
    assert list(tmp_path.iterdir()) == []


def test_two_ups_at_once_share_one_pair_that_survives_kill_9_of_everything(tmp_path):
    """In a path of 150 characters with spaces; the callers' pipes end although the services go on."""
    folder = tmp_path / "a folder with spaces"
    path = folder / ("x" * (149 - len(str(folder))))
    assert len(str(path)) == 150
    settings = settings_of(path)
    environment = {**os.environ, "HPO_HOME": str(path), "MLFLOW_TRACKING_URI": "", "HPO_DATABASE_URL": ""}
    try:
        callers = [
            subprocess.Popen([sys.executable, "-c", UP], env=environment, stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        lines = [caller.communicate(timeout=120)[0].splitlines()[-1].split() for caller in callers]
        assert lines[0][0] == lines[1][0]
        assert sorted(new for _, new in lines) == ["False", "True"]

        first, started = up(settings)
        assert (first.database_url, started) == (lines[0][0], False)

        home = homes.read(path)
        save(home, 7)
        main, served = postmaster(home), mlflow_server._processes(home)
        victims = [*served, main, *main.children(recursive=True)]
        workers = [process for process in served if process.parent() in served]
        assert len(victims) > 8 and len(workers) == 2
        victims.remove(workers[0])  # goes on without its parents, and keeps the port
        for victim in victims:
            with suppress(psutil.NoSuchProcess):  # a connection's, or one that ended with its parent
                victim.kill()
        psutil.wait_procs(victims, timeout=30)
        assert running(settings) is None
        again, started = up(settings)
        assert (again, started) == (first, True)
        assert saved(home) == [7]
        assert gone(workers[0])

        main = postmaster(home)
        everything = [*mlflow_server._processes(home), main, *main.children(recursive=True)]
        assert down(settings) is True
        assert all(gone(process) for process in everything)
        assert down(settings) is False
    finally:
        erase(settings)


# --- Postgres alone


def test_a_killed_postgres_comes_back_with_every_acknowledged_row(home):
    with postgres.connect(home, "mlflow") as connection:
        assert connection.execute("SHOW synchronous_commit").fetchone() == ("off",)
    for value in range(3):
        save(home, value, "mlflow")
        save(home, value)  # its commit writes out what MLflow's database has acknowledged before
        victim = postmaster(home)
        victim.kill()
        victim.wait(10)
        home, started = postgres.start(home, silent)
        assert started
        assert saved(home) == saved(home, "mlflow") == list(range(value + 1))


def test_a_stale_pid_file_that_names_a_living_process_stops_nobody(home):
    save(home, 1)
    assert postgres.stop(home)
    owner = (home.data / "PG_VERSION").stat()
    other = subprocess.Popen(["sleep", "100"], **({"user": owner.st_uid} if ROOT else {}))
    try:
        (home.data / "postmaster.pid").write_text(f"{other.pid}\n{home.data}\n1700000000\n{home.postgres_port}\n\n\n\n")
        assert postgres.stop(home) is False
        home, started = postgres.start(home, silent)
        assert started and saved(home) == [1]
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_kill_at_any_moment_of_the_first_start_is_made_good_by_the_next(tmp_path):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    path = (tmp_path / "home").resolve()
    (path / "services").mkdir(parents=True)
    homes.settle(path, silent, postgres.stop)
    program = (
        "import sys, pathlib; from hpo.services import home, postgres;"
        "print(postgres.start(home.read(pathlib.Path(sys.argv[1])), print))"
    )
    try:
        for _ in range(5):
            caller = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.DEVNULL)
            time.sleep(draw.uniform(0.2, 1.5))
            victims = [psutil.Process(caller.pid)]
            if draw.random() < 0.5:
                victims += victims[0].children(recursive=True)  # initdb and its Postgres die with the caller
            for victim in victims:
                with suppress(psutil.NoSuchProcess):  # done already
                    victim.kill()
            caller.wait()
        home, _ = postgres.start(homes.read(path), silent)
        save(home, 1)
        assert saved(home) == [1]
        assert not [*home.data.parent.glob("*.new")]
    finally:
        erase(settings_of(path))


def test_the_port_is_remembered_unless_somebody_else_listens_there(home):
    port = home.postgres_port
    assert postgres.stop(home)
    home, _ = postgres.start(home, silent)
    assert home.postgres_port == port
    assert postgres.stop(home)
    with socket.create_server(("127.0.0.1", port)):
        home, started = postgres.start(home, silent)
        assert started and home.postgres_port != port
    assert homes.read(home.path).postgres_port == home.postgres_port


def test_another_postgres_on_our_port_is_not_ours(home, tmp_path):
    path = (tmp_path / "other").resolve()
    (path / "services").mkdir(parents=True)
    other = homes.settle(path, silent, postgres.stop)
    assert not postgres.answers(replace(other, postgres_port=home.postgres_port))
    assert not postgres.answers(replace(other, postgres_port=home.postgres_port, password=home.password))
    assert postgres.answers(home)


def test_a_moved_home_keeps_its_database(home, tmp_path):
    save(home, 1)
    path = home.path.rename(tmp_path / "moved")
    moved = homes.settle(path, silent, postgres.stop)
    assert not daemon.lives(moved.data.with_name("postgres.life"))
    moved, started = postgres.start(moved, silent)
    assert started and saved(moved) == [1]
    assert moved.identity != home.identity


def test_a_copied_home_shares_no_database_with_its_original(home, tmp_path):
    save(home, 1)
    assert postgres.stop(home)
    path = tmp_path / "copy"
    shutil.copytree(home.path, path, symlinks=True)
    home, _ = postgres.start(home, silent)
    assert running(settings_of(path)) is None
    notices: list[str] = []
    copy, started = postgres.start(homes.settle(path, notices.append, postgres.stop), silent)
    assert started and copy.data != home.data and copy.postgres_port != home.postgres_port
    if ROOT:
        assert "begins empty" in notices[0]
        assert saved(copy) == []
    else:
        assert saved(copy) == [1]
    save(copy, 2)
    assert saved(home) == [1]


@pytest.mark.skipif(ROOT, reason="root's database lies outside HPO_HOME and is not copied with it")
def test_a_home_copied_while_its_postgres_ran_is_refused(home, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(home.path, path, symlinks=True)
    with pytest.raises(ServiceError, match=r"copied from .* is torn"):
        homes.settle(path, silent, postgres.stop)
    assert postgres.answers(home)
    shutil.rmtree(path)


def test_a_home_whose_state_is_damaged_is_refused(home):
    state = home.services / "state.json"
    kept = state.read_text()
    state.write_text("{")
    with pytest.raises(ServiceError, match=r"state\.json: expected what hpo writes"):
        up(settings_of(home.path))
    state.write_text(kept)


def test_a_database_of_another_mlflow_is_refused_and_not_migrated(home):
    with postgres.connect(home, "mlflow") as connection:
        connection.execute("CREATE TABLE alembic_version (version_num varchar(32))")
        connection.execute("INSERT INTO alembic_version VALUES ('451aebb31d03')")
    with pytest.raises(ServiceError, match=f"has schema 451aebb31d03.*expects {foreign.newest_schema()}"):
        mlflow_server.start(home, silent)
    with postgres.connect(home, "mlflow") as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("451aebb31d03",)
        assert connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (1,)


def test_a_postgres_that_cannot_start_is_reported_with_the_end_of_its_log(home):
    assert postgres.stop(home)
    control = home.data / "global" / "pg_control"
    control.rename(control.with_suffix(".away"))
    with pytest.raises(
        ServiceError, match=r"Postgres did not start[\s\S]*postgres\.log[\s\S]*could not find the database system"
    ):
        postgres.start(home, silent)


@pytest.mark.parametrize("stopped", [signal.SIGSTOP])
def test_a_frozen_postgres_is_not_started_a_second_time(home, stopped, monkeypatch):
    monkeypatch.setattr(postgres, "START_TIMEOUT", 1.0)
    process = postmaster(home)
    process.send_signal(stopped)
    try:
        with pytest.raises(ServiceError, match="Postgres lives but did not answer"):
            postgres.start(home, silent)
    finally:
        process.send_signal(signal.SIGCONT)
    monkeypatch.undo()
    assert postgres.start(home, silent) == (home, False)


# --- Root


@pytest.mark.root
def test_as_root_everything_works_in_a_private_folder_and_no_parent_is_changed(tmp_path):
    outer = tmp_path / "only root"
    outer.mkdir(mode=0o700)
    path = outer / "home"
    (path / "services").mkdir(parents=True)
    before = {parent: parent.stat().st_mode for parent in (outer, *outer.parents)}
    try:
        home, _ = postgres.start(homes.settle(path, silent, postgres.stop), silent)
        assert home.data.is_relative_to(homes.ROOT_STORE)
        assert postmaster(home).username() == postgres.ROOT_RUNS_AS
        assert {parent: parent.stat().st_mode for parent in before} == before
        assert json.loads((home.services / "state.json").read_text())["data"] == str(home.data)
    finally:
        erase(settings_of(path))
    assert not home.data.parent.exists()


@pytest.mark.root
def test_as_root_copied_binaries_follow_the_wheel(home):
    stamp = home.data.with_name("binaries") / "stamp"
    stamp.write_text("another")
    assert postgres.stop(home)
    assert stamp.read_text() == "another"  # what Postgres runs from is replaced when it is started next
    home, _ = postgres.start(home, silent)
    assert stamp.read_text() != "another"


@pytest.mark.root
def test_as_root_the_postgres_of_a_removed_home_is_stopped_and_kept_with_a_notice(home):
    victim = postmaster(home)
    shutil.rmtree(home.path)
    (home.path / "services").mkdir(parents=True)
    notices: list[str] = []
    new = homes.settle(home.path, notices.append, postgres.stop)
    assert gone(victim)
    assert str(home.data.parent) in notices[0]
    assert home.data.exists() and new.data != home.data
    shutil.rmtree(home.data.parent)


# --- What needs no service


def test_a_process_is_known_to_live_until_the_last_of_its_family_has_died(tmp_path):
    life = tmp_path / "life"
    assert not daemon.lives(life)
    with daemon.taken(life) as held:
        daemon.launch(
            ["sh", "-c", "sleep 100 & echo $! > child; sleep 100 & echo $! > other; wait"],
            life=held,
            log=tmp_path / "logs" / "log",
            environment={"PATH": os.defpath},
            folder=tmp_path,
            user=None,
        )
    while not (tmp_path / "other").exists() or not (tmp_path / "other").read_text():
        time.sleep(0.01)
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    assert daemon.lives(life)
    os.kill(int((tmp_path / "other").read_text()), signal.SIGKILL)
    assert daemon.dies(life, timeout=30)
