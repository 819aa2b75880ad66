"""docker-compose.yml without Docker: its commands, environments, secrets, health checks and order, as plain processes.

Only what an engine would give is put in place of it: paths in containers, host names, Postgres' image (the embedded
binaries, initialised as the image's entry point does).
"""

import base64
import http.client
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cells
import psycopg
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from places import ROOT
from shell import PATIENCE

from hpo import credentials
from hpo.queue import Queue
from hpo.services import daemon, foreign, postgres
from hpo.services import home as homes

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
NAME = "lab.example.org"  # of the server in a browser


class Compose:
    """Runs services of the file in `folder`, each in its own environment."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.running = folder, {}
        home = folder / "home"
        (home / "services").mkdir(parents=True)
        self.home = homes.settle(home.resolve(), print, postgres.stop)
        self.place = self.home.data.parent  # where the user that Postgres runs as may go
        self.binaries = postgres._install(self.home)
        self.postgres_port, self.mlflow_port, self.dashboard_port, self.tls_port = (
            daemon.choose_port(None) for _ in range(4)
        )
        script = [sys.executable, "-m", "hpo.services.secret_files", "--name", NAME, str(self.place)]
        subprocess.run(script, cwd=ROOT, check=True, capture_output=True)
        self.variables = dict(line.split("=", 1) for line in (self.place / ".env").read_text().splitlines())
        self.variables |= {"HPO_TRAINERS": "1"}
        self.secrets = self.place / "secrets"
        self.secrets.chmod(0o755)
        for file in self.secrets.iterdir():
            file.write_text(self.here(file.read_text()))
        (self.secrets / "credentials.toml").chmod(0o600)  # not on a read-only mount
        self.configs = self.place / "configs"
        self.configs.mkdir()
        for name, config in COMPOSE["configs"].items():
            (self.configs / name).write_text(self.here((ROOT / config["file"]).read_text()))

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
            "/backups": str(self.place / "backups"),
            "postgres:5432": f"127.0.0.1:{self.postgres_port}",
            "mlflow:5000": f"127.0.0.1:{self.mlflow_port}",
            "/tmp/mlruns": str(self.folder / "tools"),
            "0.0.0.0": "127.0.0.1",
            "listen 8443": f"listen 127.0.0.1:{self.tls_port}",
            "127.0.0.1:8443": f"127.0.0.1:{self.tls_port}",
            "127.0.0.1:8080": f"127.0.0.1:{self.dashboard_port}",
            "port = 8080": f"port = {self.dashboard_port}",
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
        service = COMPOSE["services"][name]
        before = [] if name == "postgres" else service.get("entrypoint", [])  # its image's is start_postgres
        words = [*before, *(command or service["command"])]
        log = self.folder / f"{name}-{len(self.running)}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [self.here(word) for word in words],
                env=self.environment(name),
                cwd=self.here(service.get("working_dir", self.place)),
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
        checked = subprocess.run(command, env=self.environment(name), capture_output=True, timeout=PATIENCE)
        return checked.returncode == 0

    def until_healthy(self, name: str) -> None:
        """Wait for the service that was started last."""
        (log, process) = list(self.running.items())[-1]
        end = time.monotonic() + PATIENCE
        while not self.healthy(name):
            assert process.poll() is None and time.monotonic() < end, Path(log).read_text()
            time.sleep(0.5)

    def run(self, name: str, *command: object, code: int = 0) -> str:
        """The output of what ends by itself: a one-shot service, or `docker compose run`."""
        process = self.start(name, [*map(str, command)] or None)
        ended = process.wait(timeout=PATIENCE)
        text = Path(list(self.running)[-1]).read_text()
        assert ended == code, text
        return text

    def superuser(self) -> psycopg.Connection:
        service = COMPOSE["services"]["postgres"]["environment"]
        return psycopg.connect(
            host="127.0.0.1",
            port=self.postgres_port,
            user=service["POSTGRES_USER"],
            dbname=service["POSTGRES_DB"],
            password=Path(self.here(service["POSTGRES_PASSWORD_FILE"])).read_text(),
            autocommit=True,
        )

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
        login = {"PGPASSWORD": Path(variables["POSTGRES_PASSWORD_FILE"]).read_text()}
        for config in service["configs"]:
            if config["target"].startswith("/docker-entrypoint-initdb.d/"):
                place = ["-h", "127.0.0.1", "-U", variables["POSTGRES_USER"], "-d", variables["POSTGRES_DB"]]
                script = [self.binaries / "psql", "-v", "ON_ERROR_STOP=1", *place, "-f"]
                end = time.monotonic() + PATIENCE
                while subprocess.run(
                    [self.binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.postgres_port)]
                ).returncode:
                    assert time.monotonic() < end
                    time.sleep(0.1)
                environment = self.environment("postgres") | login
                subprocess.run([*script, self.configs / config["source"]], env=environment, check=True)

    def close(self) -> None:
        for log, process in reversed(self.running.items()):
            if process.poll() is None:  # of Postgres' image SIGINT is the signal: do not wait for clients
                os.killpg(process.pid, signal.SIGINT if "postgres-" in log else signal.SIGTERM)
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        shutil.rmtree(self.place)


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """All services of no profile but the worker, each started when those that it waits for are well."""
    made = Compose(tmp_path_factory.mktemp("compose"))
    try:
        assert order() == ["postgres", "migrate", "mlflow", "worker"]
        assert not made.healthy("postgres") and not made.healthy("mlflow")
        made.start_postgres()
        made.until_healthy("postgres")
        made.run("migrate")
        made.start("mlflow")
        made.until_healthy("mlflow")
        yield made
    finally:
        made.close()


@pytest.fixture
def client(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """MLflow's client with the workers' user and password."""
    given = credentials.read(compose.secrets / "credentials.toml")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", given["tracking_username"])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", given["tracking_password"])
    return MlflowClient(given["tracking_uri"], given["tracking_uri"])


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


def test_the_services_run_as_the_file_says_until_a_model_is_promoted(compose, data, tmp_path):
    study = cells.study(tmp_path, "composed", data=data, epochs=100, rates="[1e-3]")
    queue = Queue(credentials.read(compose.secrets / "credentials.toml")["database_url"])
    runner = compose.start("worker", ["hpo", "run", "--study", str(study)])
    printed = Path(list(compose.running)[-1])
    end = time.monotonic() + PATIENCE
    while not (queue.installed() and any(row.facts.planned for row in queue.studies())):
        assert runner.poll() is None and time.monotonic() < end, printed.read_text()
        time.sleep(0.1)
    queue.close()
    worker = compose.start("worker")
    compose.until_healthy("worker")
    assert runner.wait(timeout=PATIENCE) == 0, printed.read_text()
    assert worker.poll() is None, "a worker of the pool waits for the next study"
    worker.terminate()
    assert worker.wait(timeout=PATIENCE) == 130
    assert not compose.healthy("worker"), "none is left"
    assert "Promoted: config" in printed.read_text() and "@champion is this version" in printed.read_text()
    assert "each as recorded in the database" in compose.run("worker", "hpo", "download", tmp_path / "model")
    assert (tmp_path / "model" / "weights.safetensors").exists()


@pytest.mark.long
def test_studies_are_backed_up_and_restored_by_the_service_for_it(compose, client):
    compose.run("tools", "hpo", "backup", "saved.tar")
    (saved,) = (compose.place / "backups").iterdir()
    assert saved.name == "saved.tar" and saved.stat().st_mode & 0o777 == 0o600
    with compose.superuser() as connection:  # as new: what the first start makes in them comes again
        for statement in re.findall(
            r"^CREATE DATABASE (?!mlflow_users).*$", (compose.configs / "roles.sql").read_text(), re.M
        ):
            connection.execute(f"DROP DATABASE {statement.split()[2]} WITH (FORCE)")
            connection.execute(statement)
    compose.run("migrate")
    assert "Restored composed (2 of 2 trials done)" in compose.run("tools", "hpo", "restore", "saved.tar")
    assert "Healthy" in compose.run("tools")
    (model,) = client.search_registered_models()
    assert client.get_model_version_by_alias(model.name, "champion").version == "1"


@pytest.mark.long
def test_tables_are_not_migrated_beside_a_server_that_uses_them(compose):
    login = {"host": "127.0.0.1", "port": compose.postgres_port, "user": "mlflow", "dbname": "mlflow"}
    password = (compose.secrets / "mlflow-password").read_text()
    with psycopg.connect(**login, password=password, autocommit=True) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'an-older-one'")
        try:
            text = compose.run("migrate", code=1)
        finally:
            connection.execute("UPDATE alembic_version SET version_num = %s", (foreign.newest_schema(),))
    assert "has schema an-older-one" in text and "docker compose stop mlflow worker" in text
    assert "Traceback" not in text


def test_nobody_gets_in_without_the_passwords_and_no_role_beyond_its_database(compose, client, monkeypatch):
    for user, password in ((None, None), ("hpo", "wrong"), ("admin", "password1234")):
        for name, value in (("USERNAME", user), ("PASSWORD", password)):
            monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
            if value:
                monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
        with pytest.raises(MlflowException, match="401"):
            client.search_experiments()
    for use, (database, role) in {"queue": ("hpo", "hpo_queue"), "mlflow": ("mlflow", "mlflow")}.items():
        password = (compose.secrets / f"{use}-password").read_text()
        login = {"host": "127.0.0.1", "port": compose.postgres_port, "user": role}
        with psycopg.connect(**login, password=password, dbname=database) as connection:
            superuser = "SELECT rolsuper FROM pg_roles WHERE rolname = current_user"
            assert connection.execute(superuser).fetchone() == (False,)
        for other in {"hpo", "mlflow", "mlflow_users", "postgres"} - {database}:
            with pytest.raises(psycopg.OperationalError, match="no pg_hba"):
                psycopg.connect(**login, password=password, dbname=other)
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(**login, password=secrets.token_hex(4), dbname=database)
    for host, status in ((f"127.0.0.1:{compose.mlflow_port}", 401), ("evil.example", 403)):
        connection = http.client.HTTPConnection("127.0.0.1", compose.mlflow_port, timeout=30)
        connection.putrequest("GET", "/api/2.0/mlflow/experiments/get?experiment_id=0", skip_host=True)
        connection.putheader("Host", host)
        connection.endheaders()
        answer = connection.getresponse().status
        connection.close()
        assert answer == status


@pytest.mark.long
def test_the_dashboard_reads_the_studies(compose):
    compose.start("dashboard")
    compose.until_healthy("dashboard")


@pytest.mark.long
@pytest.mark.apt
def test_the_proxy_hands_an_encrypted_request_on_as_from_its_own_name(compose):
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if nginx is None:
        pytest.skip("needs nginx")
    subject = ["-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}", "-days", "1"]
    files = ["-keyout", compose.secrets / "tls.key", "-out", compose.secrets / "tls.crt"]
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, *files], check=True)
    temporary = "".join(
        f"{kind}_temp_path {compose.place}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = compose.place / "nginx.conf"  # stands for the image's own
    main.write_text(
        f"daemon off; pid {compose.place}/nginx.pid; error_log stderr; events {{}}"
        f"http {{ access_log off; {temporary} include {compose.configs}/nginx.conf; }}"
    )
    compose.start("tls", [nginx, "-c", str(main)])
    compose.until_healthy("tls")
    trusted = ssl.create_default_context(cafile=compose.secrets / "tls.crt")
    given = credentials.read(compose.secrets / "credentials.toml")
    user = f"{given['tracking_username']}:{given['tracking_password']}"
    for origin, status in ((f"https://{NAME}", 200), ("https://evil.example", 403)):
        connection = http.client.HTTPConnection(NAME)
        connection.sock = trusted.wrap_socket(
            socket.create_connection(("127.0.0.1", compose.tls_port)), server_hostname=NAME
        )
        headers = {"Authorization": f"Basic {base64.b64encode(user.encode()).decode()}", "Origin": origin}
        headers["Content-Type"] = "application/json"
        connection.request("POST", "/api/2.0/mlflow/experiments/search", json.dumps({"max_results": 1}), headers)
        answer = connection.getresponse().status
        connection.close()
        assert answer == status
