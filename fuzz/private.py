"""Fuzz targets: what devices, helpers and the aggregator read of each other in private sums.

What is signed is signed here, whatever it says: only a peer with a key gets that far.
"""

from typing import Final

import msgpack
import numpy as np
from nacl.public import PrivateKey, SealedBox

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import (
    FRAME_BYTES,
    HEADER_BYTES_MAX,
    MAGIC,
    SIGNATURE_BYTES,
    SIGNED_PREFIX,
    Frame,
    parse,
)
from ternbus.broker.protocol.identity import AGGREGATOR, Identity
from ternbus.broker.protocol.messages import Update
from ternbus.broker.sums import masks, sets
from ternbus.broker.sums.plan_bytes import plan_bytes
from ternbus.broker.sums.terms import CARD_PREFIX, OWN, SignedCard, Terms, digest_of
from ternbus.broker.sums.words import BITS, Layout
from ternbus.helper.core import events
from ternbus.helper.core.actions import Action, Publish, Save, Stop
from ternbus.helper.core.core import Core
from ternbus.helper.core.profile import Profile
from ternbus.helper.core.records import MemoryRecords
from ternbus.helper.core.state import BoxKey, State

FEDERATION: Final = "lab"
DEVICES: Final = {  # the keys of tests/vectors.json
    name: Identity(bytes(range(first, first + 32))) for name, first in (("pi-01", 0), ("pi-02", 64), ("pi-03", 96))
}
SERVER: Final = Identity(bytes(range(32, 64)))
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
    """The body of an ask; each of its headers is signed by the device whose key it names."""
    read = sets.Ask.parse(data)
    assert read.content() == data
    signed = [resigned(each) for each in read.members]
    headers = {sets.first_part(each, FEDERATION)[0].sender: each.digest for each in signed}
    name = sets.set_digest(read.context, headers)
    assert len(name) == 32
    assert read.parsed_terms.content() == read.terms


def resigned(member: sets.SetMember) -> sets.SetMember:
    """The member with the signature of its device, where the header names a known key."""
    signer = next((each for each in DEVICES.values() if each.key_id == member.frame().key), None)
    if signer is None:
        return member
    return sets.SetMember(
        public=signer.public, header=member.header, signature=signer.sign(SIGNED_PREFIX + member.header)
    )


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
    plain = msgpack.unpackb(found, strict_map_key=False)
    assert msgpack.packb(plain) == msgpack.packb(frame.meta["plan"])  # a plan may have a NaN, which equals nothing


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


class HelperProcess:
    """A helper that answers asks; what it writes down is in memory. One handles all inputs, as in ``fuzz.peer``."""

    def __init__(self) -> None:
        self.records = MemoryRecords(roster=OWN)
        for name, identity in DEVICES.items():
            self.records.admit(name, identity.public)
        profile = Profile(
            federation=FEDERATION,
            helper="h-1",
            identity=HELPER,
            aggregator_public=SERVER.public,
            random=bytes,
            roster=OWN,
            min=3,
        )
        key = BoxKey(number=1, secret=BOX_SECRET, made_s=0.0)
        self.core = Core(profile, State(box_keys=(key,), enrolled=True), self.records)
        self.seq = 0
        self.handle(events.Started(unix_s=0.0))
        done = self.handle(events.Connected(frame_bytes=FRAME_BYTES))
        while not self.core.is_ready:  # the broker sends its card back
            (card,) = [action for action in done if isinstance(action, Publish)]
            done = self.handle(events.FrameArrived(topic=card.topic, frame=parse(card.payload)))

    def handle(self, event: events.Event) -> list[Action]:
        done = self.core.handle(event, 0.0)
        for action in done:
            if isinstance(action, Save) and action.step is not None:
                self.records.write(action.step)
        return done

    def send(self, kind: str, meta: bytes, body: bytes) -> None:
        self.seq += 1
        about = {
            "kind": kind,
            "federation": FEDERATION,
            "sender": AGGREGATOR,
            "key": bytes(SERVER.key_id),
            "seq": self.seq,
            "part": [0, 1],
            "digest": digest_of(body),
        }
        header = b"\x88" + msgpack.packb(about)[1:] + msgpack.packb("meta") + (meta or b"\x80")
        if len(header) > HEADER_BYTES_MAX:
            raise ProtocolError("header-too-long", "no frame")
        payload = MAGIC + len(header).to_bytes(4, "little") + header + SERVER.sign(SIGNED_PREFIX + header) + body
        topic = topics.status(FEDERATION) if kind == "status" else topics.help_of(FEDERATION, "h-1", kind)
        done = self.handle(events.FrameArrived(topic=topic, frame=parse(payload)))
        for action in done + self.handle(events.TimeReached(unix_s=0.0)):
            if isinstance(action, Stop):
                raise ProtocolError("stopped", action.reason)
            if isinstance(action, Publish) and (frame := parse(action.payload)).kind == sets.Answer.KIND:
                assert bool(frame.body) == (sets.Answer.from_meta(frame.meta).outcome == sets.OPENED)


HELPER_KINDS: Final = ("ask", "receipt", "status")
_process: list[HelperProcess] = []  # made at the first input, and after one that ended it


def helper(data: bytes) -> None:
    """A message of the aggregator for a helper. Bytes: kind, length of meta (2), meta, body."""
    if len(data) < 3:
        raise ProtocolError("not-a-frame", "no message")
    if not _process or _process[0].core.due_s() is None:
        _process[:] = [HelperProcess()]
    length = int.from_bytes(data[1:3], "little")
    _process[0].send(HELPER_KINDS[data[0] % len(HELPER_KINDS)], data[3 : 3 + length], data[3 + length :])
