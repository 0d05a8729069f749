"""The aggregator's presence, from its signed statuses; a hint only, so it is not saved."""

from dataclasses import dataclass

from ternbus.broker.protocol.messages import Status, is_outdated


@dataclass(slots=True)
class Presence:
    """The newest status; ``online`` is None until a status arrives on this connection."""

    online: bool | None = None
    is_behind: bool = False  # whether its last head on this connection was older than one that this device has seen
    _known: Status | None = None
    _seq: int = -1

    def reconnected(self) -> None:
        """Forget whether the aggregator is online, but keep the last status: an older one is still a replay."""
        self.online, self.is_behind = None, False

    def head_arrived(self, *, is_old: bool) -> bool:
        """Note whether a head was too old to be accepted. Returns whether it is the first such one."""
        is_news = is_old and not self.is_behind
        self.is_behind = is_old
        return is_news

    def status_arrived(self, status: Status, seq: int) -> bool:
        """Handle a status. Returns whether the aggregator came online. Raises `ProtocolError` for a replay."""
        known = self._known
        if known is not None and is_outdated(status, seq, known, self._seq):
            return False
        is_new = known is None or status.session > known.session
        came = status.online and (is_new or not self.online)
        self._known, self._seq = status, seq if is_new else max(seq, self._seq)
        self.online = status.online
        return came
