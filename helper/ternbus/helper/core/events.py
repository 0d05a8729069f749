"""The events of a helper's state machine, its only inputs, named in the past tense."""

from dataclasses import dataclass

from ternbus.broker.protocol.frame import Frame


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The process began, and its state was read from the disk; ``unix_s`` is the time of day."""

    unix_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """The broker accepted the connection; ``frame_bytes`` is the largest frame that it accepts."""

    frame_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectFailed:
    """The broker did not answer, or refused the connection."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnected:
    """The connection was lost."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameArrived:
    """A payload with the form of a frame arrived; its sender is not verified yet."""

    topic: str
    frame: Frame


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameMalformed:
    """A payload that is not a frame arrived; ``reason`` is that of the `ProtocolError`."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The broker refused one frame of the message ``seq``."""

    seq: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeReached:
    """The time of `Core.due_s` was reached; ``unix_s`` is the time of day."""

    unix_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequested:
    """The process was asked to end, for example by a signal."""

    reason: str


Event = (
    Started
    | Connected
    | ConnectFailed
    | Disconnected
    | FrameArrived
    | FrameMalformed
    | Refused
    | TimeReached
    | StopRequested
)
