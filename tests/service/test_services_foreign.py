"""hpo.services.foreign: the inside of the MLflow server (3.17) and of the wheel with Postgres (0.6) is what it was."""

import http.client
import importlib.util
import json
import os
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import psutil
import psycopg
import pytest
from alembic.script import ScriptDirectory
from mlflow import MlflowClient

from hpo import credentials
from hpo.services import daemon, foreign, mlflow_server
from hpo.services.serving import Services

# What MLflow's command would start, and whether its server was imported before that was known.
ASKS = """
import importlib, json, sys
from hpo.services import foreign
for name in foreign.IMPORTS:
    importlib.import_module(name)
is_imported = "mlflow.server" in sys.modules
print(json.dumps([is_imported, *foreign.what_mlflow_starts(sys.argv[1:])]))
"""
OLDER = "UPDATE alembic_version SET version_num = 'an-older-one'"


@pytest.fixture
def mlflow_database(services: Services) -> str:
    """URL of the database of the session's MLflow server."""
    return f"{services.database_url.rpartition('/')[0]}/mlflow"


def test_the_newest_schema_is_the_one_that_mlflows_migrations_end_in() -> None:
    spec = importlib.util.find_spec("mlflow")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "store" / "db_migrations"
    assert ScriptDirectory(str(folder)).get_heads() == [foreign.newest_schema()]


def test_the_files_of_runs_and_models_are_found_in_mlflows_database(services: Services, mlflow_database: str) -> None:
    client = MlflowClient(services.tracking_uri)
    run = client.create_run(client.create_experiment("folders-of-artifacts"))
    model = client.create_logged_model(run.info.experiment_id, name="m")
    gone = client.create_logged_model(run.info.experiment_id, name="gone")
    client.delete_logged_model(gone.model_id)
    with psycopg.connect(mlflow_database) as connection:
        assert foreign.schema(connection) == foreign.newest_schema()
        rows = {name: (kind, uri) for kind, name, uri in foreign.artifact_folders(connection)}
    assert rows[run.info.run_id] == ("run", run.info.artifact_uri)
    assert rows[model.model_id] == ("model", model.artifact_location) and gone.model_id not in rows


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # of MLflow's own tables
def test_tables_of_mlflow_are_made_and_not_changed_under_a_server(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as server:
        assert foreign.schema(server) is None
        assert foreign.migrate(database_url) is None
        assert foreign.schema(server) == foreign.newest_schema()
        assert foreign.migrate(database_url) is None
        server.execute(OLDER)
        message = foreign.migrate(database_url)
        assert message is not None and "connections of a server use it" in message
        assert foreign.schema(server) == "an-older-one"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:starlette.middleware.wsgi")  # in what MLflow uses
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
def test_users_are_made_once_and_a_new_password_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.server.auth import config, sqlalchemy_store

    file = tmp_path / "users.ini"
    database = f"sqlite:///{tmp_path}/users.db"
    file.write_text(credentials.server_users(database=database, admin="chief", password="first-of-chief"))
    monkeypatch.setenv("MLFLOW_AUTH_CONFIG_PATH", str(file))
    for password in ("a-first-password", "a-second-password"):
        foreign.add_users("worker", password)
        users = sqlalchemy_store.SqlAlchemyStore()
        users.init_db(config.read_auth_config().database_uri)
        assert users.authenticate_user("worker", password) and users.authenticate_user("chief", "first-of-chief")
        assert (users.get_user("chief").is_admin, users.get_user("worker").is_admin) == (True, False)
        users.engine.dispose()
    assert not users.authenticate_user("worker", "a-first-password")


# If one of these tests fails with a newer MLflow or uvicorn: servers start all the same, as `mlflow server` does it,
# in twice the time. See what became of the names in `foreign.run_server`.


def test_mlflows_command_says_which_uvicorn_it_starts_with_which_variables(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    users, variables = tmp_path / "users.ini", tmp_path / "variables"
    users.write_text(credentials.server_users(database=f"sqlite:///{users}.db", admin="chief", password="of-the-chief"))
    variables.write_text(f"MLFLOW_FLASK_SERVER_SECRET_KEY=of-forms\nMLFLOW_BACKEND_STORE_URI={database_url}\n")
    monkeypatch.setenv("MLFLOW_AUTH_CONFIG_PATH", str(users))
    served = mlflow_server.Served(hosts="lab:5000", environment=str(variables))
    words = mlflow_server.arguments(host="127.0.0.1", port=5000, artifacts="file:///a", served=served)
    environment = dict(os.environ) | mlflow_server.ENVIRONMENT
    asked = subprocess.run(
        [sys.executable, "-c", ASKS, *words[3:]], env=environment, capture_output=True, text=True, check=True
    )
    is_imported, command, started = json.loads(asked.stdout.splitlines()[-1])
    assert not is_imported, "the server would not know which hosts may call it"
    assert command[:3] == [sys.executable, "-m", "uvicorn"] and command[-1] == "mlflow.server.auth:create_app"
    assert started["MLFLOW_SERVER_ALLOWED_HOSTS"] == "lab:5000"
    assert started["MLFLOW_FLASK_SERVER_SECRET_KEY"] == "of-forms"
    with psycopg.connect(database_url) as connection:
        assert foreign.schema(connection) == foreign.newest_schema()


def test_processes_of_the_server_are_forked_from_one_that_keeps_no_connection(services: Services) -> None:
    port = services.tracking_uri.rpartition(":")[2]
    served = [
        process
        for process in psutil.process_iter(["cmdline"])
        if {"hpo.services.run_mlflow", port} <= set(process.info["cmdline"] or [])
    ]
    (first,) = [process for process in served if process.children()]
    assert sorted(served, key=hash) == sorted([first, *first.children()], key=hash) and len(served) == 3
    assert [connection.status for connection in first.net_connections()] == [psutil.CONN_LISTEN]


@pytest.mark.parametrize(
    "otherwise",
    [
        pytest.param("sys.platform = 'other'", marks=pytest.mark.slow),
        pytest.param("foreign.STARTS = 'other'", marks=pytest.mark.long),
    ],
    ids=["another system", "another MLflow"],
)
def test_the_server_starts_and_ends_as_mlflows_own_where_it_cannot_be_forked(otherwise: str, tmp_path: Path) -> None:
    port = daemon.choose_port(None)
    words = mlflow_server.arguments(host="127.0.0.1", port=port, artifacts=(tmp_path / "files").as_uri())
    code = f"import sys; from hpo.services import foreign; {otherwise}; foreign.run_server(sys.argv[1:])"
    database = f"sqlite:///{tmp_path}/mlflow.db"
    environment = dict(os.environ) | mlflow_server.ENVIRONMENT | {"MLFLOW_BACKEND_STORE_URI": database}
    with (tmp_path / "log").open("wb") as log:
        first = psutil.Popen([sys.executable, "-c", code, *words[3:]], env=environment, stderr=log, stdout=log)
    family, deadline = [first], time.monotonic() + 180
    try:
        while not answers(port):
            assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        family = [first, *first.children(recursive=True)]
        assert any("uvicorn" in process.cmdline() for process in family)
        first.terminate()
        assert not psutil.wait_procs(family, timeout=60)[1]
    finally:
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def answers(port: int) -> bool:
    with suppress(OSError), closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        return mlflow_server.search(connection, user=None) == 200
    return False


def test_the_wheel_has_postgres_and_a_copy_of_it_runs(tmp_path: Path) -> None:
    foreign.copy_postgres(tmp_path / "copy")
    for folder in (foreign.postgres(), foreign.copied_postgres(tmp_path / "copy")):
        for name in ("postgres", "pg_dump", "psql"):
            words = subprocess.run([folder / "bin" / name, "--version"], capture_output=True, text=True, check=True)
            assert f" {foreign.POSTGRES_VERSION}." in words.stdout
