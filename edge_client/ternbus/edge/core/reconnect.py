"""When to try the broker again: exponential backoff with jitter, so that a thousand devices do not come at once."""

from dataclasses import dataclass
from typing import Final

from ternbus.edge.core.resend import fraction

FIRST_S: Final = 0.2
LONGEST_S: Final = 30.0
STEADY_S: Final = 30.0  # a connection that lasted so long was a good one; what is cut sooner is not tried faster


@dataclass(slots=True, kw_only=True)
class Reconnect:
    """The time of the next attempt to connect."""

    salt: str
    due_s: float = 0.0
    _attempts: int = 0
    _since_s: float | None = None

    def connected(self, now: float) -> None:
        self._since_s = now

    def failed(self, now: float) -> None:
        """There is no connection, or no longer."""
        if self._since_s is not None and now - self._since_s >= STEADY_S:
            self._attempts = 0
        self._since_s = None
        wait_s = min(FIRST_S * 2.0 ** min(self._attempts, 20), LONGEST_S)
        self._attempts += 1
        self.due_s = now + wait_s * (1 + fraction(self.salt, self._attempts)) / 2
