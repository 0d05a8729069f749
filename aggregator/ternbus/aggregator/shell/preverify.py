"""The expensive checks of a frame, ahead of the core in another thread: signature, digest, content of an update.

It decides nothing: a frame that does not pass reaches the core unopened, which finds out why in the protocol's order.
"""

import threading
from dataclasses import dataclass, field, replace
from typing import Final

from ternbus.aggregator.core.events import Opened
from ternbus.aggregator.core.registry import Member, Registry
from ternbus.aggregator.core.validation import Validation, Verdict
from ternbus.aggregator.core.work import LARGE_BODY_BYTES, LARGE_HEADER_BYTES, PATIENCE_S, WorkShares
from ternbus.aggregator.merge.model import Model
from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import header_bytes, parse
from ternbus.broker.protocol.messages import Update
from ternbus.broker.protocol.ternary import content_bytes

WORTHWHILE_BYTES: Final = 4096  # below it handing over costs more than it saves
ROOM_BYTES: Final = 32 * 2**20  # of contents that wait for the core; one that is larger waits alone


@dataclass(slots=True, kw_only=True)
class Preverifier:
    """Opens frames in one thread; another takes what it opened to the core, and says so with ``close``.

    Reading ahead costs what a device may have only a little of, before the core has asked whether it may. So nothing
    is read of an update that its header refuses, and the core charges what is read whatever it answers. At most
    one update of each is read and not closed, none of a device that has had its frames or its receipts: what is read
    ahead is one more than what the core affords. And all that is read and not closed has room in ``room_bytes``.
    For a name that may not write here, or has used its rate of frames, no header is parsed.
    """

    registry: Registry
    validation: Validation
    model: Model  # its version, by which an update is too old or too new; a hint, like all that is asked here
    work: WorkShares
    room_bytes: int = ROOM_BYTES
    _held: dict[str, int] = field(default_factory=dict)  # device -> bytes of what was read ahead
    _held_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self, topic: str, payload: bytes, waited_s: float = 0.0) -> Opened | None:
        """Parse, and check signature and digest under the sender's present key; None where anything is amiss.

        ``waited_s`` is the time since the arrival of the message.
        """
        try:
            address = topics.parse(topic)
            member = self.registry.members.get(address.device or "")
            if member is None or member.revoked or member.is_flooding:
                return None
            owes = waited_s > PATIENCE_S and self.work.may_owe(member.name)
            if owes and (header_bytes(payload) > LARGE_HEADER_BYTES or len(payload) > LARGE_BODY_BYTES):
                return None
            frame = parse(payload)
            topics.check(frame, address)
            frame.check_authentic(member.public)
        except ProtocolError:
            return None
        opened = Opened(frame=frame, public=member.public)
        wants = frame.kind == Update.KIND and frame.parts == 1 and frame.seq > member.answer.seq
        may_read = not member.has_had_receipts and not owes
        return self._read(opened, member) if wants and may_read else opened

    def close(self, opened: Opened | None) -> None:
        """The core has it, or will never see it."""
        if opened is not None and opened.content is not None:
            self._let_go(opened.frame.sender)

    def _read(self, opened: Opened, member: Member) -> Opened:
        """With its content, if that is good and there is room for it."""
        frame = opened.frame
        update = self.validation.judge(member, frame, self.model.version, closed=False)
        if isinstance(update, Verdict):
            return opened
        try:
            size_bytes = content_bytes(self.validation.schema, update.codec)
        except ProtocolError:
            return opened
        if update.sealed or not self._hold(member.name, size_bytes):
            return opened
        try:
            return replace(opened, content=self.validation.measured(update, frame.body), decoded_bytes=size_bytes)
        except ProtocolError:
            self._let_go(member.name)
            return replace(opened, decoded_bytes=size_bytes)

    def _hold(self, device: str, size_bytes: int) -> bool:
        with self._lock:
            if device in self._held or (self._held and self._held_bytes + size_bytes > self.room_bytes):
                return False
            self._held[device] = size_bytes
            self._held_bytes += size_bytes
            return True

    def _let_go(self, device: str) -> None:
        with self._lock:
            self._held_bytes -= self._held.pop(device)
