"""The signals that ask a service to end in good order."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

STOPS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOP_WITHIN_S: Final = 8.0


def on_stop(handle: Callable[[int, FrameType | None], object]) -> None:
    """Call ``handle`` at each of them: at the end of a terminal's session too, unless ``nohup`` started the process."""
    for number in STOPS:
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handle)


@contextmanager
def signals_stop(request_stop: Callable[[str], None], code: int) -> Iterator[None]:
    """Let signals request a stop, and end the process with this code if it still runs `STOP_WITHIN_S` later.

    A slow name server may hold it, the sum of a large set, or a thread that a task's code has started. For services
    that have all that matters on disk.
    """

    def stop(received: int, _: object) -> None:
        request_stop(signal.Signals(received).name)
        deadline = threading.Timer(STOP_WITHIN_S, os._exit, (code,))
        deadline.daemon = True
        deadline.start()

    before = {number: signal.getsignal(number) for number in STOPS}
    on_stop(stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stops() -> None:
    """Let the clean-up finish, whatever comes."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
