"""A trainer's or suggester's end of the pipes to its supervisor.

Requests come in on standard input and messages go out on the descriptor that the command line names; whatever is
printed goes to the log. The process ends when its input closes, so it never outlives its supervisor.
"""

import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import IO, NoReturn

from hpo.worker import protocol

ALIVE_INTERVAL = 10.0  # seconds between two signs of life where an epoch, for example, takes minutes

Send = Callable[[protocol.Message], None]


class Channel:
    """The requests that have arrived, whether the present one is to be stopped, and `send`."""

    def __init__(self, messages: IO[bytes]) -> None:
        self._messages = messages
        self.requests: queue.Queue[protocol.Message] = queue.Queue()
        self.stop = threading.Event()

    def send(self, message: protocol.Message) -> None:
        self._messages.write(protocol.encode(message))

    def listen(self) -> None:
        """Read requests until the input closes or cannot be understood, then end this process."""
        try:
            for line in sys.stdin.buffer:
                request = protocol.decode(line)
                if isinstance(request, protocol.Stop):
                    self.stop.set()
                else:
                    self.requests.put(request)
        except protocol.ProtocolError:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)


def serve(answer_requests: Callable[[Channel], None]) -> NoReturn:
    """Let a function answer the supervisor's requests; an error ends the process with exit code 1 and its traceback.

    Python must not end in the usual way: it aborts (SIGABRT) if the thread that reads is waiting for input just then.
    """
    try:
        answer_requests(_connect())
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
    os._exit(1)


def _connect() -> Channel:
    """Return the channel to the supervisor of this process; a thread reads its requests from now on."""
    os.umask(0o077)  # what we write lies in HPO_HOME
    # Ctrl-C and the signals of a batch system reach the whole process group; only the supervisor acts on them.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    messages = os.fdopen(int(sys.argv[1]), "wb", buffering=0)
    os.set_inheritable(messages.fileno(), False)  # the supervisor takes its end for that of the trainer
    channel = Channel(messages)
    threading.Thread(target=channel.listen, daemon=True).start()
    return channel


def signs_of_life(send: Send) -> Callable[[], None]:
    """Return a function to be called often: now and then it says that work goes on, unlike in a trainer that hangs."""
    last = time.monotonic()

    def alive() -> None:
        nonlocal last
        if time.monotonic() - last > ALIVE_INTERVAL:
            send(protocol.Alive())
            last = time.monotonic()

    return alive
