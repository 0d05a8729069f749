"""Counters of refusals, repeated answers, traffic and statuses, saved in one record a second."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Final

from ternbus.aggregator.core.records import Observed, RefusedUpdates
from ternbus.aggregator.core.registry import Registry

COUNT_S: Final = 1.0  # from a counter's first change until all of them are saved


@dataclass(slots=True)
class Counters:
    """``due`` is when ``take`` should be called, or None while nothing changed."""

    refused: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    due: float | None = None
    _devices: set[str] = field(default_factory=set)
    _claim: tuple[str, int] | None = None
    _refused_updates: dict[str, RefusedUpdates] = field(default_factory=dict)

    def refuse(self, reason: str, now: float, count: int = 1) -> None:
        """Count frames that were dropped."""
        self.refused[reason] += count
        self._wake(now)

    def answer(self, outcome: str, now: float) -> None:
        """Count an answer that no other record stands for."""
        self.outcomes[outcome] += 1
        self._wake(now)

    def refuse_update(self, device: str, outcome: str, now: float, *, after_accepted: bool) -> None:
        """Count an update of a device that was answered `invalid` or `stale`; another outcome is none of these."""
        if outcome not in {"invalid", "stale"}:
            return
        before = self._refused_updates.get(device, RefusedUpdates())
        counts = {outcome: getattr(before, outcome) + 1, "in_a_row": 1 if after_accepted else before.in_a_row + 1}
        self._refused_updates[device] = replace(
            before, **counts, after_accepted=after_accepted or before.after_accepted
        )
        self._wake(now)

    def claim(self, device: str, version: int, now: float) -> None:
        """A device named a version that is newer than the newest."""
        self._claim = (device, version)
        self._wake(now)

    def observe(self, device: str, now: float) -> None:
        """A device's traffic or status changed."""
        self._devices.add(device)
        self._wake(now)

    def _wake(self, now: float) -> None:
        if self.due is None:
            self.due = now + COUNT_S

    def take(self, registry: Registry) -> Observed:
        """Everything since the last call."""
        members = [registry.members[name] for name in sorted(self._devices)]
        record = Observed(
            refused=dict(self.refused),
            outcomes=dict(self.outcomes),
            update_bytes={member.name: member.update_bytes for member in members},
            claim=self._claim,
            refused_updates=dict(self._refused_updates),
            statuses={member.name: member.status for member in members if member.status is not None},
        )
        for member in members:
            member.update_bytes = 0
        self.refused.clear()
        self.outcomes.clear()
        self._devices.clear()
        self._claim = None
        self._refused_updates.clear()
        self.due = None
        return record
