"""The helper's answers: a sum of a whole set that fits in every respect, or a refusal that uses nothing up."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest

from support.private_sets import (
    FEDERATION,
    MODEL,
    SERVER,
    Asked,
    Helper,
    World,
    identity,
    published,
    ready,
    stopped,
    terms_of,
)
from ternbus.broker.protocol.frame import parse
from ternbus.broker.sums import canonical
from ternbus.broker.sums.sets import ABANDON, ABANDONED, OPEN, OPENED, PREPARE, PREPARED, REFUSED, Answer
from ternbus.broker.sums.terms import BFV, OWN
from ternbus.helper.core import events
from ternbus.helper.core.actions import Publish, Save
from ternbus.helper.core.opening_log import FIRST, Opening, SignedOpening, checked
from ternbus.helper.core.records import Opened


def world(*helpers: Helper, **changes: Any) -> World:
    return World(terms_of(*helpers, **changes))


def set_of(made: World, *devices: str, **changes: Any) -> Asked:
    return made.asked(*(made.update(device, **changes) for device in devices))


def opened(helper: Helper, asked: Asked) -> Answer:
    assert helper.ask(asked, PREPARE).outcome == PREPARED
    answer = helper.ask(asked, OPEN)
    assert answer.outcome == OPENED
    return answer


def test_a_set_that_is_prepared_and_opened_gives_the_sum_and_nothing_else() -> None:
    helper = ready()
    asked = set_of(world(helper), "pi-1", "pi-2", "pi-3")
    answer = opened(helper, asked)
    assert (answer.set, answer.count) == (asked.digest, 2)
    assert np.array_equal(asked.sum_of(helper.last_sum), asked.truth)


def test_the_sums_of_two_helpers_together_open_a_set() -> None:
    one, two = ready("h-1"), ready("h-2")
    asked = set_of(world(one, two), "pi-1", "pi-2")
    for each in (one, two):
        opened(each, asked)
    assert not np.array_equal(asked.sum_of(one.last_sum), asked.truth)
    assert np.array_equal(asked.sum_of(one.last_sum, two.last_sum), asked.truth)


def test_each_step_can_be_asked_for_again_with_the_same_answer() -> None:
    helper = ready()
    asked = set_of(world(helper), "pi-1", "pi-2")
    first = helper.ask(asked, PREPARE)
    assert helper.ask(asked, PREPARE, seq=10) == first
    second = helper.ask(asked, OPEN)
    body = helper.last_sum
    assert helper.ask(asked, OPEN) == second
    assert helper.last_sum == body
    assert helper.ask(asked, PREPARE) == replace(first, count=2)
    assert not [each for each in helper.actions[-3:] if isinstance(each, Save)]


def test_the_answer_leaves_behind_what_it_says() -> None:
    """The save of a set is before its answer, and the count is on the broker before the answer too."""
    helper = ready()
    asked = set_of(world(helper), "pi-1", "pi-2")
    for step in (PREPARE, OPEN):
        done = helper.arrive(*asked.messages("h-1", step))
        kinds = [
            parse(each.payload).kind if isinstance(each, Publish) else type(each).__name__
            for each in done
            if isinstance(each, Publish | Save)
        ]
        assert kinds == ["Save", "card", "answer"]
        (card,) = published(done, "card")
        assert card.retain
        assert parse(card.payload).meta["count"] == helper.disk.count


def test_a_set_that_was_abandoned_is_never_opened_and_its_updates_are_free() -> None:
    helper = ready()
    made = world(helper)
    asked, other = set_of(made, "pi-1", "pi-2"), set_of(made, "pi-2", "pi-3")
    helper.ask(asked, PREPARE)
    assert helper.ask(other, PREPARE).reason.startswith("repeated")
    abandoned = helper.ask(asked, ABANDON)
    assert abandoned.outcome == ABANDONED
    assert helper.ask(asked, ABANDON) == abandoned
    for step in (PREPARE, OPEN):
        assert helper.ask(asked, step).reason.startswith("abandoned")
    opened(helper, other)


def test_a_set_that_is_not_known_can_be_abandoned_before_its_ask_arrives() -> None:
    helper = ready()
    asked = set_of(world(helper), "pi-1", "pi-2")
    assert helper.ask(asked, ABANDON).outcome == ABANDONED
    assert helper.ask(asked, PREPARE).reason.startswith("abandoned")


def test_what_was_opened_cannot_be_abandoned() -> None:
    helper = ready()
    asked = set_of(world(helper), "pi-1", "pi-2")
    opened(helper, asked)
    assert helper.ask(asked, ABANDON).reason.startswith("opened")
    assert helper.ask(asked, OPEN).outcome == OPENED


def test_nothing_is_opened_that_was_not_prepared() -> None:
    helper = ready()
    answer = helper.ask(set_of(world(helper), "pi-1", "pi-2"), OPEN)
    assert answer.reason.startswith("not-prepared")
    assert helper.disk.count == 0


def spoiled_boxes(made: World) -> Asked:
    one, two = made.update("pi-1"), made.update("pi-2")
    copied = made.update("pi-3", boxes=made.update("pi-1").member.frame().meta["boxes"])
    return made.asked(one, two, copied)


REFUSALS: dict[str, Callable[[World], Asked]] = {
    "too-few": lambda made: set_of(made, "pi-1", min=2),
    "too-few: the update of pi-1": lambda made: made.asked(made.update("pi-1", min=3), made.update("pi-2")),
    "too-many": lambda made: set_of(replace(made, terms=replace(made.terms, bits=4)), *(f"pi-{n}" for n in range(8))),
    "other-context: the update of pi-2": lambda made: made.asked(
        made.update("pi-1"), replace(made, model=bytes(32)).update("pi-2")
    ),
    "other-context: the update of pi-3": lambda made: made.asked(made.update("pi-1"), made.update("pi-3", base=5)),
    "twice: the update of pi-1": lambda made: made.asked(
        made.update("pi-1"), made.update("pi-1", seq=6), made.update("pi-2")
    ),
    "twice: the update of pi-1 and 1 more": lambda made: made.asked(
        made.update("pi-1"), made.update("pi-2", identity=identity("pi-1"))
    ),
    "bad-box: the update of pi-3": spoiled_boxes,
    "bad-box: the update of pi-1": lambda made: made.asked(
        made.update("pi-1", boxes=(b"1", b"2")), made.update("pi-2")
    ),
    "bad-ask: the update of pi-1": lambda made: made.asked(made.update("pi-1", kind="offer"), made.update("pi-2")),
    "bad-ask: the update of pi-2": lambda made: made.asked(made.update("pi-1"), made.update("pi-2", part=1)),
    "bad-ask: the update of pi-4": lambda made: made.asked(made.update("pi-4", federation="x"), made.update("pi-2")),
    "bad-ask: the update of a device": lambda made: made.asked(
        made.update("aggregator", identity=SERVER), made.update("pi-2")
    ),
    "bad-terms": lambda made: set_of(replace(made, terms=replace(made.terms, kind=BFV)), "pi-1", "pi-2"),
    "bad-terms: 'bits'": lambda made: set_of(
        replace(made, terms=replace(made.terms, bits=4, min=8)), *(f"pi-{n}" for n in range(8))
    ),
    "bad-terms: this helper opens": lambda made: made.asked(
        made.update("pi-1"), made.update("pi-2"), terms=replace(made.terms, ternary=2**31 - 9).content()
    ),
    "foreign-terms": lambda made: set_of(
        replace(made, terms=replace(made.terms, helpers=terms_of(Helper("h-2")).helpers)), "pi-1", "pi-2"
    ),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_does_not_fit_is_refused_and_uses_nothing_up(reason: str) -> None:
    helper = ready()
    made = world(helper)
    before = helper.disk
    answer = helper.ask(REFUSALS[reason](made), PREPARE)
    assert (answer.outcome, answer.count) == (REFUSED, 0)
    assert answer.reason.startswith(reason)
    assert replace(helper.disk, seq_limit=before.seq_limit) == before
    good = set_of(made, "pi-1", "pi-2", "pi-3", "pi-4")
    opened(helper, good)
    assert np.array_equal(good.sum_of(helper.last_sum), good.truth)


def test_a_refusal_names_all_updates_that_do_not_fit() -> None:
    helper = ready()
    made = world(helper)
    spoiled = [made.update(f"pi-{n}", base=9) for n in (3, 1)]
    answer = helper.ask(made.asked(*spoiled, made.update("pi-2")), PREPARE)
    assert answer.updates == ("pi-1", "pi-3")
    forged = made.update("pi-1")
    forged = replace(forged, member=replace(forged.member, signature=bytes(64)))
    answer = helper.ask(made.asked(forged, made.update("pi-2"), made.update("pi-3")), PREPARE)
    assert (answer.updates, answer.reason) == (("pi-1",), "bad-signature: the update of pi-1")


def test_a_header_under_another_key_than_it_names_is_refused() -> None:
    helper = ready()
    made = world(helper)
    forged = made.update("pi-1")
    forged = replace(forged, member=replace(forged.member, public=identity("pi-9").public))
    answer = helper.ask(made.asked(forged, made.update("pi-2")), PREPARE)
    assert (answer.updates, answer.reason[:11]) == (("pi-1",), "unknown-key")


def test_a_header_that_is_no_frame_is_refused_without_a_name() -> None:
    helper = ready()
    made = world(helper)
    asked = made.asked(made.update("pi-1"), made.update("pi-2"))
    members = (replace(asked.ask.members[0], header=b"x"), asked.ask.members[1])
    answer = helper.ask(Asked(replace(asked.ask, members=members)), PREPARE, digest=bytes(32))
    assert (answer.updates, answer.reason) == ((), "bad-header: the update of a device")


def test_an_ask_that_names_another_set_or_is_none_is_refused() -> None:
    helper = ready()
    asked = set_of(world(helper), "pi-1", "pi-2")
    assert helper.ask(asked, PREPARE, digest=bytes(32)).reason.startswith("wrong-set")
    assert helper.ask(asked, PREPARE, content=b"\x80").reason.startswith("bad-ask")
    assert helper.ask(asked, PREPARE).outcome == PREPARED


def test_only_asks_of_the_pinned_aggregator_are_looked_at() -> None:
    helper = ready()
    asked = set_of(world(helper), "pi-1", "pi-2")
    done = helper.arrive(*asked.messages("h-1", PREPARE, identity=identity("another")))
    assert not published(done, "answer")
    assert helper.core.dropped == {"unknown-key": 1}


def test_an_ask_in_parts_is_answered_when_all_have_come() -> None:
    helper = ready()
    asked = set_of(world(helper), *(f"pi-{n}" for n in range(20)))
    parts = asked.messages("h-1", PREPARE, frame_bytes=4096)
    assert len(parts) == 3
    assert not published(helper.arrive(*parts[1:]), "answer")
    (answer,) = published(helper.arrive(parts[0]), "answer")
    assert parse(answer.payload).meta["outcome"] == PREPARED


def test_an_update_is_in_one_set_whatever_its_number_and_key() -> None:
    helper = ready()
    made = world(helper)
    opened(helper, set_of(made, "pi-1", "pi-2"))
    renumbered = made.update("pi-1", seq=77)
    assert helper.ask(made.asked(renumbered, made.update("pi-3")), PREPARE).updates == ("pi-1",)
    rekeyed = made.update("pi-1", identity=identity("pi-1 renewed"))
    assert helper.ask(made.asked(rekeyed, made.update("pi-3")), PREPARE).updates == ("pi-1",)
    later = replace(made, version=5)
    opened(helper, later.asked(later.update("pi-1", identity=identity("pi-1 renewed")), later.update("pi-3")))


def test_one_key_has_one_name() -> None:
    helper = ready()
    made = world(helper)
    opened(helper, set_of(made, "pi-1", "pi-2"))
    twin = made.update("pi-1-again", identity=identity("pi-1"))
    answer = helper.ask(made.asked(twin, made.update("pi-3")), PREPARE)
    assert (answer.updates, answer.reason[:14]) == (("pi-1-again",), "key-of-another")


def test_with_a_roster_of_its_own_a_helper_answers_for_devices_that_it_admitted() -> None:
    helper = ready(roster=OWN)
    made = world(helper)
    helper.records.admit("pi-1", identity("pi-1").public)
    helper.records.admit("pi-2", identity("pi-2 before").public)
    asked = set_of(made, "pi-1", "pi-2")
    answer = helper.ask(asked, PREPARE)
    assert (answer.updates, answer.reason[:12]) == (("pi-2",), "not-admitted")
    assert any("`ternbus helper admit` lets a device in" in str(action) for action in helper.actions)
    helper.records.admit("pi-2", identity("pi-2").public)
    opened(helper, asked)


def test_a_set_that_was_opened_is_answered_again_when_its_devices_have_left_the_roster() -> None:
    helper = ready(roster=OWN)
    for name in ("pi-1", "pi-2"):
        helper.records.admit(name, identity(name).public)
    asked = set_of(world(helper), "pi-1", "pi-2")
    opened(helper, asked)
    body = helper.last_sum
    helper.records.admit("pi-2", identity("pi-2 renewed").public)
    assert helper.ask(asked, OPEN).outcome == OPENED
    assert helper.last_sum == body


def test_the_minimum_is_the_highest_of_helper_terms_and_devices() -> None:
    for own, in_terms, in_header in ((3, 2, 2), (2, 3, 2), (2, 2, 3)):
        helper = ready(min=own)
        made = world(helper, min=in_terms)
        assert helper.ask(set_of(made, "pi-1", "pi-2", min=in_header), PREPARE).reason.startswith("too-few")
        opened(helper, set_of(made, "pi-1", "pi-2", "pi-3", min=in_header))


def test_a_box_key_that_is_not_kept_opens_nothing() -> None:
    helper = ready()
    made = world(helper)
    helper.disk = replace(helper.disk, box_keys=(replace(helper.disk.box_key, secret=bytes([7]) * 32),))
    helper.start()
    helper.wait(1.0)
    helper.connect()
    asked = set_of(made, "pi-1", "pi-2")
    answer = helper.ask(asked, PREPARE)
    assert answer.reason.startswith("old-card")
    assert published(helper.actions[-6:], "card")  # so that the aggregator learns which is


def test_the_log_has_every_set_that_was_opened_and_each_entry_the_hash_of_the_one_before() -> None:
    helper = ready()
    made = world(helper)
    asked = [set_of(made, "pi-2", "pi-1"), set_of(made, "pi-3", "pi-4")]
    for each in asked:
        opened(helper, each)
    saves = [each for each in helper.actions if isinstance(each, Save)]
    packed = [each.step.entry for each in saves if isinstance(each.step, Opened)]
    entries = list(checked(packed, helper.identity.public))
    assert [each.digest for each in entries] == [each.digest for each in asked]
    assert [each.number for each in entries] == [1, 2]
    assert entries[0].previous == FIRST
    assert entries[0].members == tuple(
        (name, update.member.digest) for name, update in zip(("pi-1", "pi-2"), reversed(asked[0].updates), strict=True)
    )
    assert (entries[0].federation, entries[0].helper, entries[0].base) == (FEDERATION, "h-1", 4)
    assert helper.disk.log_hash == SignedOpening.unpack(packed[1]).hash
    with pytest.raises(Exception, match="bad-chain"):
        list(checked(packed[1:], helper.identity.public))
    with pytest.raises(Exception, match="bad-signature"):
        list(checked(packed, SERVER.public))


@pytest.mark.parametrize("members", [None, [["pi-1"]], [["A", bytes(32)]], [["pi-1", b""]]])
def test_an_entry_of_another_form_is_refused(members: Any) -> None:
    entry = Opening(
        federation="lab", helper="h-1", number=1, count=2, digest=bytes(32), context=MODEL, base=1,
        members=(), previous=FIRST,
    )  # fmt: skip
    assert Opening.parse(entry.content()) == entry
    fields = {**msgpack.unpackb(entry.content()), "members": members}
    with pytest.raises(Exception, match="bad-entry"):
        Opening.parse(canonical.pack(fields))


def test_an_ask_that_shows_a_higher_count_stops_the_helper_for_good() -> None:
    helper = ready()
    asked = set_of(world(helper), "pi-1", "pi-2")
    done = helper.arrive(*asked.messages("h-1", PREPARE, count=1))
    assert (stopped(done).code, published(done, "answer")) == (2, [])
    assert "ternbus helper restored" in stopped(done).reason
    assert stopped(helper.start()).code == 2
    assert helper.core.due_s() is None
    assert helper.arrive(*asked.messages("h-1", PREPARE)) == []


def test_several_asks_are_answered_one_after_the_other() -> None:
    helper = Helper()
    made = world(helper)
    sets_ = [set_of(made, f"a-{n}", f"b-{n}") for n in range(3)]
    helper.connect(*(message for each in sets_ for message in each.messages("h-1", PREPARE)), echo=False)
    assert not published(helper.actions, "answer")
    done = helper.echo(helper.actions)
    assert [parse(each.payload).meta["set"] for each in published(done, "answer")] == [each.digest for each in sets_]
    assert helper.disk.count == 3


def test_asks_beyond_the_bounds_push_out_the_oldest() -> None:
    helper = Helper()
    made = world(helper)
    sets_ = [set_of(made, f"a-{n}", f"b-{n}") for n in range(20)]
    done = helper.connect(*(message for each in sets_ for message in each.messages("h-1", PREPARE)))
    assert len(published(done, "answer")) == 16


def test_a_sum_that_no_frame_can_carry_is_refused_and_uses_nothing_up() -> None:
    helper = ready()
    asked = set_of(world(helper, dense=5000), "pi-1", "pi-2")
    assert helper.ask(asked, PREPARE).outcome == PREPARED
    helper.handle(events.Disconnected(reason="gone"))
    helper.wait(60.0)
    done = helper.handle(events.Connected(frame_bytes=1000))
    helper.echo(done)
    answer = helper.ask(asked, OPEN)
    assert (answer.outcome, answer.reason[:9], answer.count) == (REFUSED, "too-large", 1)
    assert helper.disk.count == 1
