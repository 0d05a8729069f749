"""What helpers of private sums send: enrolment, status, cards; true ones and false ones."""

from pathlib import Path
from typing import Any

import pytest

from support.private_world import CODE, HelperSide, PrivateBench, make_private
from support.small_world import (
    LAB,
    Bench,
    frames_of,
    make_directory,
    preverifier_of,
    receipts,
    reconfigure,
    refusals,
    saved,
)
from ternbus.aggregator.core import events, records
from ternbus.aggregator.store import private_rows
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.identity import Identity, enroll_proof
from ternbus.broker.protocol.messages import Enroll
from ternbus.broker.sums.sets import PREPARED, Answer


@pytest.fixture
def helper() -> HelperSide:
    return HelperSide("h-1")


@pytest.fixture
def bench(tmp_path: Path, helper: HelperSide) -> PrivateBench:
    made = PrivateBench(make_private(tmp_path / "agg", [helper]))
    made.start()
    return made


def outcomes(actions: list[events.Action]) -> list[tuple[str, str]]:
    return [(each.outcome, each.reason) for each in receipts(actions)]


def logged(actions: list[events.Action]) -> str:
    return "\n".join(action.text for action in actions if isinstance(action, events.Log))


def counted(bench: PrivateBench) -> dict[str, int]:
    return refusals(bench.tick(2))


# --- enrolment


def test_a_helper_enrolls_under_the_key_that_the_settings_name(bench: PrivateBench, helper: HelperSide) -> None:
    bench.invite_helper("h-1")
    actions = bench.say(helper, helper.enroll())
    assert outcomes(actions) == [("enrolled", "")]
    (receipt,) = frames_of(actions, "receipt")
    assert (receipt.sender, receipt.meta["device"]) == ("aggregator", "h-1")
    assert receipt.meta["device_key"] == bytes(helper.identity.key_id)
    topic = [action.topic for action in actions if isinstance(action, events.Publish)]
    assert topic[0] == topics.help_of(LAB, "h-1", "receipt")
    kinds = [type(action).__name__ for action in actions]
    assert kinds.index("Save") < kinds.index("Publish")
    assert private_rows.codes(bench.ledger.db) == {}


def test_the_same_enroll_gets_the_same_answer_also_after_a_restart(bench: PrivateBench, helper: HelperSide) -> None:
    bench.enroll_helper(helper)
    assert outcomes(bench.say(helper, helper.enroll())) == [("enrolled", "")]
    bench.restart()
    bench.start()
    again = bench.say(helper, helper.enroll())
    assert outcomes(again) == [("enrolled", "")]
    assert saved(again, records.HelperEnrolled) == []


def test_a_helper_may_enroll_again_under_its_key_by_another_invitation(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    bench.invite_helper("h-1", "another-code")
    assert outcomes(bench.say(helper, helper.enroll("another-code"))) == [("enrolled", "")]
    bench.check_published()
    assert bench.sums.helpers["h-1"].card is not None
    row = bench.ledger.db.execute("SELECT card != x'', code FROM helpers").fetchone()
    assert row == (1, "")


def test_another_key_than_that_in_the_settings_is_refused_even_with_the_code(bench: PrivateBench) -> None:
    bench.invite_helper("h-1")
    thief = HelperSide("h-1")
    ((outcome, reason),) = outcomes(bench.say(thief, thief.enroll()))
    assert (outcome, reason.partition(":")[0]) == (
        "refused",
        "aggregator.toml names another key for this helper, or does not name it ([private] helpers)",
    )
    assert counted(bench)["refused-enroll"] == 1
    assert private_rows.codes(bench.ledger.db).keys() == {"h-1"}  # the invitation is not spent


def test_a_name_that_the_settings_do_not_have_is_refused(bench: PrivateBench) -> None:
    stranger = HelperSide("h-9")
    assert outcomes(bench.say(stranger, stranger.enroll()))[0][0] == "refused"


@pytest.mark.parametrize(
    ("invited", "sent", "reason"),
    [
        ({}, CODE, "no open invitation for this device: spent, cancelled or never made"),
        ({"code": "other"}, CODE, "the code is not the invitation's"),
        ({"expires_at": 0.0}, CODE, "the invitation has expired"),
    ],
)
def test_without_the_code_of_an_open_invitation_nobody_enrolls(
    bench: PrivateBench, helper: HelperSide, invited: dict[str, Any], sent: str, reason: str
) -> None:
    if invited:
        bench.invite_helper("h-1", **invited)
    assert outcomes(bench.say(helper, helper.enroll(sent))) == [("refused", reason)]
    assert not bench.sums.helpers["h-1"].enrolled


def test_an_enroll_signed_by_another_key_than_the_one_in_it_is_dropped(bench: PrivateBench, helper: HelperSide) -> None:
    bench.invite_helper("h-1")
    thief = HelperSide("h-1")
    public = helper.identity.public
    meta = Enroll(public_key=public).meta()
    forged = thief.frame("enroll", meta, body=enroll_proof(CODE, LAB, "h-1", public))
    assert outcomes(bench.say(thief, forged)) == []
    assert counted(bench) == {"unknown-key": 1}
    body = helper.enroll()
    assert outcomes(bench.say(helper, body[:-1] + bytes([body[-1] ^ 1]))) == []
    assert counted(bench) == {"bad-digest": 1}


def test_a_device_s_invitation_admits_no_helper_and_the_other_way_round(
    bench: PrivateBench, helper: HelperSide
) -> None:
    bench.invite("h-1", CODE)
    assert outcomes(bench.say(helper, helper.enroll()))[0][0] == "refused"
    device = bench.join("h-1")  # a device may have a helper's name
    assert "h-1" in bench.core.registry.members
    bench.invite_helper("h-1", "for-a-helper")
    assert receipts(bench.receive(device.topic("enroll"), device.enroll("for-a-helper")))[0].outcome == "refused"
    assert outcomes(bench.say(helper, helper.enroll("for-a-helper"))) == [("enrolled", "")]


def test_attempts_and_frames_are_limited_before_anything_is_read(tmp_path: Path, helper: HelperSide) -> None:
    bench = PrivateBench(
        make_private(tmp_path / "agg", [helper], limits__enrolments_per_minute=2, limits__refusals_per_s=5)
    )
    bench.start()
    for _ in range(4):
        bench.say(helper, helper.enroll("wrong"))
    stranger = HelperSide("h-9")
    for _ in range(8):
        bench.say(stranger, stranger.enroll("wrong"))
    for _ in range(12):
        bench.receive(helper.topic("card"), b"no frame at all")
    found = counted(bench)
    assert found["too-many-enrolments"] == 2
    assert found["too-fast"] == 3 + 6  # of the helper's 16 frames 10 had a token, of the strangers' 8 five
    bench.tick(60)
    bench.enroll_helper(helper)
    assert bench.sums.helpers["h-1"].enrolled


def test_who_has_not_enrolled_is_told_that_it_is_unknown_at_a_low_rate(tmp_path: Path, helper: HelperSide) -> None:
    bench = PrivateBench(make_private(tmp_path / "agg", [helper], limits__refusals_per_s=2))
    bench.start()
    assert outcomes(bench.say(helper, helper.card()))[0][0] == "unknown"
    bench.tick(10)
    told = [outcome for _ in range(4) for outcome, _ in outcomes(bench.say(helper, helper.status()))]
    assert told == ["unknown"] * 2
    bench.tick(10)
    bench.invite_helper("h-1")
    assert outcomes(bench.say(helper, helper.status())) == []  # it may say who it is before it is enrolled
    later = helper.frame("answer", {}, part=1, parts=2, body=bytes(10))
    bench.tick(10)
    assert outcomes(bench.say(helper, later)) == []


def test_a_key_that_the_settings_no_longer_name_is_unknown(tmp_path: Path, helper: HelperSide) -> None:
    bench = PrivateBench(make_private(tmp_path / "agg", [helper]))
    bench.start()
    bench.ready(helper)
    bench.say(helper, helper.status(session=2, count=9))
    new = HelperSide("h-1")
    reconfigure(bench, private={"helpers": {"h-1": new.identity.public.hex()}})
    bench.restart()
    bench.start()
    assert outcomes(bench.say(helper, helper.card(2)))[0][0] == "unknown"
    bench.ready(new)
    assert bench.check_published().helpers[0].card.public == new.identity.public
    assert bench.sums.helpers["h-1"].count == 0  # what another key said says nothing of this one
    assert bench.ledger.db.execute("SELECT count FROM helpers").fetchone() == (0,)


# --- authenticity


def test_a_frame_under_another_key_or_on_another_topic_is_dropped(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    thief = HelperSide("h-1", seq=100)
    assert outcomes(bench.say(thief, thief.card(2)))[0][0] == "unknown"
    bench.receive(topics.help_of(LAB, "h-2", "card"), helper.card(2))
    bench.receive(helper.topic("status"), helper.card(2))
    good = helper.card(2)
    bench.receive(helper.topic("card"), good[:-1] + bytes([good[-1] ^ 1]))
    bench.receive(topics.help_of("other", "h-1", "card"), good)
    bench.receive(helper.topic("card"), helper.frame("card", {}, federation="other"))
    found = counted(bench)
    assert found == {
        "unknown-helper": 1,
        "wrong-sender": 1,
        "wrong-topic": 1,
        "bad-digest": 1,
        "wrong-federation": 2,
    }
    assert bench.check_published().helpers[0].card.number == 1


def test_a_device_of_the_same_name_speaks_for_no_helper(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    device = bench.join("h-1")
    imitation = HelperSide("h-1", device.identity, 50)
    payload = imitation.card(2)
    opened = preverifier_of(bench).open(imitation.topic("card"), payload)
    bench.handle(events.MessageArrived(topic=imitation.topic("card"), payload=payload, opened=opened))
    assert bench.check_published().helpers[0].card.number == 1
    assert counted(bench) == {"unknown-helper": 1}


def test_a_large_header_on_a_helper_s_topic_is_not_read(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    bench.receive(helper.topic("answer"), helper.frame("answer", {"x": "y" * 9000}))
    assert counted(bench) == {"header-too-long": 1}
    names = [f"{number:02d}-" + 61 * "d" for number in range(50)]
    meta = Answer(outcome="refused", set=bytes(32), count=1, reason="r" * 200, updates=tuple(names)).meta()
    bench.receive(helper.topic("answer"), helper.frame("answer", meta))
    assert counted(bench) == {"not-asked": 1}


def test_an_empty_message_clears_what_was_retained_and_says_nothing(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    assert bench.receive(helper.topic("card"), b"") == []
    assert bench.receive(helper.topic("status"), b"") == []


def test_what_the_aggregator_itself_sends_helpers_is_not_taken_in(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    bench.receive(helper.topic("receipt"), bench.core._frames._frame("receipt", {})[1])
    assert counted(bench) == {"unknown-helper": 1}


def test_a_plain_federation_takes_in_nothing_of_helpers(tmp_path: Path, helper: HelperSide) -> None:
    bench = Bench(make_directory(tmp_path / "agg"))
    bench.start()
    bench.receive(helper.topic("enroll"), helper.enroll())
    assert refusals(bench.tick(2)) == {"unknown-topic": 1}


# --- status


def test_a_status_tells_who_is_online_and_how_many_sets_there_are(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    known = bench.sums.helpers["h-1"]
    assert (known.online, known.count) == (True, 0)
    bench.say(helper, helper.status(count=4))
    assert known.count == 4
    assert bench.say(helper, helper.status(count=4, seq=helper.seq)) == []  # delivered again
    bench.say(helper, helper.status("offline"))
    assert (known.online, known.count) == (False, 4)
    bench.restart()
    bench.start()
    assert bench.sums.helpers["h-1"].count == 4


def test_a_lower_count_is_told_and_never_believed(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    bench.say(helper, helper.status(session=2, count=7))
    text = logged(bench.say(helper, helper.status(session=3, count=5)))
    assert "the helper h-1 says that it has written down 5 steps, and it had 7" in text
    assert "ternbus helper restored DIR" in text
    assert bench.sums.helpers["h-1"].count == 7
    assert bench.ledger.db.execute("SELECT count FROM helpers").fetchone() == (7,)
    assert counted(bench) == {"helper-behind": 1}


def test_a_count_that_was_said_before_later_answers_is_no_lost_one(bench: PrivateBench, helper: HelperSide) -> None:
    """The broker retains the status with which a session began, and may deliver answers again."""
    bench.ready(helper)
    status = helper.status(session=2, count=3)
    bench.say(helper, status)
    answers = [helper.frame("answer", Answer(outcome=PREPARED, set=bytes(32), count=count).meta()) for count in (4, 5)]
    bench.say(helper, *answers)
    bench.restart()
    bench.start()
    bench.say(helper, *answers, status)
    assert bench.sums.helpers["h-1"].count == 5
    assert "helper-behind" not in counted(bench)
    late = helper.status(session=3, count=5)  # nats-server keeps the order of each topic only
    bench.say(helper, helper.frame("answer", Answer(outcome=PREPARED, set=bytes(32), count=6).meta()), late)
    assert "helper-behind" not in counted(bench)
    bench.say(helper, helper.status(session=4, count=5))
    assert counted(bench)["helper-behind"] == 1


def test_a_session_whose_numbers_are_those_of_before_is_of_an_old_copy(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    bench.say(helper, helper.status(session=2, count=7, seq=500))
    bench.say(helper, helper.status(session=3, count=5, seq=400))
    assert counted(bench) == {"helper-behind": 1}


def test_an_old_status_is_dropped_and_one_that_is_outdated_changes_nothing(
    bench: PrivateBench, helper: HelperSide
) -> None:
    bench.ready(helper)
    bench.say(helper, helper.status(session=3, count=1, seq=50))
    bench.say(helper, helper.status(session=2, count=9, seq=60))
    assert bench.say(helper, helper.status(session=3, count=8, seq=40)) == []
    assert bench.sums.helpers["h-1"].count == 1
    assert counted(bench) == {"old-session": 1}
    bench.say(helper, helper.frame("status", {"state": "idle"}, body=b"x", seq=70))
    assert counted(bench) == {"bad-body": 1}


# --- cards


def test_a_card_comes_again_at_each_connect_and_changes_nothing(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    assert bench.say(helper, helper.card()) == []
    bench.restart()
    bench.start()
    assert saved(bench.say(helper, helper.card()), records.CardReceived) == []
    assert bench.version == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"federation": "other"}, "bad-card"),
        ({"helper": "h-2"}, "bad-card"),
        ({"public": Identity(bytes(32)).public}, "bad-signature"),
        ({"public": Identity(bytes(32)).public, "signer": Identity(bytes(32))}, "bad-card"),
        ({"box_key": bytes(32)}, "bad-card"),  # of low order
        ({"box_key": bytes([9, *bytes(31)])}, "bad-card"),  # a second one of this number
        ({"roster": "nobody"}, "bad-meta"),
        ({"min": 1}, "bad-meta"),
        ({"number": 0}, "bad-meta"),
    ],
)
def test_a_card_that_is_not_the_helper_s_is_refused(
    bench: PrivateBench, helper: HelperSide, changes: dict[str, Any], reason: str
) -> None:
    bench.ready(helper)
    bench.say(helper, helper.card(**{"number": 1, **changes}))
    assert counted(bench) == {reason: 1}
    assert bench.check_published().helpers[0].card.number == 1


def test_a_lower_box_key_is_refused_and_told_with_what_to_do(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    bench.say(helper, helper.card(5))
    text = logged(bench.say(helper, helper.card(4)))
    assert "box key 4 of h-1; 5 is known" in text
    assert "ternbus helper restored DIR" in text
    assert bench.check_published().helpers[0].card.number == 5


def test_another_minimum_under_the_same_box_key_counts_if_it_was_said_later(
    bench: PrivateBench, helper: HelperSide
) -> None:
    bench.ready(helper)
    before = helper.card(1, min=3)
    bench.say(helper, before)
    assert bench.check_published().min == 3
    bench.say(helper, helper.card(1, min=2, seq=2))
    bench.tick(20)
    assert bench.check_published().min == 3


@pytest.mark.parametrize("body", [b"", bytes(64), bytes(2000)])
def test_a_body_that_is_no_card_is_refused(bench: PrivateBench, helper: HelperSide, body: bytes) -> None:
    bench.ready(helper)
    bench.say(helper, helper.frame("card", {}, body=body))
    assert counted(bench) == {"bad-card": 1}


def test_a_card_in_parts_is_refused(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    bench.say(helper, helper.frame("card", {}, body=bytes(100), part=0, parts=2))
    assert counted(bench) == {"bad-card": 1}


# --- what the operator asks for


def test_an_invitation_of_a_helper_is_cancelled_by_its_name(bench: PrivateBench, helper: HelperSide) -> None:
    bench.invite_helper("h-1")
    bench.handle(events.CancelRequested(device="h-1", request=1))
    assert private_rows.codes(bench.ledger.db) == {}
    assert outcomes(bench.say(helper, helper.enroll()))[0][0] == "refused"
    (done,) = saved(bench.handle(events.CancelRequested(device="h-1", request=2)), records.RequestDone)
    assert "h-1 has no open invitation" in done.error


def test_a_device_s_invitation_goes_before_a_helper_s_of_the_same_name(bench: PrivateBench) -> None:
    bench.invite("h-1")
    bench.invite_helper("h-1")
    bench.handle(events.CancelRequested(device="h-1"))
    assert (bench.core.registry.codes, set(private_rows.codes(bench.ledger.db))) == ({}, {"h-1"})


def test_a_helper_is_not_revoked_but_taken_out_of_the_settings(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    (done,) = saved(bench.handle(events.RevokeRequested(device="h-1", request=1)), records.RequestDone)
    assert "h-1 is a helper, which is replaced, not revoked: take it out of private.helpers" in done.error
    (done,) = saved(bench.handle(events.RevokeRequested(device="h-9", request=2)), records.RequestDone)
    assert "h-9 has not joined" in done.error
    bench.join("h-1")
    assert saved(bench.revoke("h-1"), records.DeviceRevoked)[0].device == "h-1"


def test_an_answer_that_nobody_asked_for_is_dropped(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    bench.say(helper, helper.frame("answer", Answer(outcome="prepared", set=bytes(32), count=1).meta()))
    assert counted(bench) == {"not-asked": 1}
