"""The kinds of message as values, with conversions to and from ``meta`` maps.

``meta`` returns the map for a frame; ``from_meta`` checks a received map and raises ProtocolError for invalid fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Self

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import meta_fields
from ternbus.broker.protocol.direction import Direction
from ternbus.broker.protocol.frame import PARTS_MAX
from ternbus.broker.protocol.identity import KeyId

GRANT_RANGES_MAX: Final = 500
SAMPLES_MAX: Final = 2**32 - 1
PRIVATE: Final = "private"  # in place of a codec: the body has masked words, not a block
BOXES_MAX: Final = 8
BOX_BYTES_MAX: Final = 1024
RESTORE_LEAP: Final = 2**32  # restored from a backup, an aggregator adds a multiple of it to version, seq, session

OPEN, PAUSED, CLOSED = "open", "paused", "closed"
STATES: Final = (OPEN, PAUSED, CLOSED)
OUTCOMES: Final = ("accepted", "stale", "duplicate", "invalid", "busy", "revoked", "enrolled", "refused", "unknown")
DEVICE_STATES: Final = ("idle", "training", "offline")
AGGREGATOR_STATES: Final = ("online", "offline")
FAILING_BYTES_MAX: Final = 200
REASON_CHARS: Final = 1000  # that are read of a receipt's reason
SOFTWARE_CHARS: Final = 100  # likewise of a status' software
SPLITS: Final = ("test", "local")
CLASSES_MAX: Final = 256  # in a message of metrics
ARMS_MAX: Final = 16  # of a search


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """The change of the vector by local training on version ``base``; the body is a block."""

    KIND: ClassVar[str] = "update"
    base: int
    samples: int
    codec: str
    encoding: str
    sealed: bool
    metrics: Mapping[str, float] = field(default_factory=dict)
    # Of private updates only, and only then in the map: see docs/protocol.md, section 16.
    context: bytes = b""
    min: int = 0  # devices in the sum, by the device's owner
    boxes: tuple[bytes, ...] = field(default=(), repr=False)  # one for each helper, in the order of the terms
    arm: int | None = None  # of a search, and only then in the map

    @property
    def is_private(self) -> bool:
        return bool(self.context)

    def meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "base": self.base,
            "samples": self.samples,
            "codec": self.codec,
            "encoding": self.encoding,
            "sealed": self.sealed,
            "metrics": dict(self.metrics),
        }
        if self.is_private:
            meta |= {"context": self.context, "min": self.min, "boxes": list(self.boxes)}
        return meta | ({} if self.arm is None else {"arm": self.arm})

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Self:
        return cls(
            base=meta_fields.counter(meta, "base"),
            samples=meta_fields.integer(meta, "samples", 1, SAMPLES_MAX),
            codec=meta_fields.text(meta, "codec"),
            encoding=meta_fields.text(meta, "encoding"),
            sealed=meta_fields.boolean(meta, "sealed"),
            metrics=meta_fields.numbers(meta, "metrics"),
            arm=meta_fields.integer(meta, "arm", 0, ARMS_MAX - 1) if "arm" in meta else None,
            **(_private(meta) if meta["codec"] == PRIVATE else {}),
        )


def _private(meta: Mapping[str, Any]) -> dict[str, Any]:
    boxes = meta_fields.get(meta, "boxes")
    if not isinstance(boxes, list) or not 1 <= len(boxes) <= BOXES_MAX:
        raise ProtocolError("bad-meta", f"'boxes' is not 1 to {BOXES_MAX} boxes")
    if not all(isinstance(box, bytes) and len(box) <= BOX_BYTES_MAX for box in boxes):
        raise ProtocolError("bad-meta", f"a box is not at most {BOX_BYTES_MAX} bytes")
    return {
        "context": meta_fields.binary(meta, "context", 32),
        "min": meta_fields.integer(meta, "min", 2, SAMPLES_MAX),
        "boxes": tuple(boxes),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """The announcement of an update of ``parts`` parts, with the seq of the update."""

    KIND: ClassVar[str] = "offer"
    base: int
    parts: int

    def meta(self) -> dict[str, Any]:
        return {"base": self.base, "parts": self.parts}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Self:
        return cls(base=meta_fields.counter(meta, "base"), parts=meta_fields.integer(meta, "parts", 1, PARTS_MAX))


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The parts of an offered update that the device should send, as ranges [first, last]."""

    KIND: ClassVar[str] = "grant"
    device: str
    device_key: KeyId
    seq: int
    parts: tuple[tuple[int, int], ...]
    deadline_s: float

    def meta(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "device_key": bytes(self.device_key),
            "seq": self.seq,
            "parts": [list(pair) for pair in self.parts],
            "deadline_s": self.deadline_s,
        }

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Self:
        rows = meta_fields.get(meta, "parts")
        if not isinstance(rows, list) or len(rows) > GRANT_RANGES_MAX:
            raise ProtocolError("bad-meta", f"'parts' is not an array of at most {GRANT_RANGES_MAX} ranges")
        return cls(
            device=meta_fields.device(meta),
            device_key=KeyId(meta_fields.binary(meta, "device_key", 8)),
            seq=meta_fields.counter(meta, "seq"),
            parts=tuple(meta_fields.part_range(row) for row in rows),
            deadline_s=meta_fields.number(meta, "deadline_s", 0.0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """The aggregator's signed outcome of an update or an enroll message."""

    KIND: ClassVar[str] = "receipt"
    device: str
    device_key: KeyId
    seq: int
    outcome: str
    version: int
    reason: str = ""
    retry_after_s: float = 0.0
    highest_seq: int = 0

    def meta(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "device_key": bytes(self.device_key),
            "seq": self.seq,
            "outcome": self.outcome,
            "version": self.version,
            "reason": self.reason,
            "retry_after_s": self.retry_after_s,
            "highest_seq": self.highest_seq,
        }

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Self:
        return cls(
            device=meta_fields.device(meta),
            device_key=KeyId(meta_fields.binary(meta, "device_key", 8)),
            seq=meta_fields.counter(meta, "seq"),
            outcome=meta_fields.one_of(meta, "outcome", OUTCOMES),
            version=meta_fields.counter(meta, "version"),
            reason=meta_fields.shown(meta, "reason", REASON_CHARS) if "reason" in meta else "",
            retry_after_s=meta_fields.number(meta, "retry_after_s", 0.0) if "retry_after_s" in meta else 0.0,
            highest_seq=meta_fields.counter(meta, "highest_seq") if "highest_seq" in meta else 0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The state of a device or the aggregator, for display and scheduling only; in a last will ``offline``."""

    KIND: ClassVar[str] = "status"
    state: str
    session: int
    base: int = -1
    software: str = ""
    failing: str = ""  # why the device's work fails; empty, and then not in the map, if it does not
    count: int = -1  # of a helper: steps that it has written down; not in the map of others

    @property
    def online(self) -> bool:
        return self.state != "offline"

    def meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = {"state": self.state, "session": self.session, "base": self.base}
        meta |= {"software": self.software} | ({"failing": self.failing} if self.failing else {})
        return meta | ({"count": self.count} if self.count >= 0 else {})

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Self:
        return cls(
            state=meta_fields.one_of(meta, "state", (*DEVICE_STATES, *AGGREGATOR_STATES)),
            session=meta_fields.counter(meta, "session"),
            base=meta_fields.counter(meta, "base", -1),
            software=meta_fields.shown(meta, "software", SOFTWARE_CHARS),
            failing=meta_fields.line(meta, "failing", FAILING_BYTES_MAX) if "failing" in meta else "",
            count=meta_fields.counter(meta, "count") if "count" in meta else -1,
        )


def is_outdated(status: Status, seq: int, known: Status, known_seq: int) -> bool:
    """Whether a status is older than a ``known`` status of the same sender (docs/protocol.md, section 11.9).

    ``offline`` is the last status of a session, whatever its seq, because a last will gets its seq before the session
    begins. The other statuses of a session are ordered by seq. ProtocolError for an earlier session: a replay.
    """
    if status.session < known.session:
        raise ProtocolError("old-session", f"session {status.session} ended: session {known.session} has begun")
    if status.session > known.session or not status.online:
        return False
    return not known.online or seq < known_seq


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """The results of an evaluation of a version. What may be empty beside `values` is then not in the map."""

    KIND: ClassVar[str] = "metrics"
    version: int
    samples: int
    split: str
    values: Mapping[str, float]
    better: Mapping[str, Direction] = field(default_factory=dict)  # directions of values, by name
    classes: Mapping[str, int] = field(default_factory=dict)  # samples that the device trains on, by class
    candidate: bytes = b""  # digest of the version's vector, if it is not published yet

    def meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = {"version": self.version, "samples": self.samples, "split": self.split}
        meta |= {"values": dict(self.values)} | ({"better": dict(self.better)} if self.better else {})
        meta |= {"classes": dict(self.classes)} if self.classes else {}
        return meta | ({"candidate": self.candidate} if self.candidate else {})

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Self:
        values = meta_fields.numbers(meta, "values")
        return cls(
            version=meta_fields.counter(meta, "version"),
            samples=meta_fields.integer(meta, "samples", 0, SAMPLES_MAX),
            split=meta_fields.one_of(meta, "split", SPLITS),
            values=values,
            better=meta_fields.directions(meta, "better", values) if "better" in meta else {},
            classes=meta_fields.counts(meta, "classes", CLASSES_MAX, SAMPLES_MAX) if "classes" in meta else {},
            candidate=meta_fields.binary(meta, "candidate", 32) if "candidate" in meta else b"",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Enroll:
    """The public key of a device; the body proves that the sender has the invitation's code."""

    KIND: ClassVar[str] = "enroll"
    public_key: bytes

    def meta(self) -> dict[str, Any]:
        return {"public_key": self.public_key}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Self:
        return cls(public_key=meta_fields.binary(meta, "public_key", 32))
