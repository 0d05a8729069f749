"""The timer for subscribing to status and head again: a broker may not deliver retained messages at first."""

from dataclasses import dataclass
from typing import Final

MISSING_S: Final = 10.0
REFRESH_S: Final = 300.0  # while nothing is missing: a lost message shows in no other way


@dataclass(slots=True)
class Resubscribe:
    """Whether a head arrived on this connection, and the time of the last subscription or head."""

    _head_known: bool = False
    _subscribed_s: float = 0.0

    def connected(self, now: float) -> None:
        """Start the timer: a connect subscribes to status and head."""
        self._head_known, self._subscribed_s = False, now

    def subscribed(self, now: float) -> None:
        self._subscribed_s = now

    def head_arrived(self, now: float) -> None:
        self._head_known, self._subscribed_s = True, now

    def due_s(self, status_known: bool) -> float:
        """The time at which to subscribe again."""
        return self._subscribed_s + (REFRESH_S if self._head_known and status_known else MISSING_S)
