"""When to subscribe to status and head again: a broker may not deliver what it retains at the first try."""

from dataclasses import dataclass
from typing import Final

MISSING_S: Final = 10.0
REFRESH_S: Final = 300.0  # while nothing is missing: nothing else shows that a message was lost


@dataclass(slots=True)
class Resubscribe:
    """What arrived on this connection, and when it was last subscribed to."""

    _head_known: bool = False
    _subscribed_s: float = 0.0

    def connected(self, now: float) -> None:
        """A connect subscribes to both."""
        self._head_known, self._subscribed_s = False, now

    def subscribed(self, now: float) -> None:
        self._subscribed_s = now

    def head_arrived(self, now: float) -> None:
        self._head_known, self._subscribed_s = True, now

    def due_s(self, status_known: bool) -> float:
        """When to subscribe again."""
        return self._subscribed_s + (REFRESH_S if self._head_known and status_known else MISSING_S)
