"""Services elsewhere behind what people put in front of them: a pooler, a reverse proxy, a role with few rights."""

import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import cells
import psycopg
import pytest
from front import nginx, pgbouncer
from mlflow import MlflowClient
from shell import PATIENCE, Shell, check_recorded_once

from hpo.errors import ServiceError
from hpo.queue import Queue
from hpo.services.serving import Services


def refusal(output: str) -> str:
    """The one message of a command that was refused."""
    (line,) = [line for line in output.splitlines() if line.startswith("hpo: ")]
    assert line == output.splitlines()[-1] and "<" not in line
    return line


# Postgres


@pytest.mark.acceptance
@pytest.mark.apt
@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("transaction", ()),
        pytest.param("transaction", ("ignore_startup_parameters = options",), marks=pytest.mark.long),
        pytest.param("session", (), marks=pytest.mark.long),
    ],
)
def test_a_study_runs_behind_a_pooler(shell, data, tmp_path, tmp_path_factory, mode, settings):
    study = cells.study(tmp_path, f"pooled-{mode}-{len(settings)}", data=data, epochs=3)
    with pgbouncer(tmp_path_factory.mktemp("pooler"), shell.database_url, *settings, mode=mode) as url:
        shell.environment["HPO_DATABASE_URL"] = url
        others = [shell.start("run", "--study", study), shell.start("run", "--study", study)]
        assert all(process.wait() == 0 for process in others), [process.communicate()[0] for process in others]
        check_recorded_once(shell, study.stem, points=4, epochs=3)
        if mode == "transaction":
            shell.environment["MLFLOW_BACKEND_STORE_URI"] = shell.database_url
            assert "is a pooler (pgbouncer)" in refusal(shell.hpo("backup", tmp_path / "saved.tar", code=1))


@pytest.fixture
def role(services: Services, database_url: str) -> Iterator[str]:
    """URL of the empty database for a role that may do nothing in it."""
    name = f"role_{secrets.token_hex(6)}"
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'few'")
        (rules_file,) = map(Path, connection.execute("SHOW hba_file").fetchone() or ())
        rules = rules_file.read_text()
        rules_file.write_text(f"{rules}host all {name} 127.0.0.1/32 scram-sha-256\n")
        connection.execute("SELECT pg_reload_conf()")
        url = database_url.replace(database_url.partition("//")[2].partition("@")[0], f"{name}:few")
        try:
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end:  # the server reads its rules a moment later
                with suppress(psycopg.OperationalError):
                    psycopg.connect(url).close()
                    break
            yield url
        finally:
            rules_file.write_text(rules)
            connection.execute(f"DROP OWNED BY {name}")
            connection.execute(f"DROP ROLE {name}")


OURS = """
    SELECT relname FROM pg_class
    WHERE relkind = 'r' AND relnamespace IN (to_regnamespace('hpo'), 'public'::regnamespace)
"""
FOREIGN = {
    "holds MLflow's tables.*give hpo its own": "CREATE TABLE experiments (); CREATE TABLE runs ()",
    "schema hpo of .* was not made by hpo: it holds study": "CREATE SCHEMA hpo; CREATE TABLE hpo.study (name int)",
    "GRANT CREATE ON SCHEMA public TO role_": "GRANT CREATE ON DATABASE {database} TO {role}",
    "GRANT CREATE ON DATABASE .*; GRANT CREATE ON SCHEMA public TO role_": "",
}


@pytest.mark.service
@pytest.mark.parametrize("message", FOREIGN)
def test_a_database_that_is_not_for_hpo_is_refused_and_nothing_is_made(role: str, database_url: str, message: str):
    with psycopg.connect(database_url, autocommit=True) as connection:
        database = database_url.rpartition("/")[2]
        if statements := FOREIGN[message].format(database=database, role=role.partition("//")[2].partition(":")[0]):
            connection.execute(statements)
        before = connection.execute(OURS).fetchall()
        queue = Queue(role if "GRANT" in message else database_url)
        with pytest.raises(ServiceError, match=message):
            queue.install()
        queue.close()
        assert connection.execute(OURS).fetchall() == before


@pytest.mark.service
def test_a_role_with_both_rights_is_enough(role: str, database_url: str):
    name = role.partition("//")[2].partition(":")[0]
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"GRANT CREATE ON DATABASE {database_url.rpartition('/')[2]} TO {name}")
        connection.execute(f"GRANT CREATE ON SCHEMA public TO {name}")
    queue = Queue(role)
    queue.install()
    assert queue.installed()
    queue.close()


@pytest.mark.acceptance
def test_a_database_without_free_connections_is_told_with_the_setting(shell: Shell, role: str, database_url: str):
    name = role.partition("//")[2].partition(":")[0]
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"ALTER ROLE {name} CONNECTION LIMIT 1")
    shell.environment["HPO_DATABASE_URL"] = role
    with psycopg.connect(role):
        message = refusal(shell.hpo("studies", code=1))
    assert "takes no more connections" in message and "raise max_connections of its server" in message


# MLflow


@pytest.mark.acceptance
@pytest.mark.apt
@pytest.mark.parametrize(
    ("server", "location", "words"),
    [
        ("client_max_body_size 4k;", "", "nginx: client_max_body_size"),
        ("location ~ /mlflow-artifacts/ { return 403; }", "", "answers 403 (403 Forbidden"),
        pytest.param("location /login { return 200 '<h1>Log in</h1>'; }", "return 302 /login;", "Log in",
                     marks=pytest.mark.long),
        pytest.param("", "proxy_set_header Host lab.example.org;", "--allowed-hosts", marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_a_front_that_keeps_requests_out_is_told_in_one_line_and_nothing_is_made(
    shell: Shell, tmp_path: Path, data: Path, tracking_uri: str, server: str, location: str, words: str
):
    study = cells.study(tmp_path, f"kept-out-{len(server)}-{len(location)}", data=data, epochs=3)
    (tmp_path / "front").mkdir()
    with ExitStack() as stack:
        shell.environment["MLFLOW_TRACKING_URI"] = stack.enter_context(
            nginx(tmp_path / "front", tracking_uri, server=server, location=location)
        )
        assert words in refusal(shell.hpo("run", "--study", study, code=1))
    assert shell.queue.studies() == []
    assert MlflowClient(tracking_uri).get_experiment_by_name(study.stem) is None
