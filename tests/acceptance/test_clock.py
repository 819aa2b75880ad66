"""Workers whose clocks are wrong, in other time zones: leases are the server's, so nothing happens."""

import subprocess
import sys
import time

import cells
import pytest
from places import ROOT
from shell import PATIENCE, check_recorded_once, trainers

pytestmark = [pytest.mark.acceptance, pytest.mark.apt]
HOUR = 3600  # seconds


@pytest.fixture
def shifted(tmp_path):
    """A function that gives the environment of a process whose clock is so many seconds off, in a time zone."""
    library = tmp_path / "clock.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, ROOT / "tests/support/clock.c"], check=True)

    def environment(seconds: int, zone: str) -> dict[str, str]:
        return {"LD_PRELOAD": str(library), "CLOCK_SHIFT": str(seconds), "TZ": zone}

    return environment


def test_the_clock_of_such_a_process_is_really_wrong(shifted):
    code = "import time, datetime; print(time.time(), datetime.datetime.now().timestamp(), time.time_ns() / 1e9)"
    for seconds in (HOUR, -HOUR):
        told = subprocess.run(
            [sys.executable, "-c", code], env=shifted(seconds, "Asia/Tokyo"), capture_output=True, text=True, check=True
        )
        for number in told.stdout.split():
            assert float(number) - time.time() == pytest.approx(seconds, abs=10)


def test_workers_two_hours_apart_take_nothing_from_each_other_and_give_nothing_up(shell, data, tmp_path, shifted):
    plain = dict(shell.environment)
    shell.environment = plain | shifted(HOUR, "Pacific/Auckland")
    study = cells.study(tmp_path, "clock", data=data, epochs=400, rates="[1e-3]")
    early = shell.start("run", "--study", study, "--trainers", 1)
    shell.training("clock", epochs=20)
    (trainer,) = trainers(early)
    trainer.suspend()  # else it may be done with both before the other one has begun
    shell.environment = plain | shifted(-HOUR, "America/St_Johns")
    late = shell.start("worker", "--study", "clock", "--trainers", 1)
    shell.until(lambda: sum(job.alive for job in shell.trials("clock")) == 2, "both train")
    trainer.resume()
    shell.environment = plain
    for process in (early, late):
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
        assert "lost its lease" not in output and "worker lost" not in output
    check_recorded_once(shell, "clock", points=2, epochs=400)
    assert {job.attempt for job in shell.trials("clock")} == {1}
    assert len({job.worker for job in shell.trials("clock")}) == 2
