"""Ctrl-C, SIGTERM and SIGHUP as a value that is looked at between two steps, so that no step is cut in half.

An exception out of a signal handler could come between the start of a process and the note that it was started.
"""

import signal
from types import FrameType
from typing import Final, Self

from ternbus.broker.errors import FederationError

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(FederationError):  # noqa: N818 - no error: somebody wants it
    """A signal asked the run to end."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {'Ctrl-C' if number == signal.SIGINT else number.name}")
        self.exit_code = 128 + number


class Interrupts:
    """While it is entered, the signals that ask us to end are only noted."""

    def __init__(self) -> None:
        self._caught: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def check(self) -> None:
        """Raise `Interrupted` if a signal came."""
        if self._caught is not None:
            raise Interrupted(self._caught)

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() returned, it takes back

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._caught = self._caught or signal.Signals(number)
