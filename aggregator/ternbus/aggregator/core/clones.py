"""Devices whose key two machines use: their statuses alternate between two series of sequence numbers.

A device numbers its statuses upwards, over connections, restarts and crashes; one that was restored from an old copy
goes back once. Only two that run at once go back again and again. Where the aggregator connects, the broker may deliver
the retained status before older ones from its queue; so nothing is compared over its connections.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from ternbus.aggregator.core.events import Action, Log
from ternbus.aggregator.core.refusals import Refusals
from ternbus.aggregator.core.registry import Member
from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.messages import Status

FALLS: Final = 3  # times that a device's numbers went back and rose again
WITHIN_S: Final = 600.0
SEEN: Final = 8  # numbers remembered, since a broker delivers again what was not acknowledged
CLONED: Final = "cloned"  # the outcome that is counted, with the key


@dataclass(slots=True)
class _Series:
    """The sequence numbers of one key's statuses on this connection."""

    highest: int = 0
    seen: deque[int] = field(default_factory=lambda: deque(maxlen=SEEN))
    has_fallen: bool = False
    falls: deque[float] = field(default_factory=lambda: deque(maxlen=FALLS))  # their times

    def alternates(self, seq: int, now: float) -> bool:
        """Take in a number; whether it is that of a machine which cannot be the one before."""
        if seq in self.seen:
            return False
        self.seen.append(seq)
        if seq > self.highest:
            self.highest, self.has_fallen = seq, False
        elif not self.has_fallen:
            self.has_fallen = True
            self.falls.append(now)
            return len(self.falls) == FALLS and now - self.falls[0] <= WITHIN_S
        return False


@dataclass(slots=True, kw_only=True)
class Clones:
    """Watches the statuses of all devices. What it finds is a hint for the operator; nothing is refused for it."""

    refusals: Refusals
    _series: dict[KeyId, _Series] = field(default_factory=dict)
    _told: set[KeyId] = field(default_factory=set)
    _actions: list[Action] = field(default_factory=list)

    def connected(self) -> None:
        self._series.clear()

    def observe(self, member: Member, status: Status, seq: int, now: float) -> None:
        """Take in an authentic status, in the order of arrival, whether or not it is outdated.

        A last will says nothing: its number is lower than those of its session.
        """
        if not status.online:
            return
        series = self._series.setdefault(member.key, _Series())
        highest = series.highest
        if not series.alternates(seq, now):
            return
        series.falls.clear()
        self.refusals.counters.answer(f"{CLONED}:{member.key.hex()}", now)
        if member.key in self._told:
            return
        self._told.add(member.key)
        text = (
            f"two machines use the key of {member.name}: two sessions of it alternate (now sequence number {seq} after "
            f"{highest}); run `ternbus aggregator revoke DIR {member.name}`, and invite each machine by its own name"
        )
        line = self.refusals.log_limit.write(CLONED, text, now)
        self._actions += [Log(text=line)] if line else []

    def tell(self) -> list[Action]:
        """The log lines since the last call."""
        actions, self._actions = self._actions, []
        return actions
