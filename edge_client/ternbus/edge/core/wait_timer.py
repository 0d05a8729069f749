"""The timer of a wait for broker or aggregator: when to log it, and when to give up."""

from dataclasses import dataclass
from typing import Final

from ternbus.broker.protocol.messages import OPEN
from ternbus.edge.core.actions import Log
from ternbus.edge.core.failures import Failures
from ternbus.edge.core.follower import Follower
from ternbus.edge.core.presence import Presence
from ternbus.edge.core.private_terms import PrivateTerms

FIRST_REPORT_S: Final = 3.0  # a normal start takes up to this long
REPORT_INTERVAL_S: Final = 10.0


def awaited_of(
    presence: Presence, follower: Follower, terms: PrivateTerms, failures: Failures, *, enrolled: bool
) -> str | None:
    """What a device with a connection waits for; None if it waits for nothing. `failures` are of its own work."""
    head = follower.head
    if not presence.online:
        return "the aggregator"
    if not enrolled and not terms.missing:
        return "the aggregator to enroll this device"
    if head is None:
        return "the first head from the aggregator"
    if not follower.synced:
        return f"version {head.version} of the model"
    if terms.missing:
        return f"the terms of private sums for version {head.version}"
    return f"{failures.work} that succeeds ({failures.reason})" if failures.reason and head.state == OPEN else None


@dataclass(slots=True, kw_only=True)
class WaitTimer:
    """The present wait: a text that names what is awaited, and the time it began."""

    timeout_s: float | None = None
    awaited: str | None = None  # None: the device waits for nothing
    _since_s: float = 0.0
    _report_s: float = 0.0

    def wait_for(self, awaited: str | None, now: float) -> None:
        """Set the awaited peer or message; None if the device waits for nothing."""
        if self.awaited is None and awaited is not None:
            self._since_s = now
        if awaited != self.awaited:
            first_s = now + FIRST_REPORT_S  # what is awaited may be a newer version every second, and none arrives
            self._report_s = first_s if self.awaited is None else min(first_s, self._report_s)
        self.awaited = awaited

    def report(self, now: float) -> list[Log]:
        """The log of the wait, if it is due. If so, the next one is scheduled."""
        if self.awaited is None or now < self._report_s:
            return []
        self._report_s = now + REPORT_INTERVAL_S
        return [Log(event="waiting", text=f"waiting for {self.awaited}", fields={"for": self.awaited})]

    def given_up(self, now: float) -> str:
        """Why the device stops, if the wait has exceeded the timeout; else empty."""
        if self.awaited is None or self.timeout_s is None or now < self._since_s + self.timeout_s:
            return ""
        return f"gave up after waiting {now - self._since_s:.0f} s for {self.awaited}"

    def due_s(self) -> float | None:
        if self.awaited is None:
            return None
        return self._report_s if self.timeout_s is None else min(self._report_s, self._since_s + self.timeout_s)
