"""Messages larger than one frame: split into signed parts, and assembled again within bounds on memory."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final

from ternbus.broker.errors import LinkError, ProtocolError
from ternbus.broker.protocol.frame import PARTS_MAX, Frame, build, envelope_bytes
from ternbus.broker.protocol.identity import Identity, KeyId

PART_BYTES_MIN: Final = 1024  # minimum size of every part but the last


def encoded_bytes_max(content_bytes: int) -> int:
    """The maximum length of a body with so many bytes of content, in any encoding."""
    return content_bytes + content_bytes // 256 + 1024


def parts_max(content_bytes: int) -> int:
    """The maximum number of parts of a message with so many bytes of content."""
    return min(PARTS_MAX, 1 + encoded_bytes_max(content_bytes) // PART_BYTES_MIN)


def cut(
    identity: Identity,
    *,
    federation: str,
    sender: str,
    kind: str,
    seq: int,
    meta: Mapping[str, Any],
    body: bytes = b"",
    frame_bytes: int,
) -> list[bytes]:
    """Sign ``body`` as one frame, or as several of at most ``frame_bytes`` bytes; LinkError if that is too small."""
    about: dict[str, Any] = {"federation": federation, "sender": sender, "kind": kind, "seq": seq, "meta": meta}
    room = frame_bytes - envelope_bytes(identity, **about)
    if len(body) <= room:
        return [build(identity, **about, body=body)]
    if room < PART_BYTES_MIN:
        raise LinkError(
            f"frames of {frame_bytes} bytes leave {room} bytes for a part's body, but at least {PART_BYTES_MIN} are "
            "needed; raise the broker's maximum packet size"
        )
    parts = -(-len(body) // room)
    if parts > PARTS_MAX:
        raise LinkError(
            f"{len(body)} bytes need more than {PARTS_MAX} frames of {frame_bytes} bytes; raise the broker's maximum "
            "packet size, and limits.frame_bytes or --frame-bytes"
        )
    return [
        build(identity, **about, body=body[part * room : (part + 1) * room], part=part, parts=parts)
        for part in range(parts)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A complete message, of one part or assembled from all its parts."""

    kind: str
    federation: str
    sender: str
    key: KeyId
    seq: int
    parts: int
    meta: Mapping[str, Any]
    body: bytes
    digest: bytes  # see message_digest
    first_header: bytes  # of part 0, as it was signed
    first_signature: bytes


def header_digest(header: bytes) -> bytes:
    """BLAKE2b-256 of a frame's header, which is signed and contains the digest of the body."""
    return blake2b(header, digest_size=32).digest()


def message_digest(headers: Iterable[bytes]) -> bytes:
    """BLAKE2b-256 of the digests of a message's headers in the order of the parts: it covers all signed bytes."""
    return header_digest(b"".join(map(header_digest, headers)))


@dataclass(slots=True)
class _Assembly:
    parts: int
    came: bytearray  # 1 for each part that is here: what is missing is found without a look at each part
    bodies: dict[int, bytes] = field(default_factory=dict)
    headers: dict[int, bytes] = field(default_factory=dict)  # digests of the headers
    size_bytes: int = 0
    first: tuple[bytes, bytes] = (b"", b"")  # header and signature of part 0


@dataclass(slots=True)
class Collector:
    """Assembles the messages of one sender from their parts; beyond the bounds, the oldest messages are dropped."""

    messages_max: int
    bytes_max: int
    dropped: int = 0
    size_bytes: int = 0
    _assemblies: OrderedDict[tuple[KeyId, str, int, int, bytes], _Assembly] = field(default_factory=OrderedDict)

    def add(self, frame: Frame) -> Whole | None:
        """Add an authentic frame; return the message if this was its last missing part.

        ProtocolError for a part that is too short or too long.
        """
        if frame.parts == 1:
            return whole(frame)
        if frame.part < frame.parts - 1 and len(frame.body) < PART_BYTES_MIN:
            raise ProtocolError("short-part", f"part {frame.part} of {frame.parts} has {len(frame.body)} bytes")
        if len(frame.body) > self.bytes_max:
            raise ProtocolError("too-long", f"a part has more than {self.bytes_max} bytes")
        name = _name(frame)
        assembly = self._assemblies.get(name)
        if assembly is None:
            assembly = self._assemblies[name] = _Assembly(frame.parts, bytearray(frame.parts))
        if frame.part in assembly.bodies:
            return None  # the first copy of a part wins
        assembly.came[frame.part] = 1
        assembly.bodies[frame.part] = frame.body
        assembly.headers[frame.part] = header_digest(frame.header)
        if frame.part == 0:
            assembly.first = frame.header, frame.signature
        assembly.size_bytes += len(frame.body)
        self.size_bytes += len(frame.body)
        if len(assembly.bodies) == frame.parts:
            self._forget(name)
            body = b"".join(assembly.bodies[part] for part in range(frame.parts))
            headers = b"".join(assembly.headers[part] for part in range(frame.parts))
            return _whole(frame, body, headers, assembly.first)
        while len(self._assemblies) > self.messages_max or self.size_bytes > self.bytes_max:
            self._forget(next(iter(self._assemblies)))
            self.dropped += 1
        return None

    def lacks_only(self, frame: Frame) -> bool:
        """Whether this part is the last missing part of its message."""
        assembly = self._assemblies.get(_name(frame))
        return assembly is not None and len(assembly.bodies) == frame.parts - 1 and frame.part not in assembly.bodies

    def missing(self, kind: str, seq: int) -> list[int]:
        """The missing parts of a partly received message; empty if none has arrived."""
        return [part for first, last in self.missing_ranges(kind, seq) for part in range(first, last + 1)]

    def missing_ranges(self, kind: str, seq: int) -> Iterator[tuple[int, int]]:
        """The missing parts as ascending ranges [first, last]; each costs the same, however many parts there are."""
        assembly = self._find(kind, seq)
        came = bytearray() if assembly is None else assembly.came
        first = came.find(0)
        while first >= 0:
            end = came.find(1, first)
            yield first, (end if end >= 0 else len(came)) - 1
            first = came.find(0, end) if end >= 0 else -1

    def came(self, kind: str, seq: int) -> int:
        """How many parts of a partly received message have arrived."""
        assembly = self._find(kind, seq)
        return len(assembly.bodies) if assembly is not None else 0

    def _find(self, kind: str, seq: int) -> _Assembly | None:
        found = (each for name, each in self._assemblies.items() if name[1:3] == (kind, seq))
        return next(found, None)

    def clear(self) -> None:
        self.dropped += len(self._assemblies)
        self._assemblies.clear()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._assemblies)

    def _forget(self, name: tuple[KeyId, str, int, int, bytes]) -> None:
        self.size_bytes -= self._assemblies.pop(name).size_bytes


def _name(frame: Frame) -> tuple[KeyId, str, int, int, bytes]:
    """The fields that all parts of one message share; a collector has one sender."""
    return frame.key, frame.kind, frame.seq, frame.parts, frame.meta_bytes


def whole(frame: Frame) -> Whole:
    """The message in a single frame."""
    return _whole(frame, frame.body, header_digest(frame.header), (frame.header, frame.signature))


def _whole(frame: Frame, body: bytes, headers: bytes, first: tuple[bytes, bytes]) -> Whole:
    return Whole(
        kind=frame.kind,
        federation=frame.federation,
        sender=frame.sender,
        key=frame.key,
        seq=frame.seq,
        parts=frame.parts,
        meta=frame.meta,
        body=body,
        digest=header_digest(headers),
        first_header=first[0],
        first_signature=first[1],
    )
