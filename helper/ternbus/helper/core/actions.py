"""The actions of a helper's state machine, its only outputs; the shell performs them in order."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ternbus.helper.core.records import Step
from ternbus.helper.core.state import State


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """Write the state and the step of a set, if there is one, to stable storage in one transaction."""

    state: State
    step: Step | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Connect:
    """Open a connection with this retained last will."""

    will_topic: str
    will_payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscribe:
    """Subscribe to topic filters; the broker then delivers the retained messages."""

    filters: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """Publish one frame of the message ``seq``, with QoS 1."""

    topic: str
    payload: bytes = field(repr=False)
    seq: int
    retain: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Keep facts by name, in place of earlier ones, and count one more of each counter."""

    facts: Mapping[str, str | int | float] = field(default_factory=dict)
    counters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Flush, disconnect, and end the process with this exit code."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """Log: ``event`` and ``fields`` for programs, ``text`` for people."""

    event: str
    text: str
    fields: Mapping[str, object] = field(default_factory=dict)


Action = Save | Connect | Subscribe | Publish | Note | Stop | Log
