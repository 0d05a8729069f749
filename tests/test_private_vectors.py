"""The vectors of private sums: Ternbus makes and reads them, and so does a stranger, by the protocol's page alone."""

import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import msgpack
import numpy as np
import pytest
from nacl.public import PrivateKey
from nacl.signing import SigningKey

from stranger import sums as stranger
from stranger import wire
from stranger.helper import Helper as StrangeHelper
from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import frame as frames
from ternbus.broker.protocol.identity import Identity, enroll_proof
from ternbus.broker.protocol.messages import Enroll, Status, Update
from ternbus.broker.protocol.model_messages import Head
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import Block
from ternbus.broker.sums import masks, sets
from ternbus.broker.sums.bfv import MODULUS, Slots
from ternbus.broker.sums.terms import Card, SignedCard, Terms, context, digest_of
from ternbus.broker.sums.words import BUCKETS, DENSE_STEPS, Layout
from ternbus.edge.learn import private_sum
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.plan.plan import Plan

WHOLE: dict[str, Any] = json.loads((Path(__file__).parent / "vectors.json").read_text())
VECTORS: dict[str, Any] = WHOLE["private"]
MALFORMED: dict[str, Any] = WHOLE["malformed_private"]
KEYS = WHOLE["keys"] | VECTORS["keys"]
SEEDS = {name: bytes.fromhex(row["seed"]) for name, row in KEYS.items() if name != "box"} | {
    "pi-01": bytes.fromhex(KEYS["device"]["seed"])
}
HELPER = Identity(SEEDS["h-1"])
AGGREGATOR = Identity(SEEDS["aggregator"])
BOX_SECRET = bytes.fromhex(KEYS["box"]["secret"])
UPDATES = VECTORS["updates"]
CONTEXT = bytes.fromhex(VECTORS["context"]["context"])
OUTSIDE = ("about",)


def unhex(name: str, key: str) -> bytes:
    return bytes.fromhex(VECTORS[name][key])


def public(device: str) -> bytes:
    return Identity(SEEDS[device]).public


def terms() -> tuple[Terms, stranger.Layout]:
    content = unhex("terms", "content")
    return Terms.parse(content), stranger.read_terms(content)[1]


def layouts(row: dict[str, Any]) -> tuple[Layout, stranger.Layout]:
    numbers = {"bits": row["bits"], "ternary": 35, "dense": row["dense"], "tensors": row["tensors"]}
    return Layout(**numbers), stranger.Layout(**numbers)


def headers() -> dict[str, bytes]:
    return {row["device"]: frames.parse(bytes.fromhex(row["frame"])).header for row in UPDATES}


@pytest.mark.parametrize("name", ["pi-02", "pi-03", "h-1"])
def test_keys_follow_from_their_seeds(name: str) -> None:
    identity = Identity(SEEDS[name])
    assert (identity.public.hex(), identity.key_id.hex()) == (KEYS[name]["public"], KEYS[name]["key_id"])
    assert bytes(PrivateKey(BOX_SECRET).public_key).hex() == KEYS["box"]["public"]


def test_a_card() -> None:
    fields, content, signature = VECTORS["card"]["fields"], unhex("card", "content"), unhex("card", "signature")
    about: dict[str, Any] = {
        key: bytes.fromhex(value) if key in {"public", "box_key"} else value for key, value in fields.items()
    }
    made = Card(**about).signed(HELPER)
    assert made.packed == [content, signature]
    assert SignedCard.of_body(content + signature) == made
    assert msgpack.packb(about) == content
    assert SigningKey(SEEDS["h-1"]).sign(stranger.CARD + content).signature == signature
    assert stranger.read_card(content, signature) == about
    built = frames.build(HELPER, federation="lab", sender="h-1", kind="card", seq=2, meta={}, body=made.body)
    assert built == unhex("card", "frame")


def test_terms_and_their_digest() -> None:
    fields, content = VECTORS["terms"]["fields"], unhex("terms", "content")
    about = {key: fields[key] for key in ("kind", "bits", "levels", "min", "samples", "dp", "theta", "norm")}
    card = SignedCard.of_body(unhex("card", "content") + unhex("card", "signature"))
    ternary, dense = fields["lengths"]
    made = Terms(helpers=(card,), ternary=ternary, dense=dense, scales=tuple(fields["scales"]), **about)
    assert made.content() == content
    assert Terms.parse(content) == made
    assert made.fits(Schema.parse(bytes.fromhex(WHOLE["schema"]["bytes"])))
    assert digest_of(content) == wire.digest(content) == unhex("terms", "digest")
    read, _ = stranger.read_terms(content)
    packed = struct.pack("<3f", *fields["scales"])
    assert read == {**fields, "scales": packed, "helpers": [card.packed]}
    assert msgpack.packb(read) == content
    built = frames.build(
        AGGREGATOR, federation="lab", sender="aggregator", kind="terms", seq=100, meta={}, body=content
    )
    assert built == unhex("terms", "frame")


def test_a_context_of_the_plans_bytes_in_the_head() -> None:
    about = {key: unhex("context", key) for key in ("model", "plan", "terms")}
    frame = frames.parse(unhex("head", "frame"))
    frame.check_authentic(AGGREGATOR.public)
    head = Head.from_meta(frame.meta)
    assert (head.version, head.digest) == (VECTORS["context"]["version"], about["model"])
    assert (head.plan["codec"], head.plan["terms"]) == ("private", about["terms"])
    assert head.plan["schema"] == head.schema == bytes.fromhex(WHOLE["schema"]["digest"])
    plan = unhex("head", "plan_bytes")
    assert plan == msgpack.packb(dict(head.plan)) == stranger.plan_bytes(frame.meta_bytes)
    assert about["plan"] == digest_of(plan)
    assert context(version=head.version, **about) == CONTEXT
    assert stranger.context_of(head.version, about["model"], about["plan"], about["terms"]) == CONTEXT


@pytest.mark.parametrize("row", VECTORS["words"], ids=lambda row: f"{row['bits']} bits")
def test_words_both_ways(row: dict[str, Any]) -> None:
    ours, theirs = layouts(row)
    expected, values = bytes.fromhex(row["words"]), row["ternary"] + row["plain"]
    packed = ours.pack(np.array(row["ternary"]), np.array(row["plain"]))
    assert packed.tobytes() == theirs.write(values) == expected
    found = ours.unpack(ours.read(expected))
    assert [*found[0].tolist(), *found[1].tolist()] == theirs.read(expected) == values


@pytest.mark.parametrize("row", VECTORS["masks"], ids=lambda row: f"{row['bits']} bits")
def test_masks(row: dict[str, Any]) -> None:
    (ours, theirs), seed = layouts(row), bytes.fromhex(row["seed"])
    made = masks.mask(ours, seed, context=CONTEXT, device=public("pi-01"), helper=HELPER.public)
    assert made.tobytes().hex() == row["mask"]
    assert stranger.mask_of(theirs, seed, CONTEXT, public("pi-01"), HELPER.public).hex() == row["mask"]
    assert theirs.cut(stranger.chacha20(bytes.fromhex(row["key"]), theirs.length, 1)).hex() == row["mask"]


def test_the_stranger_s_stream_is_the_one_of_the_rfc() -> None:
    # RFC 8439, appendix A.1, test vectors 1 and 2: key and nonce of zeros, blocks 0 and 1
    stream = stranger.chacha20(bytes(32), 128, 0)
    assert stream[:8].hex() == "76b8e0ada0f13d90"
    assert stream[64:72].hex() == "9f07e7be5551387a"


@pytest.mark.parametrize("row", UPDATES, ids=lambda row: row["device"])
def test_a_private_update_from_its_values_to_its_frame(row: dict[str, Any]) -> None:
    device, seq = Identity(SEEDS[row["device"]]), row["seq"]
    about, theirs = {"context": CONTEXT, "device": device.public, "helper": HELPER.public}, terms()[1]
    ours = terms()[0].layout
    words = ours.pack(np.array(row["ternary"]), np.array([*row["dense"], row["weight"], *row["buckets"]]))
    assert words.tobytes().hex() == row["words"]
    fresh = bytes.fromhex(row["fresh"])
    seed = masks.seed_of(words, fresh)
    assert seed.hex() == row["seed"]
    sent = masks.masked(ours, words, [(HELPER.public, seed)], context=CONTEXT, device=device.public)
    assert sent.tobytes().hex() == row["masked"]
    plain = stranger.bound(CONTEXT, device.public, HELPER.public, seq)
    assert (plain + seed).hex() == row["box_plain"]
    box, sealed = bytes.fromhex(row["box"]), bytes.fromhex(row["sealed"])
    assert masks.open_box(BOX_SECRET, box, **about, seq=seq) == seed == stranger.open_box(BOX_SECRET, box, plain)
    assert len(masks.box(bytes.fromhex(KEYS["box"]["public"]), seed, **about, seq=seq)) == len(box)
    assert AGGREGATOR.unseal(sealed).hex() == row["sealed_plain"]
    assert row["sealed_plain"] == (device.key_id + seq.to_bytes(8, "little")).hex() + row["masked"]
    update = Update(
        base=42, samples=1, codec="private", encoding="raw", sealed=True, context=CONTEXT, min=3, boxes=(box,)
    )
    sender = row["device"]
    built = frames.build(
        device, federation="lab", sender=sender, kind="update", seq=seq, meta=update.meta(), body=sealed
    )
    assert built.hex() == row["frame"]
    assert Update.from_meta(frames.parse(built).meta) == update
    # the stranger's way
    values = [*row["ternary"], *row["dense"], row["weight"], *row["buckets"]]
    assert theirs.write(values) == words.tobytes()
    assert stranger.seed_of(words.tobytes(), fresh) == seed
    mask = stranger.mask_of(theirs, seed, CONTEXT, device.public, HELPER.public)
    assert theirs.add(words.tobytes(), mask) == sent.tobytes()
    key = SigningKey(SEEDS[sender])
    again = wire.make_frames(
        key, kind="update", federation="lab", sender=sender, seq=seq, meta=update.meta(), body=sealed
    )
    assert again == [built]
    stranger.check_update(wire.parse_frame(built).meta)


def test_weights_of_samples() -> None:
    for row in UPDATES:
        assert private_sum.weight(terms()[0], Plan(), row["samples"]) == row["weight"]
        assert round(max(64, min(255, 255 * row["samples"] / terms()[0].samples))) == row["weight"]


def test_buckets_of_scales() -> None:
    references = [scale / 8 if dense else scale for scale, dense in zip((0.125, 0.5, 0.25), (0, 1, 0), strict=True)]
    for row in UPDATES:
        places = [stranger.bucket(own, each) for own, each in zip(row["own_scales"], references, strict=True)]
        hots = [row["buckets"][BUCKETS * each : BUCKETS * (each + 1)] for each in range(3)]
        assert [sum(hot) for hot in hots] == [1, 1, 1]
        assert [hot.index(1) for hot in hots] == places


def test_the_values_of_a_change() -> None:
    entry, (ours, theirs) = VECTORS["values"], terms()
    schema = Schema.parse(bytes.fromhex(WHOLE["schema"]["bytes"]))
    change = np.frombuffer(unhex("values", "change"), "<f4")
    expected = [*entry["ternary"], *entry["dense"], entry["weight"], *entry["buckets"]]
    content = private_sum.encode(
        schema,
        ours,
        Plan(codec="private", clip_sigma=entry["clip_sigma"]),
        change,
        samples=entry["samples"],
        random_source=RandomSource(),
    )
    assert theirs.read(content.words) == expected
    tensors = [
        (segment.tensor.role, scale, change[segment.start : segment.stop].tolist())
        for segment, scale in zip(schema.segments, ours.scales, strict=True)
    ]
    for draw in (0.0, 0.5, 0.999):
        found = stranger.values_of(
            tensors, ours.levels, entry["weight"], entry["clip_sigma"], itertools.repeat(draw).__next__
        )
        assert found == expected


def test_draws_of_a_stranger_are_unbiased() -> None:
    draws = Random(1)
    sums, count = [0] * 4, 4000
    for _ in range(count):
        values = stranger.values_of([("ternary", 0.5, [0.1, -0.4, 0.0, 0.7])], 2, 255, 0.0, draws.random)
        sums = [one + two for one, two in zip(sums, values[:4], strict=True)]
    # a standard error of at most 0.5 / √4000 levels, of which each is a quarter
    assert np.allclose([0.25 * each / count for each in sums], [0.1, -0.4, 0.0, 0.5], atol=0.01)


def test_the_sum_of_three_devices_less_their_masks_is_a_change_of_the_model() -> None:
    ours, theirs = terms()
    layout, entry = ours.layout, VECTORS["sum"]
    total, less = np.zeros(layout.words, "<u8"), bytes(theirs.length)
    for row in UPDATES:
        layout.add(total, layout.read(bytes.fromhex(row["masked"])))
        less = theirs.add(less, bytes.fromhex(row["mask"]))
    assert (total.tobytes().hex(), less.hex()) == (entry["masked"], entry["masks"])
    layout.subtract(total, layout.read(less))
    values = theirs.read(theirs.add(bytes.fromhex(entry["masked"]), less, -1))
    assert total.tobytes().hex() == entry["words"]
    assert values == [*entry["ternary"], *entry["dense"], entry["weight"], *entry["buckets"]]
    ternary, plain = layout.unpack(total)
    assert [*ternary.tolist(), *plain.tolist()] == values
    first, dense, second = ours.scales
    scales = np.repeat([first, second, dense], [6, 7, 2])
    assert struct.pack("<15f", *stranger.change_of(values, theirs, scales.tolist(), 1)).hex() == entry["change"]
    units = np.repeat([1, DENSE_STEPS], [13, 2])
    change = scales * np.array(values[:15]) / units / (plain[2] / 255)
    schema = Schema.parse(bytes.fromhex(WHOLE["schema"]["bytes"]))
    assert Block.read(schema, "float32", "raw", change.astype("<f4").tobytes()).content.hex() == entry["change"]


def test_a_set_has_a_digest() -> None:
    made = sets.set_digest(CONTEXT, {name: digest_of(each) for name, each in headers().items()})
    assert made == stranger.set_digest(CONTEXT, headers()) == unhex("set", "digest")


@pytest.mark.parametrize(("step", "seq", "count"), [("prepare", 102, 0), ("open", 103, 1), ("abandon", 104, 1)])
def test_the_steps_of_an_ask_byte_for_byte(step: str, seq: int, count: int) -> None:
    asked = sets.AskStep(step=step, set=unhex("set", "digest"), count=count)
    body = b"" if step == sets.ABANDON else unhex("ask", "body")
    built = frames.build(
        AGGREGATOR, federation="lab", sender="aggregator", kind="ask", seq=seq, meta=asked.meta(), body=body
    )
    assert built == unhex("ask", step)
    assert sets.AskStep.from_meta(frames.parse(built).meta) == asked


def test_a_helper_answers_an_ask_with_the_sum_of_the_masks() -> None:
    content = unhex("ask", "body")
    ask = sets.Ask.parse(content)
    assert ask.content() == content
    assert ask.context == CONTEXT
    layout = ask.parsed_terms.layout
    total = np.zeros(layout.words, "<u8")
    for member in ask.members:
        frame, update = sets.first_part(member, "lab")
        about = {"context": update.context, "device": member.public, "helper": HELPER.public}
        seed = masks.open_box(BOX_SECRET, update.boxes[0], seq=frame.seq, **about)
        layout.add(total, masks.mask(layout, seed, **about))
    assert total.tobytes() == unhex("sum", "masks")
    assert stranger.read_ask(content).context == CONTEXT
    helper = StrangeHelper("lab", SigningKey(SEEDS["h-1"]), BOX_SECRET, 1, least=3, own_roster=True)
    for row in UPDATES:
        helper.admit(row["device"], public(row["device"]))
    asked: dict[str, Any] = {"set": unhex("set", "digest"), "count": 0}
    assert helper.answer({"step": "prepare", **asked}, content) == ({"outcome": "prepared", **asked, "count": 1}, b"")
    assert helper.answer({"step": "open", **asked}, content) == (
        {"outcome": "opened", **asked, "count": 2},
        total.tobytes(),
    )


@pytest.mark.parametrize(
    ("outcome", "seq", "more"),
    [
        ("prepared", 3, {}),
        ("opened", 4, {}),
        ("abandoned", 5, {}),
        ("refused", 6, {"reason": "pi-02 is in another set", "updates": ("pi-02",)}),
    ],
)
def test_answers_byte_for_byte(outcome: str, seq: int, more: dict[str, Any]) -> None:
    answer = sets.Answer(outcome=outcome, set=unhex("set", "digest"), count=1, **more)
    body = unhex("sum", "masks") if outcome == "opened" else b""
    built = frames.build(HELPER, federation="lab", sender="h-1", kind="answer", seq=seq, meta=answer.meta(), body=body)
    assert built == unhex("answer", outcome)
    assert sets.Answer.from_meta(frames.parse(built).meta) == answer
    stranger.check_answer(wire.parse_frame(built).meta)


def test_a_helper_enrolls_and_says_its_count_byte_for_byte() -> None:
    proof = enroll_proof(VECTORS["enroll"]["code"], "lab", "h-1", HELPER.public)
    assert proof == unhex("enroll", "body")
    about: dict[str, Any] = {"federation": "lab", "sender": "h-1"}
    meta = Enroll(public_key=HELPER.public).meta()
    assert frames.build(HELPER, kind="enroll", seq=1, meta=meta, body=proof, **about) == unhex("enroll", "frame")
    status = Status(state="online", session=2, software="example", count=1)
    assert frames.build(HELPER, kind="status", seq=7, meta=status.meta(), **about) == unhex("status", "frame")


OURS: dict[str, Callable[[bytes], object]] = {
    "cards": SignedCard.of_body,
    "terms": Terms.parse,
    "asks": sets.Ask.parse,
    "words": layouts(VECTORS["words"][2])[0].read,
    "answers": lambda content: sets.Answer.from_meta(frames.parse(content).meta),
    "updates": lambda content: Update.from_meta(frames.parse(content).meta),
}
THEIRS: dict[str, Callable[[bytes], object]] = {
    "cards": lambda content: stranger.read_card(content[:-64], content[-64:]),
    "terms": stranger.read_terms,
    "asks": stranger.read_ask,
    "words": layouts(VECTORS["words"][2])[1].read,
    "answers": lambda content: stranger.check_answer(wire.parse_frame(content).meta),
    "updates": lambda content: stranger.check_update(wire.parse_frame(content).meta),
}
REASONS = {
    "cards": {"bad-card", "bad-meta", "bad-signature"},
    "terms": {"bad-terms", "bad-card", "bad-meta", "bad-signature"},
    "asks": {"bad-ask", "bad-meta"},
    "words": {"bad-words", "bad-length"},
    "answers": {"bad-meta"},
    "updates": {"bad-meta"},
}


@pytest.mark.parametrize(
    ("what", "name"), [(what, name) for what, rows in MALFORMED.items() for name in rows if name not in OUTSIDE]
)
def test_what_is_malformed_is_refused(what: str, name: str) -> None:
    content = bytes.fromhex(MALFORMED[what][name])
    with pytest.raises(ProtocolError) as error:
        OURS[what](content)
    assert error.value.reason in REASONS[what]
    with pytest.raises(wire.RefusedError):
        THEIRS[what](content)


@pytest.mark.parametrize("row", VECTORS["bfv"]["values"], ids=lambda row: f"{row['bits']} bits")
def test_slots_both_ways(row: dict[str, Any]) -> None:
    about = {"bits": row["bits"], "ternary": len(row["ternary"]), "dense": row["dense"], "tensors": row["tensors"]}
    values, slots, used = row["ternary"] + row["plain"], Slots(Layout(**about)), len(row["slots"])
    assert VECTORS["bfv"]["modulus"] == MODULUS
    made = slots.of_words(slots.layout.pack(np.array(row["ternary"]), np.array(row["plain"])))
    assert (made % MODULUS).reshape(-1)[:used].tolist() == row["slots"]
    assert not made.reshape(-1)[used:].any()
    assert stranger.slots_of(stranger.Layout(**about), values, MODULUS) == row["slots"]
    assert stranger.values_in(stranger.Layout(**about), row["slots"], MODULUS) == values
    found = slots.layout.unpack(slots.to_words(made))
    assert [*found[0].tolist(), *found[1].tolist()] == values


def test_every_entry_is_used() -> None:
    """A vector added to the file must be added here."""
    used = "keys card terms head context words masks updates values set sum ask answer enroll status bfv"
    assert set(VECTORS) == set(used.split())
    assert set(MALFORMED) == set(REASONS) == set(OURS) == set(THEIRS)
