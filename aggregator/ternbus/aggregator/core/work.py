"""Fair shares of the aggregator's work for its devices, which limit a device only while others have to wait.

Work is counted in bytes, hashed or decoded, because an update of 2 KB can decode to a hundred megabytes. It is charged
whatever becomes of the message: a refused one has cost as much as an accepted one. Work beyond a device's share is the
device's debt, which decreases with time. A device with a debt waits while the queue is long; on an idle machine no
device waits. The shares are those of fair queueing (Demers, Keshav & Shenker 1989), by virtual time.
"""

import heapq
from dataclasses import dataclass, field
from typing import Final

from ternbus.broker.protocol.frame import FRAME_BYTES

LARGE_HEADER_BYTES: Final = 1024  # headers up to this size cost nothing; few honest ones are larger
LARGE_BODY_BYTES: Final = FRAME_BYTES  # bodies up to this size are hashed even for a device with a debt
HEADER_WORK: Final = 100  # the cost of each further header byte, in decoded bytes
PATIENCE_S: Final = 0.25  # a message that waited longer than this is late
DEBT_S: Final = 2.0  # the maximum of a debt of several pieces, in seconds of the whole rate


def header_work(size_bytes: int) -> int:
    """The cost of a header of this size, in decoded bytes."""
    return HEADER_WORK * max(0, size_bytes - LARGE_HEADER_BYTES)


@dataclass(slots=True)
class WorkShares:
    """The debts of devices in bytes; ``per_s`` bytes per second, in equal parts, reduce them."""

    per_s: float
    _paid: float = 0.0  # virtual time: bytes paid by a device that has had a debt since the start
    _at: float = 0.0
    _until: dict[str, float] = field(default_factory=dict)  # device -> the value of ``_paid`` that ends its debt
    _order: list[tuple[float, str]] = field(default_factory=list)  # a heap: per device a value, at most its ``_until``

    def may_owe(self, device: str) -> bool:
        """Whether the device had a debt at the last call of another method; a hint for other threads."""
        return device in self._until

    def owes(self, device: str, now: float, beyond: float = 0.0) -> bool:
        """Whether the device has a debt of more than ``beyond`` bytes."""
        self._pay(now)
        return self._until.get(device, self._paid) - self._paid > beyond

    def charge(self, device: str, size_bytes: int, now: float) -> None:
        """Add ``size_bytes`` of work to the debt of the device."""
        self._pay(now)
        known = self._until.get(device)
        if known is None:
            heapq.heappush(self._order, (self._paid, device))
        owed = 0.0 if known is None else known - self._paid
        bound = max(owed, size_bytes, DEBT_S * self.per_s)  # a small piece does not reduce the debt of a large one
        self._until[device] = self._paid + min(owed + size_bytes, bound)

    def wait_s(self, device: str, now: float) -> float:
        """The seconds until the debt is paid, if every other debt lasts as long."""
        self._pay(now)
        return (self._until.get(device, self._paid) - self._paid) * len(self._until) / self.per_s

    def _pay(self, now: float) -> None:
        left_s, self._at = now - self._at, now
        while self._order:
            entry, device = self._order[0]
            until = self._until[device]
            if entry < until:
                heapq.heapreplace(self._order, (until, device))
                continue
            needed_s = (until - self._paid) * len(self._until) / self.per_s
            if needed_s > left_s:
                self._paid += left_s * self.per_s / len(self._until)
                return
            left_s -= needed_s
            self._paid = until
            heapq.heappop(self._order)
            del self._until[device]
        self._paid = 0.0  # no debts: restart at 0, to keep the precision of the sum
