"""One connection of a browser: how many there are, and how long one may say nothing, or take nothing."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS_MAX: Final = 256
LOOK_S: Final = 5.0
SILENT_S: Final = 15.0  # without a whole request
STUCK_S: Final = 60.0  # without taking anything of an answer
HEADER_BYTES_MAX: Final = 16 * 1024


class Connection(H11Protocol):
    """HTTP/1.1 for people with bad intentions, too: uvicorn itself waits for a first request forever."""

    _watch: asyncio.TimerHandle | None = None
    _silent_s: float = 0.0
    _stuck_s: float = 0.0
    _unsent: int = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # of TCP here; typeshed has the base class
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS_MAX:
            transport.abort()
            return
        self._watch = self.loop.call_later(LOOK_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        cycle = cast("object | None", self.cycle)  # uvicorn says that there is always one
        answering = cycle is not None and not self.cycle.response_complete
        unsent = self.transport.get_write_buffer_size()
        self._silent_s = 0.0 if answering else self._silent_s + LOOK_S
        self._stuck_s = self._stuck_s + LOOK_S if unsent and unsent == self._unsent else 0.0
        self._unsent = unsent
        if self._silent_s >= SILENT_S or self._stuck_s >= STUCK_S:
            self.transport.abort()
            return
        self._watch = self.loop.call_later(LOOK_S, self._look)


class Server(uvicorn.Server):
    """Leaves signals to the process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def ignore_terminal() -> None:
    """Ctrl-C and the end of a terminal are for the aggregator, which ends the dashboard."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
