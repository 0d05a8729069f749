"""Whether the aggregator is online, from the statuses that it signs; a hint, so nothing of it is saved."""

from dataclasses import dataclass

from ternbus.broker.protocol.messages import Status, is_outdated


@dataclass(slots=True)
class Presence:
    """The newest status; ``online`` is None while none has arrived on this connection."""

    online: bool | None = None
    _known: Status | None = None
    _seq: int = -1

    def reconnected(self) -> None:
        """The last connection's status says nothing about now, but what is older than it is still a replay."""
        self.online = None

    def status_arrived(self, status: Status, seq: int) -> bool:
        """Take in a status; whether the aggregator came online by it, again or anew. ProtocolError for a replay."""
        known = self._known
        if known is not None and is_outdated(status, seq, known, self._seq):
            return False
        is_new = known is None or status.session > known.session
        came = status.online and (is_new or not self.online)
        self._known, self._seq = status, seq if is_new else max(seq, self._seq)
        self.online = status.online
        return came
