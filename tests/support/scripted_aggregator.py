"""An aggregator for the tests of the device, made from broker's primitives alone: it signs whatever a test needs."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame, build, parse
from ternbus.broker.protocol.identity import AGGREGATOR, Identity
from ternbus.broker.protocol.messages import Grant, Receipt, Status
from ternbus.broker.protocol.model_messages import Candidate, Delta, Head, Snapshot, SnapshotRef
from ternbus.broker.protocol.parts import cut
from ternbus.broker.protocol.schema import Schema, Vector, vector_digest, vector_xxh3
from ternbus.broker.protocol.ternary import RAW, ZSTD, Block, encode, nearest_block

SHAPES = {"w": (50, 20), "b": (7,)}
FEDERATION = "fed"
Message = tuple[str, bytes]  # topic, payload


@dataclass
class ScriptedAggregator:
    """Holds every version; what it returns is (topic, payload), for a test to deliver, lose or bend."""

    slots: int = 4
    codec: str = "float32"
    frame_bytes: int = 2000  # a delta or snapshot of SHAPES takes three frames
    direct_parts: int = 8
    max_staleness: int = 2
    state: str = "open"
    checksum: bool = True  # whether deltas have a checksum beside their digest
    lies: dict[int, bytes] = field(default_factory=dict)  # digests that are not those of the versions
    plan: dict[str, Any] = field(default_factory=dict)
    statistics: Any = None  # asked for in heads
    identity: Identity = field(default_factory=Identity.generate)
    schema: Schema = field(default_factory=lambda: Schema.of(SHAPES))
    seq: int = 0
    snapshot_version: int = 0
    place: int = 0

    def __post_init__(self) -> None:
        vector = np.arange(self.schema.elements, dtype=np.float32)
        self.vectors: list[Vector] = [vector]
        self.blocks: list[Block | None] = [None]
        self.delta_frames: dict[int, list[Message]] = {}
        self.snapshot_frames: dict[int, list[Message]] = {}

    @property
    def version(self) -> int:
        return len(self.vectors) - 1

    def digest(self, version: int) -> bytes:
        """As delta and head name it."""
        return self.lies.get(version) or vector_digest(self.vectors[version])

    def number(self) -> int:
        self.seq += 1
        return self.seq

    def advance(self, change: Vector | None = None) -> None:
        """Make the next version."""
        if change is None:
            rng = np.random.default_rng(self.version)
            change = rng.integers(-3, 4, self.schema.elements).astype(np.float32)
        ternary = self.codec == "ternary"
        block = nearest_block(self.schema, change) if ternary else Block.of_float32(self.schema, change)
        self.vectors.append(block.apply(self.vectors[-1]))
        self.blocks.append(block)

    def head(self, **changes: Any) -> Message:
        parts = len(self.snapshot())
        named = SnapshotRef(
            version=self.snapshot_version,
            parts=parts,
            content_bytes=len(self.schema.encoded) + 4 * self.schema.elements,
            place=self.place,
        )
        fields: dict[str, Any] = {
            "version": self.version,
            "digest": self.digest(self.version),
            "schema": self.schema.digest,
            "snapshot": named,
            "slots": self.slots,
            "max_staleness": self.max_staleness,
            "direct_parts": self.direct_parts,
            "state": self.state,
            "plan": self.plan,
        }
        seq = changes.pop("seq", None) or self.number()
        asked = {} if self.statistics is None else {"statistics": self.statistics}
        head = Head(**{**fields, **changes})
        return topics.head(FEDERATION), self.frame(Head.KIND, {**head.meta(), **asked}, seq=seq)

    def delta(self, version: int) -> list[Message]:
        """All parts; the same frames each time, as they are retained."""
        if version not in self.delta_frames:
            block = self.blocks[version]
            assert block is not None
            vector = self.vectors[version]
            about = Delta(
                version=version,
                digest=self.digest(version),
                codec=block.codec,
                encoding=RAW,
                xxh3=vector_xxh3(vector) if self.checksum else b"",
            )
            frames = self.cut(Delta.KIND, about.meta(), encode(block.content, RAW))
            slot = version % self.slots
            self.delta_frames[version] = [
                (topics.delta(FEDERATION, slot, part), frame) for part, frame in enumerate(frames)
            ]
        return self.delta_frames[version]

    def snapshot(self, version: int | None = None, place: int | None = None) -> list[Message]:
        version = self.snapshot_version if version is None else version
        place = self.place if place is None else place
        if version not in self.snapshot_frames:
            vector = self.vectors[version]
            content = self.schema.encoded + vector.tobytes()
            about = Snapshot(
                version=version,
                digest=vector_digest(vector),
                schema_bytes=len(self.schema.encoded),
                content_bytes=len(content),
                encoding=RAW,
            )
            frames = self.cut(Snapshot.KIND, about.meta(), encode(content, RAW))
            self.snapshot_frames[version] = [
                (topics.snapshot(FEDERATION, place, part), frame) for part, frame in enumerate(frames)
            ]
        return self.snapshot_frames[version]

    def new_snapshot(self) -> list[Message]:
        """A snapshot of the newest version in the other place, to be named by the next head."""
        self.snapshot_version, self.place = self.version, 1 - self.place
        return self.snapshot()

    def candidate(self, device: str, change: Vector, *, version: int | None = None, **about: Any) -> list[Message]:
        """A candidate for the version after the newest, or for another; all parts."""
        block = Block.of_float32(self.schema, change)
        digest = vector_digest(block.apply(self.vectors[-1]))
        number = self.version + 1 if version is None else version
        fields = {"version": number, "digest": digest, "codec": block.codec, "encoding": RAW, **about}
        frames = self.cut(Candidate.KIND, Candidate(**fields).meta(), encode(block.content, RAW))
        return [(topics.down(FEDERATION, device, Candidate.KIND), frame) for frame in frames]

    def status(self, state: str = "online", session: int = 1) -> Message:
        meta = Status(state=state, session=session, software="scripted").meta()
        return topics.status(FEDERATION), self.frame(Status.KIND, meta)

    def receipt(self, device: str, key: bytes, seq: int, outcome: str, **more: Any) -> Message:
        fields = {"device": device, "device_key": key, "seq": seq, "outcome": outcome, "version": self.version, **more}
        return topics.down(FEDERATION, device, "receipt"), self.frame(Receipt.KIND, Receipt(**fields).meta())

    def grant(self, device: str, key: bytes, seq: int, parts: Any, deadline_s: float = 30.0) -> Message:
        grant = Grant(device=device, device_key=key, seq=seq, parts=parts, deadline_s=deadline_s)  # type: ignore[arg-type]
        return topics.down(FEDERATION, device, "grant"), self.frame(Grant.KIND, grant.meta())

    def frame(self, kind: str, meta: Any, *, seq: int | None = None, identity: Identity | None = None) -> bytes:
        return build(
            identity or self.identity,
            federation=FEDERATION,
            sender=AGGREGATOR,
            kind=kind,
            seq=seq or self.number(),
            meta=meta,
        )

    def cut(self, kind: str, meta: Any, body: bytes) -> list[bytes]:
        return cut(
            self.identity,
            federation=FEDERATION,
            sender=AGGREGATOR,
            kind=kind,
            seq=self.number(),
            meta=meta,
            body=body,
            frame_bytes=self.frame_bytes,
        )


def as_frames(messages: list[Message]) -> list[tuple[str, Frame]]:
    return [(topic, parse(payload)) for topic, payload in messages]


def decoded(schema: Schema, codec: str, encoding: str, body: bytes) -> Vector:
    return Block.read(schema, codec, encoding, body).value()


__all__ = ["FEDERATION", "SHAPES", "ZSTD", "Message", "ScriptedAggregator", "as_frames", "decoded"]
