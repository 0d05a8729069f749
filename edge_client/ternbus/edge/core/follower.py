"""The follower of the model: it computes the vector of a version, bit for bit, from head, snapshot and deltas.

It verifies digests only: the core has verified the signatures of its frames, and has accepted the head.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

import numpy as np
import numpy.typing as npt

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.model_messages import Delta, Head, Snapshot
from ternbus.broker.protocol.parts import Collector, parts_max
from ternbus.broker.protocol.schema import Schema, Vector, to_vector, vector_digest, vector_of, vector_xxh3
from ternbus.broker.protocol.ternary import Block, decode
from ternbus.broker.protocol.topics import Address
from ternbus.edge.core.actions import Action, Log, Unsubscribe
from ternbus.edge.core.part_requests import PartRequests

HEAD_S: Final = 0.05  # for the head that comes after a delta
OCCUPIED_S: Final = 0.25  # for the next version, or whatever else happens, while nobody needs the newest one
GRACE_S: Final = 1.0  # for deltas to arrive through the common subscription, before parts are requested by name
OTHER_BEGINNING: Final = (  # for example with one that was trained elsewhere
    "the federation began with another model than the task's initial one; nothing to do: the device fetches it"
)
RETRY_S: Final = 60.0  # until the next attempt, after all snapshots failed
BEFORE_HEAD_MAX: Final = 64  # parts of deltas kept until the first head
MESSAGES_MAX: Final = 64
REQUESTED_MAX: Final = 1000  # parts of deltas that are requested at a time; the next ones when they have arrived
DELTAS_MAX: Final = 64  # applied up to a snapshot; beyond that the snapshot is smaller than the deltas
BYTES_MAX: Final = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class _SnapshotFetch:
    """The snapshot that is being fetched: the one that a head names, or the one in the other place."""

    place: int
    version: int | None  # None: the other place's, which is unknown


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InitialModel:
    """Version 0 as made by the device's task: if the federation began with the same model, no download is needed."""

    tensors: Mapping[str, npt.NDArray[np.float32]] = field(repr=False)

    def for_schema(self, schema_digest: bytes) -> tuple[Schema, Vector] | None:
        """Schema and vector, if the schema of the tensors, in their order or sorted by name, has this digest."""
        for names in (sorted(self.tensors), list(self.tensors)):
            schema = Schema.of({name: self.tensors[name].shape for name in names})
            if schema.digest == schema_digest:
                return schema, to_vector(schema, self.tensors)
        return None


@dataclass(slots=True, kw_only=True)
class Follower:
    """The vector of ``version``, and the requests for the missing parts up to the head's version."""

    federation: str
    initial_model: InitialModel | None = None  # until the first head
    schema_bytes_max: int = BYTES_MAX
    is_private: bool = False  # updates are private: their context names the version's digest
    head: Head | None = None
    version: int | None = None
    vector: Vector | None = None
    schema: Schema | None = None
    digest: bytes = b""
    requests: PartRequests = field(default_factory=PartRequests)
    _delta_prefix: str = field(init=False)
    _collector: Collector = field(default_factory=lambda: Collector(MESSAGES_MAX, BYTES_MAX))
    _deltas: dict[int, tuple[Delta, bytes]] = field(default_factory=dict)  # complete ones, above version
    _delta_bytes: int = 0  # in all of them
    _delta_seqs: dict[int, int] = field(default_factory=dict)  # by version, of deltas with a part that has arrived
    _before_head: list[tuple[str, Frame]] = field(default_factory=list)  # parts of deltas
    _fetch: _SnapshotFetch | None = None
    _fetched_since_head: bool = False  # whether a snapshot was fetched since this head was accepted
    _retry_due_s: float | None = None
    _missing_since_s: float | None = None
    unconfirmed: bool = False  # the vector is the task's initial model, and no digest has confirmed it yet
    postpones: bool = False  # nobody needs the vector now: it need not be hashed until `check`
    unchecked: Delta | None = None  # that made the vector, which was not compared with its digest

    def __post_init__(self) -> None:
        self._delta_prefix = f"{topics.root(self.federation)}/all/{Delta.KIND}/"

    @property
    def synced(self) -> bool:
        """Whether the vector is the head's."""
        return self.head is not None and self.version == self.head.version

    def can_wait_s(self, topic: str, *, is_occupied: bool) -> float:
        """How long a message can wait that changes nothing now: a delta before its head, a version while none is used.

        0 where it may change something.
        """
        if not self.synced or self.requests:
            return 0.0
        is_delta = topic.startswith(self._delta_prefix)
        if is_occupied:
            return OCCUPIED_S if is_delta or topic == topics.head(self.federation) else 0.0
        return HEAD_S if is_delta else 0.0

    def reconnected(self, now: float) -> list[Action]:
        if self._missing_since_s is not None:
            self._missing_since_s = now
        return [*self.requests.reconnected(now)]

    def disconnected(self) -> None:
        self.requests.connected = False

    def head_accepted(self, head: Head, now: float) -> list[Action]:
        self.head = head
        self._fetched_since_head = False
        self._retry_due_s = None
        self._collector.bytes_max = max(BYTES_MAX, 2 * head.snapshot.content_bytes + 2**20)
        self._use_initial_model(head)
        actions: list[Action] = []
        before_head, self._before_head = self._before_head, []
        for topic, frame in before_head:
            try:
                actions += self.part_arrived(topic, frame, now)
            except ProtocolError:
                continue  # the slot is not that of its version
        if self.vector is None and (self._fetch is None or self._is_superseded(head)):
            actions += self._fetch_snapshot(now)
        return [*actions, *self._apply_deltas(now)]

    def _use_initial_model(self, head: Head) -> None:
        """Start from the task's initial model if the head's snapshot is version 0; the deltas' digests confirm it.

        If the head names a later snapshot, fetching it is as cheap, and certain.
        """
        initial_model, self.initial_model = self.initial_model, None
        if initial_model is None or head.snapshot.version != 0:
            return
        found = initial_model.for_schema(head.schema)
        if found is not None:
            (self.schema, self.vector), self.version = found, 0
            self.digest, self.unconfirmed = vector_digest(self.vector), True

    def part_arrived(self, topic: str, frame: Frame, now: float) -> list[Action]:
        """Handle a part of a snapshot or delta. Raises `ProtocolError` for a delta in a wrong slot, or far ahead."""
        address = topics.parse(topic)
        if frame.kind == Delta.KIND:
            return self._delta_arrived(topic, address, frame, now)
        return self._snapshot_arrived(topic, address, frame, now)

    def due_s(self) -> float | None:
        """The time at which to call ``time_reached``; None if there is nothing to wait for."""
        times = [self._retry_due_s, self.requests.due_s()]
        if self._missing_since_s is not None and not self.requests:
            times.append(self._missing_since_s + GRACE_S)
        return min((time for time in times if time is not None), default=None)

    def time_reached(self, now: float) -> list[Action]:
        due = self.due_s()
        if due is None or due > now:
            return []
        if self._retry_due_s is not None and self._retry_due_s <= now:
            return self._fetch_snapshot(now)
        if not self.requests:
            return self._request_deltas(now)
        if self.vector is not None:
            return self._resync("a delta did not arrive", now)
        return self._snapshot_failed("the snapshot did not arrive", now)

    # -- deltas

    def _delta_arrived(self, topic: str, address: Address, frame: Frame, now: float) -> list[Action]:
        delta = Delta.from_meta(frame.meta)
        head = self.head
        if head is None:
            self._keep_before_head(topic, frame)
            return []
        if delta.version % head.slots != address.slot:
            raise ProtocolError("wrong-slot", f"the delta of version {delta.version} in slot {address.slot}")
        if delta.version > head.version + head.slots:
            raise ProtocolError("far-ahead", f"the delta of version {delta.version} at head {head.version}")
        check_parts(frame, head)
        if delta.version <= self._base_version(head) or delta.version in self._deltas:
            return []
        self._delta_seqs[delta.version] = frame.seq
        whole = self._collector.add(frame)
        actions: list[Action] = []
        requested = topic in self.requests
        if requested and delta.version <= head.version:
            actions += self.requests.arrived(topic, now)
        if whole is not None:
            self._keep(delta, whole.body)
            actions += self._apply_deltas(now)
        few = len(self.requests) < REQUESTED_MAX // 2 if whole is None else not self.requests  # not at each part anew
        if requested and self.vector is not None and not self.synced and few:
            actions += self._request_deltas(now)
        return actions

    def _keep_before_head(self, topic: str, frame: Frame) -> None:
        """Keep a part of a delta until the first head; beyond the bounds, in number and in bytes, the oldest go."""
        kept = [*self._before_head[-BEFORE_HEAD_MAX + 1 :], (topic, frame)]
        while sum(len(each.body) for _, each in kept) > BYTES_MAX:
            kept.pop(0)
        self._before_head = kept

    def _keep(self, delta: Delta, body: bytes) -> None:
        """Keep a complete delta until its turn; beyond the bound in bytes, the latest versions are dropped."""
        self._deltas[delta.version] = (delta, body)
        self._delta_bytes += len(body)
        while self._delta_bytes > self._collector.bytes_max:
            self._delta_bytes -= len(self._deltas.pop(max(self._deltas))[1])

    def _base_version(self, head: Head) -> int:
        return self.version if self.version is not None else head.snapshot.version

    def _apply_deltas(self, now: float) -> list[Action]:
        """Apply the deltas that have arrived, up to the head's version."""
        head = self.head
        if head is None or self.vector is None or self.version is None:
            return []
        while self.version < head.version and (found := self._deltas.pop(self.version + 1, None)):
            self._delta_bytes -= len(found[1])
            following = found[0].version + 1
            fault = self._apply_delta(*found, is_last=following > head.version or following not in self._deltas)
            if fault:
                return self._resync(fault, now)
        for version in [version for version in self._deltas if version <= self.version]:
            self._delta_bytes -= len(self._deltas.pop(version)[1])
        for version in [version for version in self._delta_seqs if version <= self.version]:
            del self._delta_seqs[version]
        if self.version == head.version:
            if self.digest != head.digest:
                return self._resync(f"the digest of version {head.version} is not the head's", now)
            self._missing_since_s = None
            self.unconfirmed = self.unconfirmed and self.unchecked is not None
            return [*self.requests.cancel()]
        is_far = not self.version < head.version <= self.version + head.slots
        if is_far or (head.snapshot.version > self.version + DELTAS_MAX and not self._fetched_since_head):
            return self._resync(f"version {self.version} is too far from the head", now)
        if self._missing_since_s is None:
            self._missing_since_s = now
        return []

    def _apply_delta(self, delta: Delta, body: bytes, *, is_last: bool) -> str:
        """Update the vector to the next version. Returns the fault of the delta; empty if it was applied.

        Only the last of several is hashed, which takes longer than all else: its digest is right for no wrong vector.
        So it is of versions that come while nobody trains on them: `check` hashes the one that is used.
        """
        assert self.schema is not None  # noqa: S101 - there is no vector without one
        assert self.vector is not None  # noqa: S101 - as above
        try:
            vector = Block.read(self.schema, delta.codec, delta.encoding, body).apply(self.vector)
        except ProtocolError as error:
            return f"the delta of version {delta.version} is malformed ({error})"
        self.vector, self.version, self.digest = vector, delta.version, delta.digest
        self.unchecked = delta
        return "" if self.postpones or not is_last else self._fault()

    def check(self, now: float) -> list[Action]:
        """Compare the vector with its digest, unless that was done; a wrong one is dropped."""
        fault = self._fault()
        return self._resync(fault, now) if fault else []

    def _fault(self) -> str:
        delta, self.unchecked = self.unchecked, None
        if delta is None or self.vector is None:
            return ""
        if not self._is_of(delta, self.vector):
            return f"the digest of version {delta.version} is not that of its delta"
        self.unconfirmed = False
        return ""

    def _is_of(self, delta: Delta, vector: Vector) -> bool:
        """Whether the delta's digest is this vector's: by the checksum where the delta has one, which is quicker.

        The aggregator's signature is on both, so that the checksum need find errors only. The context of a private
        update names ``digest``: there the device believes nothing else. An aggregator could otherwise have one device
        train on another model under the digest of all.
        """
        if delta.xxh3 and not self.is_private:
            return vector_xxh3(vector) == delta.xxh3
        return vector_digest(vector) == delta.digest

    def _request_deltas(self, now: float) -> list[Action]:
        head, version = self.head, self.version
        assert head is not None  # noqa: S101 - without one no delta is missing
        assert version is not None  # noqa: S101 - as above
        self._missing_since_s = now
        missing = (each for each in range(version + 1, head.version + 1) if each not in self._deltas)
        wanted = (
            topics.delta(self.federation, each % head.slots, part)
            for each in islice(missing, MESSAGES_MAX // 2)  # no more than are assembled at a time
            for part in self._parts_missing(each)
        )
        return [*self.requests.request(islice(wanted, REQUESTED_MAX), now)]

    def _parts_missing(self, version: int) -> list[int]:
        """The parts to request: the first, until one has arrived, which has the number of parts."""
        seq = self._delta_seqs.get(version)
        return (self._collector.missing(Delta.KIND, seq) if seq is not None else []) or [0]

    def _resync(self, reason: str, now: float) -> list[Action]:
        """Drop the vector and fetch a snapshot; pause if one was fetched for this head already."""
        fields = {"version": self.version, "reason": reason}
        log = Log(event="resync", text=f"restarting from a snapshot: {reason}", fields=fields)
        if self.unconfirmed:
            log = Log(event="other-beginning", text=OTHER_BEGINNING)
        self.vector, self.version, self.unchecked, self.unconfirmed = None, None, None, False
        self._missing_since_s = None
        if self._fetched_since_head:
            return [log, *self._pause(now)]
        return [log, *self._fetch_snapshot(now)]

    # -- snapshots

    def _is_superseded(self, head: Head) -> bool:
        """Whether the head names another snapshot in the place of the one that is being fetched."""
        fetch = self._fetch
        return fetch is not None and fetch.place == head.snapshot.place and fetch.version != head.snapshot.version

    def _fetch_snapshot(self, now: float) -> list[Action]:
        assert self.head is not None  # noqa: S101 - only a head makes it wanted
        named = self.head.snapshot
        self._fetched_since_head = True
        self._retry_due_s = None
        self._fetch = _SnapshotFetch(place=named.place, version=named.version)
        wanted = [topics.snapshot(self.federation, named.place, part) for part in range(named.parts)]
        return [*self.requests.cancel(), *self.requests.request(wanted, now)]

    def _snapshot_failed(self, reason: str, now: float) -> list[Action]:
        """Fetch the snapshot in the other place; if that failed too, pause."""
        fetch = self._fetch
        if fetch is None or fetch.version is None:
            return self._pause(now)
        log = Log(event="snapshot-failed", text=f"trying the other snapshot: {reason}", fields={"reason": reason})
        self._fetch = _SnapshotFetch(place=1 - fetch.place, version=None)
        first = topics.snapshot(self.federation, 1 - fetch.place, 0)
        return [log, *self.requests.cancel(), *self.requests.request([first], now)]

    def _pause(self, now: float) -> list[Action]:
        self._fetch = None
        self._retry_due_s = now + RETRY_S
        text = f"no snapshot could be loaded; next attempt at a new head or in {RETRY_S:.0f} s"
        log = Log(event="resting", text=text)
        return [log, *self.requests.cancel()]

    def _snapshot_arrived(self, topic: str, address: Address, frame: Frame, now: float) -> list[Action]:
        fetch, head = self._fetch, self.head
        if topic not in self.requests or fetch is None or head is None:
            # An earlier process subscribed to it: the broker keeps the session after a crash.
            return [Unsubscribe(filters=(topic,))] if self.requests.connected else []
        snapshot = Snapshot.from_meta(frame.meta)
        check_parts(frame, head)
        whole = self._collector.add(frame)
        actions: list[Action] = []
        if fetch.version in {None, snapshot.version}:
            actions += self.requests.arrived(topic, now)
            rest = [topics.snapshot(self.federation, fetch.place, part) for part in range(frame.parts)]
            if fetch.version is None and address.part == 0:
                actions += self.requests.request(rest[1:], now)
        if whole is None or snapshot.version > head.version:
            if self.requests:
                return actions
            # The place was given to the next snapshot between two of the parts.
            return [*actions, *self._snapshot_failed("its parts belong to two snapshots, or to a newer one", now)]
        try:
            self._load_snapshot(snapshot, whole.body, head)
        except ProtocolError as error:
            return [*actions, *self._snapshot_failed(str(error), now)]
        self._fetch = None
        fields = {"version": snapshot.version, "parts": whole.parts}
        log = Log(event="snapshot", text=f"loaded the snapshot of version {snapshot.version}", fields=fields)
        return [*actions, log, *self.requests.cancel(), *self._apply_deltas(now)]

    def _load_snapshot(self, snapshot: Snapshot, body: bytes, head: Head) -> None:
        if snapshot.schema_bytes > self.schema_bytes_max:
            raise ProtocolError("bad-snapshot", f"a schema of {snapshot.schema_bytes} bytes")
        # The schema is fixed, so all snapshots of a federation have the length of the one that the head names.
        content = decode(body, snapshot.encoding, head.snapshot.content_bytes)
        schema = Schema.parse(content[: snapshot.schema_bytes])
        if schema.digest != head.schema:
            raise ProtocolError("bad-snapshot", "its schema is not the head's")
        vector = vector_of(content[snapshot.schema_bytes :], schema)
        if vector_digest(vector) != snapshot.digest:
            raise ProtocolError("bad-snapshot", "its vector does not have its digest")
        self.schema, self.vector = schema, vector
        self.version, self.digest, self.unchecked = snapshot.version, snapshot.digest, None


def check_parts(frame: Frame, head: Head) -> None:
    """Raise ProtocolError where a delta or snapshot has more parts than any of this model needs."""
    if frame.parts > parts_max(head.snapshot.content_bytes):
        raise ProtocolError("too-long", f"{frame.parts} parts")
