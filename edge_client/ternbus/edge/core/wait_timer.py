"""Waiting for broker or aggregator: for what, since when, when to log it, and when to give up."""

from dataclasses import dataclass
from typing import Final

FIRST_REPORT_S: Final = 3.0  # a normal start takes as long
REPORT_INTERVAL_S: Final = 10.0


@dataclass(slots=True, kw_only=True)
class WaitTimer:
    """What is awaited now, in words, and since when something is."""

    timeout_s: float | None = None
    awaited: str | None = None  # None: nothing
    _since_s: float = 0.0
    _report_s: float = 0.0

    def wait_for(self, awaited: str | None, now: float) -> None:
        """Set what is awaited; None if nothing."""
        if self.awaited is None and awaited is not None:
            self._since_s = now
        if awaited != self.awaited:
            self._report_s = now + FIRST_REPORT_S
        self.awaited = awaited

    def report_due(self, now: float) -> bool:
        """Whether to log what is awaited; if so, the next time is set."""
        if self.awaited is None or now < self._report_s:
            return False
        self._report_s = now + REPORT_INTERVAL_S
        return True

    def timed_out(self, now: float) -> bool:
        """Whether the timeout has passed since something is awaited."""
        return self.awaited is not None and self.timeout_s is not None and now >= self._since_s + self.timeout_s

    def waited_s(self, now: float) -> float:
        return now - self._since_s

    def due_s(self) -> float | None:
        if self.awaited is None:
            return None
        return self._report_s if self.timeout_s is None else min(self._report_s, self._since_s + self.timeout_s)
