"""Requests for retained parts: a subscription for each part until it arrives, a bounded number at a time."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from ternbus.edge.core.actions import LinkAction, Subscribe, Unsubscribe

SUBSCRIBED_MAX: Final = 40
TIMEOUT_S: Final = 30.0


@dataclass(slots=True)
class PartRequests:
    """The requested topics, in order. The caller sets ``connected`` and calls `reconnected`."""

    connected: bool = False
    _queued: dict[str, None] = field(default_factory=dict)  # not subscribed to yet
    _subscribed: dict[str, float] = field(default_factory=dict)  # topic -> time of the subscription
    _abandoned: list[str] = field(default_factory=list)  # cancelled while there was no connection to unsubscribe on
    _last_arrival_s: float = 0.0

    def __len__(self) -> int:
        return len(self._queued) + len(self._subscribed)

    def __contains__(self, topic: str) -> bool:
        return topic in self._queued or topic in self._subscribed

    def request(self, topics: Iterable[str], now: float) -> list[LinkAction]:
        """Request these topics too; each is subscribed to once."""
        self._queued.update((topic, None) for topic in topics if topic not in self._subscribed)
        return self._subscribe_next(now)

    def arrived(self, topic: str, now: float) -> list[LinkAction]:
        """Unsubscribe from the topic of a part that arrived, and subscribe to the next."""
        self._queued.pop(topic, None)
        self._last_arrival_s = now
        if self._subscribed.pop(topic, None) is None:
            return []
        return [Unsubscribe(filters=(topic,)), *self._subscribe_next(now)]

    def cancel(self) -> list[LinkAction]:
        """Cancel every request."""
        subscribed = tuple(self._subscribed)
        self._queued.clear()
        self._subscribed.clear()
        if not self.connected:
            self._abandoned.extend(subscribed)
        return [Unsubscribe(filters=subscribed)] if subscribed and self.connected else []

    def reconnected(self, now: float) -> list[LinkAction]:
        """Subscribe again, since a resumed session does not deliver retained messages."""
        self.connected = True
        self._queued = dict.fromkeys((*self._subscribed, *self._queued))
        self._subscribed.clear()
        abandoned, self._abandoned = tuple(topic for topic in self._abandoned if topic not in self._queued), []
        return [*([Unsubscribe(filters=abandoned)] if abandoned else []), *self._subscribe_next(now)]

    def due_s(self) -> float | None:
        """The time of the timeout: `TIMEOUT_S` after the last subscription or arrival."""
        if not (self.connected and self._subscribed):
            return None
        return max(self._last_arrival_s, *self._subscribed.values()) + TIMEOUT_S

    def _subscribe_next(self, now: float) -> list[LinkAction]:
        if not self.connected:
            return []
        filters = tuple(islice(self._queued, SUBSCRIBED_MAX - len(self._subscribed)))
        for topic in filters:
            del self._queued[topic]
            self._subscribed[topic] = now
        return [Subscribe(filters=filters)] if filters else []
