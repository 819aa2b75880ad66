"""A real cluster of Ray in network namespaces; its head is a process group that can be killed.

Ray replaces loopback addresses by the machine's own. In namespaces its traffic stays on this machine.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from network import Network
from shell import PATIENCE

PORT = 6379
SMALL = ("--object-store-memory=80000000", "--disable-usage-stats", "--block")
# A raylet waits 15 s for each port that its agent chooses. Each namespace has its own ports.
SMALL += ("--dashboard-agent-grpc-port=20001", "--runtime-env-agent-port=20002", "--metrics-export-port=20003")
SMALL += ("--dashboard-agent-listen-port=20004",)
STARTS = 5  # of a node that has ended: on a busy machine its agent may need more than the 15 s
RAY = (sys.executable, "-P", "-m", "ray.scripts.scripts")
ASKED = """
import contextlib, io, json, sys
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
answers = sys.stdout
for line in sys.stdin:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            exec(json.loads(line), {"ray": ray})
        text = said.getvalue()
    except Exception as error:
        text = f"failed: {error!r}"
    print(json.dumps(text), file=answers, flush=True)
"""


class RayCluster:
    """Its head is the network's server."""

    def __init__(self, network: Network, environment: Mapping[str, str]) -> None:
        """`environment`: of the nodes."""
        self.network, self.folder = network, Path(tempfile.mkdtemp(prefix="ray-"))
        self.environment = dict(environment) | {
            "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            "RAY_enable_worker_prestart": "0",
            "RAY_raylet_start_wait_time_s": "60",  # a busy machine is slow
            "RAY_agent_register_timeout_ms": "300000",
            "PYTHONWARNINGS": "ignore",
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._asked: subprocess.Popen[str] | None = None  # a client of the cluster

    @property
    def address(self) -> str:
        return f"{self.network.ip('server')}:{PORT}"

    def on(self, host: str) -> tuple[str, ...]:
        """What goes in front of a command on a host: each has its own /tmp/ray, as it would have its own disk."""
        own = self.folder / host
        own.mkdir(exist_ok=True)
        mount = f'mkdir -p /tmp/ray && mount --bind {own} /tmp/ray && exec "$@"'
        return (*self.network.on(host), "unshare", "--mount", "sh", "-c", mount, "sh")

    def start_head(self, *words: str, dashboard: bool = False) -> None:
        """Start the head, which has no cores unless `words` say so, and wait until it answers."""
        own = ("--head", f"--node-ip-address={self.network.ip('server')}", f"--port={PORT}", *words)
        shown = ("--dashboard-host=0.0.0.0",) if dashboard else ()
        cores = () if any(word.startswith("--num-cpus") for word in words) else ("--num-cpus=0",)
        self._start("server", *own, *cores, *shown, f"--include-dashboard={str(dashboard).lower()}")

    def _start(self, host: str, *words: str) -> None:
        for _ in range(STARTS):
            with (self.folder / f"{host}.log").open("ab") as log:
                self.processes[host] = subprocess.Popen(
                    [*self.on(host), *RAY, "start", *words, *SMALL],
                    env=self.environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self.until(lambda: self.has_ended(host) or host in self.nodes(), f"{host} among Ray's nodes")
            if not self.has_ended(host):
                return
            self.kill(host)
        raise AssertionError(f"{host} ended {STARTS} times:\n{(self.folder / f'{host}.log').read_text()[-3000:]}")

    def has_ended(self, host: str) -> bool:
        """Return whether Ray's own processes on a host have ended."""
        return self.processes[host].poll() is not None

    def kill(self, host: str) -> None:
        """Kill -9 everything that runs on a host, as when its power goes; on the head's alone what is Ray's."""
        for pid in self._inside(host):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.processes.pop(host).wait(PATIENCE)
        if host == "server":
            self._hang_up()

    def _inside(self, host: str) -> list[int]:
        """The processes in a host's network namespace; on the server without the services and commands of hpo."""
        done = subprocess.run(["ip", "netns", "pids", self.network.namespace(host)], capture_output=True, text=True)
        own = []
        for pid in map(int, done.stdout.split()):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            is_rays = any(part in words for part in (b"/ray/", b"ray::", b"ray.scripts"))
            is_ours = b"hpo.launch" in words or b"\0hpo\0" in words
            own += [pid] if host != "server" or (is_rays and not is_ours) else []
        return own

    def ask(self, code: str) -> str:
        """What Python code prints that is connected to the cluster as `ray`, on the head's host."""
        process = self._asked or subprocess.Popen(
            [*self.on("server"), sys.executable, "-P", "-W", "ignore", "-c", ASKED, self.address],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._asked = process
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(60, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(code) + "\n")
            process.stdin.flush()
            return str(json.loads(process.stdout.readline()))
        except (OSError, ValueError):  # it has ended: Ray's head is not there, or no more
            self._hang_up()
            return "failed: Ray does not answer"
        finally:
            timer.cancel()

    def _hang_up(self) -> None:
        if self._asked is not None:
            self._asked.kill()
            with suppress(OSError):
                self._asked.communicate()
            self._asked = None

    def nodes(self) -> dict[str, str]:
        """The ids of the nodes that live, by their host names."""
        text = self.ask("for n in ray.nodes():\n if n['Alive']: print('node', n['NodeManagerHostname'], n['NodeID'])")
        rows = [line.split() for line in text.splitlines() if line.startswith("node ")]
        return {host: node for _, host, node in rows}

    def actors(self) -> list[str]:
        """The names of hpo's actors that live or wait."""
        text = self.ask(
            "from ray.util import list_named_actors\n"
            "for a in list_named_actors(all_namespaces=True):\n if a['namespace'] == 'hpo': print('actor', a['name'])"
        )
        assert not text.startswith("failed"), text
        return [line.split()[1] for line in text.splitlines() if line.startswith("actor ")]

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something that Ray, or what runs in it, does."""
        end = time.monotonic() + PATIENCE
        while not condition():
            logs = [path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log")]
            assert time.monotonic() < end, f"not within {PATIENCE:.0f} s: {what}\n" + "\n".join(logs)
            time.sleep(0.5)

    def stop(self) -> None:
        for host in list(self.processes):
            self.kill(host)
        self._hang_up()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def ray_cluster(network: Network, environment: Mapping[str, str]) -> Iterator[RayCluster]:
    """Give a cluster that has not been started; end what runs of it."""
    made = RayCluster(network, environment)
    try:
        yield made
    finally:
        made.stop()
