"""Whether the aggregator is online, from the statuses that it signs; a hint, so nothing of it is saved."""

from dataclasses import dataclass

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.messages import Status


@dataclass(slots=True)
class Presence:
    """The newest status; ``online`` is None while none has arrived on this connection."""

    online: bool | None = None
    _session: int = -1
    _seq: int = -1
    _final: bool = False  # this session's ``offline`` has arrived

    def reconnected(self) -> None:
        """The last connection's status says nothing about now, but what is older than it is still a replay."""
        self.online = None

    def status_arrived(self, status: Status, seq: int) -> bool:
        """Take in a status; whether the aggregator came online by it, again or anew. ProtocolError for a replay."""
        offline = status.state == "offline"
        if status.session < self._session:
            raise ProtocolError("old-session", f"the aggregator has begun session {self._session} since")
        new = status.session > self._session
        if not new and not offline and (self._final or seq < self._seq):
            return False
        came = not offline and (new or not self.online)
        self._session, self._seq = status.session, seq if new else max(seq, self._seq)
        self._final = offline
        self.online = not offline
        return came
