"""Workers whose clocks are wrong, in other time zones: leases are the server's, so nothing happens."""

import cells
import pytest
from shell import PATIENCE, check_recorded_once

pytestmark = [pytest.mark.acceptance, pytest.mark.apt]


def test_workers_an_hour_off_take_nothing_from_each_other_and_give_nothing_up(shell, data, tmp_path):
    study = cells.study(tmp_path, "clock", data=data, epochs=600)
    calm = shell.start("run", "--study", study, "--trainers", 1)
    shell.training("clock", epochs=20)
    plain = dict(shell.environment)
    others = []
    for shift, zone in (("+1h", "Pacific/Auckland"), ("-1h", "America/St_Johns")):
        shell.environment |= {"TZ": zone}
        others.append(
            shell.start(
                "worker",
                "--study",
                "clock",
                "--trainers",
                1,
                before=("faketime", "-m", "--exclude-monotonic", "-f", shift),
            )
        )
        shell.environment = dict(plain)
    for process in (calm, *others):
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
        assert "lost its lease" not in output and "worker lost" not in output
    check_recorded_once(shell, "clock", points=4, epochs=600)
    assert {job.attempt for job in shell.trials("clock")} == {1}
    assert len({job.worker for job in shell.trials("clock")}) > 1
