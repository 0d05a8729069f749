"""The trigger of a merge: when the updates in the buffer become a version.

A merge is due ``max_wait_s`` after the buffer's first update. It is due earlier, but at least ``min_interval_s`` after
the last merge, in two cases: the buffer is full (FedBuff, Nguyen et al. 2022), or no update is expected from any
device that is online. No update is expected from a device whose status says that its work fails, nor from one that has
been silent for several times its usual time between updates (``pace``). A further rule is a further line in ``is_due``;
if it depends on time, ``due_s`` returns the moment.

A buffer with updates of fewer than ``min_devices`` devices is never merged, not even at a stop or a close
(``may_merge``). A broker can forge who is online. That can delay a merge, and cannot cause one below that number.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Final

from ternbus.aggregator.core.registry import Member
from ternbus.aggregator.merge.accepted import AcceptedUpdate
from ternbus.aggregator.settings import MergeSettings

RETAINED_S: Final = 5.0  # how long a broker has, after a subscribe, to deliver what it retains

Buffer = Sequence[AcceptedUpdate]
Online = Mapping[str, Member]  # the devices that are online, by name


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeTrigger:
    """All that the rule remembers: four moments, in seconds of the ``now`` that its methods are given."""

    settings: MergeSettings
    min_interval_s: float = 0.0
    min_devices: int = 1  # distinct ones, of which the buffer must hold updates
    merge_by: float = math.inf  # the longest wait of the buffer's first update ends
    not_before: float = -math.inf  # the shortest interval after the last merge ends
    statuses_by: float = -math.inf  # the broker has delivered every device's status
    listening_since: float = math.inf  # no silence of before says anything; infinite without a connection

    def connected(self, now: float) -> "MergeTrigger":
        """After a connect, who is online is not known before the broker has delivered all statuses."""
        return replace(self, statuses_by=now + RETAINED_S, listening_since=now)

    def disconnected(self) -> "MergeTrigger":
        """Nobody can be heard."""
        return replace(self, listening_since=math.inf)

    def first_accepted(self, now: float) -> "MergeTrigger":
        """An update was put into the empty buffer."""
        return replace(self, merge_by=now + self.settings.max_wait_s)

    def merged(self, now: float) -> "MergeTrigger":
        return replace(self, merge_by=math.inf, not_before=now + self.min_interval_s)

    def due_s(self, buffer: Buffer, online: Online, now: float) -> float | None:
        """When ``is_due`` has to be asked again, if nothing happens before; None where time alone changes nothing."""
        if not self.may_merge(buffer):
            return self.merge_by if buffer and self.merge_by > now else None  # from then on it is ``held``
        awaited = self._awaited(buffer, online, now)
        silent_at = math.inf if awaited is None else self.silent_at(awaited)
        moments = (self.not_before, self.statuses_by, silent_at)
        return min([self.merge_by, *(moment for moment in moments if moment > now)])

    def is_due(self, buffer: Buffer, online: Online, now: float) -> bool:
        """Whether the buffer is to be merged now."""
        if not self.may_merge(buffer):
            return False
        if self.merge_by <= now:
            return True
        return self.not_before <= now and (
            len(buffer) >= self.settings.buffer_size or self._all_contributed(buffer, online, now)
        )

    def may_merge(self, buffer: Buffer) -> bool:
        """Whether the buffer holds updates of enough devices, for whatever reason it is to be merged."""
        devices: set[str] = set()
        for update in buffer:
            devices.add(update.device)
            if len(devices) >= self.min_devices:
                return True
        return False

    def held(self, buffer: Buffer, now: float) -> bool:
        """Whether the longest wait is over, and too few devices have contributed."""
        return bool(buffer) and self.merge_by <= now and not self.may_merge(buffer)

    def _all_contributed(self, buffer: Buffer, online: Online, now: float) -> bool:
        """Whether every device online that may still send an update has one in the buffer, and there is one."""
        if now < self.statuses_by:
            return False
        contributors = {update.device for update in buffer}
        return not contributors.isdisjoint(online) and self.awaited(contributors, online, now) is None

    def _awaited(self, buffer: Buffer, online: Online, now: float) -> Member | None:
        """The first device online that trains, is not in the buffer and has not been silent for too long."""
        return self.awaited({update.device for update in buffer}, online, now)

    def awaited(self, contributors: Set[str], online: Online, now: float) -> Member | None:
        """The first device online, but for ``contributors``, that trains and has not been silent for too long."""
        for name, member in online.items():
            if name not in contributors and self.is_expected(member, now):
                return member
        return None

    def is_expected(self, member: Member, now: float) -> bool:
        """Whether a device online trains, and has not been silent for too long."""
        return member.contributes and now < self.silent_at(member)

    def silent_at(self, member: Member) -> float:
        """When a device's silence says that it sends nothing, if it stays silent."""
        return max(member.pace.heard_at, self.listening_since) + member.pace.patience_s
