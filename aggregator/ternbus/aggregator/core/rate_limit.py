"""Rate limits: token buckets for peers, and a limit on the log lines for one reason."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

BURST_S: Final = 2.0  # so many seconds' worth may come at once
MINUTE_S: Final = 60.0


@dataclass(slots=True)
class TokenBucket:
    """A token bucket, full when it is first asked."""

    tokens: float = 0.0
    at: float = -math.inf

    @property
    def is_empty(self) -> bool:
        """Whether the last ``take`` left less than one."""
        return self.tokens < 1 and self.at > -math.inf

    def take(self, now: float, per_s: float, burst: float) -> bool:
        """Whether one more is within ``per_s`` a second, and ``burst`` at once."""
        self.tokens = min(burst, self.tokens + (now - self.at) * per_s)
        self.at = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


@dataclass(slots=True)
class LogLimit:
    """Which log lines are written: ``per_minute`` about each reason, of which there are few; the rest is counted."""

    per_minute: int
    _buckets: dict[str, TokenBucket] = field(default_factory=dict)
    _left_out: Counter[str] = field(default_factory=Counter)

    def write(self, reason: str, text: str, now: float) -> str:
        """The line, with how many like it were left out before; empty where it is left out, too."""
        bucket = self._buckets.setdefault(reason, TokenBucket())
        if not bucket.take(now, self.per_minute / MINUTE_S, self.per_minute):
            self._left_out[reason] += 1
            return ""
        left_out = self._left_out.pop(reason, 0)
        return f"{text} (and {left_out} more like it)" if left_out else text
