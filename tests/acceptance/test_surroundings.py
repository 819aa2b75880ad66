"""What lies where the user stands, and what a shell has set or closed, changes nothing of what `hpo` starts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cells
import pytest
from shell import PATIENCE, Shell

from hpo import settings
from hpo.services import serving

HPO = (Path(sys.executable).with_name("hpo"),)  # `python -m hpo` imports from the current folder by itself
FOREIGN = "open({mark!r}, 'a').write(__name__ + '\\n')\nraise ImportError(__name__ + ' of the user')\n"


def run(words: list[object], *, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    command = [*HPO, *map(str, words)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose modules bear names that hpo imports; each that is imported adds itself to the file `imported`."""
    made = tmp_path / "where the user stands"
    for name in ("random", "torch", "hpo", "signal", "models/__init__", "models/metrics", "data_pipeline/__init__"):
        path = made / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FOREIGN.format(mark=str(made / "imported")))
    return made


@pytest.mark.slow
@pytest.mark.acceptance
def test_nothing_comes_from_the_current_folder_and_what_python_prints_is_harmless(
    shell: Shell, folder: Path, data: Path
):
    study = cells.study(folder, "here", data=data, epochs=2, rates="[1e-3]")
    (folder / "path").mkdir()
    (folder / "path" / "sitecustomize.py").write_text("print('hello')\n")  # also where a trainer's events would go
    environment = shell.environment | {"PYTHONPATH": str(folder / "path")}
    done = run(["run", "--study", study], folder=folder, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("hello\n") and "trial 1 of here done" in done.stderr
    words = ["data", "make", folder / "cells", "--count", 2, "--size", 48]
    done = run(words, folder=folder, environment=shell.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (folder / "imported").exists()


@pytest.mark.long
@pytest.mark.acceptance
def test_trainers_that_cannot_start_are_reported_with_the_end_of_their_log(shell: Shell, tmp_path: Path, data: Path):
    study = cells.study(tmp_path, "trainerless", data=data, epochs=2)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "torch.py").write_text("raise ImportError('this torch was built for another machine')\n")
    environment = shell.environment | {"PYTHONPATH": str(tmp_path / "path")}
    done = run(["run", "--study", study], folder=tmp_path, environment=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "Trainers cannot be started: trainer ended with exit 1. The end of " in done.stderr
    assert done.stderr.endswith("ImportError: this torch was built for another machine\n")


def test_a_current_folder_that_was_removed_is_named(tmp_path: Path):
    folder = tmp_path / "gone"
    folder.mkdir()
    command = ["sh", "-c", 'rmdir "$PWD" && exec "$@"', "sh", *HPO, "status"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "hpo: The current folder was removed, perhaps made again: change into one (cd).\n"


@pytest.mark.service
@pytest.mark.long
def test_services_started_with_all_descriptors_closed_are_found_and_stopped(tmp_path: Path):
    environment = os.environ | {"HPO_HOME": str(tmp_path / "home")}
    read = settings.read({"HPO_HOME": str(tmp_path / "home")})
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *HPO, "up"]
    try:
        assert subprocess.run(command, env=environment, timeout=PATIENCE).returncode == 0
        assert serving.running(read) is not None
        assert serving.down(read)
        assert serving.running(read) is None
    finally:
        serving.erase(read)
    shutil.rmtree(tmp_path / "home")
