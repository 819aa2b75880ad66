"""The supervisor's end of a trainer or suggester process: start it, send requests, take its messages, end it."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import dropwhile
from pathlib import Path
from typing import IO

from hpo import ownership
from hpo.text import cut
from hpo.worker import protocol

# One thread each, unless the study says otherwise: one such trainer per core gets more done than one with many threads.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_ENVIRONMENT["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what deterministic matrix products on a GPU need

LAST_LINES, LONGEST_LINE = 3, 300  # lines of a log and their characters, in a message
READ = 2**20  # bytes: a process that writes faster than we read must not keep us from everything else


class Process:
    """One `python -P -m hpo.worker.MODULE` with a pipe each way. -P: not from the folder where the user stands."""

    def __init__(self, module: str, log: IO[bytes], *, gpu: str | None = None, code: Sequence[str] = ()) -> None:
        """`code`: the folder of users' code, and the digests of which it may run."""
        self._module = module
        environment = {**os.environ, **_ENVIRONMENT}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        self._messages, messages = os.pipe()
        os.set_blocking(self._messages, False)
        try:
            self._process = subprocess.Popen(
                [*self._program(), str(messages), *code],
                stdin=subprocess.PIPE,
                stdout=log,  # not for the messages: code that Python runs before hpo.worker.trainer may print
                stderr=log,
                env=environment,
                pass_fds=(messages,),
            )
        except BaseException:
            os.close(self._messages)
            raise
        finally:
            os.close(messages)
        assert self._process.stdin
        self._stdin = self._process.stdin
        self._partial = b""
        self.killed: str | None = None  # why we killed it
        self.closed = False  # it has ended, and all its messages have been taken

    def _program(self) -> list[str]:
        return [sys.executable, "-P", "-m", f"hpo.worker.{self._module}"]

    def fileno(self) -> int:
        return self._messages

    def send(self, message: protocol.Message) -> None:
        """Send a request; a process that died meanwhile is noticed when its messages are taken."""
        with suppress(BrokenPipeError, ValueError):  # ValueError: closed by us after its death
            self._stdin.write(protocol.encode(message))
            self._stdin.flush()

    def messages(self) -> list[protocol.Message]:
        """Return the messages that have arrived, those of READ bytes at a time. Set `closed` when it has ended.

        A process that sends something else is killed: it runs another version of hpo.
        """
        chunks, size = [], 0
        try:
            while size < READ and (chunk := os.read(self._messages, 1 << 16)):
                chunks.append(chunk)
                size += len(chunk)
            self.closed = size < READ
        except BlockingIOError:
            pass  # nothing more for now
        *lines, self._partial = (self._partial + b"".join(chunks)).split(b"\n")
        messages = []
        try:
            for line in lines:
                messages.append(protocol.decode(line))
        except protocol.ProtocolError as error:
            self.kill(str(error))
        return messages

    def kill(self, reason: str | None = None) -> None:
        self.killed = self.killed or reason
        self._process.kill()

    def close(self, timeout: float = 2.0) -> None:
        """Close its input, which ends it; kill it if that takes longer than `timeout` seconds."""
        with suppress(BrokenPipeError):
            self._stdin.close()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._messages)

    @property
    def lacked_memory(self) -> bool:
        """Whether it was killed, and not by us: in all likelihood for want of memory."""
        return self.killed is None and self._process.returncode == -signal.SIGKILL

    def obituary(self) -> str:
        """Return in a few words why it ended."""
        code = self._process.wait()
        if self.killed is not None:
            return self.killed
        if code >= 0:
            return f"{self._module} ended with exit {code}"
        name = signal.Signals(-code).name
        hint = ", likely out of memory" if -code == signal.SIGKILL else ""
        return f"{self._module} killed by {name} (exit {128 - code}{hint})"


def last_error(log: Path) -> str:
    """Return the last error in a log, indented: a traceback's message, else the last lines."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith("Traceback (")]
    after = lines[starts[-1] + 1 :] if starts else lines[-LAST_LINES:]
    message = list(dropwhile(lambda line: line.startswith(" "), after)) if starts else after
    return "\n".join("  " + cut(line, LONGEST_LINE) for line in message[:LAST_LINES]) or "  (empty)"


def visible_gpus(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> list[str]:
    """Return the NVIDIA GPUs we may use, as CUDA_VISIBLE_DEVICES names them: those it lists, else all with a device."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        # CUDA counts from 0 what a container was given, whatever the devices' numbers are on the host.
        return [str(index) for index, _ in enumerate(devices.glob("nvidia[0-9]*"))]
    named = [name.strip() for name in listed.split(",")]
    return [name for name in named[: named.index("-1") if "-1" in named else None] if name]  # CUDA stops at a -1


def next_gpu(visible: Sequence[str], taken: Sequence[str | None]) -> str | None:
    """Return the first of the visible GPUs that fewest trainers have; None if there is none.

    Round robin, also after one of the trainers died.
    """
    return min(visible, key=taken.count, default=None)


def open_log(home: Path, name: str) -> IO[bytes]:
    """Open the worker's log file for what trainers print, appended to."""
    file = ownership.folder(home, "logs") / f"{name}.log"
    return open(file, "ab", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o600))
