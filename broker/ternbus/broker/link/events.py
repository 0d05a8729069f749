"""The events of an MQTT connection, as values."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """The handle to acknowledge a received message; void on a later connection."""

    connection: int
    mid: int
    size_bytes: int = 0  # of the message; its acknowledgement frees as much of the backlog


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """The broker accepted the connection: MQTT 5 (``protocol`` 5) or 3.1.1 (4).

    ``frame_bytes`` is the largest frame to send, ``most_bytes`` the largest that the broker takes.
    """

    session_present: bool
    protocol: int
    frame_bytes: int
    most_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnected:
    """The connection has ended without a call of ``disconnect``; it delivers no further events."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """A message has arrived. After a reconnect the broker delivers it again, unless its token was acknowledged.

    A message of QoS 0 (``qos``) is delivered at most once. Its token is acknowledged too, to free its room.
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
    """The broker has refused a publication. With MQTT 3.1.1 it acknowledges a refused publication instead."""

    ticket: int
    reason: str


LinkEvent = Connected | Disconnected | Arrived | Published | Refused
