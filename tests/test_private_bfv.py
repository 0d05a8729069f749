"""Encrypted sums, the kind bfv: what is sent, what is refused, and that the sums are those of masks, bit for bit."""

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from support.private_device import aggregator, finished, named, private, refusals, training
from support.private_sets import Asked, ready, terms_of, words_of
from support.private_sets import Helper as HelperCore
from support.private_sets import World as Version
from support.private_sums import card as card_of
from support.private_sums import helper_key, terms_for
from support.set_world import World, content_of
from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.sums import bfv, canonical
from ternbus.broker.sums.sets import Ask
from ternbus.broker.sums.terms import BFV, SignedCard, Terms, digest_of
from ternbus.broker.sums.words import BITS, Layout
from ternbus.edge.core.actions import Publish
from ternbus.edge.plan.sum_policy import SumPolicy
from ternbus.helper.core.ask_check import ANSWER_BYTES_MAX

tenseal = pytest.importorskip("tenseal")

KEY = bfv.SecretKey.generate()
BLIND = bytes([7]) * 32
SMALL = Layout(bits=6, ternary=40, dense=3, tensors=2)
TWO = Layout(bits=6, ternary=13_000, dense=3, tensors=2)  # in two ciphertexts
PUBLIC = {"save_secret_key": False, "save_galois_keys": False, "save_relin_keys": False}


def extreme(layout: Layout, seed: int) -> Any:
    """Words of one device, with values at the ends of what it may send."""
    random = np.random.default_rng(seed)
    plain = random.choice([-(2**20), -2048, -1, 0, 2047, 2048, 2**20], layout.plain)
    return layout.pack(random.choice([-1, 1], layout.ternary), plain)


def opened(layout: Layout, *bodies: bytes) -> Any:
    sum_of_all = bfv.blinded_sum(KEY.public, layout, bodies, BLIND)
    return bfv.opened(layout, KEY.decrypt(bfv.Slots(layout), sum_of_all), BLIND)


def serialized(values: list[int], context: Any = None) -> bytes:
    """A ciphertext as it travels; under KEY unless a context is given."""
    context = context or tenseal.context_from(bfv._unpadded(KEY.public), n_threads=1)
    return bfv._padded(tenseal.bfv_vector(context, values).serialize(), bfv.CIPHERTEXT_BYTES)


def context_with(**changes: Any) -> Any:
    about = {"poly_modulus_degree": 4096, "plain_modulus": bfv.MODULUS, "coeff_mod_bit_sizes": [40, 41], **changes}
    return tenseal.context(tenseal.SCHEME_TYPE.BFV, n_threads=1, **about)


def key_of(context: Any, **changes: bool) -> bytes:
    return bfv._padded(context.serialize(save_public_key=True, **{**PUBLIC, **changes}), bfv.KEY_BYTES)


# -- arithmetic


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_sums_that_words_hold_are_opened_exactly(bits: int) -> None:
    layout = Layout(bits=bits, ternary=4097, dense=3, tensors=1)
    devices, total = layout.sum_max(1), layout.zeros()
    words = [layout.pack(np.full(layout.ternary, sign), np.full(layout.plain, sign * 2**20)) for sign in (1, -1)]
    bodies = [bfv.encrypt(KEY.public, layout, each) for each in words]
    for _ in range(devices):
        layout.add(total, words[1])
    assert np.array_equal(opened(layout, *[bodies[1]] * devices), total)
    assert np.array_equal(opened(layout, bodies[0]), words[0])


@pytest.mark.parametrize("layout", [SMALL, TWO, Layout(bits=4, ternary=0, dense=2, tensors=1)])
def test_a_sum_of_ciphertexts_opens_to_the_sum_of_the_words(layout: Layout) -> None:
    contents = [extreme(layout, seed) for seed in range(5)]
    total = layout.zeros()
    for each in contents:
        layout.add(total, each)
    bodies = [bfv.encrypt(KEY.public, layout, each) for each in contents]
    assert {len(each) for each in bodies} == {bfv.Slots(layout).body_bytes}
    assert np.array_equal(opened(layout, *bodies), total)


def test_a_helper_sees_every_slot_blinded_and_equal_updates_are_encrypted_to_others() -> None:
    words = SMALL.zeros()
    one, other = (bfv.encrypt(KEY.public, SMALL, words) for _ in range(2))
    assert one != other
    blinded = bfv.blinded_sum(KEY.public, SMALL, [one, other], BLIND)
    seen = np.frombuffer(KEY.decrypt(bfv.Slots(SMALL), blinded), "<u4")
    assert seen.size == 4096
    assert len(np.unique(seen)) > 4000
    assert seen.max() > 0.99 * bfv.MODULUS
    assert bfv.blind_of(b"s" * 32, digest_of(b"one")) != bfv.blind_of(b"s" * 32, digest_of(b"two"))


# -- hostile bytes


GOOD = bfv.encrypt(KEY.public, SMALL, SMALL.zeros())


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda: GOOD + b"\0", "bad-length"),
        (lambda: b"", "bad-length"),
        (lambda: bytes(bfv.CIPHERTEXT_BYTES), "bad-ciphertext"),
        (lambda: GOOD[:-1] + b"\1", "bad-ciphertext: not a length"),
        (lambda: b"\xff\xff\xff\xff" + GOOD[4:], "bad-ciphertext: not a length"),
        (lambda: GOOD[:900] + bytes(100) + GOOD[1000:], "bad-ciphertext: not a ciphertext under"),
        (lambda: serialized([1, 2, 3]), "bad-ciphertext: not a ciphertext of 4096 slots"),
        (lambda: serialized([0] * 4096, context_with(plain_modulus=40_961)), "bad-ciphertext"),
    ],
)
def test_bytes_that_are_no_ciphertexts_of_an_update_are_refused(body: Any, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        bfv.check(KEY.public, SMALL, body())


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (lambda: KEY.public[:-1], "bad-key: 98303 bytes"),
        (lambda: b"\xff" * bfv.KEY_BYTES, "bad-ciphertext"),
        (lambda: bytes(bfv.KEY_BYTES), "bad-key"),
        (lambda: bfv._padded(b"no key", bfv.KEY_BYTES), "bad-key: not a serialized context"),
        (lambda: key_of(context_with(plain_modulus=40_961)), "bad-key: a context with other parameters"),
        (lambda: key_of(context_with(coeff_mod_bit_sizes=[36, 36])), "bad-key: a context with other parameters"),
        (lambda: bfv._padded(context_with().serialize(save_public_key=False, **PUBLIC), bfv.KEY_BYTES), "bad-key"),
        (lambda: KEY.content[bfv.KEY_BYTES :], "bad-key"),
    ],
)
def test_bytes_that_are_no_public_key_of_these_parameters_are_refused(key: Any, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        bfv.check_key(key())


def test_a_public_key_with_a_secret_one_beside_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfv, "KEY_BYTES", 200_000)  # a secret key does not fit into the length of a public one
    with pytest.raises(ProtocolError, match="more than a public key"):
        bfv.check_key(key_of(context_with(), save_secret_key=True))


def cancelling(public: bytes) -> list[bytes]:
    """Two ciphertexts that are each other's negatives: anybody can read their sum."""
    context = tenseal.context_from(bfv._unpadded(public), n_threads=1)
    one, two = (tenseal.bfv_vector(context, [value] * 4096) for value in (1, 2))
    return [bfv._padded(each.serialize(), bfv.CIPHERTEXT_BYTES) for each in (one - two, two - one)]


def test_updates_that_cancel_each_other_are_no_sum() -> None:
    """SEAL refuses to make a ciphertext that anybody can read."""
    pair = cancelling(KEY.public)
    with pytest.raises(ProtocolError, match="bad-ciphertext: the updates cannot be added up"):
        bfv.blinded_sum(KEY.public, SMALL, pair, BLIND)


def test_an_answer_that_is_no_decrypted_sum_is_refused() -> None:
    zeros = bfv.Slots(SMALL).of_words(SMALL.zeros())
    assert not bfv.Slots(SMALL).to_words(zeros).any()
    with pytest.raises(ProtocolError, match="bad-length"):
        bfv.opened(SMALL, bytes(16), BLIND)
    with pytest.raises(ProtocolError, match="bad-words: a slot is not below"):
        bfv.opened(SMALL, np.full(4096, bfv.MODULUS, "<u4").tobytes(), BLIND)
    for slot, value in ((0, 2**18), (13, 2**6), (4095, 1)):  # above three values; above the last; of no value
        spoiled = zeros.copy()
        spoiled[0, slot] = value
        with pytest.raises(ProtocolError, match="bad-words: a slot has more than its values"):
            bfv.Slots(SMALL).to_words(spoiled)


def test_a_key_on_disk_that_is_none_is_refused_in_words() -> None:
    KEY.check()
    with pytest.raises(ConfigError, match=r"not as it was written .*: make another helper"):
        bfv.SecretKey(KEY.content[:-1]).check()
    public = bfv._unpadded(KEY.public)
    halved = bfv.SecretKey(KEY.public + public)
    with pytest.raises(ConfigError, match="no secret part"):
        halved.check()
    with pytest.raises(ProtocolError, match="bad-sum"):
        halved.decrypt(bfv.Slots(SMALL), GOOD)


def test_without_tenseal_an_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenseal", None)
    with pytest.raises(ConfigError, match=r"pip install 'ternbus\[he\]'"):
        bfv.SecretKey.generate()


# -- cards, terms, asks


def card(**changes: Any) -> SignedCard:
    made = replace(card_of().card, bfv=digest_of(KEY.public), **changes)
    return made.signed(helper_key(1), KEY.public)


def terms(**changes: Any) -> Terms:
    made = Terms(
        kind=BFV, bits=6, levels=1, helpers=(card(),), min=3, ternary=40, dense=3, scales=(0.5, 0.25), samples=0.0,
        key=KEY.public,
    )  # fmt: skip
    return replace(made, **changes)


def test_a_card_comes_with_its_key_and_stands_in_terms_without_it() -> None:
    signed = card()
    read = SignedCard.of_body(signed.body)
    assert (read, read.key, read.card.kind) == (signed, KEY.public, BFV)
    made = terms()
    assert Terms.parse(made.content()) == made
    assert len(signed.body) < 120 * 1024 - 1024  # in one frame


@pytest.mark.parametrize(
    "body",
    [
        lambda: card().body[: -bfv.KEY_BYTES],
        lambda: card().body[:-1] + b"\1",
        lambda: card_of().body + KEY.public,
    ],
)
def test_a_card_with_another_key_behind_it_is_refused(body: Any) -> None:
    with pytest.raises(ProtocolError, match="bad-card"):
        SignedCard.of_body(body())


@pytest.mark.parametrize(
    "changes",
    [
        {"helpers": (card_of(),)},
        {"kind": "mask"},
        {"key": b""},
        {"key": bytes(bfv.KEY_BYTES)},
        {"kind": "mask", "key": b""},
        {"helpers": (card(), replace(card_of(2).card, bfv=digest_of(KEY.public)).signed(helper_key(2)))},
        {"ternary": bfv.ELEMENTS_MAX},
    ],
)
def test_terms_whose_kind_does_not_go_with_key_helper_and_size_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="bad-terms"):
        Terms.parse(terms(**changes).content())


def test_an_ask_has_a_sum_or_none() -> None:
    version = Version(terms_of(ready()))
    ask = version.asked(version.update("pi-1"), version.update("pi-2")).ask
    with_sum = replace(ask, sum=b"ciphertexts")
    assert Ask.parse(with_sum.content()) == with_sum
    assert with_sum.context == ask.context
    assert Ask.parse(ask.content()).sum == b""
    for wrong in (b"", "text"):
        spoiled = canonical.pack({**canonical.unpack(with_sum.content(), KEYS, "ask", 10**6), "sum": wrong})
        with pytest.raises(ProtocolError, match="'sum' is not bytes"):
            Ask.parse(spoiled)


KEYS = ("version", "model", "plan", "terms", "members", "sum")


# -- a helper


def helper_and_set() -> tuple[HelperCore, Version, Asked]:
    helper = ready(bfv=KEY)
    version = Version(terms_of(helper, kind=BFV, key=KEY.public))
    return helper, version, version.asked(version.update("pi-1"), version.update("pi-2"))


def with_sum(made: Asked, *bodies: bytes) -> Asked:
    layout = made.ask.parsed_terms.layout
    return replace(made, ask=replace(made.ask, sum=bfv.blinded_sum(KEY.public, layout, bodies, BLIND)))


def test_a_helper_decrypts_a_prepared_sum_and_again_when_asked_again() -> None:
    helper, version, made = helper_and_set()
    contents = [words_of(version.layout, name) for name in ("pi-1", "pi-2")]
    asked = with_sum(made, *(bfv.encrypt(KEY.public, version.layout, each) for each in contents))
    assert helper.ask(asked, "open").reason.startswith("not-prepared")
    assert helper.ask(made, "prepare").outcome == "prepared"
    for _ in range(2):
        assert helper.ask(asked, "open").outcome == "opened"
        assert np.array_equal(bfv.opened(version.layout, helper.last_sum, BLIND), made.truth)
    assert helper.ask(version.asked(version.update("pi-1"), version.update("pi-3")), "prepare").reason.startswith(
        "repeated"
    )


def test_a_helper_refuses_to_open_what_is_no_sum_and_writes_nothing_down() -> None:
    helper, _, made = helper_and_set()
    assert helper.ask(made, "prepare").outcome == "prepared"
    before = helper.disk.count
    for content in (made, replace(made, ask=replace(made.ask, sum=bytes(bfv.CIPHERTEXT_BYTES)))):
        answer = helper.ask(content, "open")
        assert (answer.outcome, answer.reason.split(":")[0], answer.count) == ("refused", "bad-sum", before)


def test_a_helper_opens_sums_of_its_own_kind_only() -> None:
    _, _, made = helper_and_set()
    assert helper_of_masks().ask(made, "prepare").reason == "bad-terms: this helper opens no such sums"
    of_masks = Version(terms_of(helper_of_masks()))
    asked = of_masks.asked(of_masks.update("pi-1"), of_masks.update("pi-2"))
    assert ready(bfv=KEY).ask(asked, "prepare").reason == "bad-terms: this helper opens no such sums"
    assert bfv.Slots(Layout(bits=8, ternary=0, dense=bfv.ELEMENTS_MAX, tensors=1)).answer_bytes < ANSWER_BYTES_MAX


def helper_of_masks() -> HelperCore:
    return ready()


# -- a device

PINS = SumPolicy(helpers=(helper_key(1).public,), kind=BFV)


def for_schema(schema: Schema, **changes: Any) -> Terms:
    return terms_for(schema, **{"kind": BFV, "helpers": (card(),), "key": KEY.public, **changes})


def test_a_device_sends_ciphertexts_of_its_words_and_others_when_it_sends_them_again() -> None:
    made = for_schema(aggregator().schema)
    _, device, job = training(made, sums=PINS)
    done = finished(job)
    (frame,) = [each for each in device.handle(done) if isinstance(each, Publish) and "update" in each.topic]
    assert device.disk is not None
    assert device.disk.outstanding is not None
    body = device.disk.outstanding.body[-bfv.Slots(made.layout).body_bytes :]
    assert body in frame.payload
    assert opened(made.layout, body).tobytes() == done.content.words  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("pins", "changes", "said"),
    [
        (replace(PINS, kind="mask"), {}, 'the terms have the kind "bfv", and its owner joined for "mask"'),
        (
            PINS,
            {"kind": "mask", "helpers": (card_of(),), "key": b""},
            'the kind "mask", and its owner joined for "bfv"',
        ),
    ],
)
def test_a_device_makes_no_update_of_another_kind_than_its_owner_joined_for(
    pins: SumPolicy, changes: dict[str, Any], said: str
) -> None:
    scripted, device = aggregator(), private(sums=pins)
    messages = named(scripted, for_schema(scripted.schema, **changes))
    (text,) = refusals(device.arrive(*messages, scripted.status(), scripted.head(), *scripted.snapshot()))
    assert said in text


def test_a_device_refuses_a_key_that_its_helper_has_signed_and_that_is_none() -> None:
    scripted, device, wrong = aggregator(), private(sums=PINS), bytes(bfv.KEY_BYTES)
    signed = replace(card_of().card, bfv=digest_of(wrong)).signed(helper_key(1))
    messages = named(scripted, for_schema(scripted.schema, key=wrong, helpers=(signed,)))
    (text,) = refusals(device.arrive(*messages, scripted.status(), scripted.head(), *scripted.snapshot()))
    assert text.startswith("the key of the helper in its terms is not valid (bad-key")


def test_pins_of_encrypted_sums_are_one_helper() -> None:
    with pytest.raises(ConfigError, match="--private-kind bfv takes one helper"):
        SumPolicy(helpers=(helper_key(1).public, helper_key(2).public), kind=BFV)
    with pytest.raises(ConfigError, match=r"--private-kind is 'ckks': write one of mask, bfv"):
        SumPolicy(helpers=(helper_key(1).public,), kind="ckks")


# -- a federation


def merged(kind: str) -> World:
    world = World(private__kind=kind)
    world.give_all(world.begin())
    world.settle()
    assert world.version == 1
    return world


def test_a_version_of_encrypted_updates_has_the_bits_of_one_of_masked_updates() -> None:
    masked, encrypted = merged("mask"), merged(BFV)
    assert np.array_equal(encrypted.core.model.published, masked.core.model.published)
    assert len(encrypted.merged()) == 6
    ((digest, answer),) = encrypted.sums["h-1"]
    total = encrypted.terms_of[0].layout.zeros()
    for number in range(6):
        encrypted.terms_of[0].layout.add(
            total, encrypted.terms_of[0].layout.pack(*content_of(encrypted.terms_of[0], f"pi-{number} 0"))
        )
    blind = bfv.blind_of(encrypted.identity.seed, digest)
    assert np.array_equal(bfv.opened(encrypted.terms_of[0].layout, answer, blind), total)


def test_an_encrypted_set_that_was_asked_for_is_opened_after_a_restart_and_the_terms_stay() -> None:
    world = World(private__kind=BFV)
    devices = world.begin()
    world.lose = lambda topic: topic.endswith("/ask") and ("h-1", "open") in world.asked  # every ask to open is lost
    world.give_all(devices)
    world.settle()
    assert world.states() == ["opening"]
    world.restart()
    assert world.states() == ["opening"]
    assert world.version == 0  # with the same terms: others would begin with a version of no update
    world.lose = lambda topic: False
    world.connect_helper("h-1")
    world.tick(400.0)
    world.settle()
    assert world.version == 1
    assert len(world.merged()) == 6


def test_updates_that_cannot_be_added_up_are_dropped_and_named() -> None:
    world = World(private__kind=BFV, merge__buffer_size=3)
    devices = world.begin(3)
    for device, body in zip(devices, cancelling(world.terms_of[0].key), strict=False):
        assert world.give(device, body=body).outcome == "accepted"
    assert world.give(devices[2]).outcome == "accepted"
    world.settle()
    reasons = world.ledger.db.execute("SELECT why FROM private_updates").fetchall()
    assert reasons == 3 * [("bad-ciphertext: the updates cannot be added up",)]
    assert world.version == 0
    assert world.helpers["h-1"].disk.log_length == 0


def test_what_is_no_ciphertext_is_invalid_and_a_lying_helper_spoils_its_set_only() -> None:
    world = World(private__kind=BFV, merge__buffer_size=3)
    devices = world.begin(4)
    receipt = world.give(devices[3], body=bytes(bfv.CIPHERTEXT_BYTES))
    assert (receipt.outcome, receipt.reason.split(":")[0]) == ("invalid", "bad-ciphertext")
    world.lie = ("h-1", None)
    world.give_all(devices[:3])
    world.settle()
    assert world.states() == []
    assert world.version == 0


def test_a_federation_waits_for_a_helper_of_its_own_kind() -> None:
    world = World(private__kind=BFV)
    world.helpers["h-1"].bfv = None
    world.helpers["h-1"].start()
    with pytest.raises(AssertionError):
        world.begin()
    assert world.core.sums is not None
    assert world.core.sums.waits_for() == {"h-1": "it opens sums of the kind mask, and private.kind is bfv"}


def test_a_model_that_is_too_large_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="at most 100,000 parameters, and the model has 100,010: use kind"):
        World(private__kind=BFV, model={"w": np.ones((10_001, 10), np.float32)})
