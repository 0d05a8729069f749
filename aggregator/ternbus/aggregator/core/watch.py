"""The state of the core that the status shows: its connection, and the devices that the next version waits for."""

from collections.abc import Set
from dataclasses import dataclass
from itertools import islice

from ternbus.aggregator.core.events import CountsRequested, Save
from ternbus.aggregator.core.merge_trigger import MergeTrigger, Online
from ternbus.aggregator.core.records import SituationTold
from ternbus.aggregator.core.registry import Registry
from ternbus.aggregator.core.retained import Retained
from ternbus.aggregator.core.situation import NAMED_MAX, Situation, Waiting


def waiting(
    trigger: MergeTrigger, contributors: Set[str], online: Online, now: float, *, since: float | None
) -> Waiting:
    """Who of the devices ``online`` is waited for; ``contributors`` have sent what the next version needs of them.

    ``since`` is when the wait began; None: not yet.
    """
    awaited: list[str] = []
    silent: dict[str, float] = {}
    for name, member in online.items():
        if name in contributors or not member.contributes:
            continue
        if trigger.is_expected(member, now):
            awaited.append(name)
        else:
            silent[name] = now - max(member.pace.heard_at, trigger.listening_since)
    return Waiting(
        devices=tuple(sorted(awaited)[:NAMED_MAX]),
        count=len(awaited),
        silent=dict(islice(sorted(silent.items()), NAMED_MAX)),
        for_s=0.0 if since is None else now - since,
    )


@dataclass(slots=True)
class Watch:
    """Remembers since when there is a connection, or none, and why."""

    registry: Registry
    retained: Retained
    started_at: float = 0.0
    _connected_at: float | None = None
    _lost_at: float = 0.0
    _fault: str = "not connected yet"

    def started(self, now: float) -> None:
        self.started_at = self._lost_at = now

    def connected(self, now: float) -> None:
        self._connected_at, self._fault = now, ""

    def disconnected(self, reason: str, now: float) -> None:
        """A connection is lost, or could not be made."""
        if self._connected_at is not None:
            self._lost_at, self._connected_at = now, None
        self._fault = reason or self._fault

    def told(self, waiting: Waiting, asked: CountsRequested, now: float) -> Save:
        """The record of the situation now; what was ``asked`` brings what the shell knows of it."""
        connected = self._connected_at
        found = Situation(
            running_s=now - self.started_at,
            connected_s=None if connected is None else now - connected,
            lost_s=now - self._lost_at if connected is None else None,
            fault=self._fault,
            unacknowledged_s=asked.unacknowledged_s,
            withheld=self.retained.withheld,
            waiting=waiting,
            losses={name: each.loss for name, each in self.registry.members.items() if each.loss is not None},
        )
        return Save(record=SituationTold(situation=found))
