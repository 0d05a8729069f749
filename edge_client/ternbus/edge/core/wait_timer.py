"""Waiting for others: for whom, since when, when to say so, and when to give up."""

from dataclasses import dataclass
from typing import Final

FIRST_S: Final = 3.0  # a start takes so long anyway
AGAIN_S: Final = 10.0


@dataclass(slots=True, kw_only=True)
class WaitTimer:
    """How long the same thing has been waited for."""

    timeout_s: float | None = None
    whom: str | None = None
    _since_s: float = 0.0
    _say_s: float = 0.0

    def look(self, whom: str | None, now: float) -> None:
        """Whom we wait for now; None if for nobody."""
        if self.whom is None and whom is not None:
            self._since_s = now
        if whom != self.whom:
            self._say_s = now + FIRST_S
        self.whom = whom

    def to_say(self, now: float) -> bool:
        """Whether it is time to say for whom."""
        if self.whom is None or now < self._say_s:
            return False
        self._say_s = now + AGAIN_S
        return True

    def is_over(self, now: float) -> bool:
        """Whether it has taken too long."""
        return self.whom is not None and self.timeout_s is not None and now >= self._since_s + self.timeout_s

    def waited_s(self, now: float) -> float:
        return now - self._since_s

    def due_s(self) -> float | None:
        if self.whom is None:
            return None
        return self._say_s if self.timeout_s is None else min(self._say_s, self._since_s + self.timeout_s)
