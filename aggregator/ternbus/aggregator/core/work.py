"""How much work each device may ask for: its fair share of it, to which it is held only while others have to wait.

Work is counted in bytes that are decoded, since an update of 2 KB may stand for a hundred megabytes. What a device has
asked for beyond its share it owes, and pays off with time; who owes waits while the queue is long. On an idle machine
nobody does. The shares are those of fair queueing (Demers, Keshav & Shenker 1989), by virtual time.
"""

import heapq
from dataclasses import dataclass, field
from typing import Final

LARGE_HEADER_BYTES: Final = 1024  # few honest ones are larger; these cost nothing
HEADER_WORK: Final = 100  # bytes decoded that any further byte of a header costs as much as
PATIENCE_S: Final = 0.25  # a message that waited longer than that waited for others' work
DEBT_S: Final = 2.0  # of everybody's work: nobody owes more, however much it was given while the machine was idle


def header_work(size_bytes: int) -> int:
    """What a header of this size costs."""
    return HEADER_WORK * max(0, size_bytes - LARGE_HEADER_BYTES)


@dataclass(slots=True)
class WorkShares:
    """``per_s`` bytes of work a second pay off, in equal parts, what devices owe."""

    per_s: float
    _paid: float = 0.0  # bytes that each device that owed all the time has paid off since the beginning
    _at: float = 0.0
    _until: dict[str, float] = field(default_factory=dict)  # who owes, until ``_paid`` is as high
    _order: list[tuple[float, str]] = field(default_factory=list)  # a heap: an entry for each, not above its ``_until``

    def may_owe(self, device: str) -> bool:
        """Whether it owed when time was last looked at; for other threads, a hint."""
        return device in self._until

    def owes(self, device: str, now: float) -> bool:
        self._pay(now)
        return device in self._until

    def charge(self, device: str, size_bytes: int, now: float) -> None:
        """The device was given this much work."""
        self._pay(now)
        known = self._until.get(device)
        if known is None:
            heapq.heappush(self._order, (self._paid, device))
        owed = 0.0 if known is None else known - self._paid
        most = max(owed, size_bytes, DEBT_S * self.per_s)
        self._until[device] = self._paid + min(owed + size_bytes, most)

    def wait_s(self, device: str, now: float) -> float:
        """After how long it is even, if all that owe now go on to owe as long."""
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
        self._paid = 0.0  # nobody owes: begin again, so that it never grows too large to add a byte to
