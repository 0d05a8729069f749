"""The costly part of the first look at a frame, signature and digest, done ahead in another thread.

It decides nothing: a frame that does not pass reaches the core unopened, which finds out why in the protocol's order.
"""

from dataclasses import dataclass
from typing import Final

from aggregator.registry import Registry
from broker.errors import ProtocolError
from broker.frame import Frame, parse

WORTHWHILE_BYTES: Final = 4096  # below it handing over costs more than it saves


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A frame that is authentic under this public key; whether the key may still sign is the core's question."""

    frame: Frame
    public: bytes


def open_ahead(registry: Registry, payload: bytes) -> Opened | None:
    """Parse, and check signature and digest under the sender's present key; None where anything is amiss."""
    try:
        frame = parse(payload)
        member = registry.members.get(frame.sender)
        if member is None or member.revoked or member.is_flooding:
            return None
        frame.check_authentic(member.public)
    except ProtocolError:
        return None
    return Opened(frame=frame, public=member.public)
