"""Attacks on private sums by what is asked for and what is signed, each by its name; see docs/security.md.

Beside `test_private_attacks.py`: (a) weights, (b) forced repetition, (c) other contexts, (e) substitution and lies. An
aggregator has the masked words of all updates, so each sum that a helper opens gives it the sum of that set's contents;
`exposed` solves for single devices. Repetition is tried at a helper without the rule against it, too: it works there.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from support.private_sets import (
    FEDERATION,
    MODEL,
    PLAN,
    Asked,
    Helper,
    Sent,
    World,
    identity,
    ready,
    terms_of,
    words_of,
)
from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.frame import build, parse
from ternbus.broker.protocol.identity import KeyId, key_id
from ternbus.broker.sums import canonical, masks, sets
from ternbus.broker.sums.sets import OPEN, PREPARE, REFUSED, SetMember
from ternbus.broker.sums.terms import AGGREGATOR as BY_AGGREGATOR
from ternbus.broker.sums.terms import OWN, digest_of
from ternbus.helper.core.records import MemoryRecords

DEVICES = ("pi-1", "pi-2", "pi-3", "pi-4")
THREES = list(itertools.combinations(DEVICES, 3))  # four sums that say what each of four devices sent


@dataclass
class RecordsByNumber(MemoryRecords):
    """A helper that takes key and sequence number for the update, as the protocol's first draft did."""

    numbers: dict[tuple[str, int], bytes] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)  # the sequence number of each device in the ask at hand

    def used_in(self, device: str, base: int) -> bytes | None:
        return self.numbers.get((device, self.asked[device]))


@dataclass
class Aggregator:
    """A hostile one: it asks for whatever it likes, and solves for single updates."""

    helper: Helper
    world: World
    opened: list[Asked] = field(default_factory=list)
    sums: list[Any] = field(default_factory=list)  # of the contents of those sets, shape (elements,) each

    def ask(self, *updates: Sent, world: World | None = None) -> str:
        """Have a set prepared and opened; the reason of a refusal, or nothing."""
        asked = (world or self.world).asked(*updates)
        for step in (PREPARE, OPEN):
            answer = self.helper.ask(asked, step)
            if answer.outcome == REFUSED:
                return answer.reason
        self.opened.append(asked)
        self.sums.append(self.world.layout.unpack(asked.sum_of(self.helper.last_sum))[0])
        return ""

    def exposed(self) -> dict[str, Any]:
        """The ternary values of each device that follow from the sums, by linear algebra."""
        names = sorted({each.device for asked in self.opened for each in asked.updates})
        if not names:
            return {}
        rows = np.array(
            [[any(each.device == name for each in asked.updates) for name in names] for asked in self.opened]
        )
        inverse = np.linalg.pinv(rows.astype(float))
        is_known = np.isclose(np.diag(inverse @ rows), 1)  # its own unit vector is a combination of the sets
        values = np.rint(inverse @ np.array(self.sums)).astype(int)
        return {name: values[place] for place, name in enumerate(names) if is_known[place]}


def against(records: MemoryRecords | None = None, **settings: Any) -> Aggregator:
    """An aggregator and a helper, of the given records in place of sound ones."""
    helper = Helper(**settings)
    if records is not None:
        helper.records = records
        helper.start()
    helper.connect()
    return Aggregator(helper, World(terms_of(helper)))


def truth(sent: Sent, layout: Any) -> Any:
    return layout.unpack(sent.words)[0]


# --- (a) weights ----------------------------------------------------------------------------------------------------


def test_a_weights_have_no_place_in_an_ask() -> None:
    """Weights 1, 3, 9 would spell every trit of every device: the protocol has none, and no other way to say them."""
    attacker = against()
    updates = [attacker.world.update(name) for name in DEVICES]
    asked = attacker.world.asked(*updates)
    fields = canonical.unpack(asked.ask.content(), sets._ASK_KEYS, "ask", sets.ASK_BYTES_MAX)
    for spoiled in (
        {**fields, "weights": [1, 3, 9, 27]},
        {**fields, "members": [[*row, 3] for row in fields["members"]]},
        {**fields, "members": [row for row in fields["members"] for _ in range(3)]},
    ):
        answer = attacker.helper.ask(asked, PREPARE, content=canonical.pack(spoiled))
        assert (answer.outcome, answer.count) == (REFUSED, 0)
    assert attacker.ask(*updates) == ""
    total = sum(truth(each, attacker.world.layout) for each in updates)
    assert np.array_equal(attacker.sums[0], total)  # each member once


# --- (b) forced repetition ------------------------------------------------------------------------------------------


def renumbered(world: World, name: str, place: int, *, rekey: bool) -> Sent:
    """The update, made to be sent anew: by a packet limit, `duplicate` with a highest seq, or a new key."""
    signer = identity(f"{name} {place}") if rekey else identity(name)
    return world.update(name, seq=5 + place, identity=signer)


@pytest.mark.parametrize("rekey", [False, True], ids=["a higher number", "a new key"])
def test_b_an_update_that_is_sent_anew_is_the_same_update(rekey: bool) -> None:
    attacker = against()
    first, *others = [
        attacker.ask(*(renumbered(attacker.world, name, place, rekey=rekey) for name in members))
        for place, members in enumerate(THREES)
    ]
    assert first == ""
    assert all(reason.startswith("repeated") for reason in others)
    assert attacker.exposed() == {}


def test_b_key_and_number_in_its_place_would_spell_every_update() -> None:
    records = RecordsByNumber()
    attacker = against(records)
    for place, members in enumerate(THREES):
        records.asked = dict.fromkeys(members, 5 + place)
        updates = [renumbered(attacker.world, name, place, rekey=False) for name in members]
        assert attacker.ask(*updates) == ""
        records.numbers |= {(name, 5 + place): attacker.opened[-1].digest for name in members}
    found = attacker.exposed()
    for name in DEVICES:
        assert np.array_equal(found[name], truth(attacker.world.update(name), attacker.world.layout))


def test_b_one_model_as_four_versions_spells_every_update_that_does_not_change() -> None:
    """Not promised (docs/private-sums.md): what is alike on several versions; only differential privacy bounds it."""
    attacker = against()
    for version, chosen in enumerate(THREES):
        world = replace(attacker.world, version=version)
        updates = [world.update(name, content=words_of(world.layout, name)) for name in chosen]
        assert attacker.ask(*updates, world=world) == ""
    found = attacker.exposed()
    assert list(found) == list(DEVICES)
    for name in DEVICES:
        assert np.array_equal(found[name], truth(attacker.world.update(name), attacker.world.layout))


# --- (c) another model, plan, terms, scales or n_ref for one device -------------------------------------------------

SINGLED: dict[str, Callable[[World], World]] = {
    "model": lambda world: replace(world, model=bytes(32)),
    "plan": lambda world: replace(world, plan=digest_of(b"learning_rate 0")),
    "terms": lambda world: replace(world, terms=replace(world.terms, min=3)),
    "scales": lambda world: replace(world, terms=replace(world.terms, scales=(1e-30, 1e-30))),
    "n_ref": lambda world: replace(world, terms=replace(world.terms, samples=1e9)),
    "a version later": lambda world: replace(world, version=world.version + 1),
    "a version later with a dead model": lambda world: replace(world, version=world.version + 1, model=bytes(32)),
}


@pytest.mark.parametrize("what", SINGLED)
def test_c_a_device_that_got_something_else_is_in_no_set_with_the_others(what: str) -> None:
    attacker = against()
    special = SINGLED[what](attacker.world)
    victim, *others = DEVICES
    alone = special.update(victim)
    for world, at_fault in ((attacker.world, [victim]), (special, others)):
        asked = world.asked(alone, *(attacker.world.update(name) for name in others))
        answer = attacker.helper.ask(asked, PREPARE)
        assert answer.reason.startswith("other-context")
        assert list(answer.updates) == at_fault
    assert attacker.helper.disk.count == 0
    assert attacker.ask(*(attacker.world.update(name) for name in others)) == ""


def test_c_a_header_that_claims_the_others_context_has_no_seed() -> None:
    """The box has the device's own context, so a lie about it in an ask, or by a device, gives no mask."""
    attacker = against()
    special = replace(attacker.world, model=bytes(32))
    claimed = special.update("pi-1", context=attacker.world.context)
    reason = attacker.ask(claimed, *(attacker.world.update(name) for name in DEVICES[1:]))
    assert reason == "bad-box: the update of pi-1"


def test_c_every_part_of_a_context_changes_it_and_the_masks() -> None:
    world = World(terms_of(ready()))
    worlds = [world, *(change(world) for change in SINGLED.values()), replace(world, model=PLAN, plan=MODEL)]
    assert len({each.context for each in worlds}) == len(worlds)
    about = {"device": identity("pi-1").public, "helper": identity("helper h-1").public}
    made = {masks.mask(world.layout, bytes(32), context=each.context, **about).tobytes() for each in worlds}
    assert len(made) == len(worlds)


# --- (e) substitution and lies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rekey", [False, True], ids=["its number", "its key"])
def test_e_a_copied_box_is_no_other_update_s(rekey: bool) -> None:
    """A hostile device that puts a victim's box into its own update would have the victim's mask counted twice."""
    attacker = against()
    victim = attacker.world.update("pi-1")
    boxes = victim.member.frame().meta["boxes"]
    copied = attacker.world.update("pi-2", boxes=boxes) if rekey else attacker.world.update("pi-1", seq=6, boxes=boxes)
    company = [attacker.world.update(name) for name in (DEVICES[2:] if rekey else DEVICES[1:])]
    assert attacker.ask(copied, *company) == f"bad-box: the update of {copied.device}"
    assert attacker.ask(victim, *company) == ""


def test_e_keys_with_one_key_id_are_two_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 bytes can be made to agree by a search of 2^32 keys: nothing that counts may rest on them."""
    pair = {identity("pi-1").public, identity("a twin of pi-1").public}
    for module in ("broker.protocol.identity", "broker.sums.sets", "helper.core.profile"):
        monkeypatch.setattr(f"ternbus.{module}.key_id", lambda key: KeyId(bytes(8)) if key in pair else key_id(key))
    attacker = against(roster=OWN)
    for name in DEVICES:
        attacker.helper.records.admit(name, identity(name).public)
    twin, company = identity("a twin of pi-1"), [attacker.world.update(name) for name in DEVICES[1:]]
    assert twin.key_id == identity("pi-1").key_id
    forged = attacker.world.update("pi-1", identity=twin)
    assert attacker.ask(forged, *company) == "not-admitted: the update of pi-1"
    passed_off = replace(forged, member=replace(forged.member, public=identity("pi-1").public))
    assert attacker.ask(passed_off, *company) == "bad-signature: the update of pi-1"
    boxes = attacker.world.update("pi-1").member.frame().meta["boxes"]
    attacker.helper.records.admit("pi-1", twin.public)
    assert attacker.ask(attacker.world.update("pi-1", identity=twin, boxes=boxes), *company).startswith("bad-box")


def spliced(world: World) -> Iterable[Sent]:
    """Headers that are not what pi-1 signed as part 0 of its update."""
    sent = world.update("pi-1")
    member, frame = sent.member, sent.member.frame()
    other = world.update("pi-1", seq=6).member
    yield replace(sent, member=replace(member, header=other.header))
    yield replace(sent, member=replace(member, signature=other.signature))
    yield replace(sent, member=replace(member, header=member.header.replace(b"pi-1", b"pi-9")))
    yield replace(sent, member=replace(member, header=member.header + b"\xc0"))
    for changes in ({"part": 1}, {"kind": "offer"}, {"federation": "other"}, {"sender": "aggregator"}):
        about: dict[str, Any] = {"federation": FEDERATION, "kind": "update", "sender": "pi-1", "part": 0, **changes}
        raw = build(identity("pi-1"), seq=5, parts=2, meta=frame.meta, body=b"", **about)
        yield replace(sent, member=SetMember.of(identity("pi-1").public, parse(raw)))


def test_e_spliced_headers_are_refused() -> None:
    attacker = against()
    company = [attacker.world.update(name) for name in DEVICES[1:]]
    found = list(spliced(attacker.world))
    for sent in found:
        asked = attacker.world.asked(sent, *company)
        digest = digest_of(b"".join(each.member.header for each in asked.updates))
        assert attacker.helper.ask(asked, PREPARE, digest=digest).outcome == REFUSED
    assert len(found) == 8
    assert attacker.helper.disk.count == 0
    assert attacker.ask(attacker.world.update("pi-1"), *company) == ""


def sybils(attacker: Aggregator) -> Sequence[Sent]:
    return [attacker.world.update(f"sybil-{number}") for number in range(4)]


def test_e_sybils_do_not_count_for_a_helper_with_a_roster_of_its_own() -> None:
    attacker = against(roster=OWN, min=3)
    for name in DEVICES:
        attacker.helper.records.admit(name, identity(name).public)
    reason = attacker.ask(attacker.world.update("pi-1", min=3), *sybils(attacker))
    assert reason == "not-admitted: the update of sybil-0 and 3 more"
    assert attacker.exposed() == {}


def test_e_sybils_single_out_a_device_where_the_aggregator_says_which_devices_there_are() -> None:
    """Not promised (docs/private-sums.md): that roster protects from a curious aggregator only."""
    attacker = against(min=3)
    victim = attacker.world.update("pi-1", min=3)
    company = sybils(attacker)
    assert attacker.ask(victim, *company) == ""
    own = sum(truth(each, attacker.world.layout) for each in company)
    assert np.array_equal(attacker.sums[0] - own, truth(victim, attacker.world.layout))


def test_e_a_card_of_the_time_of_an_own_roster_opens_nothing_by_the_aggregators() -> None:
    """Devices whose owners want a roster of the helper's own would believe it, since number and box key still hold."""
    attacker = against(roster=OWN)
    attacker.helper.roster = attacker.helper.records.roster = BY_AGGREGATOR
    attacker.helper.start()
    attacker.helper.connect()
    assert attacker.world.terms.helpers[0].card.roster == OWN
    reason = attacker.ask(*map(attacker.world.update, DEVICES))
    assert reason == "old-card: this helper has no roster of its own any more"
    now = World(terms_of(attacker.helper), version=attacker.world.version)
    assert attacker.ask(*map(now.update, DEVICES), world=now) == ""


def test_e_the_smallest_set_is_not_the_aggregators_to_say() -> None:
    """Terms for five devices to all of them, and others for two to the helper, would be another context."""
    attacker = against()
    stricter = replace(attacker.world, terms=replace(attacker.world.terms, min=4))
    updates = [stricter.update(name, min=4) for name in DEVICES]
    assert attacker.ask(*updates[:2], world=stricter).startswith("too-few")
    assert attacker.ask(*updates[:2]).startswith("other-context")
    assert attacker.ask(*updates, world=stricter) == ""


@pytest.mark.parametrize(("own", "in_terms", "in_header"), [(4, 2, 2), (2, 4, 2), (2, 2, 4)])
def test_e_a_set_is_as_large_as_the_strictest_wants(own: int, in_terms: int, in_header: int) -> None:
    """The aggregator's word counts for nothing: a helper has its own, and each device signed its owner's."""
    attacker = against(min=own)
    attacker.world = replace(attacker.world, terms=replace(attacker.world.terms, min=in_terms))
    updates = [attacker.world.update(name, min=in_header) for name in DEVICES]
    for members in THREES:
        assert attacker.ask(*(each for each in updates if each.device in members)).startswith("too-few")
    assert attacker.ask(*updates) == ""


def test_e_one_key_is_one_device_whatever_it_is_called() -> None:
    """A device in league that has several names, and one key at its helper, would count as several."""
    attacker = against()
    victim, spy = attacker.world.update("pi-1"), identity("pi-2")
    names = [attacker.world.update(name, identity=spy) for name in ("pi-2", "pi-3")]
    assert attacker.ask(victim, *names) == "twice: the update of pi-2 and 1 more"
    assert attacker.ask(attacker.world.update("pi-2"), attacker.world.update("pi-4")) == ""
    assert attacker.ask(victim, names[1]) == "key-of-another: the update of pi-3"


def test_e_seeds_of_two_helpers_do_not_cancel_or_double() -> None:
    world = World(terms_of(ready("h-1"), ready("h-2")))
    sent = world.update("pi-1", seeds=[bytes(32), bytes(32)])
    about = {"context": world.context, "device": identity("pi-1").public}
    one, two = (masks.mask(world.layout, bytes(32), helper=each.card.public, **about) for each in world.terms.helpers)
    assert not np.array_equal(one, two)
    for first, second in ((one, two), (one, one)):
        rest = sent.masked.copy()
        world.layout.subtract(rest, first)
        world.layout.subtract(rest, second)
        assert np.array_equal(rest, sent.words) == (second is two)


def test_e_a_box_that_is_sealed_to_another_helper_opens_nowhere_else() -> None:
    one, two = ready("h-1"), ready("h-2")
    world = World(terms_of(one, two))
    sent = world.update("pi-1")
    (for_one, for_two), seq = sent.member.frame().meta["boxes"], sent.member.frame().seq
    about: dict[str, Any] = {"context": world.context, "device": identity("pi-1").public, "seq": seq}
    masks.open_box(one.disk.box_key.secret, for_one, helper=one.identity.public, **about)
    for helper, box, named in ((one, for_two, one), (one, for_one, two), (two, for_one, two)):
        with pytest.raises(ProtocolError):
            masks.open_box(helper.disk.box_key.secret, box, helper=named.identity.public, **about)
