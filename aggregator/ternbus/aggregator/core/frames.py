"""The frames that the aggregator publishes: signed, numbered, and cut into parts, as (topic, payload) pairs.

Sequence numbers become durable a block at a time. So whatever numbers a frame returns it together with the records
that must be saved before the frame is published: one where a block begins, else none.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ternbus.aggregator.core.events import Action, Connected, Publish, Save
from ternbus.aggregator.core.records import SeqReserved
from ternbus.aggregator.merge.downlink import snapshot_body
from ternbus.aggregator.settings import Settings
from ternbus.broker.protocol import revocations, topics
from ternbus.broker.protocol.frame import FRAME_BYTES, build
from ternbus.broker.protocol.identity import AGGREGATOR, Identity
from ternbus.broker.protocol.merge_log import Contribution, DroppedUpdate, Entry, MergedSet, Signed
from ternbus.broker.protocol.messages import Grant, Receipt, Status
from ternbus.broker.protocol.model_messages import Candidate, Delta, Head, Snapshot, SnapshotRef
from ternbus.broker.protocol.parts import cut
from ternbus.broker.protocol.schema import Schema, Vector
from ternbus.broker.protocol.statistics import KEY as STATISTICS
from ternbus.broker.protocol.topics import TERMS
from ternbus.broker.sums.sets import AskStep

SEQ_BLOCK: Final = 10_000  # sequence numbers made durable at a time: a crash skips the rest of a block
TAKEN_BYTES: Final = 256 * 1024  # frames of devices: the update of a million parameters is one, with one signature
ENVELOPE_BYTES: Final = 4096  # more than any header of an update with all its metrics takes

Message = tuple[str, bytes]  # topic, payload
Reserved = tuple[Save, ...]  # to be done before what they come with is published


@dataclass(slots=True)
class FrameWriter:
    """Builds frames under ever higher sequence numbers."""

    settings: Settings
    identity: Identity
    schema: Schema
    seq: int  # of the last frame; at first the last one that was made durable
    frame_bytes: int = 0
    taken_bytes: int = 0  # the largest frame that devices may send
    reserved: int = field(init=False)  # the last number that may be used before another block is saved

    def __post_init__(self) -> None:
        self.reserved = self.seq
        self.frame_bytes = self.settings.limits.frame_bytes

    @property
    def direct_parts(self) -> int:
        """How many parts of an update come unasked: as many as the schema's largest update needs.

        They are of the usual size at most: a device may not know yet, or not at all, that it may send larger ones.
        """
        largest = 4 * self.schema.elements
        largest += largest // 256 + 256  # what zstd and a sealed box add at worst
        room = max(1024, min(self.frame_bytes, FRAME_BYTES) - ENVELOPE_BYTES)
        return max(self.settings.limits.direct_parts, -(-largest // room))

    def connected(self, event: Connected) -> None:
        """Make no frames that the broker does not take, and ask devices for larger ones where it says that it does."""
        own = self.settings.limits.frame_bytes
        self.frame_bytes = min(own, event.frame_bytes)
        self.taken_bytes = min(max(own, TAKEN_BYTES), event.most_bytes) if own >= FRAME_BYTES else 0

    def leap(self, numbers: int) -> None:
        """Leave out that many sequence numbers."""
        self.seq = self.reserved + numbers

    def to_device(self, message: Receipt | Grant) -> list[Action]:
        """Publish a message for one device."""
        topic = topics.down(self.settings.federation, message.device, message.KIND)
        reserved, payload = self._frame(message.KIND, message.meta())
        return [*reserved, Publish(topic=topic, payload=payload)]

    def ask(self, helper: str, step: AskStep, body: bytes) -> tuple[Reserved, list[Message]]:
        """The frames of an ask, in as many parts as the broker's packets need."""
        reserved, frames = self._parts(step.KIND, step.meta(), body)
        topic = topics.help_of(self.settings.federation, helper, step.KIND)
        return reserved, [(topic, frame) for frame in frames]

    def candidate(self, devices: Iterable[str], value: Candidate, body: bytes) -> list[Action]:
        """Publish a candidate for some devices: the same frames for each."""
        reserved, frames = self._parts(value.KIND, value.meta(), body)
        names = [topics.down(self.settings.federation, device, value.KIND) for device in devices]
        return [*reserved, *(Publish(topic=topic, payload=frame) for topic in names for frame in frames)]

    def to_helper(self, message: Receipt) -> list[Action]:
        """Publish a message for one helper."""
        topic = topics.help_of(self.settings.federation, message.device, message.KIND)
        reserved, payload = self._frame(message.KIND, message.meta())
        return [*reserved, Publish(topic=topic, payload=payload)]

    def status(self, state: str, session: int, software: str) -> tuple[Reserved, Message]:
        value = Status(state=state, session=session, software=software)
        reserved, payload = self._frame(value.KIND, value.meta())
        return reserved, (topics.status(self.settings.federation), payload)

    def head(
        self,
        *,
        version: int,
        digest: bytes,
        snapshot: SnapshotRef,
        state: str,
        plan: Mapping[str, Any],
        asked: Mapping[str, Any] | None = None,
    ) -> tuple[Reserved, Message]:
        head = Head(
            version=version,
            digest=digest,
            schema=self.schema.digest,
            snapshot=snapshot,
            slots=self.settings.downlink.slots,
            max_staleness=self.settings.staleness.max,
            direct_parts=self.direct_parts,
            state=state,
            plan=plan,
            frame_bytes=largest if (largest := max(self.frame_bytes, self.taken_bytes)) > FRAME_BYTES else 0,
        )
        statistics = {} if asked is None else {STATISTICS: dict(asked)}
        reserved, payload = self._frame(head.KIND, {**head.meta(), **statistics})
        return reserved, (topics.head(self.settings.federation), payload)

    def terms(self, content: bytes) -> tuple[Reserved, list[Message]]:
        """The frames of the terms of private sums."""
        reserved, frames = self._parts(TERMS, {}, content)
        federation = self.settings.federation
        return reserved, [(topics.terms(federation, part), frame) for part, frame in enumerate(frames)]

    def delta(self, value: Delta, body: bytes) -> tuple[Reserved, list[Message]]:
        """The frames of the delta that makes a version, in that version's slot."""
        slot = value.version % self.settings.downlink.slots
        reserved, frames = self._parts(value.KIND, value.meta(), body)
        return reserved, [
            (topics.delta(self.settings.federation, slot, part), frame) for part, frame in enumerate(frames)
        ]

    def snapshot(
        self, version: int, digest: bytes, vector: Vector, place: int
    ) -> tuple[Reserved, SnapshotRef, list[Message]]:
        """How a head names a snapshot in ``place``, and its frames."""
        encoding, body, length = snapshot_body(self.schema, vector)
        value = Snapshot(
            version=version,
            digest=digest,
            schema_bytes=len(self.schema.encoded),
            content_bytes=length,
            encoding=encoding,
        )
        reserved, frames = self._parts(value.KIND, value.meta(), body)
        named = SnapshotRef(version=version, parts=len(frames), content_bytes=length, place=place)
        return (
            reserved,
            named,
            [(topics.snapshot(self.settings.federation, place, part), frame) for part, frame in enumerate(frames)],
        )

    def revocations(self, keys: Iterable[revocations.Key]) -> tuple[Reserved, list[Message]]:
        """The pages of the list of revoked keys."""
        reserved: Reserved = ()
        messages = []
        for page, body in enumerate(revocations.pages(keys)):
            begun, payload = self._frame(revocations.KIND, {"page": page}, body)
            reserved += begun
            messages.append((topics.revocations(self.settings.federation, page), payload))
        return reserved, messages

    def entry(
        self,
        version: int,
        digest: bytes,
        previous: bytes,
        *,
        updates: tuple[Contribution, ...] = (),
        sets: tuple[MergedSet, ...] = (),
        dropped: tuple[DroppedUpdate, ...] = (),
        rollback: int | None = None,
    ) -> Signed:
        """An entry in the log of merges, which is not published: the operator hands it out."""
        entry = Entry(
            federation=self.settings.federation,
            version=version,
            digest=digest,
            previous=previous,
            updates=updates,
            sets=sets,
            dropped=dropped,
            rollback=rollback,
        )
        return entry.signed(self.identity)

    def _frame(self, kind: str, meta: Mapping[str, Any], body: bytes = b"") -> tuple[Reserved, bytes]:
        """A message of one frame."""
        reserved = self._take_seq()
        frame = build(
            self.identity,
            federation=self.settings.federation,
            sender=AGGREGATOR,
            kind=kind,
            seq=self.seq,
            meta=meta,
            body=body,
        )
        return reserved, frame

    def _parts(self, kind: str, meta: Mapping[str, Any], body: bytes) -> tuple[Reserved, list[bytes]]:
        reserved = self._take_seq()
        frames = cut(
            self.identity,
            federation=self.settings.federation,
            sender=AGGREGATOR,
            kind=kind,
            seq=self.seq,
            meta=meta,
            body=body,
            frame_bytes=self.frame_bytes,
        )
        return reserved, frames

    def _take_seq(self) -> Reserved:
        """Go on to the next number, ``seq``."""
        self.seq += 1
        if self.seq <= self.reserved:
            return ()
        self.reserved = self.seq + SEQ_BLOCK
        return (Save(record=SeqReserved(upto=self.reserved)),)
