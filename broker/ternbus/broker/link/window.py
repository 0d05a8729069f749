"""The limits of unacknowledged data in each direction: publications sent, and messages received.

The window of publications adapts to the time that a broker takes to acknowledge them. paho queues its ping behind
other data, and treats the broker as lost if no answer arrives within a keepalive. A slow uplink therefore needs a
small window. A fast uplink needs a large one to be used fully.
"""

import math
from dataclasses import dataclass, field
from typing import Final

from ternbus.broker.protocol.frame import FRAME_BYTES

BYTES_TO_BEGIN: Final = 256 << 10
BYTES_MAX: Final = 4 << 20
MESSAGES_MAX: Final = 128


@dataclass(slots=True, kw_only=True)
class Backlog:
    """Received messages that are not acknowledged yet. Only the network thread uses it."""

    messages_max: float
    bytes_max: float
    messages: int = 0
    size_bytes: int = 0

    @property
    def is_full(self) -> bool:
        """Whether reading must wait; never the case if the broker obeys the receive maximum."""
        return self.messages > self.messages_max or self.size_bytes > self.bytes_max

    def arrived(self, size_bytes: int) -> None:
        self.messages += 1
        self.size_bytes += size_bytes

    def released(self, size_bytes: int) -> None:
        self.messages -= 1
        self.size_bytes -= size_bytes

    def lift(self) -> None:
        """Remove the limits, because messages that arrive from now on are not delivered."""
        self.messages_max = self.bytes_max = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    ticket: int
    size_bytes: int
    at: float


@dataclass(slots=True, kw_only=True)
class Window:
    """Publications without a PUBACK. A PUBACK after more than ``patience_s`` makes the window smaller."""

    patience_s: float
    messages_max: int = MESSAGES_MAX
    bytes_max: int = BYTES_TO_BEGIN
    size_bytes: int = 0
    _under_way: dict[int, _Sent] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        """Whether one more publication may be sent; always true if none is unacknowledged."""
        return not self._under_way or (len(self._under_way) < self.messages_max and self.size_bytes < self.bytes_max)

    @property
    def suspicion(self) -> str:
        """What may have ended a connection, for people: a message larger than usual; empty if none was under way."""
        largest = max((each.size_bytes for each in self._under_way.values()), default=0)
        if largest <= FRAME_BYTES:
            return ""
        return (
            f" while a message of {largest} bytes was sent: if that goes on, the broker or the line takes none so "
            "large; a device then goes back to smaller ones, unless its owner set its frame_bytes, which is to be "
            "lowered, as is limits.frame_bytes of an aggregator"
        )

    def sent(self, mid: int, *, ticket: int, size_bytes: int, now: float) -> None:
        """Record a publication with the packet identifier ``mid``."""
        self._under_way[mid] = _Sent(ticket=ticket, size_bytes=size_bytes, at=now)
        self.size_bytes += size_bytes

    def answered(self, mid: int, *, now: float) -> int:
        """Record a PUBACK, adapt the window to the time it took, and return the publication's ticket."""
        sent = self._under_way.pop(mid)
        self.size_bytes -= sent.size_bytes
        if now - sent.at > self.patience_s:
            self.bytes_max = max(1, self.bytes_max - sent.size_bytes)
        elif now - sent.at < self.patience_s / 2:
            self.bytes_max = min(BYTES_MAX, self.bytes_max + sent.size_bytes)
        return sent.ticket
