"""`hpo up --listen`: a lab served without Docker, by credentials in a file; nobody else gets in, nothing leaks."""

import base64
import json
import os
import subprocess
import sys
import threading
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import cells
import psutil
import psycopg
import pytest
from shell import PATIENCE

from hpo import home as homes
from hpo import postgres, services, settings

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]
ADDRESS = "127.0.0.2"  # not 127.0.0.1, so with access control; on every Linux machine


@dataclass
class Lab:
    """A home that was on loopback and listens now, and what was printed meanwhile."""

    path: Path
    folder: Path
    data: Path
    printed: list[str] = field(default_factory=list)

    @property
    def credentials(self) -> dict[str, str]:
        return tomllib.loads((self.path / "credentials.toml").read_text())

    def secrets(self) -> set[str]:
        home = homes.read(self.path)
        assert home is not None and home.access
        return {home.password, *home.access.values()}

    def hpo(self, *words: object, code: int = 0, **variables: str) -> str:
        """Run `hpo WORDS` on the serving machine; `variables` change the environment."""
        done = subprocess.run(
            [sys.executable, "-m", "hpo", *map(str, words)],
            env=os.environ | {"HPO_HOME": str(self.path), "HPO_TRAINERS": "1"} | variables,
            capture_output=True,
            text=True,
            timeout=PATIENCE * 2,
        )
        self.printed.append(done.stdout + done.stderr)
        assert done.returncode == code, self.printed[-1]
        assert "Traceback" not in self.printed[-1], self.printed[-1]
        return self.printed[-1]

    def elsewhere(self, *words: object, code: int = 0, **changed: str) -> str:
        """Run `hpo WORDS` as on another machine: it has a copy of the credentials file, perhaps with other values."""
        other = self.folder / "other machine"
        other.mkdir(exist_ok=True)
        file = other / "credentials.toml"
        values = self.credentials | changed
        file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
        file.chmod(0o600)
        return self.hpo(*words, code=code, HPO_HOME=str(other / "home"), HPO_CREDENTIALS=str(file))

    def study(self, name: str) -> Path:
        """A study file of one point and two epochs."""
        path = cells.study(self.folder, name, data=self.data, epochs=2)
        path.write_text(path.read_text().replace("[2, 4]", "[2]").replace("[1e-3, 1e-4]", "[1e-3]"))
        return path

    def ask(self, path: str, body: dict | None = None, *, user: str | None = None) -> int:
        """The status with which the MLflow server answers."""
        request = urllib.request.Request(
            self.credentials["tracking_uri"] + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Origin": self.credentials["tracking_uri"]},
        )
        if user:
            request.add_header("Authorization", f"Basic {base64.b64encode(user.encode()).decode()}")
        try:
            return urllib.request.urlopen(request, timeout=60).status
        except urllib.error.HTTPError as error:
            return error.code


@pytest.fixture(scope="module")
def lab(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    made = Lab((folder / "home").resolve(), folder, data)
    try:
        made.hpo("run", "--study", made.study("before"))
        made.hpo("up", "--listen", ADDRESS, code=1)
        assert "run already, and listen on 127.0.0.1" in made.printed[-1]
        made.hpo("down")
        made.hpo("up", "--listen", ADDRESS)
        yield made
    finally:
        services.erase(settings.read({"HPO_HOME": str(made.path)}))


def test_the_studies_made_on_loopback_are_there_and_the_serving_machine_goes_on(lab):
    assert [each["name"] for each in json.loads(lab.hpo("studies", "--json"))] == ["before"]
    assert "listen" not in lab.hpo("up")
    assert "best 1 of 1 trials" in lab.hpo("run", "--study", lab.study("before"))
    assert f"http://{ADDRESS}:" in lab.printed[-1]


def test_a_worker_elsewhere_needs_the_credentials_file_and_nothing_else(lab, tmp_path):
    assert "best 1 of 1 trials" in lab.elsewhere("run", "--study", lab.study("elsewhere"))
    lab.elsewhere("download", tmp_path / "model")
    lab.elsewhere("delete", "--study", "before", "--yes")  # made on loopback, when nobody owned anything
    assert "Healthy" in lab.elsewhere("doctor")


def test_nobody_gets_in_without_user_and_password(lab):
    search = ("/api/2.0/mlflow/experiments/search", {"max_results": 1})
    password = lab.credentials["tracking_password"]
    assert lab.ask(*search) == lab.ask(*search, user="hpo:wrong") == lab.ask(*search, user="admin:password") == 401
    assert lab.ask("/") == lab.ask("/api/2.0/mlflow-artifacts/artifacts") == 401
    assert lab.ask(*search, user=f"hpo:{password}") == 200  # as MLflow's pages ask: with their own origin
    new = {"username": "eve", "password": "a long password"}
    assert lab.ask("/api/2.0/mlflow/users/create", new, user=f"hpo:{password}") == 403
    url = urlsplit(lab.credentials["database_url"])
    for user, word in (("hpo_queue", "wrong"), ("hpo_queue", ""), ("postgres", ""), ("hpo", "")):
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(host=url.hostname, port=url.port, dbname="hpo", user=user, password=word)


def test_a_role_reaches_its_own_database_and_no_more(lab):
    url = lab.credentials["database_url"]
    with psycopg.connect(url, autocommit=True) as connection:
        rights = (
            "SELECT rolsuper, rolcreatedb, rolcreaterole, rolreplication FROM pg_roles WHERE rolname = current_user"
        )
        assert connection.execute(rights).fetchone() == (False, False, False, False)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT pg_read_file('/etc/passwd')")
    for other in ("mlflow", "mlflow_users", "postgres", "template1"):
        with pytest.raises(psycopg.OperationalError, match="no pg_hba"):
            psycopg.connect(urlunsplit(urlsplit(url)._replace(path=f"/{other}")))
    home = homes.read(lab.path)
    assert postgres.host_rules(home).splitlines() == [
        "host all hpo 127.0.0.1/32 scram-sha-256",
        "host hpo hpo_queue all scram-sha-256",
        "host mlflow mlflow 127.0.0.1/32 scram-sha-256",
        "host mlflow_users mlflow_users 127.0.0.1/32 scram-sha-256",
    ]


def test_no_password_is_printed_logged_stored_or_on_a_command_line(lab, tmp_path):
    seen: set[str] = set()
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.05):
            for process in psutil.process_iter(["cmdline"]):
                seen.add(" ".join(process.info["cmdline"] or []))

    watcher = threading.Thread(target=watch)
    watcher.start()
    wrong = urlsplit(lab.credentials["database_url"])
    wrong_url = urlunsplit(wrong._replace(netloc=wrong.netloc.replace(wrong.password or "", "wr0ng-pass")))
    try:
        lab.elsewhere("run", "--study", lab.study("watched"))
        lab.elsewhere("run", "--study", lab.study("refused"), code=1, tracking_password="wr0ng-pass")
        assert "are user and password right" in lab.printed[-1]
        lab.elsewhere("studies", code=1, database_url=wrong_url)
        lab.elsewhere("run", "--study", lab.study("lost"), code=1, tracking_uri="http://127.0.0.2:9")
        lab.hpo("down")
        lab.elsewhere("studies", code=1)
        lab.hpo("up")
    finally:
        finished.set()
        watcher.join()
    home = homes.read(lab.path)
    environment = {"PGPASSWORD": home.password, "PATH": os.defpath}
    place = ["-h", "127.0.0.1", "-p", str(home.postgres_port), "-U", "hpo"]
    dumps = []
    for name in postgres.ROLES:
        command = [postgres._binaries(home) / "pg_dump", *place, name]
        dumps.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert "best_val_nmse" in dumps[0] and "hpo.kind" in dumps[1] and "scrypt" in dumps[2] + "scrypt"
    assert any("mlflow server" in line or "--app-name basic-auth" in line for line in seen)
    holders = {"credentials.toml", "state.json", "mlflow.env", "mlflow-users.ini"}
    files = [path for path in lab.folder.rglob("*") if path.is_file() and path.name not in holders]
    assert lab.path / "logs" / "mlflow.log" in files and lab.path / "logs" / "postgres.log" in files
    for secret in {*lab.secrets(), "wr0ng-pass"}:
        assert not [line for line in seen if secret in line]
        assert not [text for text in lab.printed if secret in text]
        assert not [index for index, text in enumerate(dumps) if secret in text]
        assert not [path for path in files if secret.encode() in path.read_bytes()]
    for path in lab.path.rglob("*"):
        assert path.name not in holders or path.stat().st_mode & 0o777 == 0o600


def test_without_its_file_the_next_start_makes_new_passwords(lab):
    old = lab.secrets()
    before = lab.credentials["database_url"]
    lab.hpo("down")
    (lab.path / "credentials.toml").unlink()
    lab.hpo("up")
    assert len(old & lab.secrets()) == 1  # the superuser's, which never left the machine
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(before)
    assert "elsewhere" in lab.elsewhere("studies")


def test_it_goes_back_to_loopback_with_its_studies(lab):
    lab.hpo("down")
    assert "export HPO_DATABASE_URL=" in lab.hpo("up", "--listen", "127.0.0.1")
    assert "elsewhere" in {each["name"] for each in json.loads(lab.hpo("studies", "--json"))}
    assert "best 1 of 1 trials" in lab.hpo("run", "--study", lab.study("after"))
    home = homes.read(lab.path)
    assert home.listen is None and postgres.host_rules(home) == "host all hpo 127.0.0.1/32 scram-sha-256\n"
