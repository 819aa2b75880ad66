"""Hosts as network namespaces of this machine: each has an address and a host name of its own."""

import os
import random
import secrets
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from shell import PATIENCE, Shell

from hpo import settings
from hpo.services import serving


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
    """A bridge in the server's namespace (.1), with a cable to each worker host (.2, .3, …) and to us (.9)."""

    tag: str
    address: str  # its first three numbers
    hosts: Sequence[str]  # at most seven

    def namespace(self, host: str) -> str:
        return f"hpo-{self.tag}-{host}"

    def make(self) -> None:
        server = self.namespace("server")
        ip("netns", "add", server)
        ip("-n", server, "link", "add", "bridge", "type", "bridge")
        ip("-n", server, "address", "add", f"{self.address}.1/24", "dev", "bridge")
        ip("-n", server, "link", "set", "bridge", "up")
        ip("-n", server, "link", "set", "lo", "up")
        for number, host in enumerate(self.hosts, start=2):
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

    def ip(self, host: str) -> str:
        """The address of a host."""
        return f"{self.address}.{1 if host == 'server' else 2 + list(self.hosts).index(host)}"

    def cut(self, host: str) -> None:
        ip("-n", self.namespace("server"), "link", "set", f"to-{host}", "down")

    def mend(self, host: str) -> None:
        ip("-n", self.namespace("server"), "link", "set", f"to-{host}", "up")

    def on(self, host: str) -> tuple[str, ...]:
        """What goes in front of a command that runs on that host."""
        named = 'hostname "$0" && exec "$@"'
        return ("ip", "netns", "exec", self.namespace(host), "unshare", "--uts", "sh", "-c", named, host)

    def remove(self) -> None:
        for host in (*self.hosts, "server"):  # the cables go with them
            subprocess.run(["ip", "netns", "delete", self.namespace(host)], capture_output=True)


@contextmanager
def network_of(*hosts: str) -> Iterator[Network]:
    """Give a network of these hosts and a server; skip the test where there can be none."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and ip (iproute2)")
    made = Network(secrets.token_hex(3), unused(), hosts)
    try:
        made.make()
        yield made
    finally:
        made.remove()


@contextmanager
def served_lab(network: Network, folder: Path, monkeypatch: pytest.MonkeyPatch, *, lease: str) -> Iterator[Shell]:
    """The lab as we see it, served by the server's namespace; `start` runs `hpo` with the credentials file alone."""
    home, host = folder / "server", network.ip("server")
    try:
        subprocess.run(
            [*network.on("server"), *Shell.PROGRAM, "up", "--listen", host],
            env=os.environ | {"HPO_HOME": str(home)},
            check=True,
            capture_output=True,
            timeout=PATIENCE,
        )
        file = folder / "credentials.toml"
        shutil.copy(home / "credentials.toml", file)
        file.chmod(0o600)
        found = tomllib.loads(file.read_text())
        assert f"@{host}:" in found["database_url"] and found["tracking_uri"].startswith(f"http://{host}:")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", found["tracking_username"])  # of our own looks
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", found["tracking_password"])
        made = Shell(folder / "worker", found["database_url"], found["tracking_uri"])
        for name in ("HPO_DATABASE_URL", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            made.environment.pop(name, None)
        made.environment |= {"HPO_CREDENTIALS": str(file), "HPO_LEASE": lease}
        try:
            yield made
        finally:
            made.close()
    finally:
        serving.erase(settings.read({"HPO_HOME": str(home)}))
