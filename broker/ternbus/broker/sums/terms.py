"""The terms of private sums: what a device needs to make an update, and a helper to answer for it.

The aggregator signs them as a retained message, and each helper its own card in them. Their digest is part of every
context, so all updates of a set were made by the same terms.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Final, Self

import nacl.bindings
import nacl.exceptions
import numpy as np

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import meta_fields
from ternbus.broker.protocol.frame import COUNTER_MAX, SIGNATURE_BYTES
from ternbus.broker.protocol.identity import Identity, is_device, is_federation, verify
from ternbus.broker.protocol.plan_keys import NO_DP, SUM, THETA_MAX
from ternbus.broker.protocol.schema import ELEMENTS_MAX, TENSORS_MAX, Schema, type_f32
from ternbus.broker.sums import bfv, canonical
from ternbus.broker.sums.words import BITS, DENSE_STEPS, DEVICES_MAX, Layout

MASK, BFV = "mask", "bfv"  # kinds of private sums
KINDS: Final = (MASK, BFV)
AGGREGATOR, OWN = "aggregator", "own"  # rosters: who says which devices there are
ROSTERS: Final = (AGGREGATOR, OWN)
SCHEMA: Final = "schema"  # the key of a head's plan that binds the order and the roles of tensors to the context
HELPERS_MAX: Final = 8
CARD_BYTES_MAX: Final = 1024
TERMS_BYTES_MAX: Final = 8 * TENSORS_MAX + 64 * 1024
CONTEXT_PREFIX: Final = b"ternbus/1 context\0"
CARD_PREFIX: Final = b"ternbus/1 card\0"
SCALE_MAX: Final = 2.0**40
_CARD_KEYS: Final = ("federation", "helper", "public", "box_key", "number", "roster", "min")
_TERMS_KEYS: Final = (
    "kind", "bits", "levels", "helpers", "min", "lengths", "scales", "samples", "dp", "theta", "norm",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a helper says of itself: its Ed25519 and X25519 public keys, its roster, the smallest set it answers for."""

    federation: str
    helper: str  # its name
    public: bytes
    box_key: bytes
    number: int  # of the box key; each new one has a higher number
    roster: str
    min: int
    bfv: bytes = b""  # digest of the public key under which updates are encrypted; empty: it opens masks

    @property
    def kind(self) -> str:
        """Of the sums that it opens."""
        return BFV if self.bfv else MASK

    def content(self) -> bytes:
        """The canonical encoding."""
        fields = {key: getattr(self, key) for key in _CARD_KEYS}
        return canonical.pack(fields | ({"bfv": self.bfv} if self.bfv else {}))

    def signed(self, identity: Identity, key: bytes = b"") -> "SignedCard":
        """``key`` is the public key of which `bfv` is the digest."""
        content = self.content()
        return SignedCard(card=self, content=content, signature=identity.sign(CARD_PREFIX + content), key=key)


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedCard:
    """A card with the signature of its own ``public`` key, which whoever relies on it compares with a pinned one."""

    card: Card
    content: bytes
    signature: bytes
    key: bytes = field(default=b"", repr=False, compare=False)  # of BFV, where it came with the card

    @property
    def packed(self) -> list[bytes]:
        return [self.content, self.signature]

    @property
    def body(self) -> bytes:
        """As the body of the message `card`."""
        return self.content + self.signature + self.key

    @classmethod
    def of_body(cls, body: bytes) -> Self:
        """Read a message's body; ProtocolError for a wrong signature or card, or a key that is not the card's."""
        size = len(body) - SIGNATURE_BYTES
        size -= bfv.KEY_BYTES if size > CARD_BYTES_MAX else 0
        content, signature = body[: max(size, 0)], body[max(size, 0) :]
        read = cls.read(content, signature[:SIGNATURE_BYTES], signature[SIGNATURE_BYTES:])
        if (digest_of(read.key) if read.key else b"") != read.card.bfv:
            raise ProtocolError("bad-card", "the key behind it is not the card's")
        return read

    @classmethod
    def read(cls, content: bytes, signature: bytes, key: bytes = b"") -> Self:
        """Read and verify; ProtocolError for a wrong signature or card. The key is not looked at."""
        keys = canonical.keys_in(content, _CARD_KEYS, "bfv")
        fields = canonical.unpack(content, keys, "card", CARD_BYTES_MAX)
        card = Card(
            federation=meta_fields.text(fields, "federation"),
            helper=meta_fields.text(fields, "helper"),
            public=meta_fields.binary(fields, "public", 32),
            box_key=meta_fields.binary(fields, "box_key", 32),
            number=meta_fields.integer(fields, "number", 1, COUNTER_MAX),
            roster=meta_fields.one_of(fields, "roster", ROSTERS),
            min=meta_fields.integer(fields, "min", 2, DEVICES_MAX),
            bfv=meta_fields.binary(fields, "bfv", 32) if "bfv" in fields else b"",
        )
        if not is_federation(card.federation) or not is_device(card.helper):
            raise ProtocolError("bad-card", "'federation' or 'helper' is not a name")
        verify(card.public, CARD_PREFIX + content, signature)
        _check_box_key(card.box_key)
        return cls(card=card, content=content, signature=signature, key=key)


@lru_cache(maxsize=4)
def _layout(bits: int, ternary: int, dense: int, tensors: int) -> Layout:
    """One value for all updates under the same terms: it keeps masks as long as the words."""
    return Layout(bits=bits, ternary=ternary, dense=dense, tensors=tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Values of a set's updates. ``scales`` are in schema order: S of a ternary tensor, D of a dense one."""

    kind: str
    bits: int
    levels: int  # k: ternary values are from -k to k
    helpers: tuple[SignedCard, ...]
    min: int  # devices in a set
    ternary: int  # elements
    dense: int  # elements
    scales: tuple[float, ...]  # float32 numbers
    samples: float  # n_ref: with as many a device has the weight 1; 0: every device has
    dp: str = NO_DP
    theta: float = 0.0  # of the Poisson binomial mechanism, with ``dp`` only
    norm: float = 0.0  # B, likewise
    key: bytes = field(default=b"", repr=False)  # of the kind `bfv`: the helper's, under which updates are encrypted

    @property
    def layout(self) -> Layout:
        return _layout(self.bits, self.ternary, self.dense, len(self.scales))

    @property
    def ternary_steps(self) -> float:
        """What stands for the scale S: a sum T of q means S·T / steps. With ``dp``, E[q] = 2kθ·u/S."""
        return 2 * self.levels * self.theta if self.dp == SUM else self.levels

    @property
    def dense_steps(self) -> float:
        """What stands for the range D; with ``dp`` as of a ternary tensor."""
        return 2 * self.levels * self.theta if self.dp == SUM else DENSE_STEPS

    @property
    def devices_max(self) -> int:
        """The largest set whose sum cannot wrap."""
        return self.layout.sum_max(self.levels)

    def content(self) -> bytes:
        """The canonical encoding: the body of the message `terms`."""
        return canonical.pack(
            {
                "kind": self.kind,
                "bits": self.bits,
                "levels": self.levels,
                "helpers": [helper.packed for helper in self.helpers],
                "min": self.min,
                "lengths": [self.ternary, self.dense],
                "scales": np.array(self.scales, type_f32).tobytes(),
                "samples": float(self.samples),
                "dp": self.dp,
                "theta": float(self.theta),
                "norm": float(self.norm),
            }
            | ({"key": self.key} if self.key else {})
        )

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Decode terms and verify the helpers' cards in them; ProtocolError for anything that is not valid."""
        keys = canonical.keys_in(content, _TERMS_KEYS, "key")
        fields = canonical.unpack(content, keys, "terms", TERMS_BYTES_MAX)
        ternary, dense = _lengths(fields["lengths"])
        terms = cls(
            kind=meta_fields.one_of(fields, "kind", KINDS),
            bits=meta_fields.integer(fields, "bits", BITS[0], BITS[-1]),
            levels=meta_fields.integer(fields, "levels", 1, 127),
            helpers=_helpers(fields["helpers"]),
            min=meta_fields.integer(fields, "min", 2, DEVICES_MAX),
            ternary=ternary,
            dense=dense,
            scales=_scales(fields["scales"], ternary + dense),
            samples=meta_fields.number(fields, "samples", 0.0),
            dp=meta_fields.one_of(fields, "dp", (NO_DP, SUM)),
            theta=meta_fields.number(fields, "theta", 0.0),
            norm=meta_fields.number(fields, "norm", 0.0),
            key=meta_fields.binary(fields, "key", bfv.KEY_BYTES) if "key" in fields else b"",
        )
        terms._check_kind()
        if terms.bits not in BITS or terms.min > terms.devices_max:
            raise ProtocolError("bad-terms", "'bits' do not hold a set of 'min' devices")
        if not terms.theta <= THETA_MAX or (terms.dp == SUM) != (terms.theta > 0 and terms.norm > 0):
            raise ProtocolError("bad-terms", "'theta' and 'norm' do not go with 'dp'")
        if terms.content() != content:  # an integer in place of a float
            raise ProtocolError("bad-terms", "the encoding is not canonical")
        return terms

    def _check_kind(self) -> None:
        """ProtocolError where helpers and key do not go with the kind."""
        if any(each.card.kind != self.kind for each in self.helpers) or bool(self.key) != (self.kind == BFV):
            raise ProtocolError("bad-terms", f"a helper is not one of the kind {self.kind!r}, or 'key' is amiss")
        if self.kind == MASK:
            return
        if len(self.helpers) != 1 or digest_of(self.key) != self.helpers[0].card.bfv:
            raise ProtocolError("bad-terms", "not one helper, with the key that its card names")
        if self.ternary + self.dense > bfv.ELEMENTS_MAX:
            raise ProtocolError("bad-terms", f"more than {bfv.ELEMENTS_MAX} elements of the kind {BFV!r}")

    def fits(self, schema: Schema) -> bool:
        """Whether the numbers of elements and tensors are the schema's."""
        lengths = (schema.ternary_elements, schema.dense_elements, len(schema.tensors))
        return (self.ternary, self.dense, len(self.scales)) == lengths


def digest_of(content: bytes) -> bytes:
    """BLAKE2b-256."""
    return blake2b(content, digest_size=32).digest()


def context(*, version: int, model: bytes, plan: bytes, terms: bytes) -> bytes:
    """BLAKE2b-256 over a version and the digests of its model, of the plan's bytes in its head, and of its terms."""
    return digest_of(CONTEXT_PREFIX + version.to_bytes(8, "little") + model + plan + terms)


def _check_box_key(key: bytes) -> None:
    """ProtocolError for a point of low order: libsodium seals nothing to it."""
    try:
        nacl.bindings.crypto_scalarmult(key, key)  # clamps the number, so that it is a multiple of the curve's cofactor
    except nacl.exceptions.CryptoError as error:
        raise ProtocolError("bad-card", "nothing can be sealed to 'box_key'") from error


def _lengths(value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise ProtocolError("bad-terms", "'lengths' is not [ternary, dense]")
    ternary, dense = (meta_fields.checked_integer(each, "lengths", 0, ELEMENTS_MAX) for each in value)
    if not 0 < ternary + dense <= ELEMENTS_MAX:
        raise ProtocolError("bad-terms", "'lengths' is out of range")
    return ternary, dense


def _helpers(rows: Any) -> tuple[SignedCard, ...]:
    if not isinstance(rows, list) or not 1 <= len(rows) <= HELPERS_MAX:
        raise ProtocolError("bad-terms", f"'helpers' is not 1 to {HELPERS_MAX} cards")
    cards = []
    for row in rows:
        match row:
            case [bytes(content), bytes(signature)]:
                cards.append(SignedCard.read(content, signature))
            case _:
                raise ProtocolError("bad-terms", "a helper is not [card, signature]")
    for name in ("helper", "public", "box_key"):
        if len({getattr(each.card, name) for each in cards}) != len(cards):
            raise ProtocolError("bad-terms", f"two helpers have the same {name}")
    return tuple(cards)


def _scales(value: Any, elements: int) -> tuple[float, ...]:
    if not isinstance(value, bytes) or len(value) % 4 or not 1 <= len(value) // 4 <= min(TENSORS_MAX, elements):
        raise ProtocolError("bad-terms", "'scales' are not float32 numbers, one for each tensor")
    scales = np.frombuffer(value, type_f32)
    if not ((scales >= 0) & (scales <= SCALE_MAX)).all():  # NaN fails both
        raise ProtocolError("bad-terms", f"a scale is not from 0 to {SCALE_MAX:.0f}")
    return tuple(map(float, scales))
