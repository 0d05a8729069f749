"""Ctrl-C, SIGTERM and SIGHUP as a flag that is checked between two steps, so that no step is interrupted.

An exception from a signal handler could otherwise come after the start of a process but before it is recorded.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final, Self

from ternbus.broker.errors import FederationError

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(FederationError):  # noqa: N818 - not an error: the user asked for it
    """A signal asked the run to end."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {'Ctrl-C' if number == signal.SIGINT else number.name}")
        self.exit_code = 128 + number


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Block SIGINT in this thread. A process or thread that starts in the block keeps SIGINT blocked.

    So the terminal's Ctrl-C never interrupts a worker process, not even during its imports. This thread gets the
    signal after the block, and can then end the workers.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Interrupts:
    """A context in which SIGINT, SIGTERM and SIGHUP only set a flag."""

    def __init__(self) -> None:
        self._caught: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    @property
    def came(self) -> Interrupted | None:
        """What `check` raises; None if no signal came."""
        return None if self._caught is None else Interrupted(self._caught)

    def check(self) -> None:
        """Raise `Interrupted` if a signal came."""
        if (interrupted := self.came) is not None:
            raise interrupted

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # signal() accepts the handlers that it returned

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._caught = self._caught or signal.Signals(number)
