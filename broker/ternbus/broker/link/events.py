"""What a link reports of its connection, as values."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """What an arrived message is acknowledged with; on a later connection it is worth nothing."""

    connection: int
    mid: int
    size_bytes: int = 0  # of the message: room that its acknowledgement frees


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """The broker has let us in, speaks MQTT 5 (``protocol`` 5) or 3.1.1 (4), and takes frames of ``frame_bytes``."""

    session_present: bool
    protocol: int
    frame_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnected:
    """The connection has ended without our asking; nothing more of it comes."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """A message; after a reconnect the broker delivers it again unless its token was acknowledged.

    One of QoS 0 (``qos``) comes once, if at all; its token is acknowledged like any other, which frees its room.
    """

    topic: str
    payload: bytes
    retained: bool
    qos: int = 1
    token: Token


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The broker has acknowledged a publication."""

    ticket: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The broker has refused a publication. MQTT 3.1.1 cannot say so, and acknowledges instead."""

    ticket: int
    reason: str


LinkEvent = Connected | Disconnected | Arrived | Published | Refused
