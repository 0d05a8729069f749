"""The merge log: one signed entry for each version, with the hash of the entry before it (docs/log.md).

This module encodes and checks entries, and finds traces of tampering in a whole log. It neither stores nor makes logs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from typing import Any, Final, Self

import msgpack

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import meta_fields
from ternbus.broker.protocol.frame import SIGNATURE_BYTES
from ternbus.broker.protocol.identity import Identity, KeyId, is_federation, verify
from ternbus.broker.protocol.messages import RESTORE_LEAP
from ternbus.broker.protocol.packed import NO_EXTENSIONS

SIGNED_PREFIX: Final = b"ternbus/1 log\0"
FIRST: Final = bytes(32)  # the previous hash in the first entry
UNKNOWN_DIGEST: Final = bytes(32)  # of an update that was accepted before its aggregator kept a log
ENTRY_BYTES_MAX: Final = 2**28  # enough for millions of updates in one merge
REASON_BYTES_MAX: Final = 200
CONTAINER_BYTES_MIN: Final = 40  # of a set, which is two arrays and its members; an update has more
_KEYS: Final = ("federation", "version", "digest", "previous", "updates")
_PRIVATE_KEYS: Final = (*_KEYS, "sets", "dropped")  # of a version of private sums that has either
_ROLLBACK_KEYS: Final = (*_KEYS, "rollback")  # of a version that is an earlier one again, or a model from elsewhere
ROLLBACK_MAX: Final = 65_536  # versions that a rollback leaves out at most: the slots of deltas, and one
OTHER_MODEL: Final = -1  # in place of the version that a rollback goes back to


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """An update in a merge. ``weight`` is the factor of its block in the merge, 0 if it was left out.

    Under a coordinate-wise rule, ``weight`` is the mean weight over the coordinates.
    """

    device: str
    key: KeyId
    seq: int
    digest: bytes
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateMember:
    """A private update in a set, or one that was dropped. ``digest`` is that of its message."""

    device: str
    key: KeyId
    seq: int
    digest: bytes

    @property
    def row(self) -> list[object]:
        return [self.device, bytes(self.key), self.seq, self.digest]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedSet:
    """A set of private updates in a merge, of which only the sum is known. ``weight`` is the factor of its block."""

    digest: bytes  # its name, as helpers are asked by
    context: bytes
    base: int
    weight: float
    members: tuple[PrivateMember, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedUpdate:
    """A private update that was accepted, and that no version contains; ``reason`` begins with a word for programs."""

    update: PrivateMember
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The updates in one merge. ``digest`` is the model's, as in a head; ``previous`` is the hash of the last entry."""

    federation: str
    version: int
    digest: bytes
    previous: bytes
    updates: tuple[Contribution, ...] = ()
    sets: tuple[MergedSet, ...] = ()
    dropped: tuple[DroppedUpdate, ...] = ()  # since the entry before
    rollback: int | None = None  # the version whose model this is again; `OTHER_MODEL`: that of a file

    @property
    def members(self) -> Iterator[PrivateMember]:
        """The updates in its sets."""
        return (member for each in self.sets for member in each.members)

    @property
    def named(self) -> Iterator[tuple[str, KeyId, int, bytes]]:
        """(device, key id, seq, digest of the message) of every update in the version."""
        yield from ((each.device, each.key, each.seq, each.digest) for each in self.updates)
        yield from ((each.device, each.key, each.seq, each.digest) for each in self.members)

    @property
    def weight(self) -> float:
        """The sum of all weights."""
        return sum(each.weight for each in self.updates) + sum(each.weight for each in self.sets)

    @property
    def is_late_beginning(self) -> bool:
        """Whether the log begins here with another version than 0: the aggregator kept none before."""
        return self.previous == FIRST and self.version > 0

    def content(self) -> bytes:
        """The canonical encoding of this entry."""
        values = [self.federation, self.version, self.digest, self.previous]
        rows = [[each.device, bytes(each.key), each.seq, each.digest, float(each.weight)] for each in self.updates]
        fields = dict(zip(_KEYS, [*values, rows], strict=True))
        if self.sets or self.dropped:
            fields["sets"] = [
                [each.digest, each.context, each.base, float(each.weight), [member.row for member in each.members]]
                for each in self.sets
            ]
            fields["dropped"] = [[*each.update.row, each.reason] for each in self.dropped]
        if self.rollback is not None:
            fields["rollback"] = self.rollback
        return bytes(msgpack.packb(fields))

    def signed(self, identity: Identity) -> "Signed":
        content = self.content()
        return Signed(content=content, signature=identity.sign(SIGNED_PREFIX + content))

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Decode an entry; ProtocolError unless the bytes are its canonical encoding."""
        try:
            fields = _unpacked(content)
        except (msgpack.UnpackException, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ProtocolError("bad-entry", "the entry is not msgpack") from error
        if not isinstance(fields, dict) or tuple(fields) not in {_KEYS, _PRIVATE_KEYS, _ROLLBACK_KEYS}:
            raise ProtocolError("bad-entry", f"the entry is not a map of {', '.join(_KEYS)}, and what may follow")
        federation = meta_fields.text(fields, "federation")
        rows, sets, dropped = (fields.get(key, []) for key in ("updates", "sets", "dropped"))
        if not is_federation(federation) or not all(isinstance(each, list) for each in (rows, sets, dropped)):
            raise ProtocolError("bad-entry", "'federation' is not a valid name, or what was merged is not a list")
        entry = cls(
            federation=federation,
            version=meta_fields.integer(fields, "version"),
            digest=meta_fields.binary(fields, "digest", 32),
            previous=meta_fields.binary(fields, "previous", 32),
            updates=tuple(map(_contribution, rows)),
            sets=tuple(map(_set, sets)),
            dropped=tuple(map(_dropped, dropped)),
            rollback=meta_fields.integer(fields, "rollback", OTHER_MODEL) if "rollback" in fields else None,
        )
        if entry.content() != content or (entry.rollback is not None and entry.updates):
            raise ProtocolError("bad-entry", "the encoding of the entry is not canonical, or a rollback with updates")
        return entry


def _unpacked(content: bytes) -> Any:
    """The value in an entry's bytes; ValueError for more maps and arrays than an entry of that length can have.

    An empty map is one byte, and 72 when it is decoded: a file of 100 MB could take all memory.
    """
    left = 4 + len(content) // CONTAINER_BYTES_MIN  # the map, its three lists, and what is in them

    def counted(value: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("more maps and arrays than an entry can have")
        return value

    return msgpack.unpackb(content, strict_map_key=False, object_hook=counted, list_hook=counted, **NO_EXTENSIONS)


def _contribution(row: object) -> Contribution:
    if not isinstance(row, list) or len(row) != 5:
        raise ProtocolError("bad-entry", "an update is not [device, key, seq, digest, weight]")
    about = dict(zip(("device", "key", "seq", "digest", "weight"), row, strict=True))
    return Contribution(
        device=meta_fields.device(about),
        key=KeyId(meta_fields.binary(about, "key", 8)),
        seq=meta_fields.integer(about, "seq"),
        digest=meta_fields.binary(about, "digest", 32),
        weight=meta_fields.number(about, "weight"),
    )


def _set(row: object) -> MergedSet:
    if not isinstance(row, list) or len(row) != 5 or not isinstance(row[4], list) or not row[4]:
        raise ProtocolError("bad-entry", "a set is not [digest, context, base, weight, members]")
    about = dict(zip(("digest", "context", "base", "weight"), row[:4], strict=True))
    return MergedSet(
        digest=meta_fields.binary(about, "digest", 32),
        context=meta_fields.binary(about, "context", 32),
        base=meta_fields.integer(about, "base"),
        weight=meta_fields.number(about, "weight"),
        members=tuple(map(_member, row[4])),
    )


def _dropped(row: object) -> DroppedUpdate:
    if not isinstance(row, list) or len(row) != 5:
        raise ProtocolError("bad-entry", "a dropped update is not [device, key, seq, digest, reason]")
    reason = meta_fields.line({"reason": row[4]}, "reason", REASON_BYTES_MAX)
    return DroppedUpdate(update=_member(row[:4]), reason=reason)


def _member(row: object) -> PrivateMember:
    if not isinstance(row, list) or len(row) != 4:
        raise ProtocolError("bad-entry", "an update is not [device, key, seq, digest]")
    about = dict(zip(("device", "key", "seq", "digest"), row, strict=True))
    return PrivateMember(
        device=meta_fields.device(about),
        key=KeyId(meta_fields.binary(about, "key", 8)),
        seq=meta_fields.integer(about, "seq"),
        digest=meta_fields.binary(about, "digest", 32),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """An entry's bytes and the aggregator's signature over them."""

    content: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    @property
    def hash(self) -> bytes:
        """BLAKE2b-256 of the content, which the next entry contains as ``previous``."""
        return blake2b(self.content, digest_size=32).digest()

    def pack(self) -> bytes:
        return bytes(msgpack.packb([self.content, self.signature]))


def unpack(packed: bytes) -> Signed:
    """Decode the result of ``pack``; ProtocolError for anything else."""
    entries = list(unpack_all([packed]))
    if len(entries) != 1:
        raise ProtocolError("bad-log", f"{len(entries)} entries instead of one")
    return entries[0]


def unpack_all(chunks: Iterable[bytes]) -> Iterator[Signed]:
    """The entries of a log, from chunks that are cut anywhere; ProtocolError at the first that cannot be decoded."""
    unpacker = msgpack.Unpacker(
        max_buffer_size=ENTRY_BYTES_MAX, max_array_len=2, max_map_len=0, max_str_len=0, **NO_EXTENSIONS
    )
    start = size_bytes = 0
    try:
        for chunk in chunks:
            unpacker.feed(chunk)
            size_bytes += len(chunk)
            for found in unpacker:
                yield _signed(found, start)
                start = unpacker.tell()
        if size_bytes != start:
            raise ProtocolError("bad-log", f"the log ends inside the entry that begins at byte {start}")
    except (msgpack.UnpackException, ValueError, TypeError, RecursionError) as error:
        raise ProtocolError("bad-log", f"no valid entry at byte {start}; the rest cannot be read") from error


def _signed(found: Any, start: int) -> Signed:
    match found:
        case [bytes(content), bytes(signature)] if len(signature) == SIGNATURE_BYTES:
            return Signed(content=content, signature=signature)
        case _:
            raise ProtocolError("bad-log", f"no valid entry at byte {start}; the rest cannot be read")


@dataclass(frozen=True, slots=True)
class _Link:
    """The parts of an entry that the check of the chain needs."""

    previous: bytes
    hash: bytes
    digest: bytes
    genuine: bool
    rollback: int | None


@dataclass(slots=True, kw_only=True)
class Audit:
    """Checks the entries of a log, in the order of the log, against the aggregator's key ``public``."""

    public: bytes
    federation: str = ""  # the expected federation; by default that of the first genuine entry
    faults: list[str] = field(default_factory=list)
    entries: int = 0
    updates: int = 0
    size_bytes: int = 0
    _links: dict[int, _Link] = field(default_factory=dict)
    _highest: int = -1
    _private: set[tuple[str, KeyId, int]] = field(default_factory=set)  # private updates, merged or dropped

    def take(self, signed: Signed) -> Entry | None:
        """Check the next entry by itself and note its faults; return the entry if it is genuine."""
        self.entries += 1
        self.size_bytes += len(signed.pack())
        try:
            entry = Entry.parse(signed.content)
        except ProtocolError as error:
            self.faults.append(f"entry {self.entries} is damaged: {error.detail}")
            return None
        self.updates += sum(1 for _ in entry.named)
        genuine = self._is_genuine(entry, signed)
        if entry.version in self._links:
            self.faults.append(f"version {entry.version} is in the log twice, the second time as entry {self.entries}")
            return None
        self._look_twice(entry)
        if entry.version < self._highest:
            self.faults.append(f"version {entry.version} comes after version {self._highest}: the order was changed")
        self._highest = max(self._highest, entry.version)
        self._links[entry.version] = _Link(entry.previous, signed.hash, entry.digest, genuine, entry.rollback)
        return entry if genuine else None

    def _look_twice(self, entry: Entry) -> None:
        """An accepted private update is in one set of one version, or in none and dropped once."""
        for update in (*entry.members, *(each.update for each in entry.dropped)):
            if (name := (update.device, update.key, update.seq)) in self._private:
                self.faults.append(f"version {entry.version} has update {update.seq} of {update.device} once more")
            self._private.add(name)

    def _is_genuine(self, entry: Entry, signed: Signed) -> bool:
        try:
            verify(self.public, SIGNED_PREFIX + signed.content, signed.signature)
        except ProtocolError:
            self.faults.append(f"version {entry.version} was changed, or another key signed it")
            return False
        self.federation = self.federation or entry.federation
        if entry.federation != self.federation:
            self.faults.append(f"version {entry.version} belongs to the federation {entry.federation!r}")
            return False
        return True

    def finish(self, head: tuple[int, bytes | None] | None = None) -> list[str]:
        """Check the chain and return all faults. ``head``, a published version and its digest, must be in the log."""
        if not self._links:
            self.faults.append("the log has no entry")
            return self.faults
        versions = sorted(self._links)
        first = self._links[versions[0]]
        if not (first.previous == FIRST if first.genuine else versions[0] == 0):
            self.faults.append(f"the log begins with version {versions[0]}: earlier entries were removed")
        for before, after in pairwise(versions):
            self._compare(before, after)
        if head is not None:
            self._look_for(*head)
        return self.faults

    def _compare(self, before: int, after: int) -> None:
        """Check that two neighbouring entries are consecutive, and note a fault if they are not."""
        earlier, later = self._links[before], self._links[after]
        fits = later.previous == earlier.hash
        leaps = fits and (self._goes_back(before, after) or (after - before) % RESTORE_LEAP == 0)
        if after != before + 1 and not leaps:
            gap = f"version {before + 1} is" if after == before + 2 else f"versions {before + 1} to {after - 1} are"
            self.faults.append(f"{gap} missing")
        elif not fits and earlier.genuine and later.genuine:
            self.faults.append(f"version {after} was made after a different version {before} than the one in the log")

    def _goes_back(self, before: int, after: int) -> bool:
        """Whether the later entry is of a rollback; one to a version with another model is a fault."""
        to, later = self._links[after].rollback, self._links[after]
        if to is None:
            return False
        if to > before or (to in self._links and self._links[to].digest != later.digest):
            self.faults.append(f"version {after} claims to be version {to} again, and is not")
        return after - before <= ROLLBACK_MAX

    def _look_for(self, version: int, digest: bytes | None) -> None:
        if version > self._highest:
            self.faults.append(
                f"the log ends with version {self._highest}, but version {version} was published: "
                "it was exported earlier, or its end was removed: export it again"
            )
        elif version not in self._links:
            self.faults.append(f"version {version} was published, but is not in the log")
        elif digest is not None and self._links[version].digest != digest:
            self.faults.append(f"version {version} was published with another digest than in the log")

    @property
    def readable(self) -> bool:
        """Whether the log has an entry that could be decoded."""
        return bool(self._links)

    @property
    def begins(self) -> int:
        """The version of the oldest entry; there must be one. Above 0 the aggregator kept no log of what was before."""
        return min(self._links)

    @property
    def last(self) -> tuple[int, bytes, bytes]:
        """(version, the model's digest, the entry's hash) of the newest entry; only if ``readable``."""
        link = self._links[self._highest]
        return self._highest, link.digest, link.hash
