"""The credentials file: what it gives, what it refuses, and that no message shows what is in it."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from places import ROOT

from hpo import credentials, settings
from hpo.cli import main
from hpo.errors import SettingsError

VALUES = {
    "database_url": "postgresql://hpo_queue:s3cret@db:5432/hpo",
    "tracking_uri": "http://mlflow:5000",
    "tracking_username": "hpo",
    "tracking_password": "s3cret too",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    credentials.write(tmp_path / "credentials.toml", VALUES)
    return tmp_path / "credentials.toml"


def refused(environment: dict[str, str]) -> str:
    with pytest.raises(SettingsError) as error:
        settings.read(environment)
    assert "s3cret" not in str(error.value)
    return str(error.value)


def test_it_stands_for_four_variables_and_is_for_its_owner_only(file):
    by_file = settings.read({"HPO_CREDENTIALS": str(file)})
    by_variables = settings.read({credentials.VARIABLES[key]: value for key, value in VALUES.items()})
    assert file.stat().st_mode & 0o777 == 0o600
    for name in VALUES:
        assert getattr(by_file, name) == getattr(by_variables, name) == VALUES[name]
    assert "s3cret" not in repr(by_file)


def test_the_documented_line_makes_the_configuration_of_optunas_dashboard_of_it(file):
    page = (ROOT / "docs" / "reference" / "commands.md").read_text()
    (line,) = re.findall(r"^optuna-dashboard --from-config <\((sed .*)\)$", page, re.MULTILINE)
    variables = {"PATH": os.defpath, "HPO_CREDENTIALS": str(file)}
    made = subprocess.run(["bash", "-c", line], env=variables, capture_output=True, text=True, check=True).stdout
    assert tomllib.loads(made) == {"optuna_dashboard": {"storage": VALUES["database_url"]}}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_file_that_others_can_read_is_refused(file, mode):
    file.chmod(mode)
    assert f"mode {mode:04o}); expected 0600" in refused({"HPO_CREDENTIALS": str(file)})


@pytest.mark.root
def test_on_a_read_only_mount_its_mode_is_the_hosts_affair(file):
    file.chmod(0o444)
    script = (
        'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; exec "$2" -c "from hpo import settings as s; s.read()"'
    )
    command = ["unshare", "-m", "sh", "-ec", script, "sh", str(file), sys.executable]
    subprocess.run(command, env=os.environ | {"HPO_CREDENTIALS": str(file)}, check=True)
    refused({"HPO_CREDENTIALS": str(file)})


def test_a_variable_may_say_the_same_but_not_contradict_it(file):
    settings.read({"HPO_CREDENTIALS": str(file), "MLFLOW_TRACKING_URI": "http://mlflow:5000"})
    for variable in credentials.VARIABLES.values():
        assert f"{variable} is set to something else" in refused(
            {"HPO_CREDENTIALS": str(file), variable: "http://else"}
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected at least database_url and tracking_uri"),
        ('database_url = "s3cret"', "tracking_uri is missing"),
        ('database_url = "a"\ntracking_uri = "b"\ntracking_password = "s3cret"', "tracking_username is missing"),
        ('password = "s3cret"', "password: expected only database_url, "),
        ("database_url = 5", "database_url: expected only"),
        ("database_url = s3cret", "is no TOML file"),
        ("database_url = '\udcff'", "is no TOML file"),
    ],
)
def test_what_is_wrong_with_it_is_said_without_what_it_holds(file, text, message):
    file.write_bytes(text.encode(errors="surrogateescape"))
    assert message in refused({"HPO_CREDENTIALS": str(file)})


def test_one_that_is_not_there_is_named(tmp_path):
    assert "nowhere cannot be read: No such file" in refused({"HPO_CREDENTIALS": str(tmp_path / "nowhere")})


def test_a_password_in_the_url_of_the_mlflow_server_is_refused_for_it_is_printed():
    text = refused({"HPO_DATABASE_URL": "postgresql://db/hpo", "MLFLOW_TRACKING_URI": "http://hpo:s3cret@mlflow:5000"})
    assert "MLFLOW_TRACKING_PASSWORD" in text


def test_a_url_that_cannot_be_read_is_refused_without_being_shown():
    for url in ("postgresql://hpo:s3cret@db:port/hpo", "mysql://hpo:s3cret@db/hpo", "hpo:s3cret@db"):
        assert "HPO_DATABASE_URL: expected" in refused(
            {"HPO_DATABASE_URL": url, "MLFLOW_TRACKING_URI": "http://mlflow"}
        )


def test_services_given_by_url_are_named_without_the_databases_password(monkeypatch, capsys):
    monkeypatch.setenv("HPO_DATABASE_URL", VALUES["database_url"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", VALUES["tracking_uri"])
    assert main.main(["up"]) == 0
    shown = capsys.readouterr()
    assert VALUES["tracking_uri"] in shown.out and "s3cret" not in shown.out + shown.err
