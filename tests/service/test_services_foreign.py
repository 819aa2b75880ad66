"""hpo.services.foreign: the inside of the MLflow server (3.17) and of the wheel with Postgres (0.6) is what it was."""

import importlib.util
import subprocess
from pathlib import Path

import psycopg
import pytest
from alembic.script import ScriptDirectory
from mlflow import MlflowClient

from hpo import credentials
from hpo.services import foreign
from hpo.services.serving import Services

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


def test_the_wheel_has_postgres_and_a_copy_of_it_runs(tmp_path: Path) -> None:
    foreign.copy_postgres(tmp_path / "copy")
    for folder in (foreign.postgres(), foreign.copied_postgres(tmp_path / "copy")):
        for name in ("postgres", "pg_dump", "psql"):
            words = subprocess.run([folder / "bin" / name, "--version"], capture_output=True, text=True, check=True)
            assert f" {foreign.POSTGRES_VERSION}." in words.stdout
