"""The aggregator's presence, from its signed statuses; a hint only, so it is not saved."""

from dataclasses import dataclass

from ternbus.broker.protocol.messages import Status, is_outdated


@dataclass(slots=True)
class Presence:
    """``online`` is None until a status arrives on this connection."""

    online: bool | None = None
    _known: Status | None = None
    _seq: int = -1

    def reconnected(self) -> None:
        """Forget whether the aggregator is online, but keep the last status: an older one is still a replay."""
        self.online = None

    def status_arrived(self, status: Status, seq: int) -> bool:
        """Handle a status. Returns whether it says something new. Raises `ProtocolError` for a replay."""
        known = self._known
        if known is not None and is_outdated(status, seq, known, self._seq):
            return False
        is_new = known is None or status.session > known.session
        is_news = is_new or status.online != self.online
        self._known, self._seq = status, seq if is_new else max(seq, self._seq)
        self.online = status.online
        return is_news
