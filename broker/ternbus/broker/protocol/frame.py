"""Signed frames, the envelope of every message: build and parse, whatever the kind of message."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

import msgpack

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.identity import AGGREGATOR, Identity, KeyId, is_device, is_federation, verify
from ternbus.broker.protocol.packed import NO_EXTENSIONS, check_whole

MAGIC: Final = b"TBF1"
HEADER_BYTES_MAX: Final = 16_384
SIGNATURE_BYTES: Final = 64
SIGNED_PREFIX: Final = b"ternbus/1 frame\0"
PARTS_MAX: Final = 65_535
DEPTH_MAX: Final = 8
CONTAINERS_MAX: Final = 2048  # maps and arrays in a header: each costs about a hundred times its byte
COUNTER_MAX: Final = 2**62  # the maximum of seq, version, base and session
U64: Final = 2**64
FRAME_BYTES: Final = 120 * 1024  # AWS IoT Core accepts 128 KB; a broker with a smaller limit sends it in CONNACK
FRAME_BYTES_TAKEN: Final = (8 << 20) - 1024  # every member takes frames up to this size
FRAME_BYTES_RANGE: Final = 4096, 268_000_000  # bounds of the setting: from the size of an envelope, and from MQTT


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One MQTT payload with a well-formed header; ``check_authentic`` verifies its signature."""

    kind: str
    federation: str
    sender: str
    key: KeyId
    seq: int
    part: int
    parts: int
    digest: bytes
    meta: Mapping[str, Any]
    meta_bytes: bytes
    header: bytes
    signature: bytes
    body: bytes

    def check_authentic(self, public: bytes) -> None:
        """Raise ProtocolError unless ``public`` signed the header and the body has the digest in the header."""
        self.check_signature(public)
        self.check_digest()

    def check_signature(self, public: bytes) -> None:
        """Raise ProtocolError unless ``public`` signed the header; the body is not looked at."""
        verify(public, SIGNED_PREFIX + self.header, self.signature)

    def check_digest(self) -> None:
        """Raise ProtocolError unless the body has the digest in the header."""
        if blake2b(self.body, digest_size=32).digest() != self.digest:
            raise ProtocolError("bad-digest", "the body does not have the digest in the header")

    def check_bodiless(self) -> None:
        """Raise ProtocolError unless this is a message of one part without a body, as most kinds are."""
        if self.parts != 1 or self.body:
            raise ProtocolError("bad-body", f"a message of kind {self.kind} must have one part and no body")


def build(
    identity: Identity,
    *,
    federation: str,
    sender: str,
    kind: str,
    seq: int,
    meta: Mapping[str, Any],
    body: bytes = b"",
    part: int = 0,
    parts: int = 1,
) -> bytes:
    """Sign and encode one frame: ``TBF1``, header length, header, signature, body.

    ProtocolError if the header is longer than `HEADER_BYTES_MAX`.
    """
    about: dict[str, Any] = {"federation": federation, "sender": sender, "kind": kind, "seq": seq, "meta": meta}
    header = _header(identity, about, digest=blake2b(body, digest_size=32).digest(), part=part, parts=parts)
    signature = identity.sign(SIGNED_PREFIX + header)
    return b"".join((MAGIC, struct.pack("<I", len(header)), header, signature, body))


def envelope_bytes(identity: Identity, **about: Any) -> int:
    """The length of all but the body of a part, at most, of a message that is ``about`` this; as of `build`."""
    header = _header(identity, about, digest=bytes(32), part=PARTS_MAX - 1, parts=PARTS_MAX)
    return 8 + len(header) + SIGNATURE_BYTES


def _header(identity: Identity, about: Mapping[str, Any], *, digest: bytes, part: int, parts: int) -> bytes:
    header: bytes = msgpack.packb(
        {
            "kind": about["kind"],
            "federation": about["federation"],
            "sender": about["sender"],
            "key": bytes(identity.key_id),
            "seq": about["seq"],
            "part": [part, parts],
            "digest": digest,
            "meta": dict(about["meta"]),
        }
    )
    if len(header) > HEADER_BYTES_MAX:
        raise ProtocolError("header-too-long", f"{len(header)} bytes, at most {HEADER_BYTES_MAX}")
    return header


def header_bytes(payload: bytes) -> int:
    """The length of the header that the payload states; 0 if the payload is too short."""
    return int.from_bytes(payload[4:8], "little")


def header_of(payload: bytes) -> bytes:
    """The header of a well-formed frame."""
    return payload[8 : 8 + header_bytes(payload)]


def parse(payload: bytes) -> Frame:
    """Parse a payload and check the form of its header, but neither signature nor digest; else ProtocolError."""
    if len(payload) < 8 + SIGNATURE_BYTES or payload[:4] != MAGIC:
        raise ProtocolError("not-a-frame", "the payload is too short or does not begin with TBF1")
    (length,) = struct.unpack_from("<I", payload, 4)
    if length > HEADER_BYTES_MAX:
        raise ProtocolError("header-too-long", f"{length} bytes, at most {HEADER_BYTES_MAX}")
    end = 8 + length
    if len(payload) < end + SIGNATURE_BYTES:
        raise ProtocolError("not-a-frame", "the payload is shorter than the header length in it")
    header = payload[8:end]
    fields, meta_bytes = _parse_header(header)
    part, parts = _part(fields)
    return Frame(
        kind=_text(fields, "kind"),
        federation=_name(fields, "federation"),
        sender=_name(fields, "sender"),
        key=KeyId(_binary(fields, "key", 8)),
        seq=_integer(fields["seq"], "seq", COUNTER_MAX),
        part=part,
        parts=parts,
        digest=_binary(fields, "digest", 32),
        meta=fields["meta"],
        meta_bytes=meta_bytes,
        header=header,
        signature=payload[end : end + SIGNATURE_BYTES],
        body=payload[end + SIGNATURE_BYTES :],
    )


def _parse_header(header: bytes) -> tuple[dict[str, Any], bytes]:
    """The header as a map, and the encoded bytes of ``meta``, by which the parts of a message are matched."""
    unpacker = _unpacker(header)
    fields: dict[str, Any] = {}
    meta_bytes = b""
    try:
        check_whole(header)
        for _ in range(unpacker.read_map_header()):
            key = unpacker.unpack()
            start = unpacker.tell()
            value = unpacker.unpack()
            if not isinstance(key, str) or key in fields:
                raise ProtocolError("bad-header", "a key is repeated or not a string")
            fields[key] = value
            if key == "meta":
                meta_bytes = header[start : unpacker.tell()]
    # msgpack raises OutOfData, StackError, FormatError and ValueError (also UnicodeDecodeError).
    except (msgpack.UnpackException, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ProtocolError("bad-header", "the header is not exactly one msgpack map") from error
    for key in ("kind", "federation", "sender", "key", "seq", "part", "digest", "meta"):
        if key not in fields:
            raise ProtocolError("bad-header", f"{key!r} is missing")
    if not isinstance(fields["meta"], dict):
        raise ProtocolError("bad-header", "'meta' is not a map")
    _check_depth(fields)
    return fields, meta_bytes


def _unpacker(header: bytes) -> msgpack.Unpacker:
    """A decoder that refuses extensions, repeated keys, and a container beyond CONTAINERS_MAX before it is made."""
    left = CONTAINERS_MAX - 1  # the hooks do not count the header's own map

    def count() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ProtocolError("bad-header", f"the header has more than {CONTAINERS_MAX} maps and arrays")

    def array(elements: list[Any]) -> list[Any]:
        count()
        return elements

    def unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        count()
        try:
            result = dict(pairs)
        except TypeError as error:  # an unhashable key: an array or a map
            raise ValueError("a key is an array or a map") from error
        if len(result) != len(pairs):
            raise ValueError("a key is repeated")
        return result

    unpacker = msgpack.Unpacker(
        strict_map_key=False,
        object_pairs_hook=unique,
        list_hook=array,
        max_buffer_size=HEADER_BYTES_MAX,
        **NO_EXTENSIONS,
    )
    unpacker.feed(header)
    return unpacker


def _check_depth(fields: dict[str, Any]) -> None:
    level: list[Any] = [fields]
    for _ in range(DEPTH_MAX):
        children = (each.values() if type(each) is dict else each for each in level)
        level = [child for each in children for child in each if type(child) in (dict, list)]
        if not level:
            return
    raise ProtocolError("bad-header", f"the header is nested more than {DEPTH_MAX} levels deep")


def _part(fields: Mapping[str, Any]) -> tuple[int, int]:
    value = fields["part"]
    if not isinstance(value, list) or len(value) != 2:
        raise ProtocolError("bad-header", "'part' is not [i, n]")
    part, parts = (_integer(number, "part", PARTS_MAX) for number in value)
    if not (1 <= parts <= PARTS_MAX and part < parts):
        raise ProtocolError("bad-header", f"part {part} of {parts} is out of range")
    return part, parts


def _integer(value: object, key: str, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= high:
        raise ProtocolError("bad-header", f"{key!r} is not an integer from 0 to {high}")
    return value


def _text(fields: Mapping[str, Any], key: str) -> str:
    value = fields[key]
    if not isinstance(value, str):
        raise ProtocolError("bad-header", f"{key!r} is not a string")
    return value


def _name(fields: Mapping[str, Any], key: str) -> str:
    value = _text(fields, key)
    good = is_federation(value) if key == "federation" else value == AGGREGATOR or is_device(value)
    if not good:
        raise ProtocolError("bad-header", f"{key!r} is not a valid name")
    return value


def _binary(fields: Mapping[str, Any], key: str, length: int) -> bytes:
    value = fields[key]
    if not isinstance(value, bytes) or len(value) != length:
        raise ProtocolError("bad-header", f"{key!r} is not {length} bytes")
    return value
