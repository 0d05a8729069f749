"""Fuzz targets: what devices, helpers and the aggregator read of each other in private sums.

What is signed is signed here, whatever it says: only a peer with a key gets that far.
"""

from typing import Final

import msgpack
import numpy as np
from nacl.public import PrivateKey, SealedBox

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.frame import MAGIC, SIGNATURE_BYTES, SIGNED_PREFIX, Frame, parse
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.messages import Update
from ternbus.broker.sums import masks, sets
from ternbus.broker.sums.plan_bytes import plan_bytes
from ternbus.broker.sums.terms import CARD_PREFIX, SignedCard, Terms
from ternbus.broker.sums.words import BITS, Layout

FEDERATION: Final = "lab"
DEVICE: Final = Identity(bytes(range(32)))  # the keys of tests/vectors.json
HELPER: Final = Identity(bytes(range(128, 160)))
BOX_SECRET: Final = bytes(range(160, 192))
SEALED: Final = SealedBox(PrivateKey(BOX_SECRET))
BOUND_BYTES: Final = 3 * 32 + 8
KINDS: Final[tuple[type[Update | sets.AskStep | sets.Answer], ...]] = (Update, sets.AskStep, sets.Answer)
HEADER: Final = msgpack.packb(
    {
        "kind": "head",
        "federation": FEDERATION,
        "sender": "aggregator",
        "key": bytes(8),
        "seq": 1,
        "part": [0, 1],
        "digest": bytes(32),
        "meta": None,
    }
)[:-1]


def card(data: bytes) -> None:
    """A helper's card."""
    read = SignedCard.read(data, HELPER.sign(CARD_PREFIX + data))
    assert read.card.signed(HELPER) == read
    assert SignedCard.of_body(read.body) == read
    masks.box(read.card.box_key, bytes(32), context=bytes(32), device=bytes(32), helper=bytes(32), seq=1)


def terms(data: bytes) -> None:
    """Terms, with the cards in them."""
    read = Terms.parse(data)
    assert read.content() == data
    assert read.min <= read.devices_max <= (2 ** (read.bits - 1) - 1) // read.levels
    assert read.layout.words > 0
    assert len({each.card.public for each in read.helpers}) == len(read.helpers)


def ask(data: bytes) -> None:
    """The body of an ask; each of its headers is signed by one device."""
    read = sets.Ask.parse(data)
    assert read.content() == data
    signed = [
        sets.SetMember(public=DEVICE.public, header=each.header, signature=DEVICE.sign(SIGNED_PREFIX + each.header))
        for each in read.members
    ]
    found = sets.first_parts(signed, FEDERATION)
    assert len(found) == len(signed)
    name = sets.set_digest(read.context, {device: member.digest for device, (member, _, _) in found.items()})
    assert len(name) == 32
    assert read.parsed_terms.content() == read.terms


def private_meta(data: bytes) -> None:
    """The meta of a private update, of a step of an ask, or of an answer; the first byte chooses."""
    kind = KINDS[(data[0] if data else 0) % len(KINDS)]
    message = kind.from_meta(with_meta(data[1:]).meta)
    assert kind.from_meta(message.meta()) == message
    if isinstance(message, sets.Answer):
        assert message.reason.isprintable()


def plan(data: bytes) -> None:
    """A head's meta, and the bytes of the plan in it."""
    frame = with_meta(data)
    found = plan_bytes(frame.meta_bytes)
    assert found in data
    assert msgpack.unpackb(found, strict_map_key=False) == frame.meta["plan"]


def with_meta(meta: bytes) -> Frame:
    """A frame with this meta, as it is read."""
    header = HEADER + meta
    return parse(MAGIC + len(header).to_bytes(4, "little") + header + bytes(SIGNATURE_BYTES))


def words(data: bytes) -> None:
    """Words. Bytes: bits, ternary elements, dense elements, tensors; then a body, added to itself and taken away."""
    if len(data) < 4:
        raise ProtocolError("bad-length", "no words")
    layout = Layout(bits=BITS[data[0] % len(BITS)], ternary=data[1], dense=data[2], tensors=data[3])
    read = layout.read(data[4:])
    ternary, plain = layout.unpack(read)
    assert layout.pack(ternary, plain).tobytes() == data[4:]
    assert not len(ternary) or -(2 ** (layout.bits - 1)) <= ternary.min() <= ternary.max() < 2 ** (layout.bits - 1)
    total = read.copy()
    layout.add(total, read)
    assert np.array_equal(layout.read(total.tobytes()), total)
    layout.subtract(total, read)
    assert np.array_equal(total, read)


def box(data: bytes) -> None:
    """What a device has sealed to a helper. Bytes: context, device's and helper's key, seq; then what it has sealed."""
    about = {name: data[32 * i : 32 * (i + 1)] for i, name in enumerate(("context", "device", "helper"))}
    bound, plain = data[:BOUND_BYTES], data[BOUND_BYTES:]
    if len(bound) < BOUND_BYTES:
        raise ProtocolError("bad-box", "no box")
    seed = masks.open_box(BOX_SECRET, SEALED.encrypt(plain), seq=int.from_bytes(bound[96:], "little"), **about)
    assert plain == masks.BOX_PREFIX + bound + seed
