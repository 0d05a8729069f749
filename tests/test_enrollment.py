"""Which keys may speak for which devices: signatures, invitations, enrolments, revocations."""

from collections.abc import Callable

import pytest

from support.small_world import (
    Bench,
    Device,
    place,
    published,
    receipts,
    refusals,
    saved,
    ternary_block,
)
from ternbus.aggregator.core import events, records
from ternbus.broker.protocol.frame import parse

Make = Callable[..., Bench]


def test_what_is_not_signed_by_the_device_gets_no_answer(make: Make) -> None:
    bench = make()
    old = bench.join("pi")
    pi = bench.join("pi")
    good = pi.update(ternary_block(bench.schema, 1), 0)[0]
    header_end = 8 + int.from_bytes(good[4:8], "little")
    forged = {
        "bad-signature": good[:header_end] + bytes(64) + good[header_end + 64 :],
        "bad-digest": good[:-1] + bytes([good[-1] ^ 1]),
        "not-a-frame": good[:50],
        "replaced-key": Device("pi", bench.schema, old.identity, seq=5).update(ternary_block(bench.schema, 1), 0)[0],
    }
    for payload in forged.values():
        assert published(bench.receive(pi.topic("update"), payload)) == []
    assert refusals(bench.tick(1.0)) == dict.fromkeys(forged, 1)
    assert receipts(bench.receive(pi.topic("update"), good))[0].outcome == "accepted"


def test_a_device_that_is_not_known_is_told_so_at_a_low_rate(make: Make) -> None:
    """As after a restore from before it joined; nobody can check its frames, so all such names share one rate."""
    bench = make()
    stranger, per_s = Device("stranger", bench.schema), bench.core.settings.limits.refusals_per_s
    for kind, payload in [
        ("update", stranger.update(ternary_block(bench.schema, 1), 0)[0]),
        ("status", stranger.status("idle")),
    ]:
        (receipt,) = receipts(bench.receive(stranger.topic(kind), payload))
        assert (receipt.outcome, receipt.device_key) == ("unknown", stranger.identity.key_id)
        assert receipt.seq == parse(payload).seq
    assert refusals(bench.tick(1.0)) == {"unknown-device": 2}
    answers = [receipts(bench.receive(stranger.topic("status"), stranger.status("idle"))) for _ in range(3 * per_s)]
    assert sum(map(len, answers)) == per_s
    late_part = stranger.update(bytes(9000), 0, frame_bytes=4096)[1]
    assert receipts(bench.receive(stranger.topic("update"), late_part)) == []


def test_an_invited_device_may_publish_its_status_before_it_is_enrolled(make: Make) -> None:
    bench = make()
    pi = Device("pi", bench.schema)
    bench.invite("pi")
    assert published(bench.receive(pi.topic("status"), pi.status("idle"))) == []
    (receipt,) = bench.send(pi, ternary_block(bench.schema, 1), 0)
    assert receipt.outcome == "unknown"


def test_a_key_that_is_not_known_is_told_so_and_the_device_s_own_key_loses_nothing(make: Make) -> None:
    bench = make()
    pi, other_key = bench.join("pi"), Device("pi", bench.schema)
    for _ in range(3 * bench.core.settings.limits.receipts_per_s):
        bench.receive(pi.topic("status"), other_key.status("idle"))
    assert [receipt.outcome for receipt in bench.send(pi, ternary_block(bench.schema, 1), 0)] == ["accepted"]
    bench.tick(1.0)
    (receipt,) = receipts(bench.receive(pi.topic("status"), other_key.status("idle")))
    assert (receipt.outcome, receipt.device_key) == ("unknown", other_key.identity.key_id)


def test_a_frame_must_agree_with_its_topic(make: Make) -> None:
    bench = make()
    pi, eve = bench.join("pi"), bench.join("eve")
    block = ternary_block(bench.schema, 1)
    wrong = [
        (eve.topic("update"), pi.update(block, 0)[0], "wrong-sender"),
        (pi.topic("status"), pi.update(block, 0)[0], "wrong-topic"),
        (pi.topic("update"), pi.frame("update", {}, federation="other"), "wrong-federation"),
        ("ternbus/1/other/up/pi/update", pi.update(block, 0)[0], "wrong-federation"),
        ("ternbus/1/lab/up/pi/receipt", pi.update(block, 0)[0], "unknown-topic"),
        ("ternbus/2/lab/up/pi/update", pi.update(block, 0)[0], "unknown-topic"),
        ("nonsense", b"", "unknown-topic"),
    ]
    for topic, payload, reason in wrong:
        assert published(bench.receive(topic, payload)) == []
        assert refusals(bench.tick(1.0)) == {reason: 1}
    assert bench.core.model.buffer == []


def test_a_cleared_topic_of_a_device_is_no_frame_and_no_fault(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    assert bench.receive(pi.topic("status"), b"") == []
    assert refusals(bench.tick(1.0)) == {}


def test_a_revoked_key_is_told_so_if_the_signature_is_its_own(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    bench.revoke("pi")
    good = pi.update(ternary_block(bench.schema, 1), 0)[0]
    (receipt,) = receipts(bench.receive(pi.topic("update"), good))
    assert (receipt.outcome, receipt.device_key, receipt.seq) == ("revoked", pi.identity.key_id, pi.seq)
    header_end = 8 + int.from_bytes(good[4:8], "little")
    forged = good[:header_end] + bytes(64) + good[header_end + 64 :]
    assert published(bench.receive(pi.topic("update"), forged)) == []
    assert refusals(bench.tick(1.0)) == {"revoked-key": 1, "bad-signature": 1}
    assert bench.core.model.buffer == []


def test_a_device_that_is_online_is_told_at_once_once_and_after_it_is_on_disk(make: Make) -> None:
    """In a paused federation it sends nothing that could be answered."""
    bench = make()
    pi, away = bench.join("pi"), bench.join("away")
    bench.receive(pi.topic("status"), pi.status("idle"))
    actions = bench.handle(events.RevokeRequested(device="pi", why="stolen"))
    (receipt,) = receipts(actions)
    assert (receipt.outcome, receipt.reason, receipt.seq) == ("revoked", "stolen", pi.seq)
    assert place(actions, records.DeviceRevoked) < place(actions, events.Publish)
    assert receipts(bench.handle(events.RevokeRequested(device="pi"))) == []
    assert receipts(bench.handle(events.RevokeRequested(device="away"))) == []
    assert away.name in bench.core.registry.members


def test_a_revoked_device_may_be_invited_again_with_a_new_key_only(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    bench.revoke("pi")
    code = bench.invite("pi")
    assert receipts(bench.receive(pi.topic("enroll"), pi.enroll(code)))[0].outcome == "refused"
    new = Device("pi", bench.schema)
    assert receipts(bench.receive(new.topic("enroll"), new.enroll(code)))[0].outcome == "enrolled"
    frame = pi.update(ternary_block(bench.schema, 1), 0)[0]
    assert receipts(bench.receive(pi.topic("update"), frame))[0].outcome == "revoked"
    assert bench.send(new, ternary_block(bench.schema, 1), 0)[0].outcome == "accepted"


def test_receipts_to_those_without_a_key_are_few(make: Make) -> None:
    """Strangers share their bound; it is not that of a revoked device, nor of one that is invited."""
    bench = make(limits__refusals_per_s=2, limits__receipts_per_s=10)
    pi = bench.join("pi")
    bench.revoke("pi")
    frames = [pi.status("idle") for _ in range(50)]
    assert len(receipts(bench.receive(pi.topic("status"), *frames))) == 4  # two seconds' worth, as for a device
    eve, guest = Device("eve", bench.schema), Device("guest", bench.schema)
    assert len(receipts(bench.receive(eve.topic("enroll"), *[eve.enroll("guess") for _ in range(5)]))) == 2
    code = bench.invite("guest")
    assert receipts(bench.receive(guest.topic("enroll"), guest.enroll(code)))[0].outcome == "enrolled"
    bench.now += 1.0
    assert len(receipts(bench.receive(eve.topic("enroll"), *[eve.enroll("guess") for _ in range(5)]))) == 2
    bench.tick(1.0)
    counted = bench.ledger.db.execute("SELECT value FROM counts WHERE name = 'invalid:too-fast'").fetchone()
    assert counted == (46 + 6,)


def test_enrolling_spends_the_code_and_the_identical_frame_gets_the_same_answer(make: Make) -> None:
    bench = make()
    pi, twin = Device("pi", bench.schema), Device("pi", bench.schema)
    code = bench.invite("pi")
    frame = pi.enroll(code)
    (receipt,) = receipts(bench.receive(pi.topic("enroll"), frame))
    assert (receipt.outcome, receipt.device, receipt.device_key) == ("enrolled", "pi", pi.identity.key_id)
    assert receipt.seq == pi.seq
    assert place(bench.last, records.DeviceEnrolled) < place(bench.last, events.Publish)
    assert receipts(bench.receive(pi.topic("enroll"), frame))[0].outcome == "enrolled"
    assert not saved(bench.last, records.DeviceEnrolled)
    assert receipts(bench.receive(twin.topic("enroll"), twin.enroll(code)))[0].outcome == "refused"


def test_the_code_is_spent_after_a_restart_too(make: Make) -> None:
    bench = make()
    pi, twin = Device("pi", bench.schema), Device("pi", bench.schema)
    code = bench.invite("pi")
    frame = pi.enroll(code)
    bench.receive(pi.topic("enroll"), frame)
    bench.restart()
    bench.start()
    assert receipts(bench.receive(twin.topic("enroll"), twin.enroll(code)))[0].outcome == "refused"
    assert receipts(bench.receive(pi.topic("enroll"), frame))[0].outcome == "enrolled"


@pytest.mark.parametrize("code", ["wrong", "another-device's"])
def test_a_wrong_code_is_refused(make: Make, code: str) -> None:
    bench = make()
    bench.invite("pi", "right")
    bench.invite("other", "another-device's")
    pi = Device("pi", bench.schema)
    (receipt,) = receipts(bench.receive(pi.topic("enroll"), pi.enroll(code)))
    assert receipt.outcome == "refused"
    assert refusals(bench.tick(1.0)) == {"refused-enroll": 1}
    assert "pi" not in bench.core.registry.members


def test_without_an_invitation_there_is_no_enrolling(make: Make) -> None:
    bench = make()
    pi = Device("pi", bench.schema)
    assert receipts(bench.receive(pi.topic("enroll"), pi.enroll("anything")))[0].outcome == "refused"


def test_an_enroll_is_signed_by_the_key_in_it(make: Make) -> None:
    bench = make()
    code = bench.invite("pi")
    pi, eve = Device("pi", bench.schema), Device("pi", bench.schema)
    proof = parse(pi.enroll(code)).body
    stolen = eve.frame("enroll", {"public_key": pi.identity.public}, body=proof)
    assert published(bench.receive(pi.topic("enroll"), stolen)) == []
    short = eve.frame("enroll", {"public_key": b"short"}, body=proof)
    assert published(bench.receive(pi.topic("enroll"), short)) == []
    assert refusals(bench.tick(1.0)) == {"unknown-key": 1, "bad-meta": 1}
    assert bench.core.registry.members == {}


def test_an_enrolled_key_with_another_proof_is_refused(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    assert receipts(bench.receive(pi.topic("enroll"), pi.enroll("another-code")))[0].outcome == "refused"


def test_a_new_key_takes_the_place_of_the_old_which_never_returns(make: Make) -> None:
    bench = make()
    old = bench.join("pi")
    bench.send(old, ternary_block(bench.schema, 1), 0, seq=500)
    new = bench.join("pi")
    # sequence numbers belong to a key; (device, base) outlives it
    (receipt,) = bench.send(new, ternary_block(bench.schema, 2), 0)
    assert (receipt.seq, receipt.outcome, receipt.highest_seq) == (2, "duplicate", 0)
    assert published(bench.receive(old.topic("update"), *old.update(ternary_block(bench.schema, 3), 0))) == []
    assert refusals(bench.tick(1.0)) == {"replaced-key": 1}
    code = bench.invite("pi")
    assert receipts(bench.receive(old.topic("enroll"), old.enroll(code)))[0].outcome == "refused"
