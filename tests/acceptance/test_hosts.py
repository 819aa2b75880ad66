"""Several hosts: a server and two worker hosts in network namespaces, with addresses and host names of their own."""

import os
import random
import secrets
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cells
import pytest
from shell import PATIENCE, Shell, check_recorded_once, resume, suspend, trainers

from hpo import settings
from hpo.services import serving

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.root, pytest.mark.apt]
LEASE = "5"  # seconds


def ip(*words: str) -> None:
    """Run `ip`; skip the test where it may not."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no network namespaces here: ip {' '.join(words)}: {done.stderr.strip()}")


def unused() -> str:
    """A network of the range that is set apart for tests of networks, which this machine has no address in: another
    test, or one that was killed and could not clean up, has its own."""
    taken = subprocess.run(["ip", "-4", "-oneline", "address"], capture_output=True, text=True, check=True).stdout
    left = [f"198.{half}.{number}" for half in (18, 19) for number in range(256)]
    return random.choice([network for network in left if f" {network}." not in taken])


@dataclass
class Network:
    """A bridge in the server's namespace (.1), with a cable to each worker host (.2, .3) and to us (.9)."""

    tag: str
    address: str  # its first three numbers

    def namespace(self, host: str) -> str:
        return f"hpo-{self.tag}-{host}"

    def make(self) -> None:
        server = self.namespace("server")
        ip("netns", "add", server)
        ip("-n", server, "link", "add", "bridge", "type", "bridge")
        ip("-n", server, "address", "add", f"{self.address}.1/24", "dev", "bridge")
        ip("-n", server, "link", "set", "bridge", "up")
        ip("-n", server, "link", "set", "lo", "up")
        for host, number in (("anna", 2), ("ben", 3)):
            ip("netns", "add", self.namespace(host))
            ip("-n", self.namespace(host), "link", "set", "lo", "up")
            self._cable(host, number, ["-n", self.namespace(host)])
        self._cable(f"us{self.tag}", 9, [])

    def _cable(self, name: str, number: int, where: list[str]) -> None:
        server = self.namespace("server")
        ip(*where, "link", "add", name, "type", "veth", "peer", "name", f"to-{name}", "netns", server)
        ip("-n", server, "link", "set", f"to-{name}", "master", "bridge", "up")
        ip(*where, "address", "add", f"{self.address}.{number}/24", "dev", name)
        ip(*where, "link", "set", name, "up")

    def cut(self, host: str) -> None:
        ip("-n", self.namespace("server"), "link", "set", f"to-{host}", "down")

    def mend(self, host: str) -> None:
        ip("-n", self.namespace("server"), "link", "set", f"to-{host}", "up")

    def on(self, host: str) -> tuple[str, ...]:
        """What goes in front of a command that runs on that host."""
        named = 'hostname "$0" && exec "$@"'
        return ("ip", "netns", "exec", self.namespace(host), "unshare", "--uts", "sh", "-c", named, host)

    def remove(self) -> None:
        for host in ("anna", "ben", "server"):  # the cables go with them
            subprocess.run(["ip", "netns", "delete", self.namespace(host)], capture_output=True)


@pytest.fixture
def network() -> Iterator[Network]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and ip (iproute2)")
    made = Network(secrets.token_hex(3), unused())
    try:
        made.make()
        yield made
    finally:
        made.remove()


@pytest.fixture
def lab(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    """The lab as we see it, served by the server's namespace; `start` runs `hpo` with the credentials file alone."""
    home, host = tmp_path / "server", f"{network.address}.1"
    try:
        subprocess.run(
            [*network.on("server"), *Shell.PROGRAM, "up", "--listen", host],
            env=os.environ | {"HPO_HOME": str(home)},
            check=True,
            capture_output=True,
            timeout=PATIENCE,
        )
        file = tmp_path / "credentials.toml"
        shutil.copy(home / "credentials.toml", file)
        file.chmod(0o600)
        found = tomllib.loads(file.read_text())
        assert f"@{host}:" in found["database_url"] and found["tracking_uri"].startswith(f"http://{host}:")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", found["tracking_username"])  # of our own looks
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", found["tracking_password"])
        made = Shell(tmp_path / "worker", found["database_url"], found["tracking_uri"])
        for name in ("HPO_DATABASE_URL", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            made.environment.pop(name, None)
        made.environment |= {"HPO_CREDENTIALS": str(file), "HPO_LEASE": LEASE}
        try:
            yield made
        finally:
            made.close()
    finally:
        serving.erase(settings.read({"HPO_HOME": str(home)}))


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
