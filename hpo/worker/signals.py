"""Signals that stop a worker."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def stopped_by_signals(stop: Callable[[str], None], *, limit: float) -> Iterator[None]:
    """Call `stop` with the name of each SIGINT, SIGTERM and SIGHUP; only in the main thread.

    If this process still runs `limit` seconds after the first one, for a server that is frozen or a network that
    swallows packets, it ends itself (exit code 130): what it could not give back it loses with its lease.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    wake, waker = os.pipe()  # a handler may start no thread: it could hold the lock that this takes
    ended = threading.Event()

    def last_resort() -> None:
        asked = os.read(wake, 1) == b"!"
        os.close(wake)
        if asked and not ended.wait(limit):
            os._exit(130)

    def handle(number: int, _: Any) -> None:
        stop(signal.Signals(number).name)
        with suppress(OSError):  # the second time nobody reads
            os.write(waker, b"!")

    threading.Thread(target=last_resort, daemon=True).start()
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield
    finally:
        ended.set()
        os.close(waker)  # lets the thread end, and with it the other side
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
