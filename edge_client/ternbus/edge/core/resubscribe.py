"""The timer for subscribing to status and head again: a broker may not deliver retained messages at first."""

from dataclasses import dataclass
from typing import Final

MISSING_S: Final = 10.0
REFRESH_S: Final = 300.0  # while nothing is missing: a lost message shows in no other way


@dataclass(slots=True)
class Resubscribe:
    """Whether the head that the broker retains has come on this connection, and the time from which the wait counts.

    A head that comes live before it does not put off the next subscription.
    """

    is_current: bool = False  # it has
    _since_s: float = 0.0

    def connected(self, now: float) -> None:
        """Start the timer: a connect subscribes to status and head."""
        self.is_current, self._since_s = False, now

    def subscribed(self, now: float) -> None:
        self._since_s = now

    def head_arrived(self, now: float, *, retained: bool) -> None:
        self.is_current |= retained
        if self.is_current:
            self._since_s = now

    def due_s(self, status_known: bool) -> float:
        """The time at which to subscribe again."""
        return self._since_s + (REFRESH_S if self.is_current and status_known else MISSING_S)
