"""Detection of cloned devices: two machines that use one key sign lower numbers after higher ones.

Sequence numbers and sessions of a device's statuses increase over connections, restarts and crashes. A device that was
restored from an old copy goes back once; only two machines at the same time go back repeatedly. The order of arrival
proves nothing, since a broker can replay or delay a status. A status that names a version does: it was signed after
that version was made, so also after all that had arrived by then.

Each of two machines soon gets a sequence number above the other's, by the answer to an update, and often before it
begins a training. Their sessions stay apart: each counts up from the time at which its process began.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from ternbus.aggregator.core.events import Action, Log
from ternbus.aggregator.core.refusals import Refusals
from ternbus.aggregator.core.registry import Member
from ternbus.broker.log_levels import WARNING
from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.messages import DEVICE_STATES, Status

FALLS: Final = 3  # times that a device's numbers, or sessions, went back and rose above all before
WITHIN_S: Final = 24 * 3600.0
VERSIONS: Final = 8  # the newest ones at which a number or a session rose are remembered
TRAINING: Final = DEVICE_STATES[1]
CLONED: Final = "cloned"  # the outcome that is counted, with the key


@dataclass(slots=True)
class _Series:
    """The sequence numbers and sessions of one key's statuses."""

    seq: int = 0  # the highest ever
    session: int = 0
    rises: deque[tuple[int, int, int]] = field(default_factory=lambda: deque(maxlen=VERSIONS))
    falls: deque[float] = field(default_factory=lambda: deque(maxlen=FALLS))  # their times

    def alternates(self, seq: int, session: int, base: int, newest: int, now: float) -> bool:
        """Take in a status, signed on version ``base`` where ``newest`` is; whether there are two machines.

        ``rises`` has, of the time since the last fall, the version that was the newest, and the highest number and
        session of the statuses that rose above all by then. A restored device explains one fall; what is replayed after
        it rises above nothing, so it is not in them.
        """
        fell = any(version < base <= newest and (seq < high or session < late) for version, high, late in self.rises)
        if fell:
            self.rises.clear()
            self.falls.append(now)
        if seq > self.seq or session > self.session:
            same = self.rises and self.rises[-1][0] == newest
            _, high, late = self.rises.pop() if same else (newest, 0, 0)
            self.rises.append((newest, max(seq, high), max(session, late)))
            self.seq, self.session = max(seq, self.seq), max(session, self.session)
        return fell and len(self.falls) == FALLS and now - self.falls[0] <= WITHIN_S


@dataclass(slots=True, kw_only=True)
class Clones:
    """Watches the statuses of all devices. What it finds is a hint for the operator; nothing is refused for it."""

    refusals: Refusals
    _series: dict[KeyId, _Series] = field(default_factory=dict)
    _told: set[KeyId] = field(default_factory=set)
    _actions: list[Action] = field(default_factory=list)

    def observe(self, member: Member, status: Status, seq: int, newest: int, now: float) -> None:
        """Take in an authentic status, whether or not it is outdated; ``newest`` is the newest version.

        A last will says nothing: its number is lower than those of its session.
        """
        if not status.online:
            return
        series = self._series.setdefault(member.key, _Series())
        before, base = (series.seq, series.session), status.base if status.state == TRAINING else -1
        if not series.alternates(seq, status.session, base, newest, now):
            return
        series.falls.clear()
        self.refusals.counters.answer(f"{CLONED}:{member.key.hex()}", now)
        if member.key in self._told:
            return
        self._told.add(member.key)
        text = (
            f"two machines use the key of {member.name}: it signs lower sequence numbers or sessions after higher "
            f"ones, again and again (now {seq} in session {status.session}, after {before[0]} and {before[1]}); "
            f"run `ternbus aggregator revoke {self.refusals.directory} {member.name}`, and invite each machine by its "
            "own name"
        )
        line = self.refusals.log_limit.write(CLONED, text, now)
        self._actions += [Log(text=line, level=WARNING, event="cloned", fields={"device": member.name})] if line else []

    def tell(self) -> list[Action]:
        """The log lines since the last call."""
        actions, self._actions = self._actions, []
        return actions
