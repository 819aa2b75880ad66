"""Variables of libpq, of proxies and of MLflow's client change nothing of how hpo reaches its own services."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import cells
import pytest
from shell import Shell

from hpo import settings, surroundings
from hpo.cli import unreachable
from hpo.queue import DatabaseLost, Queue
from hpo.services import serving
from hpo.tracking.errors import TrackingUnavailable

POSTGRES = {  # as a shell has them that works with other servers
    "PGSERVICE": "nope",
    "PGSERVICEFILE": "/nonexistent",
    "PGTARGETSESSIONATTRS": "standby",
    "PGREQUIREAUTH": "none",
    "PGHOST": "db.example.org",
    "PGHOSTADDR": "127.0.0.9",
    "PGCHANNELBINDING": "require",
    "PGSSLMODE": "require",
    "PGSSLROOTCERT": "system",
    "PGSSLNEGOTIATION": "direct",
    "PGGSSENCMODE": "require",
    "PGOPTIONS": "-c statement_timeout=1",
    "PGCLIENTENCODING": "LATIN1",
    "PGTZ": "Nowhere/Land",
    "PGPORT": "1",
    "PGUSER": "anna",
}
MLFLOW = {
    **{name: "http://127.0.0.1:9" for name in ("HTTP_PROXY", "http_proxy")},
    "ALL_PROXY": "socks5://127.0.0.1:9",
    "MLFLOW_TRACKING_AWS_SIGV4": "true",
    "MLFLOW_TRACKING_INSECURE_TLS": "true",
    "MLFLOW_TRACKING_SERVER_CERT_PATH": "/nonexistent",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH": "/nonexistent",
    "MLFLOW_TRACKING_AUTH": "nope",
}


@pytest.fixture
def surrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of these variables, and none else of their kinds."""
    for name in [*surroundings.of_postgres(), "no_proxy", "NO_PROXY", "NETRC"]:
        monkeypatch.setenv(name, "")  # so that it is as it was afterwards, too
        monkeypatch.delenv(name)
    for name, value in (POSTGRES | MLFLOW).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def own(tmp_path: Path, surrounded: None) -> Iterator[Shell]:
    """`hpo` on services of its own, in a shell that has all of these variables and a .netrc."""
    read = settings.read({"HPO_HOME": str(tmp_path / "home")})
    (tmp_path / ".netrc").write_text("machine 127.0.0.2 login wrong password wrong\ndefault login x password y\n")
    (tmp_path / ".netrc").chmod(0o600)
    shell = Shell(read.home, "postgresql://", "")
    for name in ("HPO_DATABASE_URL", "MLFLOW_TRACKING_URI"):
        del shell.environment[name]
    shell.environment["HOME"] = str(tmp_path)
    try:
        yield shell
    finally:
        shell.close()
        serving.erase(read)


@pytest.mark.acceptance
@pytest.mark.slow
def test_no_variable_changes_how_hpo_reaches_its_own_services(own, data, tmp_path):
    study = cells.study(tmp_path, "surrounded", data=data, epochs=2, rates="[1e-3]")
    study.write_text(study.read_text().replace("Four points for a test.", "日本"))
    own.hpo("up", "--listen", "127.0.0.2")
    assert "trial 1 of surrounded done" in own.hpo("run", "--study", study)
    assert "日本" in own.hpo("report", "--study", "surrounded", "-o", tmp_path / "report") + (
        tmp_path / "report" / "report.md"
    ).read_text(encoding="utf-8")
    own.hpo("backup", tmp_path / "saved.tar")
    assert "Healthy" in own.hpo("doctor")


def test_for_its_own_postgres_what_a_url_does_not_say_is_not_taken_from_variables(surrounded):
    assert set(surroundings.of_postgres()) == set(POSTGRES) - {"PGHOST", "PGPORT", "PGUSER", "PGCLIENTENCODING"}
    surroundings.reach_own_postgres()
    assert surroundings.of_postgres() == [] and os.environ["PGUSER"] == "anna"


@pytest.mark.parametrize(
    ("uri", "is_own", "is_direct"),
    [
        ("http://127.0.0.1:5000", False, True),
        ("http://localhost:5000", False, True),
        ("http://192.168.1.20:5000", True, True),
        ("http://192.168.1.20:5000", False, False),
    ],
)
def test_a_server_of_hpo_or_on_this_machine_is_reached_directly(surrounded, uri, is_own, is_direct):
    surroundings.reach_mlflow(uri, user=None, password=None, is_own=is_own)
    assert (surroundings.proxies(uri) == []) is is_direct
    assert ("MLFLOW_TRACKING_AWS_SIGV4" in os.environ) is not is_direct
    assert "NETRC" not in os.environ, "without a password of hpo it is the user's"


def test_hosts_that_pass_the_proxy_already_still_do(surrounded, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "example.org")
    surroundings.reach_mlflow("http://127.0.0.1:5000", user=None, password=None, is_own=True)
    surroundings.reach_mlflow("http://127.0.0.1:5000", user=None, password=None, is_own=True)
    assert os.environ["NO_PROXY"] == "example.org,127.0.0.1"


def test_with_servers_elsewhere_a_message_names_the_variable(surrounded, monkeypatch):
    monkeypatch.setenv("HPO_DATABASE_URL", "postgresql://hpo:secret@db:5432/hpo")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert re.search("Set here, and counting for it: .*PGSSLMODE", unreachable.database(DatabaseLost("no SSL")))
    message = unreachable.tracking(TrackingUnavailable("ProxyError"))
    assert "HTTP_PROXY sends the requests to a proxy" in message and message.endswith("NO_PROXY=mlflow")


@pytest.mark.service
def test_a_database_elsewhere_is_spoken_to_in_utf8(database_url, monkeypatch):
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    queue = Queue(database_url)
    with queue.engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT '日本'").scalar() == "日本"
    queue.close()
