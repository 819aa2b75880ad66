"""What Ray runs on a machine: an actor with one `hpo worker` as its child process.

Ray gets the class by value, so it needs no hpo of this version there. It uses the standard library and Ray alone. What
became of the worker stands in Ray's own key-value store: the actor that could tell it is gone when people ask.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAMESPACE = "hpo"  # of the actors, and of the keys
STOPPED = 130  # exit code of a worker that was told to leave
LOOK = 1.0  # seconds between two looks at the node
DYING = 30.0  # seconds in which an actor that is removed is killed
KEPT = 20  # lines of what a worker wrote
SERVICES = ("HPO_CREDENTIALS", "HPO_DATABASE_URL")  # one of them leads to the services
# The child ends with this process, however that ends: PR_SET_PDEATHSIG is 1, SIGTERM is 15.
CHILD = """import ctypes, os, runpy, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 15)
    os.getppid() == int(sys.argv[1]) or sys.exit(1)
del sys.argv[1]
runpy.run_module("hpo", run_name="__main__", alter_sys=True)
"""


class Worker:
    """An actor. It is restarted wherever it fits if its node dies, is drained, or its process is killed."""

    def __init__(self, name: str, words: Sequence[str], variables: Mapping[str, str], needs_credentials: bool) -> None:
        """`words`: behind `hpo`. `variables`: of the environment, none of them secret."""
        import ray

        self.name, self.words, self.variables = name, list(words), dict(variables)
        self.child: subprocess.Popen[str] | None = None
        self.written: deque[str] = deque(maxlen=KEPT)
        self.lines = 0  # that were written
        self.needs_credentials = needs_credentials
        self.is_told, self.is_moving = False, False
        context = ray.get_runtime_context()
        self.node = context.get_node_id()
        context.current_actor.work.remote()  # runs once this has returned, after each restart

    def leave(self) -> None:
        """Let the worker hand back and leave."""
        self.is_told = True
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
            self.note()

    def work(self) -> None:
        """Run the worker to its end; then end this actor, or let Ray start it again elsewhere."""
        try:
            self.follow()
        finally:  # also if Ray did not answer: an actor without a worker would keep its place
            os._exit(1)  # which Ray takes for a death, and not for an end

    def follow(self) -> None:
        """Run the worker; remove this actor when it has ended for good."""
        import ray

        self.note()
        code = 0 if self.is_told else self.run()
        reason = "" if code in (0, STOPPED) else next((line for line in reversed(self.written) if line.strip()), "")
        if not self.is_told and (self.is_moving or code < 0):
            self.note("restarting", reason=f"killed by signal {-code}" if code < 0 else "its node is drained")
            time.sleep(0 if self.is_moving else LOOK)
            return
        self.note("ended", code=code, reason=reason)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
        time.sleep(DYING)

    def run(self) -> int:
        """Return the exit code of the worker."""
        environment = {**os.environ, **self.variables}
        environment.setdefault("HPO_HOME", str(Path.home() / "hpo"))
        if self.needs_credentials and not any(environment.get(name) for name in SERVICES):
            self.written.append(
                f"hpo: {socket.gethostname()} has no credentials: set HPO_CREDENTIALS where `ray start` runs, or name "
                "a file on the nodes with --ray credentials=PATH."
            )
            return 1
        command = [sys.executable, "-P", "-c", CHILD, str(os.getpid()), *self.words]
        self.child = child = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        reader = threading.Thread(target=self.read, daemon=True)
        reader.start()
        if self.is_told:
            self.leave()
        lines = 0
        while True:
            try:
                code = child.wait(LOOK)
                reader.join(LOOK)
                return code
            except subprocess.TimeoutExpired:
                if not self.is_moving and not self.is_told and self.is_drained():
                    self.is_moving = True
                    child.send_signal(signal.SIGTERM)
                    self.note()
                elif self.lines > lines:
                    lines = self.lines
                    self.note()

    def read(self) -> None:
        """Pass on what the worker writes, for Ray's logs, and keep its end."""
        assert self.child is not None and self.child.stdout is not None
        for line in self.child.stdout:
            print(line, end="", flush=True)
            self.written.append(line.rstrip("\n"))
            self.lines += 1

    def is_drained(self) -> bool:
        """Return whether this node is to go."""
        import ray

        return self.node in ray._private.state.state.get_draining_nodes()

    def note(self, state: str = "", **facts: Any) -> None:
        """Write down what has become of the worker; without a `state`: it runs, or is leaving."""
        from ray.experimental.internal_kv import _internal_kv_put

        state = state or ("leaving" if self.is_told or self.is_moving else "running")
        record = {"state": state, "node": self.node, "host": socket.gethostname(), "output": "\n".join(self.written)}
        _internal_kv_put(f"hpo:{self.name}".encode(), json.dumps(record | facts).encode(), namespace=NAMESPACE)
