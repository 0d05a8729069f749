"""Makes versions and publishes them: delta, head and snapshot, each on disk before anybody can read it."""

from collections.abc import Callable
from dataclasses import dataclass

from aggregator import events, records
from aggregator.model import Model
from aggregator.outlet import Frames, Outlet
from aggregator.settings import Settings
from broker import topics
from broker.frame import parse
from broker.messages import SnapshotRef


@dataclass(slots=True, kw_only=True)
class Kept:
    """What stands on the broker, as far as we are concerned; a restart recovers it."""

    state: str
    snapshot: SnapshotRef
    sizes: dict[str, int]  # retained topic -> bytes of its frame
    head_frame: bytes
    slots: int  # how many delta slots the frames were laid out for


@dataclass(slots=True, kw_only=True)
class Press:
    """Turns the model's merges into records and retained messages."""

    settings: Settings
    model: Model
    kept: Kept
    outlet: Outlet
    do: Callable[[events.Action], None]

    def merge(self) -> None:
        """Make the next version: on disk first, then its delta, then the head that names it."""
        merged = self.model.merge()
        encoding, body, frames = self.outlet.delta(merged.version, merged.digest, merged.block)
        self._save(
            records.VersionMade(
                version=merged.version,
                digest=merged.digest,
                updates=merged.updates,
                staleness_mean=merged.staleness_mean,
                staleness_max=merged.staleness_max,
                codec=merged.block.codec,
                encoding=encoding,
                body=body,
            )
        )
        # an empty message clears what an older, longer delta left in this slot
        left = self._delta_topics(merged.version)[len(frames) :]
        self._keep([*frames, *((topic, b"") for topic in left), self._head()])
        if merged.version - self.kept.snapshot.version >= -(-self.settings.downlink.slots // 2):
            self.snapshot()

    def snapshot(self) -> None:
        """Publish the whole model to the other place, then a head that names it."""
        place = 1 - self.kept.snapshot.place
        model = self.model
        self.kept.snapshot, frames = self.outlet.snapshot(model.version, model.digest, model.published, place)
        self._save(
            records.SnapshotTaken(
                version=model.version, published=model.published, server=model.server, named=self.kept.snapshot
            )
        )
        self._keep([*frames, self._head()])

    def change_state(self, state: str) -> None:
        self.kept.state = state
        self._save(records.StateChanged(state=state))
        self._keep([self._head()])

    def renew(self) -> None:
        """At start: say anew what the settings changed since the last head."""
        if self.kept.slots != self.settings.downlink.slots:
            self._lay_out_slots()
        topic, frame = self._build_head()
        if parse(frame).meta != parse(self.kept.head_frame).meta:
            self.kept.head_frame = frame
            self._keep([(topic, frame)])

    def fit(self, frame_bytes: int) -> None:
        """Obey a broker's packet limit: kept frames that are larger give way to a snapshot in smaller parts."""
        self.outlet.frame_bytes = min(self.settings.limits.frame_bytes, frame_bytes)
        if max(self.kept.sizes.values()) > self.outlet.frame_bytes:
            self.snapshot()

    def republish(self) -> None:
        """Give the broker what it should have kept: the snapshot, the deltas since, the head."""
        federation, named = self.settings.federation, self.kept.snapshot
        wanted = [topics.snapshot(federation, named.place, part) for part in range(named.parts)]
        for version in range(named.version + 1, self.model.version + 1):
            wanted += self._delta_topics(version)
        self.do(events.RepublishKept(topics=(*wanted, topics.head(federation))))

    def _lay_out_slots(self) -> None:
        """Another number of slots puts every delta elsewhere: clear the old ones and begin at a snapshot."""
        prefix = f"{topics.root(self.settings.federation)}/all/delta/"
        self._save(records.SlotsChanged(slots=self.settings.downlink.slots))
        self._keep([(topic, b"") for topic in sorted(self.kept.sizes) if topic.startswith(prefix)])
        self.kept.slots = self.settings.downlink.slots
        self.snapshot()

    def _delta_topics(self, version: int) -> list[str]:
        """The topics of the parts that are kept in a version's slot."""
        slot = version % self.settings.downlink.slots
        found: list[str] = []
        while (topic := topics.delta(self.settings.federation, slot, len(found))) in self.kept.sizes:
            found.append(topic)
        return found

    def _build_head(self) -> tuple[str, bytes]:
        return self.outlet.head(
            version=self.model.version,
            digest=self.model.digest,
            snapshot=self.kept.snapshot,
            state=self.kept.state,
        )

    def _head(self) -> tuple[str, bytes]:
        topic, self.kept.head_frame = self._build_head()
        return topic, self.kept.head_frame

    def _keep(self, frames: Frames) -> None:
        """Make retained frames durable, then publish them."""
        self._save(records.FramesKept(frames=tuple(frames)))
        for topic, payload in frames:
            if payload:
                self.kept.sizes[topic] = len(payload)
            else:
                self.kept.sizes.pop(topic, None)
            self.do(events.Publish(topic=topic, payload=payload, retain=True))

    def _save(self, record: records.Record) -> None:
        self.do(events.Save(record=record))
