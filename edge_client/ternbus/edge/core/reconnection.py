"""When to connect again, and what the log says of connections that end."""

from dataclasses import dataclass, field

from ternbus.broker.backoff import Reconnect, contested
from ternbus.edge.core.actions import Log


@dataclass(slots=True, kw_only=True)
class Reconnection:
    """The time of the next attempt, and ``reason``, why there is no connection."""

    device: str
    salt: str
    reason: str = ""
    _attempts: Reconnect = field(init=False)

    def __post_init__(self) -> None:
        self._attempts = Reconnect(salt=self.salt)

    @property
    def due_s(self) -> float:
        return self._attempts.due_s

    def connected(self, now: float) -> None:
        self.reason = ""
        self._attempts.connected(now)

    def failed(self, reason: str, now: float) -> list[Log]:
        """An attempt failed, or a connection ended. The same reason is logged once in a row."""
        known, self.reason = self.reason == reason, reason
        logs = [] if known else [Log(event="disconnected", text=reason, fields={"reason": reason})]
        if self._attempts.failed(now):
            logs.append(Log(event="contested", text=contested(self.device), fields={"client_id": self.device}))
        return logs
