"""What a link reports of its connection, as values."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """What an arrived message is acknowledged with; on a later connection it is worth nothing."""

    connection: int
    mid: int


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
    """A message; after a reconnect the broker delivers it again unless its token was acknowledged."""

    topic: str
    payload: bytes
    retained: bool
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
