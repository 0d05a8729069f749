"""Frames, messages in parts, schema, vectors and blocks, as sections 3 and 6 to 11 of docs/protocol.md define them."""

import hashlib
import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np
import zstandard
from nacl.exceptions import BadSignatureError, CryptoError
from nacl.public import SealedBox
from nacl.signing import SigningKey, VerifyKey
from numpy.typing import NDArray

MAGIC = b"TBF1"
SIGNED = b"ternbus/1 frame\0"
HEADER_LIMIT = 16_384
FRAME_LIMIT = 122_880
SIGNATURE = 64
LEAST_PART = 1_024
NESTING = 8
WINDOW = 8 << 20
LARGEST = np.float32(65_504)
TINY = np.float32(2.0**-126)
UINT = 2**64

Floats = NDArray[np.float32]
Meta = dict[str, Any]


class RefusedError(Exception):
    """What arrived is not what the document allows; `step` is the number of the check of section 8 that failed."""

    def __init__(self, step: int, reason: str) -> None:
        """Say which check failed, and why."""
        super().__init__(f"step {step}: {reason}")
        self.step = step
        self.reason = reason


def digest(data: bytes) -> bytes:
    """BLAKE2b with a 32-byte output."""
    return hashlib.blake2b(data, digest_size=32).digest()


def key_id(public: bytes) -> bytes:
    """Name an Ed25519 public key in 8 bytes."""
    return digest(public)[:8]


# --- msgpack under the rules of section 6 ---------------------------------------------------------------------------


def _pairs(pairs: list[tuple[Any, Any]]) -> Meta:
    out: Meta = {}
    for name, value in pairs:
        if not isinstance(name, str):
            raise TypeError("a map key is not a str")
        if name in out:
            raise ValueError(f"key {name!r} stands twice")
        out[name] = value
    return out


def _depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0


def read_map(raw: bytes) -> tuple[Meta, dict[str, bytes]]:
    """Read one map that fills `raw`; also give the bytes of each value as they were sent."""
    unpacker = msgpack.Unpacker(
        raw=False, strict_map_key=False, object_pairs_hook=_pairs, max_buffer_size=max(len(raw), 1)
    )
    unpacker.feed(raw)
    values: Meta = {}
    spans: dict[str, bytes] = {}
    try:
        for _ in range(unpacker.read_map_header()):
            name = unpacker.unpack()
            start = unpacker.tell()
            values = _pairs([*values.items(), (name, unpacker.unpack())])
            spans[name] = raw[start : unpacker.tell()]
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise RefusedError(2, f"header: {error}") from error
    if unpacker.tell() != len(raw):
        raise RefusedError(2, "header: bytes after the map")
    if 1 + max(map(_depth, values.values()), default=0) > NESTING:
        raise RefusedError(2, "header: nested too deep")
    return values, spans


Check = Callable[[Any], bool]


def is_int(low: int = 0, high: int = UINT - 1) -> Check:
    """Check for an integer (no bool, no float) within both ends."""
    return lambda value: type(value) is int and low <= value <= high


def is_float(value: object) -> bool:
    """Check for a finite float, for which an integer will do."""
    return type(value) is int or (type(value) is float and math.isfinite(value))


def is_bin(length: int) -> Check:
    """Check for bin of one length."""
    return lambda value: type(value) is bytes and len(value) == length


def is_one_of(*words: str) -> Check:
    """Check for one of these words."""
    return lambda value: type(value) is str and value in words


def is_str(value: object) -> bool:
    """Check for a str."""
    return type(value) is str


def is_bool(value: object) -> bool:
    """Check for a bool."""
    return type(value) is bool


def is_floats(most: int | None = None) -> Check:
    """Check for a map of str to float."""
    return lambda value: (
        isinstance(value, dict) and (most is None or len(value) <= most) and all(map(is_float, value.values()))
    )


def _is_snapshot(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(map(is_int(), value))
        and 1 <= value[1] <= 65_535
        and value[3] in (0, 1)
    )


def _is_ranges(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 500
        and all(isinstance(r, list) and len(r) == 2 and all(map(is_int(), r)) and r[0] <= r[1] for r in value)
    )


UINT64 = is_int()
CODEC = is_one_of("ternary", "float32")
ENCODING = is_one_of("raw", "zstd")
OUTCOME = is_one_of("accepted", "stale", "duplicate", "invalid", "busy", "revoked", "enrolled", "refused", "unknown")
META: dict[str, dict[str, Check]] = {
    "head": {
        "version": UINT64,
        "digest": is_bin(32),
        "schema": is_bin(32),
        "snapshot": _is_snapshot,
        "slots": is_int(1),
        "max_staleness": UINT64,
        "direct_parts": UINT64,
        "state": is_one_of("open", "paused", "closed"),
        "plan": lambda value: isinstance(value, dict),
    },
    "snapshot": {
        "version": UINT64,
        "digest": is_bin(32),
        "schema_bytes": UINT64,
        "bytes": UINT64,
        "encoding": ENCODING,
    },
    "delta": {"version": is_int(1), "digest": is_bin(32), "codec": CODEC, "encoding": ENCODING},
    "update": {
        "base": UINT64,
        "samples": is_int(1, 2**32 - 1),
        "codec": CODEC,
        "encoding": ENCODING,
        "sealed": is_bool,
        "metrics": is_floats(32),
    },
    "offer": {"base": UINT64, "parts": is_int(1, 65_535)},
    "grant": {"device": is_str, "device_key": is_bin(8), "seq": UINT64, "parts": _is_ranges, "deadline_s": is_float},
    "receipt": {
        "device": is_str,
        "device_key": is_bin(8),
        "seq": UINT64,
        "outcome": OUTCOME,
        "version": UINT64,
        "reason": is_str,
        "retry_after_s": lambda value: is_float(value) and value >= 0,
    },
    "enroll": {"public_key": is_bin(32)},
    "status": {
        "state": is_one_of("idle", "training", "online", "offline"),
        "session": UINT64,
        "base": is_int(-1),
        "software": is_str,
    },
    "metrics": {"version": UINT64, "samples": UINT64, "split": is_one_of("test", "local"), "values": is_floats()},
}
WITHOUT_BODY = {"head", "offer", "grant", "receipt", "status", "metrics"}
HEADER: dict[str, Check] = {
    "kind": is_str,
    "federation": is_str,
    "sender": is_str,
    "key": is_bin(8),
    "seq": is_int(1),
    "part": lambda value: (
        isinstance(value, list)
        and len(value) == 2
        and all(map(is_int(), value))
        and 1 <= value[1] <= 65_535
        and value[0] < value[1]
    ),
    "digest": is_bin(32),
    "meta": lambda value: isinstance(value, dict),
}


def check_map(values: Mapping[str, Any], checks: Mapping[str, Check], step: int) -> None:
    """Refuse a map in which a listed key is missing, or has a wrong type or range."""
    for name, check in checks.items():
        if name not in values or not check(values[name]):
            raise RefusedError(step, f"{name} is missing or wrong")


# --- frames ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """One frame that passed the first two checks."""

    kind: str
    federation: str
    sender: str
    key: bytes
    seq: int
    part: int
    parts: int
    digest: bytes
    meta: Meta
    meta_bytes: bytes
    header: bytes
    signature: bytes
    body: bytes


def pack_header(
    *,
    kind: str,
    federation: str,
    sender: str,
    key: bytes,
    seq: int,
    part: tuple[int, int],
    digest: bytes,
    meta: Mapping[str, Any],
) -> bytes:
    """Write a header, its keys in the document's order; nothing is checked, since hostile frames are made here too."""
    packed = {
        "kind": kind,
        "federation": federation,
        "sender": sender,
        "key": key,
        "seq": seq,
        "part": list(part),
        "digest": digest,
        "meta": dict(meta),
    }
    return bytes(msgpack.packb(packed))


def pack_frame(signing: SigningKey, header: bytes, body: bytes) -> bytes:
    """Sign a header as it is, and put the frame together."""
    signature = signing.sign(SIGNED + header).signature
    return MAGIC + struct.pack("<I", len(header)) + header + signature + body


def parse_frame(payload: bytes) -> Frame:
    """Checks 1 and 2 of section 8: lengths and the header."""
    if len(payload) < 8 + SIGNATURE or payload[:4] != MAGIC:
        raise RefusedError(1, "not a frame")
    (length,) = struct.unpack_from("<I", payload, 4)
    if length > HEADER_LIMIT or len(payload) < 8 + length + SIGNATURE:
        raise RefusedError(1, "header too long")
    raw = payload[8 : 8 + length]
    values, spans = read_map(raw)
    check_map(values, HEADER, 2)
    return Frame(
        values["kind"],
        values["federation"],
        values["sender"],
        values["key"],
        values["seq"],
        values["part"][0],
        values["part"][1],
        values["digest"],
        values["meta"],
        spans["meta"],
        raw,
        payload[8 + length : 8 + length + SIGNATURE],
        payload[8 + length + SIGNATURE :],
    )


def check_frame(payload: bytes, *, federation: str, kind: str, sender: str, public: bytes) -> Frame:
    """All checks of section 8 on one frame, in order, for a topic's kind and sender and the one key recorded for it."""
    frame = parse_frame(payload)
    if (frame.federation, frame.kind, frame.sender) != (federation, kind, sender):
        raise RefusedError(3, "the frame and its topic disagree")
    if frame.key != key_id(public):
        raise RefusedError(4, "unknown key")
    try:
        VerifyKey(public).verify(SIGNED + frame.header, frame.signature)
    except BadSignatureError as error:
        raise RefusedError(5, "signature") from error
    if frame.digest != digest(frame.body):
        raise RefusedError(6, "body digest")
    check_map(frame.meta, META[kind], 7)
    if kind in WITHOUT_BODY and (frame.body or (frame.part, frame.parts) != (0, 1)):
        raise RefusedError(7, "a body where there is none")
    return frame


def cut(body: bytes, room: int) -> list[bytes]:
    """Cut a body into parts of `room` bytes, the last one being what remains."""
    if room < LEAST_PART < len(body):
        raise ValueError("a part of less than 1,024 bytes")
    return [body[at : at + room] for at in range(0, len(body), room)] or [b""]


def make_frames(
    signing: SigningKey,
    *,
    kind: str,
    federation: str,
    sender: str,
    seq: int,
    meta: Mapping[str, Any],
    body: bytes = b"",
    limit: int = FRAME_LIMIT,
) -> list[bytes]:
    """One message as frames of at most `limit` bytes."""
    key = key_id(bytes(signing.verify_key))
    name: Meta = {"kind": kind, "federation": federation, "sender": sender, "key": key, "seq": seq, "meta": meta}
    largest = pack_header(**name, part=(65_534, 65_535), digest=bytes(32))
    bodies = cut(body, limit - 8 - SIGNATURE - len(largest))
    return [
        pack_frame(signing, pack_header(**name, part=(i, len(bodies)), digest=digest(b)), b)
        for i, b in enumerate(bodies)
    ]


@dataclass
class Assembly:
    """Messages of which parts are missing, at most `limit` of them; the oldest is dropped."""

    limit: int = 8
    pending: OrderedDict[tuple[Any, ...], dict[int, bytes]] = field(default_factory=OrderedDict)

    def add(self, frame: Frame) -> bytes | None:
        """Put a part in its place, the first copy winning; the message's body once it is complete."""
        name = (frame.sender, frame.key, frame.kind, frame.seq, frame.parts, frame.meta_bytes)
        parts = self.pending.setdefault(name, {})
        parts.setdefault(frame.part, frame.body)
        if len(parts) == frame.parts:
            del self.pending[name]
            return b"".join(parts[i] for i in range(frame.parts))
        while len(self.pending) > self.limit:
            self.pending.popitem(last=False)
        return None


# --- the model ------------------------------------------------------------------------------------------------------


def flush(values: Floats) -> Floats:
    """Tiny numbers, negative zero included, count as +0."""
    out = np.array(values, np.float32)
    out[np.abs(out) < TINY] = 0.0
    return out


@dataclass(frozen=True)
class Tensor:
    """One entry of the schema, with where it lies in the vector."""

    name: str
    shape: tuple[int, ...]
    role: str
    start: int
    size: int

    @property
    def place(self) -> slice:
        """Its elements in the vector."""
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class Schema:
    """The schema, with its bytes as the aggregator wrote them."""

    raw: bytes
    tensors: tuple[Tensor, ...]

    @classmethod
    def parse(cls, raw: bytes) -> "Schema":
        """Read a schema's bytes."""
        try:
            entries = msgpack.unpackb(raw, raw=False)
        except (ValueError, msgpack.UnpackException) as error:
            raise RefusedError(7, f"schema: {error}") from error
        tensors: list[Tensor] = []
        start = 0
        if not isinstance(entries, list):
            raise RefusedError(7, "schema: not an array")
        for entry in entries:
            if not (isinstance(entry, list) and len(entry) == 3 and is_str(entry[0]) and isinstance(entry[1], list)):
                raise RefusedError(7, "schema: entry")
            name, shape, role = entry
            if not all(map(is_int(1), shape)) or role not in ("ternary", "dense"):
                raise RefusedError(7, "schema: shape or role")
            tensors.append(Tensor(name, tuple(shape), role, start, math.prod(shape)))
            start += tensors[-1].size
        if len({t.name for t in tensors}) != len(tensors):
            raise RefusedError(7, "schema: a name stands twice")
        return cls(raw, tuple(tensors))

    @property
    def elements(self) -> int:
        """Length of the vector."""
        return sum(t.size for t in self.tensors)

    @property
    def ternary(self) -> list[Tensor]:
        """The ternary tensors, in schema order."""
        return [t for t in self.tensors if t.role == "ternary"]

    @property
    def dense(self) -> list[Tensor]:
        """The dense tensors, in schema order."""
        return [t for t in self.tensors if t.role == "dense"]

    def content_bytes(self, codec: str) -> int:
        """Length of a block's content."""
        n = sum(t.size for t in self.ternary)
        m = sum(t.size for t in self.dense)
        return 4 * len(self.ternary) + -(-n // 5) + 4 * m if codec == "ternary" else 4 * (n + m)

    def change(self, codec: str, content: bytes) -> Floats:
        """Check a block's content; what it adds to each element, in the vector's order."""
        if len(content) != self.content_bytes(codec):
            raise RefusedError(7, "block: length")
        out = np.zeros(self.elements, np.float32)
        groups = (self.ternary, self.dense)
        if codec == "float32":
            values = ranged(np.frombuffer(content, "<f4"))
            at = 0
            for tensor in (*groups[0], *groups[1]):
                out[tensor.place] = values[at : at + tensor.size]
                at += tensor.size
            return out
        head = 4 * len(groups[0])
        n = sum(t.size for t in groups[0])
        scales = ranged(np.frombuffer(content[:head], "<f4"), low=0.0)
        trits = unpack_trits(content[head : head + -(-n // 5)], n)
        dense = ranged(np.frombuffer(content[head + -(-n // 5) :], "<f4"))
        at = 0
        for tensor, scale in zip(groups[0], scales, strict=True):
            out[tensor.place] = scale * trits[at : at + tensor.size].astype(np.float32)
            at += tensor.size
        at = 0
        for tensor in groups[1]:
            out[tensor.place] = dense[at : at + tensor.size]
            at += tensor.size
        return out

    def ternary_content(self, scales: Sequence[float], trits: NDArray[np.int8], dense: Floats) -> bytes:
        """Write a ternary block: trits and dense elements in their groups' order."""
        return np.asarray(scales, "<f4").tobytes() + pack_trits(trits) + np.asarray(dense, "<f4").tobytes()

    def float_content(self, change: Floats) -> bytes:
        """Write a float32 block from a change in the vector's order."""
        ordered = [change[t.place] for t in (*self.ternary, *self.dense)]
        return np.concatenate(ordered).astype("<f4").tobytes()


def ranged(values: NDArray[Any], low: float = -65_504.0) -> Floats:
    """Flush what is tiny and refuse what is out of range, NaN included."""
    out = flush(values)
    if not bool(np.all((out >= low) & (out <= LARGEST))):
        raise RefusedError(7, "block: a value out of range")
    return out


def pack_trits(trits: NDArray[np.int8]) -> bytes:
    """Five trits to a byte, the first being the least digit."""
    digits = np.ones(-(-len(trits) // 5) * 5, np.int64)
    digits[: len(trits)] = trits.astype(np.int64) + 1
    return bytes((digits.reshape(-1, 5) @ np.array([1, 3, 9, 27, 81])).astype(np.uint8).tobytes())


def unpack_trits(data: bytes, count: int) -> NDArray[np.int8]:
    """Read trits, refusing bytes above 242 and a fill that is not zero."""
    packed = np.frombuffer(data, np.uint8)
    if bool(np.any(packed > 242)):
        raise RefusedError(7, "block: trit byte")
    digits = (packed[:, None] // np.array([1, 3, 9, 27, 81], np.uint8)) % 3
    trits = digits.astype(np.int8).reshape(-1) - np.int8(1)
    if bool(np.any(trits[count:] != 0)):
        raise RefusedError(7, "block: fill")
    return trits[:count]


def apply(vector: Floats, change: Floats) -> Floats:
    """Add a change to a vector by the document's arithmetic; the change is what `Schema.change` gives."""
    return flush(flush(vector) + flush(change))


def encode(content: bytes, encoding: str) -> bytes:
    """Encode a block's or snapshot's content."""
    return zstandard.ZstdCompressor(level=3).compress(content) if encoding == "zstd" else content


def decode(data: bytes, encoding: str, length: int) -> bytes:
    """Decode what was encoded, checking a zstd frame's header before giving it room."""
    if encoding == "raw":
        if len(data) != length:
            raise RefusedError(7, "content: length")
        return data
    try:
        if data[:4] != b"\x28\xb5\x2f\xfd":
            raise RefusedError(7, "zstd: not a frame")
        known = zstandard.get_frame_parameters(data)
        if known.content_size != length or known.window_size > WINDOW or known.dict_id:
            raise RefusedError(7, "zstd: content size, window or dictionary")
        content = zstandard.ZstdDecompressor().decompress(
            data, max_output_size=length, read_across_frames=False, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise RefusedError(7, f"zstd: {error}") from error
    if len(content) != length:
        raise RefusedError(7, "zstd: length")
    return content


def seal(data: bytes, key: bytes, seq: int, aggregator: bytes) -> bytes:
    """Seal encoded bytes to the aggregator's key."""
    plain = key + struct.pack("<Q", seq) + data
    return bytes(SealedBox(VerifyKey(aggregator).to_curve25519_public_key()).encrypt(plain))


def unseal(box: bytes, signing: SigningKey) -> bytes:
    """Open a box as the aggregator does; only the known answers need it."""
    try:
        return bytes(SealedBox(signing.to_curve25519_private_key()).decrypt(box))
    except CryptoError as error:
        raise RefusedError(7, "box") from error


def enroll_body(code: str, federation: str, device: str, public: bytes) -> bytes:
    """Prove that the invitation's code is known."""
    text = b"\0".join([b"ternbus/1 enroll", federation.encode(), device.encode(), public])
    return hashlib.blake2b(text, digest_size=32, key=code.encode()).digest()
