"""The helper's connection: enrollment, what the broker retains of it, box keys that change, and the end."""

from dataclasses import replace

import pytest

from support.private_sets import (
    FEDERATION,
    FRAME_BYTES,
    NOW_S,
    Helper,
    World,
    frames,
    from_server,
    identity,
    logged,
    published,
    ready,
    receipt,
    server_status,
    stopped,
    terms_of,
)
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import COUNTER_MAX, build, parse
from ternbus.broker.protocol.identity import Identity, enroll_proof
from ternbus.broker.protocol.messages import RESTORE_LEAP, Enroll, Receipt, Status
from ternbus.broker.protocol.model_messages import Head
from ternbus.broker.sums.sets import OPEN, OPENED, PREPARE, PREPARED
from ternbus.broker.sums.terms import SignedCard
from ternbus.helper.core import events
from ternbus.helper.core.actions import Connect, Log, Publish, Save, Subscribe
from ternbus.helper.core.state import MONTH_S, SEQ_BLOCK


def own_status(helper: Helper, *, count: int, signer: Identity | None = None) -> tuple[str, bytes]:
    """What a broker may have retained of the helper."""
    meta = Status(state="offline", session=1, count=count).meta()
    payload = build(signer or helper.identity, federation=FEDERATION, sender="h-1", kind="status", seq=2, meta=meta)
    return topics.help_of(FEDERATION, "h-1", "status"), payload


def own_card(helper: Helper, *, number: int, count: int = 0) -> tuple[str, bytes]:
    key = replace(helper.disk.box_key, number=number)
    card = helper.profile.publish_card(key, seq=1, count=count)
    return card.topic, card.payload


def test_a_new_helper_enrolls_when_the_aggregator_is_online_until_a_receipt_comes() -> None:
    helper = Helper(enrolled=False)
    assert not published(helper.connect(echo=False), "enroll")
    (enroll,) = frames(helper.arrive(server_status()), "enroll")
    public = helper.identity.public
    enroll.check_authentic(public)
    assert (enroll.seq, Enroll.from_meta(enroll.meta).public_key) == (1, public)
    assert enroll.body == enroll_proof("code", FEDERATION, "h-1", public)
    assert len(published(helper.wait(20.0), "enroll")) > 1
    assert not published(helper.actions, "card")
    done = helper.arrive(receipt(helper, "enrolled"))
    assert helper.disk.enrolled
    assert isinstance(done[0], Save)
    assert not published(helper.wait(0.0), "enroll")
    assert logged(helper.echo(done)) == ["ready"]


def test_a_busy_aggregator_is_asked_again_when_it_says() -> None:
    helper = Helper(enrolled=False)
    helper.connect(server_status(), echo=False)
    helper.arrive(receipt(helper, "busy", retry_after_s=40.0))
    assert not published(helper.wait(39.0), "enroll")
    assert published(helper.wait(2.0), "enroll")


def test_an_aggregator_that_comes_online_is_told_at_once() -> None:
    helper = Helper(enrolled=False)
    helper.connect(server_status("offline"), echo=False)
    assert not published(helper.wait(100.0), "enroll")
    assert published(helper.arrive(server_status("online", session=2)), "enroll")
    helper = ready()
    assert published(helper.arrive(server_status()), "card")
    assert not published(helper.arrive(server_status()), "card")
    assert not helper.arrive(server_status("online", seq=1))  # an earlier one
    done = helper.arrive(server_status("offline"))
    assert logged(done) == ["aggregator-offline"]


def test_a_replayed_status_of_an_earlier_session_is_dropped() -> None:
    helper = ready()
    helper.arrive(server_status(session=5))
    helper.arrive(server_status(session=4))
    assert helper.core.dropped == {"old-session": 1}


@pytest.mark.parametrize(
    ("outcome", "enrolled", "text"),
    [
        ("refused", False, "refused the invitation (why)"),
        ("revoked", False, "revoked this helper's key (why)"),
        ("revoked", True, "revoked this helper's key (why)"),
        ("unknown", True, "does not know this helper (why)"),
    ],
)
def test_a_helper_that_is_refused_or_revoked_stops(outcome: str, enrolled: bool, text: str) -> None:
    helper = Helper(enrolled=enrolled)
    helper.connect(server_status(), echo=enrolled)
    done = helper.arrive(receipt(helper, outcome, reason="why"))
    stop = stopped(done)
    assert stop.code == 3
    assert text in stop.reason
    assert stop.reason.endswith("run: ternbus helper init 'my bureau' --invitation FILE")
    assert len(published(done, "status")) == enrolled
    helper.start()
    helper.connect(echo=False)
    assert logged(helper.arrive(receipt(helper, outcome))) == ["dropped"]  # once more, for instance to an earlier code


def test_a_refusal_without_a_reason_is_told_too() -> None:
    helper = Helper(enrolled=False)
    helper.connect(echo=False)
    assert stopped(helper.arrive(receipt(helper, "refused"))).reason.startswith("the aggregator has refused the")


def test_receipts_of_others_and_odd_ones_are_dropped() -> None:
    helper = ready()
    helper.arrive(receipt(helper, "revoked", device="h-2"))
    for outcome in ("enrolled", "accepted", "refused", "busy"):
        helper.arrive(receipt(helper, outcome, seq=4))
    assert helper.core.dropped == {"not-outstanding": 1, "odd-receipt": 4}
    assert helper.core.is_ready


def test_what_is_not_for_the_helper_is_dropped() -> None:
    helper = ready()
    head = from_server(Head.KIND, {}, topics.head(FEDERATION))
    up = topics.up(FEDERATION, "h-1", "status"), own_status(helper, count=0)[1]
    other = from_server(Receipt.KIND, {}, topics.help_of(FEDERATION, "h-2", Receipt.KIND))
    helper.arrive(head, up, other, ("nonsense", head[1]))
    helper.handle(events.FrameMalformed(reason="not-a-frame"))
    assert helper.core.dropped == {"not-ours": 3, "unknown-topic": 1, "not-a-frame": 1}


def test_drops_and_refusals_of_the_broker_are_logged_by_powers_of_ten() -> None:
    helper = ready()
    done = [each for _ in range(100) for each in helper.handle(events.Refused(seq=1, reason="quota"))]
    assert [each.fields["count"] for each in done if isinstance(each, Log)] == [1, 10, 100]


def test_nothing_is_answered_before_the_broker_has_shown_what_it_retains() -> None:
    helper = Helper()
    done = helper.connect(echo=False)
    (card,) = published(done, "card")
    assert not card.retain
    (subscribed,) = [each for each in done if isinstance(each, Subscribe)]
    assert {card.topic, topics.help_of(FEDERATION, "h-1", "status")} <= set(subscribed.filters)
    assert done.index(subscribed) < done.index(card)
    helper.arrive(own_card(helper, number=1))  # retained: an earlier one
    assert "ready" not in logged(helper.actions)
    again = helper.wait(11.0)
    assert len(published(again, "card")) == 1
    (second,) = published(again, "card")
    again = helper.arrive((second.topic, second.payload))
    assert logged(again) == []  # it looks twice
    (third,) = published(again, "card")
    done = helper.arrive((third.topic, third.payload))
    assert helper.core.is_ready
    assert [(parse(each.payload).kind, each.retain) for each in done if isinstance(each, Publish)] == [
        ("card", True),
        ("status", True),
    ]
    (status,) = frames(done, "status")
    assert (Status.from_meta(status.meta).state, Status.from_meta(status.meta).count) == ("online", 0)


def test_a_copy_of_the_disk_that_is_put_back_is_found_by_what_the_broker_retains() -> None:
    helper = ready()
    made = World(terms_of(helper))
    asked = made.asked(made.update("pi-1"), made.update("pi-2"))
    before = helper.disk
    helper.ask(asked, PREPARE)
    copy = helper.disk
    helper.ask(asked, OPEN)
    cards = [each for each in published(helper.actions, "card") if each.retain]
    for disk in (before, copy):
        helper.disk = disk
        helper.start()
        helper.wait(60.0)
        stop = stopped(helper.connect((cards[-1].topic, cards[-1].payload), echo=False))
        assert stop.code == 2
        assert "the broker shows count 2" in stop.reason
        assert not helper.core.is_ready
        assert helper.disk.seen_count == 2


def test_a_status_with_a_higher_count_or_a_card_with_a_newer_key_stops_the_helper() -> None:
    helper = Helper()
    assert stopped(helper.connect(own_status(helper, count=1))).code == 2
    helper = Helper()
    assert "box key 2" in stopped(helper.connect(own_card(helper, number=2))).reason
    helper = Helper()
    helper.connect(own_status(helper, count=1, signer=identity("another")))  # of a helper that had this name
    assert helper.core.is_ready


def test_restored_makes_a_new_box_key_under_which_no_earlier_box_opens() -> None:
    helper = ready()
    made = World(terms_of(helper))
    asked = made.asked(made.update("pi-1"), made.update("pi-2"))
    helper.arrive(*asked.messages("h-1", PREPARE, count=7))
    before = helper.disk
    helper.disk = before.restored(helper.random, NOW_S)
    assert helper.disk.box_key.number == int(NOW_S) + 1
    assert helper.disk.count == 7 + RESTORE_LEAP
    assert helper.disk.seq_limit == before.seq_limit + RESTORE_LEAP
    helper.start()
    helper.wait(1.0)
    helper.connect()
    assert helper.ask(asked, PREPARE, count=7).reason.startswith("old-card")
    fresh = World(terms_of(helper))
    other = fresh.asked(fresh.update("pi-1"), fresh.update("pi-2"))
    assert helper.ask(other, PREPARE).outcome == PREPARED
    full = replace(before, seen_count=COUNTER_MAX, seen_number=COUNTER_MAX).restored(helper.random, NOW_S)
    assert (full.count, full.box_key.number) == (COUNTER_MAX, COUNTER_MAX)
    assert not full.is_behind


def test_no_count_of_an_aggregator_makes_a_helper_useless_for_good() -> None:
    helper = ready()
    made = World(terms_of(helper))
    asked = made.asked(made.update("pi-1"), made.update("pi-2"))
    assert stopped(helper.arrive(*asked.messages("h-1", PREPARE, count=COUNTER_MAX))).code == 2
    helper.disk = helper.disk.restored(helper.random, NOW_S)
    helper.start()
    helper.wait(1.0)
    helper.connect()
    made = World(terms_of(helper))
    asked = made.asked(made.update("pi-1"), made.update("pi-2"))
    assert helper.ask(asked, PREPARE, count=COUNTER_MAX).outcome == PREPARED
    assert helper.core.is_ready
    own = own_status(helper, count=helper.disk.count)
    helper.disk = replace(helper.disk, count=helper.disk.count - 1)  # an old copy is one all the same
    helper.start()
    helper.wait(1000.0)
    assert stopped(helper.connect(own)).code == 2


def test_the_box_key_changes_each_month_and_is_erased_a_month_later() -> None:
    helper = ready()
    first = helper.disk.box_key
    old = World(terms_of(helper))
    asked = old.asked(old.update("pi-1"), old.update("pi-2"))
    assert helper.ask(asked, PREPARE).outcome == PREPARED
    done = helper.wait(MONTH_S + 3600)
    assert "box-key" in logged(done)
    assert [key.number for key in helper.disk.box_keys] == [1, 2]
    card = SignedCard.of_body(frames(done, "card")[-1].body).card
    assert (card.number, card.box_key) == (2, helper.disk.box_key.public)
    assert helper.ask(asked, OPEN).outcome == OPENED  # the key is still kept
    helper.wait(MONTH_S + 3600)
    assert [key.number for key in helper.disk.box_keys] == [2, 3]
    assert first.secret not in {key.secret for key in helper.disk.box_keys}
    assert helper.ask(asked, OPEN).reason.startswith("old-card")


def test_an_old_key_is_erased_also_when_no_new_one_is_due() -> None:
    state = Helper().disk
    two = state.rotated(bytes, NOW_S + MONTH_S)
    younger = replace(two, box_keys=(two.box_keys[0], replace(two.box_key, made_s=NOW_S + 2 * MONTH_S)))
    assert [key.number for key in younger.rotated(bytes, NOW_S + 2 * MONTH_S).box_keys] == [2]


def test_a_helper_that_is_not_ready_makes_no_box_key() -> None:
    """Its disk may be an old copy, whose next number another key has."""
    helper = Helper()
    helper.wait(3 * MONTH_S)
    assert helper.disk.box_key.number == 1
    helper.connect()
    assert helper.disk.box_key.number == 2


def test_each_attempt_to_connect_has_its_own_session_and_last_will() -> None:
    helper = Helper()
    wills = [each for each in helper.actions if isinstance(each, Connect)]
    for _ in range(3):
        helper.handle(events.ConnectFailed(reason="nobody there"))
        wills += [each for each in helper.wait(60.0) if isinstance(each, Connect)]
    statuses = [Status.from_meta(parse(each.will_payload).meta) for each in wills]
    assert [each.session for each in statuses] == [1, 2, 3, 4]
    assert {(each.state, each.count) for each in statuses} == {("offline", 0)}
    assert logged(helper.actions) == ["disconnected"]


def test_connections_that_are_cut_short_hint_at_a_second_helper_of_this_name() -> None:
    helper = Helper()
    for _ in range(5):
        helper.connect()
        helper.wait(1.0)
        helper.handle(events.Disconnected(reason="taken over"))
        helper.wait(60.0)
    assert logged(helper.actions).count("contested") == 1


def test_what_was_heard_on_a_lost_connection_is_asked_for_again() -> None:
    helper = Helper()
    made = World(terms_of(helper))
    asked = made.asked(made.update("pi-1"), made.update("pi-2"))
    helper.connect(*asked.messages("h-1", PREPARE), echo=False)
    helper.handle(events.Disconnected(reason="gone"))
    helper.wait(60.0)
    assert not published(helper.connect(), "answer")
    assert helper.ask(asked, PREPARE).outcome == PREPARED


def test_numbers_are_never_used_again_after_a_crash() -> None:
    helper = ready()
    used = {parse(each.payload).seq for each in helper.actions if isinstance(each, Publish)}
    for session in range(1, SEQ_BLOCK + 1):
        helper.arrive(server_status(session=session))
    used |= {parse(each.payload).seq for each in helper.actions if isinstance(each, Publish)}
    assert len(used) > SEQ_BLOCK
    helper.start()
    done = helper.connect()
    assert min(parse(each.payload).seq for each in done if isinstance(each, Publish)) > max(used)


def test_a_signal_ends_it_in_good_order() -> None:
    helper = ready()
    done = helper.handle(events.StopRequested(reason="SIGTERM"))
    (status,) = frames(done, "status")
    assert Status.from_meta(status.meta).state == "offline"
    assert (stopped(done).code, stopped(done).reason) == (0, "SIGTERM")
    assert helper.handle(events.Connected(frame_bytes=FRAME_BYTES)) == []
    assert helper.core.due_s() is None
