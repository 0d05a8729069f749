"""Versions and their messages: delta, head and snapshot, each saved before it is published."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ternbus.aggregator.core import records
from ternbus.aggregator.core.events import Action, Connected, Log, Publish, RepublishRetained, Save
from ternbus.aggregator.core.frames import FrameWriter, Message, Reserved
from ternbus.aggregator.core.search import Search
from ternbus.aggregator.core.terms import PrivateTerms
from ternbus.aggregator.merge import optimizer
from ternbus.aggregator.merge.accepted import PUBLISHED, WITHDRAWN, AcceptedUpdate
from ternbus.aggregator.merge.downlink import encoded_block, next_block
from ternbus.aggregator.merge.model import Merged, Model, Prepared
from ternbus.aggregator.merge.recipe import Recipe
from ternbus.aggregator.settings import Settings
from ternbus.aggregator.sums.private_sets import OpenedSet
from ternbus.broker.errors import ProtocolError
from ternbus.broker.log_levels import WARNING
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import FRAME_BYTES_TAKEN, parse
from ternbus.broker.protocol.merge_log import Contribution, DroppedUpdate, MergedSet, Signed
from ternbus.broker.protocol.messages import RESTORE_LEAP
from ternbus.broker.protocol.model_messages import Delta, Head, SnapshotRef
from ternbus.broker.protocol.schema import Vector, vector_digest, vector_xxh3

LEAPS_SINCE_S: Final = 1_767_225_600  # 2026-01-01, in Unix time
LEAPS_MAX: Final = 2**27  # minutes, 255 years: a clock that is wrong leaves room below 2^62
CHANGED: Final = "the head changed before the broker showed what it holds"


def leap_of(version: int, clock_s: float) -> int:
    """By how much a restored state goes up: a multiple of 2^32, at least once, at most 2^59.

    ``clock_s`` is Unix time. The version becomes at least 2^32 times the minutes since 2026: two restores of one copy,
    at different minutes, give no number twice.
    """
    minutes = min(int(clock_s - LEAPS_SINCE_S) // 60, LEAPS_MAX)
    return RESTORE_LEAP * max(1, minutes - version // RESTORE_LEAP)


@dataclass(slots=True, kw_only=True)
class PublishedState:
    """What the broker was given to retain; a restart recovers it."""

    state: str
    snapshot: SnapshotRef
    snapshot_seq: int  # of its frames
    sizes: dict[str, int]  # retained topic -> bytes of its frame
    head_frame: bytes
    slots: int  # how many delta slots the frames were laid out for
    recipe: Recipe  # by which merges since the snapshot were made
    log_hash: bytes  # of the last entry in the log of merges
    terms_seq: int = 0  # of the frames of the terms of private sums
    revoked: int = 0  # keys in the list of revoked ones
    floor: int = 0  # updates on lower versions are stale: a rollback has withdrawn what they were made on
    shown: set[str] = field(default_factory=set)  # topics that the broker may hold for Home Assistant


@dataclass(slots=True, kw_only=True)
class Versions:
    """Turns the model's merges into records and retained messages."""

    settings: Settings
    model: Model
    published: PublishedState
    frames: FrameWriter
    # Until then the broker may show that it still has our head, after which everything is published again. None: it
    # has shown it, or was given everything; while it has not, no head may be published that names what it lost.
    confirm_by: float | None = None
    private: PrivateTerms | None = None
    dropped: list[DroppedUpdate] = field(default_factory=list)  # those that the log of merges has not named
    asked: Mapping[str, Any] | None = None  # an open request for statistics, which each head has
    given: int = 0  # how often a snapshot was published since the start
    search: Search = field(default_factory=Search)

    def merge(self) -> list[Action]:
        """Make the next version: on disk first, then its delta, then the head that names it."""
        updates = tuple(self.model.buffer)
        return self._publish(self.model.merge(), updates=updates)

    def merge_sets(self, opened: Sequence[OpenedSet]) -> list[Action]:
        """Make the next version of sets of private updates."""
        self.model.refill(each.buffered for each in opened)
        merged = self.model.merge()
        members = sum(len(each.members) for each in opened)
        staleness = sum(each.staleness * len(each.members) for each in opened)
        about = replace(merged, contributions=(), updates=members, staleness_mean=staleness / members)
        weights = (each.weight for each in merged.contributions)
        sets = tuple(each.merged(weight) for each, weight in zip(opened, weights, strict=True))
        return self._publish(about, sets)

    def publish_candidate(self, prepared: Prepared) -> list[Action]:
        """Make the version that was a candidate."""
        return self._publish(self.model.adopt(prepared), candidate=PUBLISHED, updates=prepared.updates)

    def withdraw_candidate(self, dropped: Iterable[DroppedUpdate]) -> list[Action]:
        """Make a version of no update in place of a candidate, whose updates the log says are dropped."""
        self.dropped.extend(dropped)
        return self._publish(self.model.skip(), candidate=WITHDRAWN)

    def empty(self) -> list[Action]:
        """Make a version of no update: what must not change within a version changes with it."""
        return self._publish(self.model.skip())

    def _publish(
        self,
        merged: Merged,
        sets: tuple[MergedSet, ...] = (),
        candidate: str = "",
        updates: Sequence[AcceptedUpdate] = (),
    ) -> list[Action]:
        """``updates`` are those of its contributions."""
        encoding, body = encoded_block(merged.block)
        delta = Delta(
            version=merged.version,
            digest=merged.digest,
            codec=merged.block.codec,
            encoding=encoding,
            xxh3=vector_xxh3(self.model.published),
        )
        reserved, frames = self.frames.delta(delta, body)
        made = records.VersionMade(
            version=merged.version,
            digest=merged.digest,
            updates=merged.updates,
            staleness_mean=merged.staleness_mean,
            staleness_max=merged.staleness_max,
            codec=merged.block.codec,
            encoding=encoding,
            body=body,
            entry=self._entry(merged.contributions, sets),
            sets=None if self.private is None else tuple(each.digest for each in sets),
            candidate=candidate,
            search=self.search.made(merged.version, updates),
        )
        # an empty message clears what an older, longer delta left in this slot
        left = self._delta_topics(merged.version)[len(frames) :]
        reserved_head, head = self._head()
        retained = self._retain([*frames, *_cleared(left), *head])
        actions = [*reserved, Save(record=made), *reserved_head, *retained]
        # the next delta would take the slot of one that the newest snapshot does not make needless
        if self._behind >= self.published.slots:
            actions += self.snapshot(at_leisure=True)
        return actions

    @property
    def _behind(self) -> int:
        """By how many versions the newest snapshot is older than the model."""
        return self.model.version - self.published.snapshot.version

    @property
    def needs_snapshot(self) -> bool:
        """Whether one is due, as soon as the broker has the head."""
        return self._behind >= -(-self.published.slots // 2)

    def snapshot(self, *, at_leisure: bool = False) -> list[Action]:
        """Publish the whole model to the other place, then a head that names it."""
        place = 1 - self.published.snapshot.place
        model = self.model
        reserved, named, frames = self.frames.snapshot(model.version, model.digest, model.published, place)
        self.published.snapshot, self.published.recipe = named, Recipe.of(self.settings)
        self.published.snapshot_seq = self.frames.seq
        self.given += 1
        taken = records.SnapshotTaken(
            version=model.version,
            published=model.published,
            server=model.server,
            named=named,
            recipe=Recipe.of(self.settings),
            at_leisure=at_leisure,
        )
        left = self._parts_in(lambda part: topics.snapshot(self.settings.federation, place, part))[len(frames) :]
        reserved_head, head = self._head()
        retained = self._retain([*frames, *head, *_cleared(left)])
        return [*reserved, Save(record=taken), *reserved_head, *retained]

    def roll_back(self, vector: Vector, to: int) -> list[Action]:
        """Go on with this model, ``to`` in the log: so much later that every device takes the snapshot."""
        model = self.model
        model.empty()
        model.published, model.server = vector, optimizer.init(self.settings.optimizer, vector)
        model.digest = vector_digest(vector)
        self.published.floor = model.version + self.settings.downlink.slots + 1
        withdrawn = Save(record=records.VersionsWithdrawn(below=self.published.floor))
        return [withdrawn, *self.leap(self.settings.downlink.slots + 1, rollback=to)]

    def leap(self, versions: int, rollback: int | None = None) -> list[Action]:
        """Go on that many versions later with the same model: after a restore, above what devices may have seen."""
        model = self.model
        model.version += versions
        block = next_block(model.schema, self.settings.downlink.codec, model.published, model.published)
        encoding, body = encoded_block(block)
        made = records.VersionMade(
            version=model.version,
            digest=model.digest,
            updates=0,
            staleness_mean=0.0,
            staleness_max=0,
            codec=block.codec,
            encoding=encoding,
            body=body,
            entry=self._entry((), rollback=rollback),
            sets=None if self.private is None else (),
            search=self.search.leapt(model.version),
        )
        return [Save(record=made), *self.snapshot()]

    def change_state(self, state: str) -> list[Action]:
        self.published.state = state
        return [Save(record=records.StateChanged(state=state)), *self.renew_head()]

    def renew_head(self) -> list[Action]:
        """Publish a head of the same version."""
        reserved, head = self._head()
        return [*reserved, *self._retain(head)]

    def renew(self) -> list[Action]:
        """At start: begin at a snapshot where the settings no longer are those of the deltas and merges before."""
        if self.published.recipe.optimizer.name != self.settings.optimizer.name:
            self.model.restart_server()
        if self.published.slots != self.settings.downlink.slots:
            return self._lay_out_slots()
        if self.published.recipe != Recipe.of(self.settings):
            return self.snapshot()  # what was merged under the old settings must not be merged again under the new ones
        return []

    def fit(self, event: Connected, *, is_first: bool = False) -> list[Action]:
        """Obey a broker's packet limit, and publish a head where it or the settings changed since the last one.

        Retained frames that are larger than the limit give way to a snapshot in smaller parts. ``is_first``: no broker
        has been given anything yet, which is no reason to tell the operator of it.
        """
        self.frames.connected(event)
        most = self.frames.frame_bytes
        text = (
            f"frames of up to {most} bytes: above {FRAME_BYTES_TAKEN} they reach only devices and helpers that take "
            "them, such as devices joined with as large a --frame-bytes, and others wait for good; lower "
            "limits.frame_bytes in aggregator.toml and restart"
        )
        told = [Log(text=text, level=WARNING, event="large-frames")] if most > FRAME_BYTES_TAKEN else []
        if any(self.published.sizes[topic] > most for topic in self.wanted()):
            return [*told, *self.snapshot()]
        reserved, (topic, frame) = self._build_head()
        if parse(frame).meta == parse(self.published.head_frame).meta:
            return [*told, *reserved]
        self.published.head_frame = frame
        return [*told, *reserved, *self._retain([(topic, frame)], why="" if is_first else CHANGED)]

    def republish(self, why: str = "the broker did not deliver the stored ones") -> list[Action]:
        """Give the broker what it should have retained: the snapshot, the deltas since, the head.

        ``why`` is for the operator's log; empty where nobody need know.
        The head is sent as it is now. Later events may share a commit with this one, and a head of theirs, read from
        the ledger, would name what only follows it.
        """
        self.confirm_by = None
        self.given += 1
        head = topics.head(self.settings.federation)
        return [
            RepublishRetained(topics=(*self.wanted(), *self._newest_delta()), why=why),
            Publish(topic=head, payload=self.published.head_frame, retain=True),
        ]

    def newer(self, payload: bytes, address: topics.Address) -> int | None:
        """The version of a head that we signed and do not know: then our state is a copy from before it."""
        try:
            frame = parse(payload)
            topics.check(frame, address)
            frame.check_authentic(self.frames.identity.public)
            head = Head.from_meta(frame.meta)
        except ProtocolError:
            return None
        return head.version if head.version > self.model.version or frame.seq > self.frames.seq else None

    def snapshot_topics(self) -> list[str]:
        """The topics of the parts of the newest snapshot, in order."""
        named = self.published.snapshot
        return [topics.snapshot(self.settings.federation, named.place, part) for part in range(named.parts)]

    def terms_topics(self) -> list[str]:
        """The topics of the parts of the terms of private sums, in order; none where there are no terms."""
        return self._parts_in(lambda part: topics.terms(self.settings.federation, part))

    def wanted(self) -> list[str]:
        """What a device needs to get from nothing to the head, in order."""
        wanted = self._parts_in(lambda page: topics.revocations(self.settings.federation, page))
        return [*wanted, *self.terms_topics(), *self.snapshot_topics(), *self.delta_topics()]

    def delta_topics(self, after: int = 0) -> list[str]:
        """The topics of the parts of the deltas since the newest snapshot, above version ``after``, in order."""
        versions = range(max(self.published.snapshot.version, after) + 1, self.model.version + 1)
        return [topic for version in versions for topic in self._delta_topics(version)]

    def _newest_delta(self) -> list[str]:
        """The delta that a snapshot of its version makes needless, but for devices that are one version behind.

        A crash may have come before it was published. They would wait for it, and load the snapshot only in the end.
        """
        if self.published.snapshot.version < self.model.version:
            return []  # it is among those since the snapshot
        found = self._delta_topics(self.model.version)
        return found if all(self.published.sizes[topic] <= self.frames.frame_bytes for topic in found) else []

    def _lay_out_slots(self) -> list[Action]:
        """Another number of slots puts every delta elsewhere: begin at a snapshot, then clear the old ones."""
        prefix = f"{topics.root(self.settings.federation)}/all/delta/"
        changed = Save(record=records.SlotsChanged(slots=self.settings.downlink.slots))
        self.published.slots = self.settings.downlink.slots
        snapshot = self.snapshot()
        old = [topic for topic in sorted(self.published.sizes) if topic.startswith(prefix)]
        return [changed, *snapshot, *self._retain(_cleared(old))]

    def _delta_topics(self, version: int) -> list[str]:
        """The topics of the parts that are retained in a version's slot."""
        slot = version % self.settings.downlink.slots
        return self._parts_in(lambda part: topics.delta(self.settings.federation, slot, part))

    def _parts_in(self, topic_of: Callable[[int], str]) -> list[str]:
        found: list[str] = []
        while (topic := topic_of(len(found))) in self.published.sizes:
            found.append(topic)
        return found

    def _entry(
        self, updates: tuple[Contribution, ...], sets: tuple[MergedSet, ...] = (), rollback: int | None = None
    ) -> Signed:
        """The entry in the log of merges for the version that was just made."""
        model, dropped = self.model, tuple(self.dropped)
        previous = self.published.log_hash
        entry = self.frames.entry(
            model.version, model.digest, previous, updates=updates, sets=sets, dropped=dropped, rollback=rollback
        )
        self.published.log_hash = entry.hash
        self.dropped.clear()
        return entry

    def _build_head(self) -> tuple[Reserved, Message]:
        return self.frames.head(
            version=self.model.version,
            digest=self.model.digest,
            snapshot=self.published.snapshot,
            state=self.published.state,
            plan=self._plan(),
            asked=self.asked,
        )

    def _plan(self) -> Mapping[str, Any]:
        if self.private is not None:
            return self.private.plan(self.model.version)
        return {**self.settings.published_plan, **self.search.plan(self.model.version)}

    def _head(self) -> tuple[Reserved, list[Message]]:
        """The head, behind the terms that it names, where these are new."""
        reserved, messages = ((), []) if self.private is None else self._terms(self.private)
        reserved_head, head = self._build_head()
        self.published.head_frame = head[1]
        return (*reserved, *reserved_head), [*messages, head]

    def _terms(self, private: PrivateTerms) -> tuple[Reserved, list[Message]]:
        """The newest version's terms, unless the broker was given them, in parts of a size that it takes."""
        saved = private.begin(self.model)
        begun, held = private.sums.contexts.get(self.model.version), self.terms_topics()
        if begun is None or (
            held
            and private.retained == begun.terms_digest
            and all(self.published.sizes[topic] <= self.frames.frame_bytes for topic in held)
        ):
            return saved, []
        reserved, frames = self.frames.terms(begun.terms_bytes)
        private.retained, self.published.terms_seq = begun.terms_digest, self.frames.seq
        return (*saved, *reserved), [*frames, *_cleared(held[len(frames) :])]

    def _retain(self, frames: list[Message], why: str = CHANGED) -> list[Action]:
        """Make frames durable, then have the broker retain them: all that a device needs, where it may have lost it."""
        actions: list[Action] = [Save(record=records.FramesRetained(frames=tuple(frames)))]
        in_doubt = self.confirm_by is not None
        for topic, payload in frames:
            if payload:
                self.published.sizes[topic] = len(payload)
            else:
                self.published.sizes.pop(topic, None)
            if not (payload and in_doubt):
                actions.append(Publish(topic=topic, payload=payload, retain=True))
        if in_doubt:
            actions += self.republish(why)
        return actions


def _cleared(retained: Iterable[str]) -> list[Message]:
    """Messages without a payload, which have the broker forget what it retains."""
    return [(topic, b"") for topic in retained]
