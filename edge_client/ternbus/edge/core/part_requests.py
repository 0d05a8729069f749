"""Asking the broker for retained parts by name: at most so many topics at once, each until it has come."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from ternbus.edge.core.actions import LinkAction, Subscribe, Unsubscribe

AT_ONCE: Final = 40
PATIENCE_S: Final = 30.0


@dataclass(slots=True)
class PartRequests:
    """Topics that are wanted, in order. Whether there is a connection it knows from being told."""

    connected: bool = False
    _waiting: dict[str, None] = field(default_factory=dict)  # wanted, not subscribed to yet
    _asked: dict[str, float] = field(default_factory=dict)  # subscribed to, and when
    _left: list[str] = field(default_factory=list)  # subscribed to in a session that was cut, wanted no more
    _last_came_s: float = 0.0

    def __bool__(self) -> bool:
        return bool(self._waiting or self._asked)

    def __contains__(self, topic: str) -> bool:
        return topic in self._waiting or topic in self._asked

    def want(self, topics: Iterable[str], now: float) -> list[LinkAction]:
        """Ask for these too; what is asked for already is not asked for twice."""
        self._waiting.update((topic, None) for topic in topics if topic not in self._asked)
        return self._ask(now)

    def came(self, topic: str, now: float) -> list[LinkAction]:
        """A wanted part is here: no more of this topic, and the next one."""
        self._waiting.pop(topic, None)
        self._last_came_s = now
        if self._asked.pop(topic, None) is None:
            return []
        return [Unsubscribe(filters=(topic,)), *self._ask(now)]

    def drop(self) -> list[LinkAction]:
        """Want nothing any more."""
        asked = tuple(self._asked)
        self._waiting.clear()
        self._asked.clear()
        if not self.connected:
            self._left.extend(asked)
        return [Unsubscribe(filters=asked)] if asked and self.connected else []

    def reconnected(self, now: float) -> list[LinkAction]:
        """A new connection: ask anew, since a resumed session delivers nothing that is retained."""
        self.connected = True
        self._waiting = dict.fromkeys((*self._asked, *self._waiting))
        self._asked.clear()
        left, self._left = tuple(topic for topic in self._left if topic not in self._waiting), []
        return [*([Unsubscribe(filters=left)] if left else []), *self._ask(now)]

    def due_s(self) -> float | None:
        """When to give up waiting: so long after the last one was asked for, or came."""
        if not (self.connected and self._asked):
            return None
        return max(self._last_came_s, *self._asked.values()) + PATIENCE_S

    def _ask(self, now: float) -> list[LinkAction]:
        if not self.connected:
            return []
        filters = tuple(self._waiting)[: AT_ONCE - len(self._asked)]
        for topic in filters:
            del self._waiting[topic]
            self._asked[topic] = now
        return [Subscribe(filters=filters)] if filters else []
