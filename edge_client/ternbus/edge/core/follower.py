"""Following the model: head, snapshot and deltas to the vector of a version, bit for bit.

Knows nothing of who may be believed: the frames that it is given are authentic, and the head is accepted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.messages import Delta, Head, Snapshot
from ternbus.broker.protocol.parts import Collector
from ternbus.broker.protocol.schema import Schema, Vector, to_vector, vector_digest, vector_of
from ternbus.broker.protocol.ternary import Block, decode
from ternbus.broker.protocol.topics import Address
from ternbus.edge.core.actions import Action, Log, Unsubscribe
from ternbus.edge.core.part_requests import PartRequests

GRACE_S: Final = 1.0  # what comes by itself, by the subscription to all deltas, is not asked for by name
REST_S: Final = 60.0
EARLY_MAX: Final = 64  # parts of deltas that came before the first head
MESSAGES_MAX: Final = 64
BYTES_MAX: Final = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    """A snapshot that is being fetched: the one that a head names, or whatever lies in the other place."""

    place: int
    named: int | None  # its version


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    seq: int
    parts: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Beginning:
    """Version 0 as a device's own task makes it: where the federation began with the same, nobody has to send it."""

    tensors: Mapping[str, npt.NDArray[np.float32]] = field(repr=False)

    def under(self, schema_digest: bytes) -> tuple[Schema, Vector] | None:
        """As schema and vector, if the federation's schema is one that it fits: by name, as in a file, or as it is."""
        for names in (sorted(self.tensors), list(self.tensors)):
            schema = Schema.of({name: self.tensors[name].shape for name in names})
            if schema.digest == schema_digest:
                return schema, to_vector(schema, self.tensors)
        return None


@dataclass(slots=True, kw_only=True)
class Follower:
    """The vector of version ``version``, and how to get from there to the head."""

    federation: str
    beginning: Beginning | None = None  # until the first head
    head: Head | None = None
    version: int | None = None
    vector: Vector | None = None
    schema: Schema | None = None
    digest: bytes = b""
    asking: PartRequests = field(default_factory=PartRequests)
    _collector: Collector = field(default_factory=lambda: Collector(MESSAGES_MAX, BYTES_MAX))
    _deltas: dict[int, tuple[Delta, bytes]] = field(default_factory=dict)  # whole, above version
    _seen: dict[int, _Seen] = field(default_factory=dict)  # deltas of which a part has come
    _early: list[tuple[str, Frame]] = field(default_factory=list)
    _attempt: _Attempt | None = None
    _tried: bool = False  # a snapshot since this head was accepted
    _rest_until_s: float | None = None
    _missing_since_s: float | None = None
    guessed: bool = False  # the vector is the task's own beginning, and no digest has confirmed it yet

    @property
    def synced(self) -> bool:
        """Whether the vector is the head's."""
        return self.head is not None and self.version == self.head.version

    def reconnected(self, now: float) -> list[Action]:
        if self._missing_since_s is not None:
            self._missing_since_s = now
        return [*self.asking.reconnected(now)]

    def disconnected(self) -> None:
        self.asking.connected = False

    def head_accepted(self, head: Head, now: float) -> list[Action]:
        self.head = head
        self._tried = False
        self._rest_until_s = None
        self._collector.bytes_max = max(BYTES_MAX, 2 * head.snapshot.content_bytes + 2**20)
        self._begin(head)
        actions: list[Action] = []
        early, self._early = self._early, []
        for topic, frame in early:
            try:
                actions += self.part_arrived(topic, frame, now)
            except ProtocolError:
                continue  # found in a slot that is not its own
        if self.vector is None and (self._attempt is None or self._overwritten(head)):
            actions += self._fetch_snapshot(now)
        return [*actions, *self._advance(now)]

    def _begin(self, head: Head) -> None:
        """Start from the task's own version 0 while every delta since is kept; their digests tell whether it is ours.

        From a later snapshot on fetching that one is as cheap, and it is certain.
        """
        beginning, self.beginning = self.beginning, None
        if beginning is None or head.snapshot.version != 0:
            return
        found = beginning.under(head.schema)
        if found is not None:
            (self.schema, self.vector), self.version = found, 0
            self.digest, self.guessed = vector_digest(self.vector), True

    def part_arrived(self, topic: str, frame: Frame, now: float) -> list[Action]:
        """Take in a part of a snapshot or delta; raise ProtocolError for one that has no business where it was."""
        address = topics.parse(topic)
        if frame.kind == Delta.KIND:
            return self._delta_arrived(topic, address, frame, now)
        return self._snapshot_arrived(topic, address, frame, now)

    def due_s(self) -> float | None:
        """When ``time_reached`` has something to do."""
        times = [self._rest_until_s, self.asking.due_s()]
        if self._missing_since_s is not None and not self.asking:
            times.append(self._missing_since_s + GRACE_S)
        return min((time for time in times if time is not None), default=None)

    def time_reached(self, now: float) -> list[Action]:
        due = self.due_s()
        if due is None or due > now:
            return []
        if self._rest_until_s is not None and self._rest_until_s <= now:
            return self._fetch_snapshot(now)
        if not self.asking:
            return self._ask_for_deltas(now)
        if self.vector is not None:
            return self._lose("a delta did not come", now)
        return self._snapshot_failed("the snapshot did not come", now)

    # -- deltas

    def _delta_arrived(self, topic: str, address: Address, frame: Frame, now: float) -> list[Action]:
        delta = Delta.from_meta(frame.meta)
        head = self.head
        if head is None:
            self._early = [*self._early[-EARLY_MAX + 1 :], (topic, frame)]
            return []
        if delta.version % head.slots != address.slot:
            raise ProtocolError("wrong-slot", f"the delta of version {delta.version} in slot {address.slot}")
        if delta.version > head.version + head.slots:
            raise ProtocolError("far-ahead", f"the delta of version {delta.version}, the head is {head.version}")
        if delta.version <= self._floor(head) or delta.version in self._deltas:
            return []
        self._seen[delta.version] = _Seen(seq=frame.seq, parts=frame.parts)
        whole = self._collector.add(frame)
        actions: list[Action] = []
        asked = topic in self.asking
        if asked and delta.version <= head.version:
            actions += self.asking.came(topic, now)
        if whole is not None:
            self._deltas[delta.version] = (delta, whole.body)
            actions += self._advance(now)
        elif asked:
            actions += self._ask_for_deltas(now)
        return actions

    def _floor(self, head: Head) -> int:
        return self.version if self.version is not None else head.snapshot.version

    def _advance(self, now: float) -> list[Action]:
        """Apply what has come, and see what is missing."""
        head = self.head
        if head is None or self.vector is None or self.version is None:
            return []
        while self.version < head.version and (found := self._deltas.pop(self.version + 1, None)):
            fault = self._apply(*found)
            if fault:
                return self._lose(fault, now)
        for mapping in (self._deltas, self._seen):
            for version in [version for version in mapping if version <= self.version]:
                mapping.pop(version)
        if self.version == head.version:
            if self.digest != head.digest:
                return self._lose("the digest is not the head's", now)
            self._missing_since_s, self.guessed = None, False
            return [*self.asking.drop()]
        if not self.version < head.version <= self.version + head.slots:
            return self._lose(f"version {self.version} is too far from the head", now)
        if self._missing_since_s is None:
            self._missing_since_s = now
        return []

    def _apply(self, delta: Delta, body: bytes) -> str:
        """Turn the vector into the next version's; what was wrong, or nothing."""
        assert self.schema is not None  # noqa: S101 - there is no vector without one
        assert self.vector is not None  # noqa: S101 - as above
        try:
            vector = Block.read(self.schema, delta.codec, delta.encoding, body).apply(self.vector)
        except ProtocolError as error:
            return f"the delta of version {delta.version} is malformed ({error})"
        if vector_digest(vector) != delta.digest:
            return f"the digest after the delta of version {delta.version} differs"
        self.vector, self.version, self.digest, self.guessed = vector, delta.version, delta.digest, False
        return ""

    def _ask_for_deltas(self, now: float) -> list[Action]:
        head = self.head
        if head is None or self.version is None:
            return []
        self._missing_since_s = now
        wanted = [
            topics.delta(self.federation, version % head.slots, part)
            for version in range(self.version + 1, head.version + 1)
            if version not in self._deltas
            for part in self._parts_missing(version)
        ]
        return [*self.asking.want(wanted, now)]

    def _parts_missing(self, version: int) -> list[int]:
        """Which parts to ask for; how many there are is not known before one has come."""
        seen = self._seen.get(version)
        return (self._collector.missing(Delta.KIND, seen.seq) if seen else []) or [0]

    def _lose(self, reason: str, now: float) -> list[Action]:
        """The vector is of no use: begin again from a snapshot."""
        fields = {"version": self.version, "reason": reason}
        log = Log(event="resync", text=f"starting again from a snapshot: {reason}", fields=fields)
        if self.guessed:
            log = Log(event="other-beginning", text="the federation began with another model than the task's own")
        self.vector, self.version, self.guessed = None, None, False
        self._missing_since_s = None
        if self._tried:
            return [log, *self._rest(now)]
        return [log, *self._fetch_snapshot(now)]

    # -- snapshots

    def _overwritten(self, head: Head) -> bool:
        """Whether the snapshot that is being fetched gives way to the one that this head names."""
        attempt = self._attempt
        return attempt is not None and attempt.place == head.snapshot.place and attempt.named != head.snapshot.version

    def _fetch_snapshot(self, now: float) -> list[Action]:
        assert self.head is not None  # noqa: S101 - only a head makes it wanted
        named = self.head.snapshot
        self._tried = True
        self._rest_until_s = None
        self._attempt = _Attempt(place=named.place, named=named.version)
        wanted = [topics.snapshot(self.federation, named.place, part) for part in range(named.parts)]
        return [*self.asking.drop(), *self.asking.want(wanted, now)]

    def _snapshot_failed(self, reason: str, now: float) -> list[Action]:
        """Try what lies in the other place; then rest."""
        attempt = self._attempt
        if attempt is None or attempt.named is None:
            return self._rest(now)
        log = Log(event="snapshot-failed", text=f"trying the other snapshot: {reason}", fields={"reason": reason})
        self._attempt = _Attempt(place=1 - attempt.place, named=None)
        first = topics.snapshot(self.federation, 1 - attempt.place, 0)
        return [log, *self.asking.drop(), *self.asking.want([first], now)]

    def _rest(self, now: float) -> list[Action]:
        self._attempt = None
        self._rest_until_s = now + REST_S
        log = Log(event="resting", text=f"the model cannot be followed; next try at a new head or in {REST_S:.0f} s")
        return [log, *self.asking.drop()]

    def _snapshot_arrived(self, topic: str, address: Address, frame: Frame, now: float) -> list[Action]:
        attempt, head = self._attempt, self.head
        if topic not in self.asking or attempt is None or head is None:
            # Nobody asked in this life: a session that outlived a crash still carries the subscription.
            return [Unsubscribe(filters=(topic,))] if self.asking.connected else []
        snapshot = Snapshot.from_meta(frame.meta)
        whole = self._collector.add(frame)
        actions: list[Action] = []
        if attempt.named in {None, snapshot.version}:
            actions += self.asking.came(topic, now)
            rest = [topics.snapshot(self.federation, attempt.place, part) for part in range(frame.parts)]
            if attempt.named is None and address.part == 0:
                actions += self.asking.want(rest[1:], now)
        if whole is None or snapshot.version > head.version:
            return actions
        try:
            self._adopt(snapshot, whole.body, head)
        except ProtocolError as error:
            return [*actions, *self._snapshot_failed(str(error), now)]
        self._attempt = None
        fields = {"version": snapshot.version, "parts": whole.parts}
        log = Log(event="snapshot", text=f"took the snapshot of version {snapshot.version}", fields=fields)
        return [*actions, log, *self.asking.drop(), *self._advance(now)]

    def _adopt(self, snapshot: Snapshot, body: bytes, head: Head) -> None:
        # The schema is fixed, so every snapshot of a federation is as long as the one that the head names.
        content = decode(body, snapshot.encoding, head.snapshot.content_bytes)
        schema = Schema.parse(content[: snapshot.schema_bytes])
        if schema.digest != head.schema:
            raise ProtocolError("bad-snapshot", "its schema is not the head's")
        vector = vector_of(content[snapshot.schema_bytes :], schema)
        if vector_digest(vector) != snapshot.digest:
            raise ProtocolError("bad-snapshot", "its digest differs")
        self.schema, self.vector = schema, vector
        self.version, self.digest = snapshot.version, snapshot.digest
