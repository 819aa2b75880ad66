"""Awkward environments in which everything works, or is refused in one message: many of each kind at a time."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import cells
import pytest
from shell import PATIENCE

from hpo import api, settings
from hpo.cli import main
from hpo.services import serving

# Everything that a folder's name may hold, in one.
NAME = "two words ünd 日本 'a\" a%b $HOME `x` #?=&; \\ " + 30 * "long "
# Variables that other programs read, with values that some of those would not take.
POSTGRES = {
    "PGPASSFILE": "/nonexistent",
    "PGCONNECT_TIMEOUT": "1",
    "PGDATA": "/nonexistent",
    "PGMINPROTOCOLVERSION": "3.0",
    "PGLOADBALANCEHOSTS": "random",
    "PGSSLCERT": "/nonexistent",
    "PGSSLKEY": "/nonexistent",
    "PGSSLCRL": "/nonexistent",
    "PGOPTIONS": "-c search_path=nowhere",
    "PGCLIENTENCODING": "LATIN1",
}
PYTHON = {
    "PYTHONDEVMODE": "1",
    "PYTHONHASHSEED": "1",
    "OMP_NUM_THREADS": "0",
    "MKL_NUM_THREADS": "abc",
    "CUDA_VISIBLE_DEVICES": "9",
    "MPLBACKEND": "TkAgg",
}
TERMINAL = {"COLUMNS": "-5", "LINES": "x", "TERM": "nonsense", "NO_COLOR": "1", "TZ": "Nowhere/Land", "LANGUAGE": "tr"}
MLFLOW = {
    "OPTUNA_STORAGE": "sqlite:////nonexistent",
    "MLFLOW_TRACKING_TOKEN": "nope",
    "MLFLOW_EXPERIMENT_NAME": "other",
    "MLFLOW_RUN_ID": "nope",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "true",
    "MLFLOW_REGISTRY_URI": "http://127.0.0.1:9",
    "MLFLOW_TRACKING_USERNAME": "anna",
    "GUNICORN_CMD_ARGS": "--nonsense",
    "WEB_CONCURRENCY": "0",
    "LD_PRELOAD": "",
}
ENCODINGS = (
    {"PYTHONIOENCODING": "iso-8859-1", "LC_ALL": "C"},
    {"PYTHONIOENCODING": "cp1252"},
    {"LC_ALL": "nonsense"},
)


def hpo(home: Path, *words: object, folder: Path, before: tuple[str, ...] = (), **variables: str) -> str:
    """Run `hpo WORDS` on services of its own; return what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HPO_", "MLFLOW_"))}
    environment |= {"HPO_HOME": str(home), "HPO_TRAINERS": "1"} | variables
    command = [*before, Path(sys.executable).with_name("hpo"), *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=PATIENCE)
    output = (done.stdout + done.stderr).decode(errors="replace")
    assert done.returncode == 0 and "Traceback" not in output, (words, variables, output)
    return output


@pytest.mark.long
@pytest.mark.acceptance
def test_a_home_of_any_name_works_among_files_variables_and_limits_of_all_kinds(tmp_path: Path, data: Path):
    folder, home = tmp_path / "here", tmp_path / NAME.strip() / "home"
    folder.mkdir()
    home.parent.mkdir()
    (folder / "mlflow").mkdir()
    (folder / "mlflow" / "__init__.py").write_text("raise ImportError('of the user')\n")
    (folder / ".env").write_text("HPO_HOME=/nonexistent\n")
    (folder / "pyproject.toml").write_text("[broken\n")
    (folder / "mlruns").mkdir()
    (folder / "mlruns" / "meta.yaml").write_text("of somebody else\n")
    link = tmp_path / "link"
    link.symlink_to(home)
    study = cells.study(tmp_path, "passing", data=data, epochs=2, rates="[1e-3]")
    harmless = POSTGRES | PYTHON | TERMINAL | MLFLOW
    limited = ("bash", "-c", 'ulimit -n 64; exec "$@"', "bash")
    try:
        hpo(home, "up", folder=folder, PATH="", **harmless)
        output = hpo(link, "run", "--study", study, folder=folder, before=limited, PYTHONOPTIMIZE="2", **harmless)
        assert "trial 1 of passing done" in output and "study passing closed" in output
        for variables in ENCODINGS:
            output = hpo(home, "trials", "--study", "passing", folder=folder, **variables)
            assert "passing" in output
        assert (folder / "mlruns" / "meta.yaml").read_text() == "of somebody else\n"
        assert "Stopped" in hpo(home, "down", folder=folder, PATH="")
    finally:
        serving.erase(settings.read({"HPO_HOME": str(home)}))


@pytest.mark.acceptance
@pytest.mark.long
def test_everything_is_listed_checked_and_reported_in_any_encoding(shell, data, tmp_path):
    study = cells.study(tmp_path, "spelled", data=data, epochs=2, rates="[1e-3]")
    lines = study.read_text().splitlines()
    lines = [line if not line.startswith("description") else 'description = "größer: R² µm"' for line in lines]
    study.write_text("\n".join(lines), encoding="utf-8")
    shell.hpo("run", "--study", study)
    listings = [["trials", "--study", "spelled"], ["studies"], ["show", "spelled"]]
    for place, variables in enumerate(ENCODINGS):

        def printed(*words: object, variables: dict[str, str] = variables) -> str:
            command = [*shell.PROGRAM, *map(str, words)]
            done = subprocess.run(command, env=shell.environment | variables, capture_output=True, timeout=PATIENCE)
            output = (done.stdout + done.stderr).decode(errors="replace")
            assert done.returncode == 0 and "Traceback" not in output, (words, variables, output)
            return output

        for words in listings:
            assert "spelled" in printed(*words)
        assert "Healthy" in printed("doctor", "--study", "spelled") and "MLflow: " in printed("status")
        assert "usage: hpo" in printed("--help") and "good" in printed("data", "check", data)
        assert "Plan of spelled" in printed("run", "--study", study, "--dry-run")
        printed("report", "--study", "spelled", "-o", tmp_path / f"report-{place}")
        assert "R²" in (tmp_path / f"report-{place}" / "report.md").read_text(encoding="utf-8")


@pytest.mark.acceptance
@pytest.mark.long
def test_a_home_whose_path_has_800_characters_works(tmp_path: Path):
    home = tmp_path.joinpath(*["long" * 50] * 4, "home")
    home.parent.mkdir(parents=True)
    try:
        hpo(home, "up", folder=tmp_path)
        assert "MLflow: " in hpo(home, "status", folder=tmp_path)
        assert "Stopped" in hpo(home, "down", folder=tmp_path)
    finally:
        serving.erase(settings.read({"HPO_HOME": str(home)}))


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator:
    """Run a command that is refused, with these variables; return its message."""

    def run(*words: object, **variables: str) -> str:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert main.main([str(word) for word in words]) == 1, (words, variables)
        error = capsys.readouterr().err
        (message,) = [line for line in error.splitlines() if line.startswith("hpo: ")]
        assert "Traceback" not in error
        return message

    yield run


@pytest.mark.service
@pytest.mark.slow
def test_a_database_that_cannot_be_one_is_refused_with_what_is_wrong(refused, database_url, tracking_uri, tmp_path):
    server, name = database_url.rsplit("/", 1)
    port = urlsplit(database_url).port
    cases = {
        server.replace(f":{port}", ":abc") + f"/{name}": "hpo_database_url: expected",
        server.replace(f":{port}", ":99999") + f"/{name}": "hpo_database_url",
        f"mysql://{server.partition('://')[2]}/{name}": "hpo_database_url: expected",
        f"{server}/nowhere-{name}": "does not exist",
        f"{server}/{name}?sslmode=verify-full": "ssl was required",
        server.replace(f":{port}", ":9") + f"/{name}": "refused",
        server.replace("127.0.0.1", "nowhere.invalid") + f"/{name}": "nowhere.invalid",
    }
    variables = {"HPO_HOME": str(tmp_path / "home"), "MLFLOW_TRACKING_URI": tracking_uri}
    for url, word in cases.items():
        message = refused("studies", **variables, HPO_DATABASE_URL=url)
        assert word in message.lower(), (url, message)
        assert urlsplit(database_url).password not in message, "no password is told"


@pytest.mark.service
@pytest.mark.slow
def test_a_database_is_reached_however_its_url_is_spelled(database_url, tracking_uri, tmp_path, monkeypatch, capsys):
    url = urlsplit(database_url)
    spelled = "".join(f"%{ord(letter):02x}" for letter in url.password)
    host = f"{quote(url.username)}:{spelled}@"
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    for rest in (
        f"{host}127.0.0.1:{url.port}{url.path}?sslmode=disable",
        f"{host}{url.path}?host=127.0.0.1&port={url.port}",
    ):
        monkeypatch.setenv("HPO_DATABASE_URL", f"{url.scheme}://{rest}")
        assert main.main(["studies"]) == 0, capsys.readouterr().err


@pytest.mark.service
@pytest.mark.slow
@pytest.mark.parametrize(
    "change", ["/wrong", "version", *(pytest.param(change, marks=pytest.mark.long) for change in ("/#/", "https"))]
)
def test_an_address_that_is_no_mlflow_server_is_refused(refused, database_url, tracking_uri, tmp_path, change):
    uri = tracking_uri.replace("http://", "https://") if change == "https" else f"{tracking_uri}{change}"
    variables = {"HPO_HOME": str(tmp_path / "home"), "HPO_DATABASE_URL": database_url, "MLFLOW_TRACKING_URI": uri}
    assert "MLflow server" in refused("doctor", **variables)


@pytest.mark.parametrize("kind", ["file", "/dev/null", "of another user"])
def test_a_home_that_cannot_be_one_is_refused(refused, tmp_path, kind):
    home = Path("/dev/null") if kind == "/dev/null" else tmp_path / "home"
    if kind == "file":
        home.write_text("")
    elif kind == "of another user":
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        home.mkdir()
        os.chown(home, 12345, 12345)
    assert str(home) in refused("up", HPO_HOME=str(home))


NAMES = ["two words", "ünd", "🙂", "a'b", 'a"b', "two\nlines", "@champion", "grid", "grid+12345678", "", "x" * 230]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_that_a_study_cannot_have_is_refused(refused, tmp_path, monkeypatch, name):
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "home"))
    file = tmp_path / f"{name}.toml"
    file.write_text(cells.STUDY.format(data=tmp_path, rates="[1e-3]", epochs=2))
    assert "name" in refused("run", "--study", file) or name == ""
    assert not (tmp_path / "home").exists()


def test_a_study_file_that_is_none_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "home"))
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "utf16.toml").write_text(cells.STUDY.format(data=tmp_path, rates="[1e-3]", epochs=2), "utf-16")
    for name in ("folder.toml", "utf16.toml", "absent.toml"):
        assert name in refused("run", "--study", tmp_path / name)
    assert not (tmp_path / "home").exists()


def test_a_study_file_may_lie_anywhere_with_any_line_ends_and_a_long_name(tmp_path, data, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    text = cells.STUDY.format(data=data, rates="[1e-3]", epochs=2)
    for name in ("x", "a..b", 200 * "y"):
        Path("..", f"{name}.toml").write_text(text, newline="\r\n")
        (study,) = api.load(f"../{name}.toml")
        assert study.name == name
