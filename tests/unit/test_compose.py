"""docker-compose.yml: valid, hardened, and running what the embedded services run."""

import os
import re
import subprocess
import sys

import pytest
import yaml
from places import ROOT

from hpo.services import foreign, mlflow_server, postgres, secret_files
from hpo.worker.ending import STOP_LIMIT

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
CONFIGS = {name: (ROOT / config["file"]).read_text() for name, config in COMPOSE["configs"].items()}
REQUIRED = set(re.findall(r"\$\{(\w+):\?", (ROOT / "docker-compose.yml").read_text()))  # that have no default


def test_it_is_valid_by_the_schema_of_the_compose_specification():
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml"]
    subprocess.run(check, cwd=ROOT, check=True, capture_output=True)


def test_postgres_in_a_container_has_the_options_and_version_of_the_embedded_one():
    service = SERVICES["postgres"]
    assert service["command"] == ["postgres", *postgres.options(), "-c", "hba_file=/etc/postgresql/pg_hba.conf"]
    assert service["image"].startswith(f"postgres:{foreign.POSTGRES_VERSION}.")
    assert service["environment"]["POSTGRES_USER"] == postgres.ROLE
    assert dict(secret_files.OWNERS.values()) == postgres.ROLES
    sql = CONFIGS["roles.sql"]
    assert dict(re.findall(r"CREATE DATABASE (\w+) OWNER (\w+);", sql)) == postgres.ROLES
    assert "ROLE hpo " not in sql and "SUPERUSER" not in sql and "trust" not in CONFIGS["pg_hba.conf"]


@pytest.mark.parametrize("kind", ["configs", "secrets"])
def test_a_service_is_given_files_since_a_read_only_container_takes_no_copies(kind):
    # https://github.com/docker/compose/issues/12031: `content` and `environment` are copied, a `file` is mounted.
    assert all(list(definition) == ["file"] for definition in COMPOSE[kind].values())


def test_mlflow_in_a_container_has_the_command_and_environment_of_the_embedded_one():
    service = SERVICES["mlflow"]
    served = mlflow_server.Served(hosts="NAMES", environment="/run/secrets/mlflow.env")
    expected = mlflow_server.arguments(host="0.0.0.0", port=5000, artifacts="/artifacts", served=served)
    expected[expected.index("--cors-allowed-origins") + 1] = "ORIGINS"
    given = [
        re.sub(r"\$\{HPO_ARTIFACTS:-(.*)\}|\$\{HPO_(HOST|ORIGIN)S:\?.*\}", lambda found: found[1] or found[2], word)
        for word in service["command"]
    ]
    assert [{"HOST": "NAMES", "ORIGIN": "ORIGINS"}.get(word, word) for word in given] == ["python", *expected]
    assert mlflow_server.ENVIRONMENT.items() <= service["environment"].items()
    own = {"HPO_CREDENTIALS", "MLFLOW_AUTH_CONFIG_PATH"}
    assert set(service["environment"]) - set(mlflow_server.ENVIRONMENT) == own
    assert SERVICES["migrate"]["command"] == ["python", *mlflow_server.PREPARE, "/run/secrets/mlflow.env"]


def test_postgres_makes_nothing_until_it_can_read_each_password(tmp_path):
    (tmp_path / "docker-entrypoint.sh").write_text('#!/bin/sh\necho "made with $*"\n')
    (tmp_path / "docker-entrypoint.sh").chmod(0o755)
    (tmp_path / "secrets").mkdir()
    command = [word.replace("$$", "$").replace("/run", str(tmp_path)) for word in SERVICES["postgres"]["entrypoint"]]
    environment = {"PATH": f"{tmp_path}:{os.defpath}"}

    def start() -> subprocess.CompletedProcess:
        return subprocess.run([*command, "postgres", "-c", "a b"], env=environment, capture_output=True, text=True)

    (tmp_path / "secrets" / "queue-password").symlink_to("gone")  # unreadable also for root
    refused = start()
    assert refused.returncode != 0 and refused.stdout == "" and "queue-password" in refused.stderr
    (tmp_path / "secrets" / "queue-password").unlink()
    (tmp_path / "secrets" / "queue-password").write_text("secret")
    assert start().stdout == "made with postgres -c a b\n"


def test_everything_starts_after_what_it_needs_and_migrations_run_before_the_server():
    waits = {
        name: {each: how["condition"] for each, how in service.get("depends_on", {}).items()}
        for name, service in SERVICES.items()
    }
    assert waits["migrate"] == {"postgres": "service_healthy"}
    assert waits["mlflow"] == {"migrate": "service_completed_successfully"}
    assert waits["worker"] == waits["worker-gpu"] == {"mlflow": "service_healthy"}
    assert all("healthcheck" in SERVICES[name] for needs in waits.values() for name in needs if name != "migrate")


def test_only_pages_are_published_and_only_on_loopback_but_for_tls():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"mlflow": ["127.0.0.1:5000:5000"], "dashboard": ["127.0.0.1:8080:8080"], "tls": ["443:8443"]}
    on_request = {name for name, service in SERVICES.items() if "profiles" in service}
    assert on_request == {"dashboard", "tls", "tools", "worker-gpu"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_can_do_no_more_than_it_must(name):
    service = SERVICES[name]
    assert service["read_only"] and service["init"] and "/tmp" in service["tmpfs"]
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service and "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"]) or name == "tools", "the caller's, whose files it writes"
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert {"cpus", "memory", "pids"} <= set(service["deploy"]["resources"]["limits"])
    assert re.search(r":\d+\.\d+", service["image"]), "pinned"
    of_the_host = [
        mount for mount in service.get("volumes", []) if str(mount).partition(":")[0] not in COMPOSE["volumes"]
    ]
    assert [mount["source"] for mount in of_the_host] == (["./backups"] if name == "tools" else [])
    assert "healthcheck" in service or name in ("migrate", "tools"), "which end by themselves"


def test_a_worker_has_the_time_to_hand_its_trials_back():
    for name in ("worker", "worker-gpu"):
        assert float(SERVICES[name]["stop_grace_period"].removesuffix("s")) > STOP_LIMIT + 5


def test_no_secret_stands_in_the_file_and_each_that_is_used_is_made_by_the_script():
    made = set(secret_files.contents()) | {"tls.crt", "tls.key"}  # the certificate is the user's own
    assert {name: f"./secrets/{name}" for name in made} == {
        name: each["file"] for name, each in COMPOSE["secrets"].items()
    }
    for service in SERVICES.values():
        given = [CONFIGS[config["source"]] for config in service.get("configs", [])]
        used = set(re.findall(r"/run/secrets/([\w.-]+)", str([service, *given])))
        assert used == set(service.get("secrets", [])) and used <= made
        assert not [key for key in service.get("environment", {}) if re.search("PASSWORD$|SECRET|URI$|URL$", key)]
    for folder in (".gitignore", ".dockerignore"):
        assert re.search(r"^(/secrets/|\*)$", (ROOT / folder).read_text(), re.MULTILINE)


def test_the_script_makes_files_that_differ_each_time_and_overwrites_none(tmp_path):
    script = [
        sys.executable,
        "-S",
        "-m",
        "hpo.services.secret_files",
        "--name",
        "lab.example.org",
        tmp_path,
    ]  # -S: no packages
    mounted = tmp_path / "docs" / "compose" / "roles.sql"
    mounted.parent.mkdir(parents=True)
    mounted.touch(mode=0o600)  # checked out with a strict umask
    subprocess.run(script, cwd=ROOT, check=True, capture_output=True)
    assert mounted.stat().st_mode & 0o777 == 0o644
    folder = tmp_path / "secrets"
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    assert texts.keys() == secret_files.contents().keys()
    for private, mode in (("secrets", 0o700), ("backups", 0o700), (".env", 0o600)):
        assert (tmp_path / private).stat().st_mode & 0o777 == mode
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}, "containers run as other users"
    passwords = re.findall(r"\b[0-9a-f]{48}\b", "\n".join(texts.values()))
    assert len(set(passwords)) == 7 and not set(passwords) & set(
        re.findall(r"[0-9a-f]{48}", str(secret_files.contents()))
    )
    settings = (tmp_path / ".env").read_text()
    assert "HPO_ORIGINS=https://lab.example.org\n" in settings
    assert {line.partition("=")[0] for line in settings.splitlines()} == REQUIRED
    again = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1 and "nothing was changed" in again.stderr
    assert texts == {path.name: path.read_text() for path in folder.iterdir()}
