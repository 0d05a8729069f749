"""Sampling of logs that peers can cause, so that they cannot fill the log."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from ternbus.broker.errors import ProtocolError
from ternbus.edge.core.actions import Action, Log

LINES: Final = 60  # of each repeatable event in `WINDOW_S`
WINDOW_S: Final = 60.0
# What a broker causes as often as it likes, with a head, a receipt or a part that it repeats.
REPEATABLE: Final = frozenset({"bad-plan", "busy", "resting", "resync", "snapshot", "snapshot-failed"})


@dataclass(slots=True)
class LogSampler:
    """Counts of each reason."""

    counts: Counter[str] = field(default_factory=Counter)
    _begun_s: float = 0.0  # the window
    _seen: Counter[str] = field(default_factory=Counter)  # repeatable events in the window

    def log(self, event: str, reason: str, text: str, fields: Mapping[str, object]) -> list[Log]:
        """Count a reason. Returns a `Log` if the count is a power of ten."""
        self.counts[reason] += 1
        count = self.counts[reason]
        if str(count).strip("0") != "1":
            return []
        return [Log(event=event, text=f"{text} ({count} so far)", fields={"reason": reason, **fields, "count": count})]

    def dropped(self, error: ProtocolError) -> list[Log]:
        """Count a message that is dropped."""
        return self.log("dropped", error.reason, f"dropped a message: {error}", {"detail": error.detail})

    def limit(self, actions: Iterable[Action], now: float) -> list[Action]:
        """The actions without the logs of a repeatable event beyond `LINES` in a window; the last one says so."""
        if now >= self._begun_s + WINDOW_S:
            self._begun_s = now
            self._seen.clear()
        return [kept for action in actions if (kept := self._limited(action)) is not None]

    def _limited(self, action: Action) -> Action | None:
        if not isinstance(action, Log) or action.event not in REPEATABLE:
            return action
        self._seen[action.event] += 1
        if self._seen[action.event] < LINES:
            return action
        text = f"{action.text} (more of this is not logged for up to {WINDOW_S:.0f} s)"
        return replace(action, text=text) if self._seen[action.event] == LINES else None
