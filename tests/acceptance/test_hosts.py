"""Several hosts: a server and two worker hosts in network namespaces, with addresses and host names of their own."""

from collections.abc import Iterator
from pathlib import Path

import cells
import pytest
from network import Network, network_of, served_lab
from shell import PATIENCE, Shell, check_recorded_once, resume, suspend, trainers

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.root, pytest.mark.apt]
LEASE = "5"  # seconds


@pytest.fixture
def network() -> Iterator[Network]:
    with network_of("anna", "ben") as made:
        yield made


@pytest.fixture
def lab(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    with served_lab(network, tmp_path, monkeypatch, lease=LEASE) as made:
        yield made


def test_a_host_cut_off_in_mid_trial_writes_nothing_more_of_it_when_it_returns(network, lab, data, tmp_path):
    study = cells.study(tmp_path, "hosts", data=data, epochs=400)
    study.write_text(study.read_text().replace("[1e-3, 1e-4]", "[1e-2]"))  # two points
    run = lab.start("run", "--study", study, "--trainers", 1, before=network.on("anna"))
    lab.until(lambda: any(row.facts.planned for row in lab.queue.studies()), "the study is planned")

    def of(host: str):
        return next((job for job in lab.trials("hosts") if job.alive and str(job.worker).startswith(f"{host}:")), None)

    lab.until(lambda: of("anna"), "anna has one of the trials")
    asleep = trainers(run)
    suspend(asleep)  # else she may be done with both before ben has begun
    far = lab.start("worker", "--study", "hosts", "--trainers", 1, before=network.on("ben"))
    lab.until(lambda: of("ben"), "ben has the other one")
    asleep += trainers(far)
    suspend(asleep)  # else he may be done before the next worker is there
    spare = lab.start("worker", "--study", "hosts", "--trainers", 1, before=network.on("anna"))
    lab.until(lambda: len(lab.queue.workers("hosts")) == 3, "a worker with nothing to take is there")
    resume(asleep)
    job = lab.until(lambda: (found := of("ben")) and found.epochs >= 20 and found, "ben is in the middle of it")
    network.cut("ben")
    taken = lab.until(
        lambda: (now := lab.queue.job(job.id)).alive and now.attempt == 2 and now, "anna has taken ben's trial over"
    )
    assert str(taken.worker).startswith("anna:") and taken.epochs >= 20, "the curve goes on"
    network.mend("ben")
    output, _ = far.communicate(timeout=PATIENCE)
    assert far.returncode == 0, output
    assert f"trial {job.number} of hosts: lost its lease, stopping" in output, output
    assert f"trial {job.number} of hosts done" not in output
    for process in (run, spare):
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
    ended = lab.queue.job(job.id)
    assert ended.worker == taken.worker and ended.attempt == 2, "anna recorded it"
    check_recorded_once(lab, "hosts", points=2, epochs=400)
