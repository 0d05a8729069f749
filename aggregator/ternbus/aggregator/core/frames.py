"""What the aggregator says: its frames, signed, numbered and cut, as (topic, payload) pairs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ternbus.aggregator.core.records import Record, SeqReserved
from ternbus.aggregator.merge.downlink import encoded_block, snapshot_body
from ternbus.aggregator.settings import Settings
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import build
from ternbus.broker.protocol.identity import AGGREGATOR, Identity
from ternbus.broker.protocol.merge_log import Contribution, Entry, Signed
from ternbus.broker.protocol.messages import Delta, Head, Receipt, Snapshot, SnapshotRef, Status
from ternbus.broker.protocol.parts import cut
from ternbus.broker.protocol.schema import Schema, Vector
from ternbus.broker.protocol.ternary import Block

SEQ_BLOCK: Final = 10_000  # sequence numbers made durable at a time: a crash skips the rest of a block
ENVELOPE_BYTES: Final = 4096  # more than any header of an update with all its metrics takes

Frames = list[tuple[str, bytes]]


@dataclass(slots=True)
class FrameWriter:
    """Builds frames under ever higher sequence numbers; ``save`` makes each block of numbers durable before use."""

    settings: Settings
    identity: Identity
    schema: Schema
    save: Callable[[Record], None]
    seq: int  # the last one that was made durable; the next frame's is above it
    frame_bytes: int = 0
    _reserved: int = field(init=False)

    def __post_init__(self) -> None:
        self._reserved = self.seq
        self.frame_bytes = self.settings.limits.frame_bytes

    @property
    def direct_parts(self) -> int:
        """How many parts of an update come unasked: as many as the schema's largest update needs."""
        largest = 4 * self.schema.elements
        largest += largest // 256 + 256  # what zstd and a sealed box add at worst
        return max(self.settings.limits.direct_parts, -(-largest // max(1024, self.frame_bytes - ENVELOPE_BYTES)))

    def leap(self, numbers: int) -> None:
        """Leave out so many sequence numbers."""
        self.seq = self._reserved + numbers

    def status(self, state: str, session: int, software: str) -> tuple[str, bytes]:
        value = Status(state=state, session=session, software=software)
        return topics.status(self.settings.federation), self.frame(value.KIND, value.meta())

    def receipt(self, receipt: Receipt) -> tuple[str, bytes]:
        topic = topics.down(self.settings.federation, receipt.device, receipt.KIND)
        return topic, self.frame(receipt.KIND, receipt.meta())

    def head(self, *, version: int, digest: bytes, snapshot: SnapshotRef, state: str) -> tuple[str, bytes]:
        head = Head(
            version=version,
            digest=digest,
            schema=self.schema.digest,
            snapshot=snapshot,
            slots=self.settings.downlink.slots,
            max_staleness=self.settings.staleness.max,
            direct_parts=self.direct_parts,
            state=state,
            plan=self.settings.plan,
        )
        return topics.head(self.settings.federation), self.frame(head.KIND, head.meta())

    def delta(self, version: int, digest: bytes, block: Block) -> tuple[str, bytes, Frames]:
        """(encoding, body, frames) of the delta that makes ``version``."""
        encoding, body = encoded_block(block)
        value = Delta(version=version, digest=digest, codec=block.codec, encoding=encoding)
        slot = version % self.settings.downlink.slots
        frames = self._parts(value.KIND, value.meta(), body)
        return (
            encoding,
            body,
            [(topics.delta(self.settings.federation, slot, part), frame) for part, frame in enumerate(frames)],
        )

    def snapshot(self, version: int, digest: bytes, vector: Vector, place: int) -> tuple[SnapshotRef, Frames]:
        """The frames of a snapshot for ``place``, and how a head names it."""
        encoding, body, length = snapshot_body(self.schema, vector)
        value = Snapshot(
            version=version,
            digest=digest,
            schema_bytes=len(self.schema.encoded),
            content_bytes=length,
            encoding=encoding,
        )
        frames = self._parts(value.KIND, value.meta(), body)
        named = SnapshotRef(version=version, parts=len(frames), content_bytes=length, place=place)
        return named, [
            (topics.snapshot(self.settings.federation, place, part), frame) for part, frame in enumerate(frames)
        ]

    def entry(self, version: int, digest: bytes, previous: bytes, updates: tuple[Contribution, ...] = ()) -> Signed:
        """An entry in the log of merges, which is not published: who asks the operator is given it."""
        federation = self.settings.federation
        entry = Entry(federation=federation, version=version, digest=digest, previous=previous, updates=updates)
        return entry.signed(self.identity)

    def frame(self, kind: str, meta: Mapping[str, Any]) -> bytes:
        """One frame without a body."""
        return build(
            self.identity,
            federation=self.settings.federation,
            sender=AGGREGATOR,
            kind=kind,
            seq=self._next_seq(),
            meta=meta,
        )

    def _parts(self, kind: str, meta: Mapping[str, Any], body: bytes) -> list[bytes]:
        return cut(
            self.identity,
            federation=self.settings.federation,
            sender=AGGREGATOR,
            kind=kind,
            seq=self._next_seq(),
            meta=meta,
            body=body,
            frame_bytes=self.frame_bytes,
        )

    def _next_seq(self) -> int:
        self.seq += 1
        if self.seq > self._reserved:
            self._reserved = self.seq + SEQ_BLOCK
            self.save(SeqReserved(upto=self._reserved))
        return self.seq
