"""The timer for sending a message again until its receipt arrives, by the protocol's resend rules."""

from dataclasses import dataclass
from typing import Final

from ternbus.broker.backoff import fraction

LONGEST_S: Final = 3600.0
UNACKNOWLEDGED_FACTOR: Final = 10.0  # while the broker has not acknowledged it: the message is still in transit
BUSY_MIN_S: Final = 0.5


@dataclass(slots=True, kw_only=True)
class Resend:
    """The time of the next transmission. The caller decides whether a message may be sent."""

    salt: str
    first_s: float  # the wait after the first transmission; it doubles with each
    _due_s: float | None = None  # if None, the backoff counts from the broker's last acknowledgement
    _not_before_s: float = 0.0
    _attempts: int = 0
    _unacknowledged: int = 0
    _last_s: float = 0.0

    def restart(self, now: float) -> None:
        """Send at once, and reset the backoff: message or connection is new, or the aggregator came online."""
        self._due_s = now
        self._attempts = 0
        self._unacknowledged = 0

    def sent(self, frames: int, now: float) -> None:
        self._due_s = None
        self._attempts += 1
        self._unacknowledged = frames
        self._last_s = now

    def acknowledged(self, now: float) -> None:
        """The broker acknowledged one of the frames."""
        self._unacknowledged = max(0, self._unacknowledged - 1)
        self._last_s = now

    def busy(self, retry_after_s: float, now: float) -> None:
        """Wait as the aggregator asks; neither a reconnect nor its return online shortens the wait.

        The backoff begins anew: the aggregator is there, and who waits for its turn long must not lose it by silence.
        """
        self._attempts = 0
        wait_s = min(max(retry_after_s, BUSY_MIN_S), LONGEST_S)
        self._not_before_s = now + wait_s * (1 + fraction(self.salt, "busy", now) / 4)
        self._due_s = self._not_before_s

    def granted(self, deadline_s: float, now: float) -> None:
        """Wait for the receipt of the granted parts; at the deadline the message is offered again."""
        self._due_s = now + min(max(deadline_s, BUSY_MIN_S), LONGEST_S)

    @property
    def in_vain(self) -> int:
        """How often it was sent and taken by the broker, and not answered."""
        return 0 if self._unacknowledged else self._attempts

    def due_s(self) -> float:
        if self._due_s is not None:
            return max(self._due_s, self._not_before_s)
        wait_s = min(self.first_s * 2.0 ** max(0, self._attempts - 1), LONGEST_S)
        if self._unacknowledged:
            wait_s *= UNACKNOWLEDGED_FACTOR
        return self._last_s + wait_s * (1 + fraction(self.salt, self._attempts) / 4)
