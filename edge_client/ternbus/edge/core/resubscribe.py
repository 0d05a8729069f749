"""When to ask for status and head once more: a broker's answer to a subscription may lack what it has retained."""

from dataclasses import dataclass
from typing import Final

SOON_S: Final = 10.0
LATER_S: Final = 300.0  # while nothing is missing: a message that was lost has no other way to be noticed


@dataclass(slots=True)
class Resubscribe:
    """What came on this connection, and when it was last asked for."""

    _head: bool = False
    _asked_s: float = 0.0

    def connected(self, now: float) -> None:
        """Everything is asked for at a connect."""
        self._head, self._asked_s = False, now

    def asked(self, now: float) -> None:
        self._asked_s = now

    def head_came(self, now: float) -> None:
        self._head, self._asked_s = True, now

    def due_s(self, status_came: bool) -> float:
        """When to ask again."""
        return self._asked_s + (LATER_S if self._head and status_came else SOON_S)
