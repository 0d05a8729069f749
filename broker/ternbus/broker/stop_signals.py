"""The signals that ask a service to end in good order."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Final

STOPS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def on_stop(handle: Callable[[int, FrameType | None], object]) -> None:
    """Call ``handle`` at each of them: at the end of a terminal's session too, unless ``nohup`` started the process."""
    for number in STOPS:
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handle)


def ignore_stops() -> None:
    """Let the clean-up finish, whatever comes."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
