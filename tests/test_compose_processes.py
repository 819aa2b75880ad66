"""docker-compose.yml without Docker: its commands, environments, secrets, health checks and order, as plain processes.

Only what an engine would give is put in place of it: paths in containers, host names, Postgres' image (the embedded
binaries, initialised as the image's entry point does).
"""

import http.client
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import cells
import psycopg
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from shell import PATIENCE, ROOT

from hpo import credentials, daemon, mlflow_server, postgres
from hpo import home as homes

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())


class Compose:
    """Runs services of the file in `folder`, each in its own environment."""

    def __init__(self, folder: Path) -> None:
        home = folder / "home"
        (home / "services").mkdir(parents=True)
        self.home = homes.settle(home.resolve(), print, postgres.stop)
        self.place = self.home.data.parent  # where the user that Postgres runs as may go
        self.binaries = postgres._install(self.home)
        self.postgres_port, self.mlflow_port = daemon.choose_port(None), daemon.choose_port(None)
        script = [sys.executable, "-m", "hpo.secret_files", str(self.place)]
        subprocess.run(script, cwd=ROOT, check=True, capture_output=True)
        self.variables = dict(line.split("=", 1) for line in (self.place / ".env").read_text().splitlines())
        self.variables |= {"HPO_TRAINERS": "1", "HPO_STUDY": "composed"}
        self.secrets = self.place / "secrets"
        self.secrets.chmod(0o755)
        for file in self.secrets.iterdir():
            file.write_text(self.here(file.read_text()))
        (self.secrets / "credentials.toml").chmod(0o600)  # not on a read-only mount
        self.configs = self.place / "configs"
        self.configs.mkdir()
        for name, config in COMPOSE["configs"].items():
            (self.configs / name).write_text(self.here((ROOT / config["file"]).read_text()))
        self.folder, self.running = folder, {}

    def here(self, text: str) -> str:
        """The text with what an engine would put in for variables, and with our paths and addresses."""

        def value(found: re.Match) -> str:
            name, kind, default = found.groups()
            assert kind == ":-" or name in self.variables, found[0]
            return self.variables.get(name) or default

        text = re.sub(r"\$\{(\w+)(:[-?])([^}]*)\}", value, str(text)).replace("$$", "$")
        for there, ours in {
            "/run/secrets": str(self.place / "secrets"),
            "/etc/postgresql": str(self.place / "configs"),
            "/artifacts": str(self.place / "artifacts"),
            "postgres:5432": f"127.0.0.1:{self.postgres_port}",
            "mlflow:5000": f"127.0.0.1:{self.mlflow_port}",
            "0.0.0.0": "127.0.0.1",
        }.items():
            text = text.replace(there, ours)
        return re.sub(r"^5000$", str(self.mlflow_port), text)

    def environment(self, name: str) -> dict[str, str]:
        own = {key: self.here(value) for key, value in COMPOSE["services"][name].get("environment", {}).items()}
        base = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        base |= {"PATH": f"{Path(sys.executable).parent}:{self.binaries}:{os.defpath}", "HOME": str(self.folder)}
        return base | {"HPO_HOME": str(self.folder / name), "PGPORT": str(self.postgres_port)} | own

    def start(self, name: str, command: list[str] | None = None, **arguments) -> subprocess.Popen:
        """Start a service, or with `command` what `docker compose run SERVICE COMMAND` starts."""
        words = command or [self.here(word) for word in COMPOSE["services"][name]["command"]]
        log = self.folder / f"{name}-{len(self.running)}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                words,
                env=self.environment(name),
                cwd=self.place,
                stdout=output,
                stderr=output,
                start_new_session=True,
                **arguments,
            )
        self.running[str(log)] = process
        return process

    def healthy(self, name: str) -> bool:
        kind, *words = COMPOSE["services"][name]["healthcheck"]["test"]
        words = [self.here(word) for word in words]
        command = ["sh", "-c", *words] if kind == "CMD-SHELL" else words
        return (
            subprocess.run(command, env=self.environment(name), capture_output=True, timeout=PATIENCE).returncode == 0
        )

    def until_healthy(self, name: str) -> None:
        (log, process) = list(self.running.items())[-1]
        end = time.monotonic() + PATIENCE
        while not self.healthy(name):
            assert process.poll() is None and time.monotonic() < end, Path(log).read_text()
            time.sleep(0.5)

    def run(self, name: str, *command: object) -> str:
        """The output of what ends by itself: a one-shot service, or `docker compose run`."""
        process = self.start(name, [*map(str, command)] or None)
        code = process.wait(timeout=PATIENCE)
        text = Path(list(self.running)[-1]).read_text()
        assert code == 0, text
        return text

    def start_postgres(self) -> None:
        """What the entry point of Postgres' image does: initdb, the server, the scripts of its folder."""
        service, user = COMPOSE["services"]["postgres"], daemon.as_user(postgres._user())
        variables = {key: self.here(value) for key, value in service["environment"].items()}
        self.home.data.mkdir(mode=0o700)
        if user:
            os.chown(self.home.data, user["user"], user["group"])
        made = postgres._run(
            *(self.binaries / "initdb", "-D", self.home.data, "-U", variables["POSTGRES_USER"]),
            f"--pwfile={variables['POSTGRES_PASSWORD_FILE']}",
            *shlex.split(variables["POSTGRES_INITDB_ARGS"]),
        )
        assert made.returncode == 0, made.stderr
        ours = {"port": self.postgres_port, "listen_addresses": "127.0.0.1", "unix_socket_directories": ""}
        options = [f"--{key}={value}" for key, value in ours.items()]
        command = [self.here(word) for word in service["command"]]
        self.start(
            "postgres", [str(self.binaries / command[0]), *command[1:], "-D", str(self.home.data), *options], **user
        )
        password = Path(variables["POSTGRES_PASSWORD_FILE"]).read_text()
        login = ["-h", "127.0.0.1", "-U", variables["POSTGRES_USER"], "-d", variables["POSTGRES_DB"]]
        for config in service["configs"]:
            if config["target"].startswith("/docker-entrypoint-initdb.d/"):
                script = [
                    self.binaries / "psql",
                    "-v",
                    "ON_ERROR_STOP=1",
                    *login,
                    "-f",
                    self.configs / config["source"],
                ]
                end = time.monotonic() + PATIENCE
                while subprocess.run(
                    [self.binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.postgres_port)]
                ).returncode:
                    assert time.monotonic() < end
                    time.sleep(0.1)
                subprocess.run(script, env=self.environment("postgres") | {"PGPASSWORD": password}, check=True)

    def close(self) -> None:
        for process in reversed(self.running.values()):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        shutil.rmtree(self.place)


@pytest.fixture
def compose(tmp_path: Path) -> Iterator[Compose]:
    made = Compose(tmp_path)
    try:
        yield made
    finally:
        made.close()


def order() -> list[str]:
    """The services of no profile, each after those that it waits for."""
    left = {
        name: set(each.get("depends_on", {})) for name, each in COMPOSE["services"].items() if "profiles" not in each
    }
    done: list[str] = []
    while left:
        ready = [name for name, needs in left.items() if needs <= set(done)]
        done += ready
        left = {name: needs for name, needs in left.items() if name not in ready}
    return done


def test_the_services_run_as_the_file_says_until_a_model_is_promoted(compose, data, tmp_path, monkeypatch):
    assert order() == ["postgres", "migrate", "mlflow", "worker"]
    assert not compose.healthy("postgres") and not compose.healthy("mlflow")
    compose.start_postgres()
    compose.until_healthy("postgres")
    compose.run("migrate")
    compose.start("mlflow")
    compose.until_healthy("mlflow")

    study = cells.study(tmp_path, "composed", data=data, epochs=60)
    runner = compose.start("worker", ["hpo", "run", "--study", str(study)])
    printed = Path(list(compose.running)[-1])
    end = time.monotonic() + PATIENCE
    while "charts:" not in printed.read_text():
        assert runner.poll() is None and time.monotonic() < end, printed.read_text()
        time.sleep(0.2)
    worker = compose.start("worker")
    compose.until_healthy("worker")
    assert runner.wait(timeout=PATIENCE) == 0, printed.read_text()
    assert worker.wait(timeout=PATIENCE) == 0
    assert not compose.healthy("worker"), "none is left"
    assert "Promoted: config" in printed.read_text() and "@champion is this version" in printed.read_text()
    assert "each as recorded in the database" in compose.run("worker", "hpo", "download", tmp_path / "model")
    assert (tmp_path / "model" / "weights.safetensors").exists()
    assert "Healthy" in compose.run("worker", "hpo", "doctor")
    compose.run("migrate")  # once more, as at every `up`

    given = credentials.read(compose.secrets / "credentials.toml")
    client = MlflowClient(given["tracking_uri"], given["tracking_uri"])
    for user, password in ((None, None), ("hpo", "wrong"), ("admin", "password1234")):
        for name, value in (("USERNAME", user), ("PASSWORD", password)):
            monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
            if value:
                monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
        with pytest.raises(MlflowException, match="401"):
            client.search_experiments()
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", given["tracking_username"])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", given["tracking_password"])
    (model,) = client.search_registered_models()
    assert client.get_model_version_by_alias(model.name, "champion").version == "1"

    for use, (database, role) in {"queue": ("hpo", "hpo_queue"), "mlflow": ("mlflow", "mlflow")}.items():
        password = (compose.secrets / f"{use}-password").read_text()
        login = {"host": "127.0.0.1", "port": compose.postgres_port, "user": role}
        with psycopg.connect(**login, password=password, dbname=database) as connection:
            assert connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone() == (
                False,
            )
        for other in {"hpo", "mlflow", "mlflow_users", "postgres"} - {database}:
            with pytest.raises(psycopg.OperationalError, match="no pg_hba"):
                psycopg.connect(**login, password=password, dbname=other)
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(**login, password=secrets.token_hex(4), dbname=database)
    for host, status in ((f"127.0.0.1:{compose.mlflow_port}", 401), ("evil.example", 403)):
        url = urlsplit(given["tracking_uri"])
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=30)
        connection.putrequest("GET", "/api/2.0/mlflow/experiments/get?experiment_id=0", skip_host=True)
        connection.putheader("Host", host)
        connection.endheaders()
        answer = connection.getresponse().status
        connection.close()
        assert answer == status
    assert given["tracking_username"] == mlflow_server.USER
