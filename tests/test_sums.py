"""Words, masks, terms and sets of private sums: what is added can be taken out again, and nothing else is read."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.frame import build, parse
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.messages import PRIVATE, Update
from ternbus.broker.protocol.plan_keys import NO_DP, SUM
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.sums import masks, sets
from ternbus.broker.sums.terms import MASK, OWN, Card, SignedCard, Terms, context, digest_of
from ternbus.broker.sums.words import BITS, BUCKETS, Layout

HELPER, DEVICE = Identity(bytes(32)), Identity(bytes([1]) * 32)
BOX_SECRET = bytes([2]) * 32
CONTEXT = bytes([3]) * 32


def box_public(secret: bytes) -> bytes:
    import nacl.public  # noqa: PLC0415 - the only place that makes a key from its secret

    return bytes(nacl.public.PrivateKey(secret).public_key)


def card(identity: Identity = HELPER, **changes: Any) -> SignedCard:
    made = Card(
        federation="lab", helper="h-1", public=identity.public, box_key=box_public(BOX_SECRET), number=1, roster=OWN,
        min=3,
    )  # fmt: skip
    return replace(made, **changes).signed(identity)


def terms(**changes: Any) -> Terms:
    made = Terms(
        kind=MASK, bits=6, levels=1, helpers=(card(),), min=3, ternary=300, dense=7, scales=(0.5, 0.25), samples=0.0
    )
    return replace(made, **changes)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    return Layout(
        bits=draw(st.sampled_from(BITS)),
        ternary=draw(st.integers(0, 50)),
        dense=draw(st.integers(0, 9)),
        tensors=draw(st.integers(1, 3)),
    )


def values_of(layout: Layout, seed: int) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    half = 2 ** (layout.bits - 1)
    return (
        random.integers(-half, half, layout.ternary),
        random.integers(-(2**31), 2**31, layout.plain),
    )


def wrapped(values: Any, bits: int) -> Any:
    return (values + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


@given(layouts(), st.integers(0, 2**32))
def test_words_are_read_as_they_were_packed(layout: Layout, seed: int) -> None:
    ternary, plain = values_of(layout, seed)
    words = layout.pack(ternary, plain)
    assert words.shape == (layout.words,)
    assert np.array_equal(layout.read(words.tobytes()), words)
    found = layout.unpack(words)
    assert np.array_equal(found[0], ternary)
    assert np.array_equal(found[1], plain)


@given(layouts(), st.integers(0, 2**32))
def test_lanes_are_added_and_subtracted_each_by_itself(layout: Layout, seed: int) -> None:
    (one, plain), (two, more) = values_of(layout, seed), values_of(layout, seed + 1)
    total, other = layout.pack(one, plain), layout.pack(two, more)
    before = total.copy()
    layout.add(total, other)
    found = layout.unpack(total)
    assert np.array_equal(found[0], wrapped(one + two, layout.bits))
    assert np.array_equal(found[1], wrapped(plain + more, 32))
    assert np.array_equal(layout.read(total.tobytes()), total)
    layout.subtract(total, other)
    assert np.array_equal(total, before)


@given(layouts(), st.integers(0, 2**32), st.integers(0, 16))
def test_the_sum_of_many_is_what_adding_one_after_the_other_gives(layout: Layout, seed: int, count: int) -> None:
    """Of as many as have room beside each other at 4 bits, all at the ends of their range or anywhere."""
    many = [layout.pack(*values_of(layout, seed + each)) for each in range(count)]
    ends = layout.pack(np.full(layout.ternary, -1), np.full(layout.plain, -1))
    for words in (many, [ends] * count):
        total = layout.zeros()
        for each in words:
            layout.add(total, each)
        assert np.array_equal(layout.sum(iter(words)), total)


@pytest.mark.parametrize("bits", BITS)
def test_the_sum_of_masked_words_less_the_masks_is_the_sum(bits: int) -> None:
    layout = Layout(bits=bits, ternary=1003, dense=11, tensors=2)
    devices = [Identity(bytes([10 + each]) * 32) for each in range(3)]
    helpers = [Identity(bytes([20 + each]) * 32).public for each in range(2)]
    contents = [values_of(layout, each) for each in range(3)]
    total = np.zeros(layout.words, "<u8")
    for device, content in zip(devices, contents, strict=True):
        words = layout.pack(*content)
        seeds = [(helper, masks.seed_of(words, bytes([each]) * 32)) for each, helper in enumerate(helpers)]
        sent = masks.masked(layout, words, seeds, context=CONTEXT, device=device.public)
        assert not np.array_equal(sent, words)
        layout.add(total, layout.read(sent.tobytes()))
        for helper, seed in seeds:
            layout.subtract(total, masks.mask(layout, seed, context=CONTEXT, device=device.public, helper=helper))
    found = layout.unpack(total)
    assert np.array_equal(found[0], wrapped(sum(content[0] for content in contents), bits))
    assert np.array_equal(found[1], wrapped(sum(content[1] for content in contents), 32))


def test_masks_differ_by_seed_context_device_and_helper() -> None:
    layout, one = Layout(bits=4, ternary=500, dense=3, tensors=1), bytes(32)
    about = {"context": CONTEXT, "device": DEVICE.public, "helper": HELPER.public}
    made = [masks.mask(layout, bytes(32), **about), masks.mask(layout, bytes([1]) * 32, **about)]
    made += [masks.mask(layout, one, **{**about, name: bytes([9]) * 32}) for name in about]
    assert len({each.tobytes() for each in made}) == 5
    for each in made:
        assert np.array_equal(layout.read(each.tobytes()), each)


def test_the_same_random_state_gives_other_contents_other_seeds() -> None:
    layout = Layout(bits=4, ternary=40, dense=3, tensors=1)
    one, two = (layout.pack(*values_of(layout, seed)) for seed in (1, 2))
    assert masks.seed_of(one, bytes(32)) != masks.seed_of(two, bytes(32))
    assert masks.seed_of(one, bytes(32)) == masks.seed_of(one, bytes(32))


def test_bits_that_hold_no_value_and_wrong_lengths_are_refused() -> None:
    layout = Layout(bits=6, ternary=11, dense=0, tensors=1)
    words = layout.pack(*values_of(layout, 1))
    for word, bit in ((0, 60), (1, 6), (1, 63), (layout.words - 1, 63)):
        spoiled = words.copy()
        spoiled[word] |= np.uint64(1 << bit)
        if word < layout.ternary_words or layout.plain % 2:
            with pytest.raises(ProtocolError, match="bad-words"):
                layout.read(spoiled.tobytes())
    for body in (b"", words.tobytes()[:-1], words.tobytes() + bytes(8)):
        with pytest.raises(ProtocolError, match="bad-length"):
            layout.read(body)


def test_a_set_never_wraps() -> None:
    most = {bits: Layout(bits=bits, ternary=1, dense=1, tensors=1).sum_max(1) for bits in BITS}
    assert most == {4: 7, 5: 15, 6: 31, 8: 127}
    assert Layout(bits=8, ternary=1, dense=1, tensors=1).sum_max(2) == 63


def test_a_box_opens_for_its_update_only() -> None:
    about: dict[str, Any] = {"context": CONTEXT, "device": DEVICE.public, "helper": HELPER.public, "seq": 7}
    sealed = masks.box(box_public(BOX_SECRET), bytes([5]) * 32, **about)
    assert len(sealed) == masks.BOX_BYTES
    assert masks.open_box(BOX_SECRET, sealed, **about) == bytes([5]) * 32
    others: dict[str, Any] = {"context": bytes(32), "device": HELPER.public, "helper": DEVICE.public, "seq": 8}
    for name, other in others.items():
        with pytest.raises(ProtocolError, match="another update"):
            masks.open_box(BOX_SECRET, sealed, **{**about, name: other})
    for key, text in ((bytes([4]) * 32, sealed), (BOX_SECRET, sealed[:-1]), (BOX_SECRET, b"")):
        with pytest.raises(ProtocolError, match="does not open"):
            masks.open_box(key, text, **about)


def test_cards_and_terms_are_read_as_they_were_written() -> None:
    made = terms(helpers=(card(), card(DEVICE, helper="h-2", box_key=bytes([8]) * 32)))
    assert Terms.parse(made.content()) == made
    assert SignedCard.of_body(card().body) == card()
    assert made.devices_max == 31
    assert made.fits(Schema.of({"w": (30, 10), "b": (7,)}))
    assert not made.fits(Schema.of({"w": (30, 10), "b": (8,)}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bits": 7}, "do not hold"),
        ({"bits": 4, "min": 8}, "do not hold"),
        ({"levels": 0}, "bad-meta"),
        ({"levels": 16}, "do not hold"),
        ({"min": 1}, "bad-meta"),
        ({"scales": ()}, "'scales'"),
        ({"scales": (-1.0, 0.0)}, "a scale"),
        ({"scales": (float("nan"), 0.0)}, "a scale"),
        ({"scales": (float("inf"), 0.0)}, "a scale"),
        ({"ternary": 0, "dense": 0}, "'lengths'"),
        ({"helpers": ()}, "'helpers'"),
        ({"helpers": (card(), card(DEVICE))}, "same helper"),
        ({"helpers": (card(), card(helper="h-2", box_key=bytes([9]) * 32))}, "same public"),
        ({"helpers": (card(), card(DEVICE, helper="h-2"))}, "same box_key"),
        ({"dp": SUM}, "'theta'"),
        ({"dp": NO_DP, "theta": 0.1, "norm": 1.0}, "'theta'"),
        ({"dp": SUM, "theta": 0.3, "norm": 1.0}, "'theta'"),
        ({"samples": -1.0}, "bad-meta"),
        ({"kind": "plain"}, "bad-meta"),
    ],
)
def test_terms_that_cannot_be_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        Terms.parse(terms(**changes).content())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"federation": "Lab"}, "not a name"),
        ({"helper": "aggregator"}, "not a name"),
        ({"helper": "h\x1b[2J"}, "not a name"),
        ({"number": 0}, "'number'"),
        ({"roster": "mine"}, "'roster'"),
        ({"min": 1}, "'min'"),
        ({"min": True}, "'min'"),
        ({"box_key": bytes(31)}, "'box_key'"),
        ({"box_key": bytes(32)}, "nothing can be sealed"),  # points of low order
        ({"box_key": bytes.fromhex("ec" + 30 * "ff" + "7f")}, "nothing can be sealed"),
        (
            {"box_key": bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800")},
            "nothing can be sealed",
        ),
    ],
)
def test_cards_that_cannot_be_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        SignedCard.of_body(card(**changes).body)


def test_terms_have_one_encoding() -> None:
    content = terms().content()
    float_, whole = b"\xa7samples\xcb" + bytes(8), b"\xa7samples\x00"
    assert content.count(float_) == 1
    with pytest.raises(ProtocolError, match="not canonical"):
        Terms.parse(content.replace(float_, whole))


def test_a_card_of_another_key_is_refused() -> None:
    forged = SignedCard(card=card().card, content=card().content, signature=card(number=2).signature)
    with pytest.raises(ProtocolError, match="bad-signature"):
        Terms.parse(terms(helpers=(forged,)).content())
    with pytest.raises(ProtocolError):
        SignedCard.of_body(b"")


@pytest.mark.parametrize("content", [b"", b"\x80", b"\xc0", b"\x91\x01", bytes(100)])
def test_what_is_no_terms_and_no_ask_is_refused(content: bytes) -> None:
    with pytest.raises(ProtocolError):
        Terms.parse(content)
    with pytest.raises(ProtocolError):
        sets.Ask.parse(content)


def header(identity: Identity = DEVICE, sender: str = "pi-1", **changes: Any) -> sets.SetMember:
    update = Update(
        base=4, samples=1, codec=PRIVATE, encoding="raw", sealed=True, context=CONTEXT, min=3, boxes=(bytes(200),)
    )
    about: dict[str, Any] = {"kind": "update", "seq": 5, "federation": "lab", "part": 0, "parts": 2}
    meta = {**update.meta(), **changes.pop("meta", {})}
    frame = parse(build(identity, sender=sender, meta=meta, body=b"body", **{**about, **changes}))
    return sets.SetMember.of(identity.public, frame)


def test_an_ask_is_read_as_it_was_written() -> None:
    content = terms().content()
    ask = sets.Ask(version=4, model=bytes(32), plan=bytes([1]) * 32, terms=content, members=(header(),))
    read = sets.Ask.parse(ask.content())
    assert read == ask
    assert read.parsed_terms == terms()
    assert read.context == context(version=4, model=bytes(32), plan=bytes([1]) * 32, terms=digest_of(content))
    frame, update = sets.first_part(read.members[0], "lab")
    assert (frame.sender, frame.seq, update.context, update.min) == ("pi-1", 5, CONTEXT, 3)


@pytest.mark.parametrize(
    "member",
    [
        header(federation="other"),
        header(kind="offer"),
        header(part=1),
        header(meta={"codec": "ternary"}),
        replace(header(), public=HELPER.public),
        replace(header(), header=header().header[:-1]),
    ],
)
def test_a_header_that_is_no_private_update_is_refused(member: sets.SetMember) -> None:
    with pytest.raises(ProtocolError):
        sets.first_part(member, "lab")


def test_the_name_of_a_set_depends_on_members_and_context_and_not_on_their_order() -> None:
    headers = {"b": bytes([1]) * 32, "a": bytes([2]) * 32}
    name = sets.set_digest(CONTEXT, headers)
    assert name == sets.set_digest(CONTEXT, dict(reversed(headers.items())))
    assert name != sets.set_digest(bytes(32), headers)
    assert name != sets.set_digest(CONTEXT, {"a": bytes([1]) * 32, "b": bytes([2]) * 32})


def test_steps_and_answers_are_read_as_they_were_written() -> None:
    step = sets.AskStep(step=sets.OPEN, set=bytes(32), count=3)
    assert sets.AskStep.from_meta(step.meta()) == step
    for answer in (
        sets.Answer(outcome=sets.OPENED, set=bytes(32), count=4),
        sets.Answer(outcome=sets.REFUSED, set=bytes(32), count=4, reason="repeated: pi-1", updates=("pi-1",)),
    ):
        assert sets.Answer.from_meta(answer.meta()) == answer
    for updates in (["A"], "pi-1", ["pi"] * 51, [1]):
        with pytest.raises(ProtocolError, match="'updates'"):
            sets.Answer.from_meta({**step.meta(), "outcome": sets.REFUSED, "updates": updates})


def test_one_hots_have_seven_places() -> None:
    assert Layout(bits=4, ternary=0, dense=0, tensors=3).plain == 1 + 3 * BUCKETS
