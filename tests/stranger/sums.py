"""Private sums in plain integers, as section 16 of docs/protocol.md defines them: the device's, helper's and reader's.

Nothing here is quick, and no number is an array: a word is an int, so are its values.
"""

import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import floor, log2
from statistics import pstdev
from typing import Any

import msgpack
from nacl.exceptions import CryptoError
from nacl.public import PrivateKey, PublicKey, SealedBox
from nacl.signing import VerifyKey

from stranger.wire import SIGNED, Frame, RefusedError, digest, is_bin, key_id, parse_frame, read_map

CONTEXT, CARD, BOX, MASK, SET = (f"ternbus/1 {name}\0".encode() for name in ("context", "card", "box", "mask", "set"))
CARD_KEYS = ("federation", "helper", "public", "box_key", "number", "roster", "min")
TERMS_KEYS = (
    "kind", "bits", "levels", "helpers", "min", "lengths", "scales", "samples", "dp", "theta", "norm",
)  # fmt: skip
ASK_KEYS = ("version", "model", "plan", "terms", "members")
STEPS = 2**20  # of a dense value
BUCKETS = 7
FEDERATION = "[a-z0-9][a-z0-9-]{0,31}"
DEVICE = "(?!aggregator)[a-z0-9][a-z0-9_-]{0,63}"


@dataclass(frozen=True)
class Layout:
    """How many values an update has: `ternary` of `bits` bits each, then numbers of 32 bits."""

    bits: int
    ternary: int
    dense: int
    tensors: int

    @property
    def plain(self) -> int:
        """The numbers of 32 bits: dense elements, the weight, seven for each tensor."""
        return self.dense + 1 + BUCKETS * self.tensors

    @property
    def widths(self) -> list[tuple[int, int]]:
        """(place, bits) of each value, the ternary ones first; a place is a number of bits from the beginning."""
        lanes = 64 // self.bits
        places = [(64 * (each // lanes) + self.bits * (each % lanes), self.bits) for each in range(self.ternary)]
        start = 64 * -(-self.ternary // lanes)
        return places + [(start + 32 * each, 32) for each in range(self.plain)]

    @property
    def length(self) -> int:
        """The bytes of the words."""
        lanes = 64 // self.bits
        return 8 * (-(-self.ternary // lanes) + -(-self.plain // 2))

    def write(self, values: Sequence[int]) -> bytes:
        """Write values, ternary ones first, each modulo its width."""
        total = sum((value % (1 << bits)) << place for value, (place, bits) in zip(values, self.widths, strict=True))
        return total.to_bytes(self.length, "little")

    def read(self, words: bytes) -> list[int]:
        """Read the values as signed numbers; refuse another length, and a bit that holds no value."""
        if len(words) != self.length:
            raise RefusedError(7, "another length than the terms say")
        total, used, values = int.from_bytes(words, "little"), 0, []
        for place, bits in self.widths:
            used |= ((1 << bits) - 1) << place
            value = (total >> place) & ((1 << bits) - 1)
            values.append(value - (1 << bits) if value >> (bits - 1) else value)
        if total & ~used:
            raise RefusedError(7, "a bit is set that holds no value")
        return values

    def add(self, one: bytes, two: bytes, sign: int = 1) -> bytes:
        """Add (or subtract) value by value."""
        return self.write([a + sign * b for a, b in zip(self.read(one), self.read(two), strict=True)])

    def cut(self, stream: bytes) -> bytes:
        """Set the bits of a stream to 0 that hold no value."""
        total = int.from_bytes(stream, "little")
        return self.write([total >> place for place, _ in self.widths])


def chacha20(key: bytes, length: int, counter: int) -> bytes:
    """The key stream of RFC 8439 with a nonce of zeros."""
    out = b""
    while len(out) < length:
        start = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key), counter, 0, 0, 0]
        state = list(start)
        for _ in range(10):
            for a, b, c, d in (
                (0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
                (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14),
            ):  # fmt: skip
                for x, y, z, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                    state[x] = (state[x] + state[y]) % 2**32
                    state[z] ^= state[x]
                    state[z] = (state[z] << turn | state[z] >> (32 - turn)) % 2**32
        out += struct.pack("<16I", *((a + b) % 2**32 for a, b in zip(state, start, strict=True)))
        counter += 1
    return out[:length]


def seed_of(words: bytes, fresh: bytes) -> bytes:
    """The seed of an update's masks, of its unmasked words and 32 random bytes."""
    return blake2b(words, digest_size=32, key=fresh).digest()


def mask_of(layout: Layout, seed: bytes, context: bytes, device: bytes, helper: bytes) -> bytes:
    """The mask of an update for one helper."""
    key = blake2b(MASK + context + device + helper, digest_size=32, key=seed).digest()
    return layout.cut(chacha20(key, layout.length, 1))


def bound(context: bytes, device: bytes, helper: bytes, seq: int) -> bytes:
    """What stands in a box before the seed."""
    return BOX + context + device + helper + struct.pack("<Q", seq)


def public_of(secret: bytes) -> bytes:
    """The public key of a box key."""
    return bytes(PrivateKey(secret).public_key)


def make_box(box_key: bytes, plain: bytes) -> bytes:
    """Seal the plain text of a box."""
    return SealedBox(PublicKey(box_key)).encrypt(plain)


def open_box(secret: bytes, box: bytes, expected: bytes) -> bytes:
    """Open a box that has to begin with `expected`, and give the seed."""
    try:
        plain = SealedBox(PrivateKey(secret)).decrypt(box)
    except (CryptoError, ValueError, TypeError) as error:
        raise RefusedError(7, "the box does not open") from error
    if plain[:-32] != expected:
        raise RefusedError(7, "the box is of another update")
    return plain[-32:]


def one_encoding(content: bytes, keys: tuple[str, ...]) -> dict[str, Any]:
    """Read a map with exactly these keys, in this order, in the one encoding that it has."""
    fields, _ = read_map(content)
    if tuple(fields) != keys or msgpack.packb(fields) != content:
        raise RefusedError(7, "not the one encoding")
    return fields


def _need(right: bool, what: str) -> None:
    if not right:
        raise RefusedError(7, what)


def _is_whole(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _check(public: bytes, signed: bytes, signature: bytes) -> None:
    try:
        VerifyKey(public).verify(signed, signature)
    except (CryptoError, ValueError) as error:
        raise RefusedError(5, "signature") from error


def read_card(content: bytes, signature: bytes) -> dict[str, Any]:
    """Read a helper's card."""
    _need(len(content) <= 1024, "a card is too long")
    card = one_encoding(content, CARD_KEYS)
    _need(type(card["federation"]) is str and re.fullmatch(FEDERATION, card["federation"]) is not None, "federation")
    _need(type(card["helper"]) is str and re.fullmatch(DEVICE, card["helper"]) is not None, "helper")
    _need(all(type(card[key]) is bytes and len(card[key]) == 32 for key in ("public", "box_key")), "keys")
    _need(_is_whole(card["number"], 1, 2**62) and _is_whole(card["min"], 2, 2000), "number or min")
    _need(card["roster"] in ("aggregator", "own"), "roster")
    _check(card["public"], CARD + content, signature)
    try:
        make_box(card["box_key"], b"")
    except CryptoError as error:
        raise RefusedError(7, "nothing can be sealed to the box key") from error
    return card


def read_terms(content: bytes) -> tuple[dict[str, Any], Layout]:
    """Read terms and the cards in them."""
    terms = one_encoding(content, TERMS_KEYS)
    _need(terms["kind"] in ("mask", "bfv") and terms["dp"] in ("none", "sum"), "kind or dp")
    _need(terms["bits"] in (4, 5, 6, 8) and type(terms["bits"]) is int, "bits")
    _need(_is_whole(terms["levels"], 1, 127) and _is_whole(terms["min"], 2, 2000), "levels or min")
    _need(terms["min"] * terms["levels"] <= 2 ** (terms["bits"] - 1) - 1, "bits too few")
    lengths, scales, helpers = terms["lengths"], terms["scales"], terms["helpers"]
    _need(isinstance(lengths, list) and len(lengths) == 2, "lengths")
    _need(all(_is_whole(each, 0, 2**62) for each in lengths) and sum(lengths) > 0, "lengths")
    _need(type(scales) is bytes and 4 <= len(scales) <= 4 * sum(lengths) and len(scales) % 4 == 0, "scales")
    _need(all(0 <= each <= 2**40 for (each,) in struct.iter_unpack("<f", scales)), "a scale")
    floats = [terms[key] for key in ("samples", "theta", "norm")]
    _need(all(type(each) is float and 0 <= each < float("inf") for each in floats), "a float")
    _need(terms["theta"] <= 0.25 and (terms["dp"] == "sum") == (floats[1] > 0 and floats[2] > 0), "theta or norm")
    _need(isinstance(helpers, list) and 1 <= len(helpers) <= 8, "helpers")
    _need(all(isinstance(each, list) and len(each) == 2 for each in helpers), "helpers")
    cards = [read_card(*each) for each in helpers]
    _need(all(len({card[key] for card in cards}) == len(cards) for key in ("helper", "public", "box_key")), "same")
    return terms, Layout(terms["bits"], lengths[0], lengths[1], len(scales) // 4)


def context_of(version: int, model: bytes, plan: bytes, terms: bytes) -> bytes:
    """The context: of digests, but the version."""
    return digest(CONTEXT + struct.pack("<Q", version) + model + plan + terms)


def plan_bytes(meta: bytes) -> bytes:
    """The bytes of `plan` within the bytes of a head's meta."""
    return read_map(meta)[1]["plan"]


def set_digest(context: bytes, headers: Mapping[str, bytes]) -> bytes:
    """The digest of a set, from the header of part 0 of each device's update."""
    return digest(SET + context + b"".join(digest(headers[name]) for name in sorted(headers)))


def check_update(meta: Mapping[str, Any]) -> None:
    """Check what a private update has in its meta beside what every update has."""
    _need(meta.get("codec") == "private" and meta.get("encoding") == "raw" and meta.get("sealed") is True, "codec")
    _need(is_bin(32)(meta.get("context")) and _is_whole(meta.get("min"), 2, 2**32 - 1), "context or min")
    boxes = meta.get("boxes")
    _need(isinstance(boxes, list) and 1 <= len(boxes) <= 8, "boxes")
    _need(all(type(box) is bytes and len(box) <= 1024 for box in meta["boxes"]), "a box")


def check_answer(meta: Mapping[str, Any]) -> None:
    """Check the meta of an answer."""
    _need(meta.get("outcome") in ("prepared", "opened", "abandoned", "refused"), "outcome")
    _need(is_bin(32)(meta.get("set")) and _is_whole(meta.get("count"), 0, 2**62), "set or count")
    reason, updates = meta.get("reason", ""), meta.get("updates", [])
    _need(type(reason) is str and len(reason.encode()) <= 200, "reason")
    _need(isinstance(updates, list) and len(updates) <= 50, "updates")
    _need(all(type(each) is str and re.fullmatch(DEVICE, each) for each in updates), "a name")


@dataclass(frozen=True)
class Ask:
    """An ask whose form is right; its members are not looked at yet."""

    version: int
    context: bytes
    terms: Mapping[str, Any]
    layout: Layout
    rows: list[list[bytes]]


def read_ask(content: bytes) -> Ask:
    """Read the body of an ask, and the terms in it."""
    ask = one_encoding(content, ASK_KEYS)
    _need(_is_whole(ask["version"], 0, 2**62), "version")
    _need(all(type(ask[key]) is bytes and len(ask[key]) == 32 for key in ("model", "plan")), "digests")
    rows = ask["members"]
    _need(isinstance(rows, list) and 1 <= len(rows) <= 2000, "members")
    for row in rows:
        _need(isinstance(row, list) and list(map(type, row)) == [bytes] * 3, "a member")
        _need(len(row[0]) == 32 and len(row[1]) <= 16_384 and len(row[2]) == 64, "a member")
    _need(type(ask["terms"]) is bytes, "terms")
    terms, layout = read_terms(ask["terms"])
    context = context_of(ask["version"], ask["model"], ask["plan"], digest(ask["terms"]))
    return Ask(ask["version"], context, terms, layout, rows)


def read_member(public: bytes, header: bytes, signature: bytes, federation: str) -> Frame:
    """Read a member: the frame of part 0, without its body, of an update of a device in this federation."""
    frame = parse_frame(b"TBF1" + struct.pack("<I", len(header)) + header + signature)
    _need(re.fullmatch(DEVICE, frame.sender) is not None, "not of a device")
    _need((frame.federation, frame.kind, frame.part) == (federation, "update", 0), "not part 0 of an update")
    _need(frame.key == key_id(public), "another key than the header names")
    _check(public, SIGNED + header, signature)
    check_update(frame.meta)
    return frame


def bucket(own: float, reference: float) -> int:
    """The place in a tensor's one-hot that is 1."""
    if own == 0:
        return 0
    if reference == 0:
        return BUCKETS - 1
    return 3 + max(-3, min(3, round(log2(own / reference))))


Tensor = tuple[str, float, list[float]]  # role, scale of the terms, and u


def values_of(
    tensors: Sequence[Tensor], levels: int, weight: int, clip_sigma: float, draw: Callable[[], float]
) -> list[int]:
    """The values of an update, with draws from 0 to 1."""
    ternary: list[int] = []
    dense: list[int] = []
    buckets: list[int] = []
    for role, scale, u in tensors:
        steps = levels if role == "ternary" else STEPS
        drawn = [_drawn(value, scale, steps, draw) for value in u]
        (ternary if role == "ternary" else dense).extend(drawn)
        own = max(map(abs, u))
        if role == "ternary" and clip_sigma and (spread := pstdev(u)):
            own = min(own, clip_sigma * spread)
        place = bucket(own, scale if role == "ternary" else scale / 8)
        buckets += [int(each == place) for each in range(BUCKETS)]
    return [*ternary, *dense, weight, *buckets]


def _drawn(value: float, scale: float, steps: int, draw: Callable[[], float]) -> int:
    if scale == 0:
        return 0
    x = steps * max(-1.0, min(1.0, value / scale))
    return floor(x) + (draw() < x - floor(x))


def change_of(sums: Sequence[int], layout: Layout, scales: Iterable[float], levels: int) -> list[float]:
    """The change of a set, in a block's order, of its sums; `scales` has one for each element."""
    weight = sums[layout.ternary + layout.dense] / 255
    units = [levels] * layout.ternary + [STEPS] * layout.dense
    return [scale * value / unit / weight for scale, value, unit in zip(scales, sums, units, strict=False)]


def slots_of(layout: Layout, values: Sequence[int], modulus: int) -> list[int]:
    """The slots of an encrypted update or sum, without the zeros behind them."""
    lanes, slots = 20 // layout.bits, []
    for first in range(0, layout.ternary, lanes):
        row = values[first : min(first + lanes, layout.ternary)]
        slots.append(sum(value << (layout.bits * place) for place, value in enumerate(row)))
    for value in values[layout.ternary :]:
        rest = (value + 2048) % 4096 - 2048
        slots += [rest, (value - rest) // 4096]
    return [slot % modulus for slot in slots]


def values_in(layout: Layout, slots: Sequence[int], modulus: int) -> list[int]:
    """The values in slots, from which the blinding is taken already."""
    around = [slot - modulus if slot > modulus // 2 else slot for slot in slots]
    lanes, half = 20 // layout.bits, 1 << (layout.bits - 1)
    count = -(-layout.ternary // lanes)
    ternary = []
    for slot in around[:count]:
        rest = slot
        for _ in range(lanes):
            digit = (rest + half) % (2 * half) - half
            ternary.append(digit)
            rest = (rest - digit) // (2 * half)
        _need(rest == 0, "a slot has more than its values")
    _need(not any(ternary[layout.ternary :]), "a slot has more than its values")
    pairs = zip(around[count::2], around[count + 1 :: 2], strict=True)
    return ternary[: layout.ternary] + [low + 4096 * high for low, high in pairs]
