"""Whether the aggregator is there, from the statuses that it signs; a hint, so nothing of it is kept on disk."""

from dataclasses import dataclass

from ternbus.broker.protocol.messages import Status, is_outdated


@dataclass(slots=True)
class Presence:
    """The newest status that was heard; ``online`` is None while none was heard on this connection."""

    online: bool | None = None
    _known: Status | None = None
    _seq: int = -1

    def reconnected(self) -> None:
        """What was true on another connection is not known to be true now; old statuses stay old."""
        self.online = None

    def heard(self, status: Status, seq: int) -> bool:
        """Take in a status; whether it says that the aggregator has come (or come back). ProtocolError for a replay."""
        known = self._known
        if known is not None and is_outdated(status, seq, known, self._seq):
            return False
        is_new = known is None or status.session > known.session
        came = status.online and (is_new or not self.online)
        self._known, self._seq = status, seq if is_new else max(seq, self._seq)
        self.online = status.online
        return came
