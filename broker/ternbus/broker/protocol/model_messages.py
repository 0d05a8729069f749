"""The kinds of message that publish the model as values: heads, snapshots, deltas and candidates.

As in ``messages``, ``meta`` returns the map for a frame, and ``from_meta`` checks a received map.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import meta_fields
from ternbus.broker.protocol.frame import FRAME_BYTES, FRAME_BYTES_RANGE, PARTS_MAX
from ternbus.broker.protocol.messages import STATES
from ternbus.broker.protocol.parts import parts_max

FRAME_BYTES_KEY: Final = "frame_bytes"


def _frame_bytes(meta: Mapping[str, Any]) -> int:
    if FRAME_BYTES_KEY not in meta:
        return 0
    return meta_fields.integer(meta, FRAME_BYTES_KEY, FRAME_BYTES, FRAME_BYTES_RANGE[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotRef:
    """The snapshot that a head refers to; in frames the array ``[version, parts, bytes, place]``."""

    version: int
    parts: int
    content_bytes: int
    place: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The newest version of the model, and the parameters for following and training."""

    KIND: ClassVar[str] = "head"
    version: int
    digest: bytes
    schema: bytes
    snapshot: SnapshotRef
    slots: int
    max_staleness: int
    direct_parts: int
    state: str
    plan: Mapping[str, Any]
    frame_bytes: int = 0  # of frames that devices may send; 0, and then not in the map, if none above 120 KiB

    def meta(self) -> dict[str, Any]:
        named = self.snapshot
        meta = {
            "version": self.version,
            "digest": self.digest,
            "schema": self.schema,
            "snapshot": [named.version, named.parts, named.content_bytes, named.place],
            "slots": self.slots,
            "max_staleness": self.max_staleness,
            "direct_parts": self.direct_parts,
            "state": self.state,
            "plan": dict(self.plan),
        }
        return meta | ({FRAME_BYTES_KEY: self.frame_bytes} if self.frame_bytes else {})

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Self:
        named = meta_fields.get(meta, "snapshot")
        if not isinstance(named, list) or len(named) != 4:
            raise ProtocolError("bad-meta", "'snapshot' is not [version, parts, bytes, place]")
        version, parts, size_bytes, place = (meta_fields.checked_integer(number, "snapshot") for number in named)
        head = cls(
            version=meta_fields.counter(meta, "version"),
            digest=meta_fields.binary(meta, "digest", 32),
            schema=meta_fields.binary(meta, "schema", 32),
            snapshot=SnapshotRef(version=version, parts=parts, content_bytes=size_bytes, place=place),
            slots=meta_fields.integer(meta, "slots", 1, PARTS_MAX),
            max_staleness=meta_fields.integer(meta, "max_staleness"),
            direct_parts=meta_fields.integer(meta, "direct_parts"),
            state=meta_fields.one_of(meta, "state", STATES),
            plan=meta_fields.mapping(meta, "plan"),
            frame_bytes=_frame_bytes(meta),
        )
        if version > head.version or not 1 <= parts <= parts_max(size_bytes) or place > 1:
            raise ProtocolError("bad-meta", "'snapshot' has a version, a number of parts or a place out of range")
        return head


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The whole model: the body is the schema's bytes, then the encoded vector."""

    KIND: ClassVar[str] = "snapshot"
    version: int
    digest: bytes
    schema_bytes: int
    content_bytes: int
    encoding: str

    def meta(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "digest": self.digest,
            "schema_bytes": self.schema_bytes,
            "bytes": self.content_bytes,
            "encoding": self.encoding,
        }

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Self:
        return cls(
            version=meta_fields.counter(meta, "version"),
            digest=meta_fields.binary(meta, "digest", 32),
            schema_bytes=meta_fields.integer(meta, "schema_bytes"),
            content_bytes=meta_fields.integer(meta, "bytes"),
            encoding=meta_fields.text(meta, "encoding"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """The change from version - 1 to version; the body is a block."""

    KIND: ClassVar[str] = "delta"
    version: int
    digest: bytes
    codec: str
    encoding: str
    xxh3: bytes = b""  # checksum of the new vector; empty, and then not in the map, if the sender does not say it

    def meta(self) -> dict[str, Any]:
        meta = {"version": self.version, "digest": self.digest, "codec": self.codec, "encoding": self.encoding}
        return meta | ({"xxh3": self.xxh3} if self.xxh3 else {})

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Self:
        return cls(
            version=meta_fields.counter(meta, "version", 1),
            digest=meta_fields.binary(meta, "digest", 32),
            codec=meta_fields.text(meta, "codec"),
            encoding=meta_fields.text(meta, "encoding"),
            xxh3=meta_fields.binary(meta, "xxh3", 16) if "xxh3" in meta else b"",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate(Delta):
    """The delta of a version that is not published yet, for a device that is to evaluate it first."""

    KIND: ClassVar[str] = "candidate"
