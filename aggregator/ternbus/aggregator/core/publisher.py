"""Makes versions and publishes them: delta, head and snapshot, each on disk before anybody can read it."""

from collections.abc import Callable
from dataclasses import dataclass

from ternbus.aggregator.core import events, records
from ternbus.aggregator.core.frames import Frames, FrameWriter
from ternbus.aggregator.merge.downlink import encoded_block, next_block
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.settings import Recipe, Settings
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.merge_log import Contribution, Signed
from ternbus.broker.protocol.messages import SnapshotRef


@dataclass(slots=True, kw_only=True)
class PublishedState:
    """What stands on the broker, as far as we are concerned; a restart recovers it."""

    state: str
    snapshot: SnapshotRef
    sizes: dict[str, int]  # retained topic -> bytes of its frame
    head_frame: bytes
    slots: int  # how many delta slots the frames were laid out for
    recipe: Recipe  # by which merges since the snapshot were made
    log_hash: bytes  # of the last entry in the log of merges


@dataclass(slots=True, kw_only=True)
class Publisher:
    """Turns the model's merges into records and retained messages."""

    settings: Settings
    model: Model
    kept: PublishedState
    outlet: FrameWriter
    do: Callable[[events.Action], None]
    in_doubt: bool = False  # whether the broker still has what it was given; until then no head may say that it does

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
                entry=self._entry(merged.contributions),
            )
        )
        # an empty message clears what an older, longer delta left in this slot
        left = self._delta_topics(merged.version)[len(frames) :]
        self._keep([*frames, *((topic, b"") for topic in left), self._head()])
        if merged.version - self.kept.snapshot.version >= -(-self.settings.downlink.slots // 2):
            self.snapshot(at_leisure=True)

    def snapshot(self, *, at_leisure: bool = False) -> None:
        """Publish the whole model to the other place, then a head that names it."""
        place = 1 - self.kept.snapshot.place
        model = self.model
        self.kept.snapshot, frames = self.outlet.snapshot(model.version, model.digest, model.published, place)
        self.kept.recipe = self.settings.recipe
        self._save(
            records.SnapshotTaken(
                version=model.version,
                published=model.published,
                server=model.server,
                named=self.kept.snapshot,
                recipe=self.kept.recipe,
                at_leisure=at_leisure,
            )
        )
        left = self._parts_in(lambda part: topics.snapshot(self.settings.federation, place, part))[len(frames) :]
        self._keep([*frames, self._head(), *((topic, b"") for topic in left)])

    def leap(self, versions: int) -> None:
        """Go on so many versions later with the same model: after a restore, above whatever devices may have seen."""
        model = self.model
        model.version += versions
        block = next_block(model.schema, self.settings.downlink.codec, model.published, model.published)
        encoding, body = encoded_block(block)
        self._save(
            records.VersionMade(
                version=model.version,
                digest=model.digest,
                updates=0,
                staleness_mean=0.0,
                staleness_max=0,
                codec=block.codec,
                encoding=encoding,
                body=body,
                entry=self._entry(()),
            )
        )
        self.snapshot()

    def change_state(self, state: str) -> None:
        self.kept.state = state
        self._save(records.StateChanged(state=state))
        self._keep([self._head()])

    def renew(self) -> None:
        """At start: begin at a snapshot where the settings no longer are those of the deltas and merges before."""
        if self.kept.recipe.optimizer.name != self.settings.optimizer.name:
            self.model.restart_server()
        if self.kept.slots != self.settings.downlink.slots:
            self._lay_out_slots()
        elif self.kept.recipe != self.settings.recipe:
            self.snapshot()  # what was merged under the old settings must not be merged again under the new ones

    def fit(self, frame_bytes: int) -> None:
        """Obey a broker's packet limit, and say anew what it or the settings changed since the last head.

        Kept frames that are larger than the limit give way to a snapshot in smaller parts.
        """
        self.outlet.frame_bytes = min(self.settings.limits.frame_bytes, frame_bytes)
        if any(self.kept.sizes[topic] > self.outlet.frame_bytes for topic in self._wanted()):
            self.snapshot()
            return
        topic, frame = self._build_head()
        if parse(frame).meta != parse(self.kept.head_frame).meta:
            self.kept.head_frame = frame
            self._keep([(topic, frame)])

    def republish(self) -> None:
        """Give the broker what it should have kept: the snapshot, the deltas since, the head.

        The head is sent as it is now. Later events may share a commit with this one, and a head of theirs, read from
        the ledger, would name what only follows it.
        """
        self.in_doubt = False
        self.do(events.RepublishKept(topics=tuple(self._wanted())))
        head = topics.head(self.settings.federation)
        self.do(events.Publish(topic=head, payload=self.kept.head_frame, retain=True))

    def _wanted(self) -> list[str]:
        """What a device needs to get from nothing to the head, in order."""
        federation, named = self.settings.federation, self.kept.snapshot
        wanted = [topics.snapshot(federation, named.place, part) for part in range(named.parts)]
        for version in range(named.version + 1, self.model.version + 1):
            wanted += self._delta_topics(version)
        return wanted

    def _lay_out_slots(self) -> None:
        """Another number of slots puts every delta elsewhere: begin at a snapshot, then clear the old ones."""
        prefix = f"{topics.root(self.settings.federation)}/all/delta/"
        self._save(records.SlotsChanged(slots=self.settings.downlink.slots))
        self.kept.slots = self.settings.downlink.slots
        self.snapshot()
        self._keep([(topic, b"") for topic in sorted(self.kept.sizes) if topic.startswith(prefix)])

    def _delta_topics(self, version: int) -> list[str]:
        """The topics of the parts that are kept in a version's slot."""
        slot = version % self.settings.downlink.slots
        return self._parts_in(lambda part: topics.delta(self.settings.federation, slot, part))

    def _parts_in(self, topic_of: Callable[[int], str]) -> list[str]:
        found: list[str] = []
        while (topic := topic_of(len(found))) in self.kept.sizes:
            found.append(topic)
        return found

    def _entry(self, updates: tuple[Contribution, ...]) -> Signed:
        """The entry in the log of merges for the version that was just made."""
        entry = self.outlet.entry(self.model.version, self.model.digest, self.kept.log_hash, updates)
        self.kept.log_hash = entry.hash
        return entry

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
        """Make retained frames durable, then publish them: all that a device needs, while the broker is in doubt."""
        self._save(records.FramesKept(frames=tuple(frames)))
        for topic, payload in frames:
            if payload:
                self.kept.sizes[topic] = len(payload)
            else:
                self.kept.sizes.pop(topic, None)
            if not (payload and self.in_doubt):
                self.do(events.Publish(topic=topic, payload=payload, retain=True))
        if self.in_doubt:
            self.republish()

    def _save(self, record: records.Record) -> None:
        self.do(events.Save(record=record))
