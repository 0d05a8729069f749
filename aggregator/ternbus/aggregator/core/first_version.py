"""Version 0 of a federation: the records that are saved before its aggregator first runs."""

from dataclasses import dataclass

from ternbus.aggregator.core import records
from ternbus.aggregator.core.frames import FrameWriter
from ternbus.aggregator.core.search import Search
from ternbus.aggregator.core.versions import PublishedState
from ternbus.aggregator.merge import optimizer
from ternbus.aggregator.merge.downlink import encoded_block, next_block
from ternbus.aggregator.merge.recipe import Recipe
from ternbus.aggregator.settings import Settings
from ternbus.broker.protocol import merge_log
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.messages import OPEN
from ternbus.broker.protocol.schema import Schema, Vector, vector_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstVersion:
    """The initial model as a version that no merge made, its snapshot, and the frames to be retained."""

    seq: int  # up to which sequence numbers are reserved
    version: records.VersionMade
    snapshot: records.SnapshotTaken
    frames: records.FramesRetained

    @property
    def records(self) -> list[records.Record]:
        """In the order in which they are saved."""
        return [records.SeqReserved(upto=self.seq), self.version, self.snapshot, self.frames]

    def published(self, settings: Settings) -> PublishedState:
        """What a recovery would make of these records."""
        *_, (_, head_frame) = self.frames.frames
        return PublishedState(
            state=OPEN,
            snapshot=self.snapshot.named,
            snapshot_seq=parse(self.frames.frames[0][1]).seq,
            sizes={topic: len(payload) for topic, payload in self.frames.frames},
            head_frame=head_frame,
            slots=settings.downlink.slots,
            recipe=Recipe.of(settings),
            log_hash=self.version.entry.hash,
        )


def make(settings: Settings, identity: Identity, schema: Schema, vector: Vector) -> FirstVersion:
    """``vector`` is the initial model, shape (elements,), float32."""
    writer = FrameWriter(settings, identity, schema, 0)
    digest = vector_digest(vector)
    _, named, frames = writer.snapshot(0, digest, vector, 0)
    search = Search.of(settings.search, 0)
    plan = {**settings.published_plan, **search.plan(0)}
    _, head = writer.head(version=0, digest=digest, snapshot=named, state=OPEN, plan=plan)
    codec = settings.downlink.codec
    encoding, body = encoded_block(next_block(schema, codec, vector, vector))
    return FirstVersion(
        seq=writer.reserved,
        version=records.VersionMade(
            version=0,
            digest=digest,
            updates=0,
            staleness_mean=0.0,
            staleness_max=0,
            codec=codec,
            encoding=encoding,
            body=body,
            entry=writer.entry(0, digest, merge_log.FIRST),
            search=search.state,
        ),
        snapshot=records.SnapshotTaken(
            version=0,
            published=vector,
            server=optimizer.init(settings.optimizer, vector),
            named=named,
            recipe=Recipe.of(settings),
        ),
        frames=records.FramesRetained(frames=(*frames, head)),
    )
