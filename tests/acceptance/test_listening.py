"""`hpo up --listen`: a lab served without Docker, by credentials in a file; nobody else gets in, nothing leaks."""

import base64
import json
import os
import re
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

import browser
import cells
import psutil
import psycopg
import pytest
from shell import PATIENCE

from hpo import settings, study
from hpo.planning import plans
from hpo.planning.preparation import prepare
from hpo.queue import Queue
from hpo.services import home as homes
from hpo.services import postgres, serving
from hpo.tracking.client import Tracker

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]
ADDRESS = "127.0.0.2"  # not 127.0.0.1, so with access control; on every Linux machine

SEARCH = ("/api/2.0/mlflow/experiments/search", {"max_results": 1})


@dataclass
class Lab:
    """A home that was on loopback and listens now, and what was printed meanwhile."""

    path: Path
    folder: Path
    data: Path
    printed: list[str] = field(default_factory=list)  # since it listens
    commands: set[str] = field(default_factory=set)  # command lines of all processes of the machine since then
    old_secrets: set[str] = field(default_factory=set)

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

    def plan(self, name: str) -> None:
        """Plan the study on loopback, where the services start for it."""
        read = settings.read({"HPO_HOME": str(self.path)})
        found, _ = serving.up(read)
        queue, ready = Queue(found.database_url), prepare(study.load(str(self.study(name))))
        queue.install()
        plans.plan(ready, queue, Tracker(found.tracking_uri), read, found.database_url)
        queue.close()

    def ask(self, path: str, body: dict | None = None, *, user: str | None = None, **headers: str) -> int:
        """The status with which the MLflow server answers."""
        request = urllib.request.Request(
            self.credentials["tracking_uri"] + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Origin": self.credentials["tracking_uri"]} | headers,
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
    made, finished = Lab((folder / "home").resolve(), folder, data), threading.Event()

    def watch() -> None:
        while not finished.wait(0.2):
            for process in psutil.process_iter(["cmdline"]):
                made.commands.add(" ".join(process.info["cmdline"] or []))

    watcher = threading.Thread(target=watch)
    try:
        made.plan("before")
        made.hpo("up", "--listen", ADDRESS, code=1)
        assert "run already, and listen on 127.0.0.1" in made.printed[-1]
        made.hpo("down")
        for name in homes.GUARDED:  # as an earlier hpo left them
            subprocess.run(["chmod", "-R", "a+rX", made.path / name], check=name == "artifacts", capture_output=True)
        made.printed.clear()
        watcher.start()
        made.hpo("up", "--listen", ADDRESS)
        yield made
    finally:
        finished.set()
        if watcher.ident:
            watcher.join()
        serving.erase(settings.read({"HPO_HOME": str(made.path)}))


@pytest.mark.long
def test_the_studies_planned_on_loopback_are_there_and_the_serving_machine_goes_on(lab):
    assert [each["name"] for each in json.loads(lab.hpo("studies", "--json"))] == ["before"]
    assert "export HPO_CREDENTIALS=" in lab.hpo("up")
    assert "best 1 of 1 trial," in lab.hpo("run", "--study", lab.study("before"))
    assert f"http://{ADDRESS}:" in lab.printed[-1]


@pytest.mark.long
@pytest.mark.apt
def test_the_link_of_a_command_shows_the_trials_in_a_browser_that_logged_in(lab):
    link = re.findall(r"list:\s+(\S+)", "".join(lab.printed))[-1]
    with browser.chromium() as driver:
        driver.get(link.partition("#")[0].replace("://", f"://hpo:{lab.credentials['tracking_password']}@"))
        driver.get(link)
        shown = browser.until(driver, lambda: browser.rows(driver), "the list")
    assert any("f2" in cell["text"] for row in shown for cell in row.values()), shown


def test_a_worker_elsewhere_needs_the_credentials_file_and_nothing_else(lab, tmp_path):
    assert "best 1 of 1 trial," in lab.elsewhere("run", "--study", lab.study("elsewhere"))
    shown = lab.elsewhere("up")
    assert "export HPO_CREDENTIALS=" in shown and "DATABASE_URL" not in shown
    lab.elsewhere("download", "--study", "elsewhere", tmp_path / "model")
    lab.elsewhere("delete", "--study", "before", "--yes")  # made on loopback, when nobody owned anything
    assert "Healthy" in lab.elsewhere("doctor")


def test_every_file_of_the_home_is_its_users_alone(lab):
    found = {path: path.lstat().st_mode & 0o777 for path in (lab.path, *lab.path.rglob("*"))}
    assert any("artifacts" in path.parts and path.is_file() for path in found)
    assert {str(path): oct(mode) for path, mode in found.items() if mode != (0o700 if path.is_dir() else 0o600)} == {}


@pytest.mark.long
def test_a_credentials_file_removed_while_the_services_run_is_written_again(lab):
    before = lab.credentials
    (lab.path / "credentials.toml").unlink()
    assert "credentials.toml was missing: written again, with the passwords in use" in lab.hpo("up")
    assert lab.credentials == before


def test_nobody_gets_in_without_user_and_password(lab):
    password = lab.credentials["tracking_password"]
    assert lab.ask(*SEARCH) == lab.ask(*SEARCH, user="hpo:wrong") == lab.ask(*SEARCH, user="admin:password") == 401
    assert lab.ask("/") == lab.ask("/api/2.0/mlflow-artifacts/artifacts") == 401
    assert lab.ask(*SEARCH, user=f"hpo:{password}") == 200  # as MLflow's pages ask: with their own origin
    assert lab.ask(*SEARCH, user=f"hpo:{password}", Origin="http://evil.example") == 403
    assert lab.ask(*SEARCH, user=f"hpo:{password}", Host="evil.example") == 403
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


@pytest.mark.long
def test_without_its_file_the_next_start_makes_new_passwords(lab):
    lab.old_secrets, old = lab.secrets(), lab.credentials
    lab.hpo("down")
    lab.elsewhere("studies", code=1)
    (lab.path / "credentials.toml").unlink()
    lab.hpo("up")
    assert len(lab.old_secrets & lab.secrets()) == 1  # the superuser's, which never left the machine
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(old["database_url"])
    assert lab.ask(*SEARCH, user=f"hpo:{old['tracking_password']}") == 401
    assert "elsewhere" in lab.elsewhere("studies")


def test_no_password_is_printed_logged_stored_or_on_a_command_line(lab):
    wrong = urlsplit(lab.credentials["database_url"])
    wrong_url = urlunsplit(wrong._replace(netloc=wrong.netloc.replace(wrong.password or "", "wr0ng-pass")))
    lab.elsewhere("studies", code=1, database_url=wrong_url)
    lab.elsewhere("promote", "--study", "elsewhere", code=1, tracking_password="wr0ng-pass")
    assert "are user and password right" in lab.printed[-1]
    lab.elsewhere("promote", "--study", "elsewhere", code=1, tracking_uri=f"http://{ADDRESS}:9")
    home = homes.read(lab.path)
    place = ["-h", "127.0.0.1", "-p", str(home.postgres_port), "-U", "hpo"]
    dumps = {}
    for name in postgres.ROLES:
        command = [postgres._binaries(home) / "pg_dump", *place, name]
        dumps[name] = subprocess.run(command, env={"PGPASSWORD": home.password}, capture_output=True, check=True).stdout
    assert b"best_val_nmse" in dumps["hpo"] and b"hpo.kind" in dumps["mlflow"] and b"admin" in dumps["mlflow_users"]
    assert any("--app-name basic-auth" in line for line in lab.commands)
    assert any("hpo.worker.trainer" in line for line in lab.commands)
    holders = {"credentials.toml", "state.json", "mlflow.env", "mlflow-users.ini"}
    files = [path for path in lab.folder.rglob("*") if path.is_file()]
    assert {lab.path / "logs" / "mlflow.log", lab.path / "logs" / "postgres.log"} <= set(files)
    for secret in {*lab.secrets(), *lab.old_secrets, "wr0ng-pass"}:
        assert not [line for line in list(lab.commands) if secret in line]
        assert not [text for text in lab.printed if secret in text]
        assert not [name for name, text in dumps.items() if secret.encode() in text]
        assert not [path for path in files if path.name not in holders and secret.encode() in path.read_bytes()]
    for path in files:
        assert path.name not in holders or path.stat().st_mode & 0o777 == 0o600


@pytest.mark.long
def test_it_goes_back_to_loopback_with_its_studies(lab):
    lab.hpo("down")
    assert "export HPO_DATABASE_URL=" in lab.hpo("up", "--listen", "127.0.0.1")
    assert "Promoted" in lab.hpo("promote", "--study", "elsewhere", "--force")
    lab.hpo("delete", "--study", "elsewhere", "--yes")  # rows and runs of the roles that nobody is any more
    home = homes.read(lab.path)
    assert home.listen is None and postgres.host_rules(home) == "host all hpo 127.0.0.1/32 scram-sha-256\n"
