"""Awkward users, folders and limits: each works, or ends in one message with exit code 1 and nothing half made."""

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cells
import psutil
import pytest
from shell import PATIENCE, Shell, tmpfs

from hpo import settings
from hpo.services import serving

NAMELESS = 54321  # number of a user that /etc/passwd does not list
CGROUPS = Path("/sys/fs/cgroup")


def hpo(before: list[str], *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `hpo WORDS` with the words of `before` in front, and with this environment beside that of the tests."""
    command = [*before, *Shell.PROGRAM, *map(str, words)]
    whole = {name: value for name, value in (os.environ | environment).items() if value}
    return subprocess.run(command, env=whole, cwd="/", capture_output=True, text=True, timeout=PATIENCE)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one message of a command that was refused."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "Interrupted" not in done.stderr
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("hpo: ")]
    assert done.stderr.endswith(f"{message}\n"), "it is the last line"
    return message


def as_user(number: int) -> list[str]:
    """Words in front of a command that run it as another user, who may read the files of these tests."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can be another user, by setpriv")
    words = ["setpriv", f"--reuid={number}", f"--regid={number}", "--clear-groups"]
    words += [f"--{kind}-caps=-all,+dac_read_search" for kind in ("inh", "ambient")]
    if subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("setpriv may not keep a capability here")
    return words


@pytest.fixture
def user() -> int:
    """A user with a name and without processes, since they count against his limits."""
    busy = {process.uids().real for process in psutil.process_iter()}
    names = [entry for entry in pwd.getpwall() if 0 < entry.pw_uid < 1000 and entry.pw_uid not in busy]
    if not names:
        pytest.skip("every user of this system runs something")
    return names[0].pw_uid


def folder_of(user: int, path: Path) -> Path:
    path.mkdir(exist_ok=True)
    os.chown(path, user, user)
    return path


@contextmanager
def control_group(controller: str, **limits: int) -> Iterator[list[str]]:
    """Words in front of a command that run it in a control group below one with these limits (version 1)."""
    group = CGROUPS / controller / f"hpo-test-{os.getpid()}"
    try:
        (group / "inner").mkdir(parents=True)
    except OSError as error:
        pytest.skip(f"no control group of {controller} can be made here: {error}")
    try:
        for name, value in limits.items():
            (group / f"{controller}.{name}").write_text(str(value))
        yield ["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(group / "inner" / "cgroup.procs")]
    finally:
        for path in (group / "inner", group):
            path.rmdir()


def test_a_home_whose_name_has_a_line_end_is_refused_on_one_line(tmp_path: Path):
    home = tmp_path / "two\nlines"
    assert "expected a path on one line, found '" in refusal(hpo([], "up", HPO_HOME=str(home)))
    assert not home.exists()


@pytest.mark.root
def test_a_user_without_a_name_learns_what_to_do(tmp_path: Path):
    home = folder_of(NAMELESS, tmp_path / "home")
    message = refusal(hpo(as_user(NAMELESS), "up", HPO_HOME=str(home), HOME=str(tmp_path)))
    assert f"none for the number {NAMELESS}. Run hpo as a user that /etc/passwd lists" in message
    assert not list(home.glob("services/postgres*/*"))


@pytest.mark.root
def test_a_user_without_name_and_home_folder_trains_with_services_elsewhere(shell: Shell, data: Path, tmp_path: Path):
    study = cells.study(tmp_path, "nameless", data=data, epochs=2, rates="[1e-3]")
    home = folder_of(NAMELESS, tmp_path / "home of nobody")
    variables = {name: value for name, value in shell.environment.items() if name.startswith(("HPO_", "MLFLOW_"))}
    done = hpo(as_user(NAMELESS), "run", "--study", study, **variables | {"HPO_HOME": str(home), "HOME": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    message = refusal(hpo(as_user(NAMELESS), "status", HPO_HOME="~/hpo", HOME=""))
    assert "HPO_HOME: expected a path, found '~/hpo', and the home folder of that user is unknown." in message


@pytest.mark.root
@pytest.mark.parametrize("limit", [3, 45])
def test_a_limit_on_processes_is_named_and_nothing_is_started(tmp_path: Path, data: Path, user: int, limit: int):
    home = folder_of(user, tmp_path / "home")
    study = cells.study(tmp_path, f"limited{limit}", data=data, epochs=2)
    limited = [*as_user(user), "bash", "-c", f'ulimit -u {limit}; exec "$@"', "bash"]
    message = refusal(hpo(limited, "run", "--study", study, HPO_HOME=str(home), HOME=str(home)))
    assert f"The limits here: {limit} (ulimit -u)" in message
    assert not (home / "services").exists()


@pytest.mark.root
def test_a_limit_on_processes_of_a_control_group_is_named(tmp_path: Path):
    with control_group("pids", max=40) as inside:
        message = refusal(hpo(inside, "up", HPO_HOME=str(tmp_path / "home")))
    assert "fewer may be started here. The limits here: 40 (pids.max of /sys/fs/cgroup/pids/hpo-test-" in message
    assert not (tmp_path / "home").exists()


@pytest.mark.root
def test_a_quota_of_one_core_leaves_one_core():
    code = "from data_pipeline.cores import cores; print(cores())"
    with control_group("cpu", cfs_quota_us=100_000) as inside:
        done = subprocess.run([*inside, Shell.PROGRAM[0], "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


@pytest.mark.root
def test_a_disk_that_is_full_is_named_with_its_folder(tmp_path: Path, user: int):
    with tmpfs(tmp_path / "small", "30m") as disk:
        home = folder_of(user, folder_of(user, disk) / "home")
        message = refusal(hpo(as_user(user), "up", HPO_HOME=str(home), HOME=str(home)))
        assert f"The disk of {home}/services is full: expected 70 MB for a Postgres database, found 31 MB." in message
        assert not list(home.glob("services/postgres*/*")) and not (home / "services" / "postgres.new").exists()


@pytest.mark.root
def test_a_disk_that_fills_while_the_services_run_is_named_with_its_folder(tmp_path: Path, data: Path, user: int):
    study = cells.study(tmp_path, "filled", data=data, epochs=2)
    with tmpfs(tmp_path / "filling", "200m") as disk:
        home = folder_of(user, folder_of(user, disk) / "home")
        variables = {"HPO_HOME": str(home), "HOME": str(home)}
        assert hpo(as_user(user), "up", **variables).returncode == 0
        try:
            with (disk / "filler").open("wb") as file:
                file.write(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
            message = refusal(hpo(as_user(user), "run", "--study", study, **variables))
            assert f"The disk of {home} (HPO_HOME) is full: " in message
            (disk / "filler").unlink()
            done = hpo(as_user(user), "run", "--study", study, **variables)
            assert done.returncode == 0, "nothing is lost: " + done.stderr
        finally:
            (disk / "filler").unlink(missing_ok=True)
            assert hpo(as_user(user), "down", **variables).returncode == 0


@pytest.mark.long
def test_a_home_whose_name_looks_like_a_part_of_a_url_is_like_any_other(tmp_path: Path, data: Path):
    home, decoded = tmp_path / "a%20b%41", tmp_path / "a bA"
    study = cells.study(tmp_path, "quoted", data=data, epochs=2, rates="[1e-3]")
    try:
        done = hpo([], "run", "--study", study, HPO_HOME=str(home))
        assert done.returncode == 0, done.stdout + done.stderr
        assert list(home.glob("artifacts/**/MLmodel")) and not decoded.exists()
        done = hpo([], "delete", "--study", "quoted", "--yes", HPO_HOME=str(home))
        assert done.returncode == 0, done.stdout + done.stderr
        assert not list(home.glob("artifacts/**/MLmodel")), "MLflow finds what it is to delete"
    finally:
        serving.erase(settings.read({"HPO_HOME": str(home)}))


@pytest.mark.long
@pytest.mark.acceptance
def test_a_study_is_run_compared_and_reported_where_only_ascii_can_be_printed(shell: Shell, data: Path, tmp_path: Path):
    study = cells.study(tmp_path, "ascii", data=data, epochs=2, rates="[1e-3]")
    variables = {name: value for name, value in shell.environment.items() if name.startswith(("HPO_", "MLFLOW_"))}
    for locale in ({"PYTHONIOENCODING": "ascii"}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        for words in (
            ["run", "--study", study],
            ["compare", "ascii/0", "ascii/1"],
            ["report", "--study", "ascii", "-o", tmp_path / "report"],
        ):
            done = hpo([], *words, **variables | locale | {"LC_ALL": "C"})
            assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
            assert done.stdout.isascii()


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "variables", "reason"),
    [
        pytest.param(
            *([], {"TORCH_LOGS": "nonsense"}, "Invalid log settings: nonsense, must be a comma separated list"),
            marks=pytest.mark.long,
        ),
        (["bash", "-c", 'ulimit -v 3000000; exec "$@"', "bash"], {}, ""),
    ],
    ids=["TORCH_LOGS", "ulimit -v"],
)
def test_trainers_that_cannot_start_say_what_their_log_says(
    shell: Shell, data: Path, tmp_path: Path, before: list[str], variables: dict[str, str], reason: str
):
    study = cells.study(tmp_path, f"startless{len(variables)}", data=data, epochs=2)
    ours = {name: value for name, value in shell.environment.items() if name.startswith(("HPO_", "MLFLOW_"))}
    done = hpo(before, "run", "--study", study, **ours | variables)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    _, _, end = done.stderr.partition("hpo: Trainers cannot be started: trainer ended with exit 1. The end of ")
    assert reason in end and len(end.splitlines()) in range(2, 6), done.stderr
