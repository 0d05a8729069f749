"""Sampling of logs that peers can cause: the 1st, 10th, 100th of each reason, so that they cannot fill the log."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from ternbus.edge.core.actions import Log


@dataclass(slots=True)
class LogSampler:
    """Counts of each reason."""

    counts: Counter[str] = field(default_factory=Counter)

    def log(self, event: str, reason: str, text: str, fields: Mapping[str, object]) -> list[Log]:
        """Count a reason. Returns a `Log` if the count is a power of ten."""
        self.counts[reason] += 1
        count = self.counts[reason]
        if str(count).strip("0") != "1":
            return []
        return [Log(event=event, text=f"{text} ({count} so far)", fields={"reason": reason, **fields, "count": count})]
