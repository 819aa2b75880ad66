"""The embedded services under `hpo run`: nothing set, everything killed, the same command goes on."""

import os
import subprocess
import sys
import time
from contextlib import suppress

import cells
import psutil
import pytest
from shell import PATIENCE

from hpo import settings
from hpo.services import serving

pytestmark = pytest.mark.acceptance


def processes_of(home) -> list[psutil.Process]:
    """All processes that serve this home or train for it, but ours."""
    found = []
    for process in psutil.process_iter():
        try:
            marks = [*process.cmdline(), *process.environ().values()]
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        if process.pid != os.getpid() and any(str(home) in mark for mark in marks):
            found.append(process)
    return found


@pytest.mark.slow
def test_after_everything_was_killed_the_same_command_goes_on(data, tmp_path):
    home = tmp_path / "a home with spaces"
    study = cells.study(tmp_path, "embedded", data=data, epochs=150, rates="[1e-3]")
    command = [sys.executable, "-m", "hpo", "run", "--study", str(study), "--trainers", "1"]
    environment = os.environ | {"HPO_HOME": str(home), "HPO_LEASE": "8"}
    read = settings.read({"HPO_HOME": str(home)})
    try:
        log = tmp_path / "first.log"
        with log.open("w") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        end = time.monotonic() + PATIENCE
        while "done:" not in log.read_text():
            assert time.monotonic() < end and process.poll() is None, log.read_text()
            time.sleep(0.1)
        victims = processes_of(home)
        postgres = [each for each in psutil.process_iter() if services_name(each, read)]
        assert victims
        for each in {*victims, *postgres}:
            with suppress(psutil.NoSuchProcess):  # a trainer ends with its supervisor
                each.kill()
        process.wait()
        again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        assert again.returncode == 0, again.stderr
        assert "best 2 of 2 trials" in again.stdout
        assert "export HPO_DATABASE_URL=postgresql://hpo:" in again.stdout
    finally:
        serving.erase(read)
    assert processes_of(home) == []


def services_name(process: psutil.Process, read: settings.Settings) -> bool:
    """Whether this is the home's Postgres: as root its files lie elsewhere, so ask for its data directory."""
    from hpo.services import home as homes

    known = homes.read(read.home.resolve())
    try:
        return known is not None and str(known.data) in process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False
