"""Whether the aggregator is there, from the statuses that it signs; a hint, so nothing of it is kept on disk."""

from dataclasses import dataclass

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.messages import Status


@dataclass(slots=True)
class Presence:
    """The newest status that was heard; ``online`` is None while none was heard on this connection."""

    online: bool | None = None
    _session: int = -1
    _seq: int = -1
    _final: bool = False  # this session's ``offline`` has been heard

    def reconnected(self) -> None:
        """What was true on another connection is not known to be true now; old statuses stay old."""
        self.online = None

    def heard(self, status: Status, seq: int) -> bool:
        """Take in a status; whether it says that the aggregator has come (or come back). ProtocolError for a replay."""
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
