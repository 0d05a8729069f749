"""What the protocol says of the aggregator, sentence by sentence, asked of its core."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from support.small_world import (
    LAB,
    Bench,
    Device,
    float32_block,
    follow,
    frames_of,
    heads,
    receipts,
    refusals,
    saved,
    ternary_block,
)
from ternbus.aggregator import settings as configuration
from ternbus.aggregator.core import events, records
from ternbus.aggregator.core.grants import Grants, ranges
from ternbus.aggregator.shell import administration
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import build, parse
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.messages import Grant, Status
from ternbus.broker.protocol.parts import cut
from ternbus.broker.protocol.ternary import Block, content_bytes

HEAD, STATUS = topics.head(LAB), topics.status(LAB)
Make = Callable[..., Bench]


def published(actions: list[events.Action]) -> list[events.Publish]:
    return [action for action in actions if isinstance(action, events.Publish)]


def place(actions: list[events.Action], kind: type, what: str = "") -> int:
    """Where in the order the first such action stands."""
    for number, action in enumerate(actions):
        if isinstance(action, events.Save) and isinstance(action.record, kind):
            return number
        if isinstance(action, kind) and what in getattr(action, "topic", ""):
            return number
    raise AssertionError(f"no {kind.__name__}")


def reconfigure(bench: Bench, **changes: object) -> None:
    """Edit aggregator.toml: ``downlink={"slots": 2}``."""
    settings = administration.load_settings(bench.directory)
    sections = {
        name: replace(getattr(settings, name), **keys) if isinstance(keys, dict) and name != "plan" else keys
        for name, keys in changes.items()
    }
    (bench.directory / administration.TOML).write_text(configuration.dumps(replace(settings, **sections)))


def spent(bench: Bench, kind: str) -> dict[str, int]:
    """What was refused so far, a second later."""
    return refusals(bench.last + bench.tick(1.0))


# --- accepted


def test_an_accepted_update_is_saved_before_its_receipt(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    block = ternary_block(bench.schema, 1)
    (receipt,) = bench.send(pi, block, 0, samples=7)
    assert (receipt.device, receipt.device_key, receipt.seq) == ("pi", pi.identity.key_id, pi.seq)
    assert (receipt.outcome, receipt.version) == ("accepted", 0)
    assert place(bench.last, records.UpdateAccepted) < place(bench.last, events.Publish, "receipt")
    (record,) = saved(bench.last, records.UpdateAccepted)
    update = record.update
    assert (update.device, update.seq, update.base, update.staleness, update.samples) == ("pi", pi.seq, 0, 0, 7)
    assert (update.codec, update.encoding, record.body) == ("ternary", "raw", block.content)


def test_receipts_are_not_retained_and_go_to_the_device_only(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    (receipt,) = published(bench.last)
    assert (receipt.topic, receipt.retain) == (topics.down(LAB, "pi", "receipt"), False)


@pytest.mark.parametrize("codec", ["ternary", "float32"])
@pytest.mark.parametrize("encoding", ["raw", "zstd"])
@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("frame_bytes", [1500, 100_000])
def test_every_form_of_an_update_is_accepted(
    make: Make, codec: str, encoding: str, sealed: bool, frame_bytes: int
) -> None:
    """Raw or zstd, sealed or not, in one part or in several, the last part first and each twice."""
    bench = make()
    pi = bench.join("pi")
    block = (ternary_block if codec == "ternary" else float32_block)(bench.schema, 1)
    frames = pi.update(
        block,
        0,
        encoding=encoding,
        seal_to=bench.identity.public if sealed else None,
        frame_bytes=frame_bytes,
    )
    answers = [receipts(bench.receive(pi.topic("update"), frame)) for frame in [*reversed(frames), *reversed(frames)]]
    assert [answer.outcome for answer in answers[len(frames) - 1]] == ["accepted"]
    assert not any(answers[: len(frames) - 1])
    assert len(bench.core.model.buffer) == 1
    value = bench.core.model._gathered.result().delta
    np.testing.assert_allclose(value, block.value(), rtol=1e-6)


# --- refused: the outcome table, and the order of the checks


def test_a_base_older_than_the_bound_is_stale(make: Make) -> None:
    bench = make(merge__buffer_size=1, staleness__max=2)
    pi, old = bench.join("pi"), bench.join("old")
    for version in range(3):
        assert bench.send(pi, ternary_block(bench.schema, version), version)[0].outcome == "accepted"
    (receipt,) = bench.send(old, ternary_block(bench.schema, 9), 0)
    assert (receipt.outcome, receipt.version) == ("stale", 3)
    assert place(bench.last, records.UpdateAnswered) < place(bench.last, events.Publish)
    assert bench.send(old, ternary_block(bench.schema, 9), 1)[0].outcome == "accepted"


def test_a_base_above_head_is_invalid(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    (receipt,) = bench.send(pi, ternary_block(bench.schema, 1), 1)
    assert (receipt.outcome, receipt.reason) == ("invalid", "base-in-future")


def test_a_device_and_base_is_accepted_once(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    (receipt,) = bench.send(pi, ternary_block(bench.schema, 2), 0)
    assert (receipt.outcome, receipt.highest_seq) == ("duplicate", 0)
    assert len(bench.core.model.buffer) == 1


def test_the_same_seq_gets_the_same_answer_again(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    block = ternary_block(bench.schema, 1)
    for base, outcome in [(0, "accepted"), (5, "invalid"), (0, "duplicate")]:
        first = bench.send(pi, block, base)[0]
        again = bench.send(pi, block, base, seq=pi.seq)[0]
        assert first == again
        assert first.outcome == outcome
        assert not saved(bench.last, records.UpdateAccepted) + saved(bench.last, records.UpdateAnswered)
    assert len(bench.core.model.buffer) == 1


def test_the_same_seq_gets_the_same_answer_whatever_it_now_holds(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    bench.send(pi, b"nonsense", 0)
    (receipt,) = bench.send(pi, ternary_block(bench.schema, 1), 0, seq=pi.seq)
    assert receipt.outcome == "invalid"


def test_a_lower_seq_is_told_the_highest(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    bench.send(pi, ternary_block(bench.schema, 1), 0, seq=1000)
    (receipt,) = bench.send(pi, ternary_block(bench.schema, 2), 0, seq=7)
    assert (receipt.outcome, receipt.seq, receipt.highest_seq) == ("duplicate", 7, 1000)
    counted = saved(bench.tick(1.0), records.Observed)[0]
    assert counted.outcomes == {"duplicate": 1}


def test_seq_zero_is_no_number(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    assert bench.send(pi, ternary_block(bench.schema, 1), 0, seq=0) == []
    assert receipts(bench.receive(pi.topic("offer"), pi.offer(0, 1, seq=0))) == []
    assert refusals(bench.tick(1.0)) == {"bad-seq": 2}


def test_a_repeated_message_of_many_parts_is_answered_once(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    frames = pi.update(float32_block(bench.schema, 1), 0, frame_bytes=1500)
    assert len(frames) == 3
    assert len(receipts(bench.receive(pi.topic("update"), *frames))) == 1
    assert len(receipts(bench.receive(pi.topic("update"), *frames))) == 1


def test_the_order_is_seq_then_base_then_stale_then_content(make: Make) -> None:
    bench = make(merge__buffer_size=1, staleness__max=1)
    pi, other = bench.join("pi"), bench.join("other")
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    for version in (1, 2, 3):
        bench.send(other, ternary_block(bench.schema, version), version)
    # a seq below the highest, of a base that was accepted and is stale, with nonsense in it
    (receipt,) = bench.send(pi, b"nonsense", 0, seq=1)
    assert (receipt.outcome, receipt.highest_seq) == ("duplicate", pi.seq)
    # accepted before and stale: accepted before
    (receipt,) = bench.send(pi, b"nonsense", 0)
    assert (receipt.outcome, receipt.highest_seq) == ("duplicate", 0)
    # stale, with nonsense in it: stale
    fresh = bench.join("fresh")
    assert bench.send(fresh, b"nonsense", 1)[0].outcome == "stale"
    assert bench.send(fresh, b"nonsense", 4)[0].outcome == "invalid"


def test_content_is_looked_at_last_also_in_meta(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    meta = {"base": 0, "samples": 0, "codec": "ternary", "encoding": "raw", "sealed": False, "metrics": {}}
    assert receipts(bench.receive(pi.topic("update"), pi.frame("update", meta)))[0].outcome == "duplicate"
    meta["base"] = True
    assert receipts(bench.receive(pi.topic("update"), pi.frame("update", meta)))[0].outcome == "invalid"


BAD_META = [
    {"base": -1},
    {"base": "0"},
    {"samples": 0},
    {"samples": 2**32},
    {"samples": 1.0},
    {"codec": 3},
    {"encoding": None},
    {"sealed": 1},
    {"metrics": {"loss": float("nan")}},
    {"metrics": {str(number): 0.0 for number in range(33)}},
    {"metrics": {3: 0.0}},
    {"metrics": []},
]


@pytest.mark.parametrize("wrong", BAD_META, ids=lambda wrong: str(wrong)[:40])
def test_an_update_with_a_wrong_meta_is_invalid(make: Make, wrong: dict[str, object]) -> None:
    bench = make()
    pi = bench.join("pi")
    meta = {"base": 0, "samples": 1, "codec": "ternary", "encoding": "raw", "sealed": False, "metrics": {}}
    body = ternary_block(bench.schema, 1).content
    (receipt,) = receipts(bench.receive(pi.topic("update"), pi.frame("update", meta | wrong, body=body)))
    assert (receipt.outcome, receipt.reason.split(":")[0]) == ("invalid", "bad-meta")
    assert bench.core.model.buffer == []


def bad_contents(bench: Bench) -> dict[str, tuple[bytes, dict[str, object]]]:
    good = ternary_block(bench.schema, 1).content
    nan = np.array([np.nan], dtype="<f4").tobytes()
    return {
        "bad-length": (good[:-1], {}),
        "bad-scale": (nan + good[4:], {}),
        "bad-trits": (good[:4] + b"\xf3" + good[5:], {}),
        "bad-element": (good[:-4] + nan, {}),
        "bad-codec": (good, {"codec": "sign"}),
        "bad-encoding": (good, {"encoding": "gzip"}),
        "bad-zstd": (good, {"encoding": "zstd"}),
        "bad-seal": (good, {"sealed": True}),
    }


@pytest.mark.parametrize(
    "reason",
    ["bad-length", "bad-scale", "bad-trits", "bad-element", "bad-codec", "bad-encoding", "bad-zstd", "bad-seal"],
)
def test_an_update_with_wrong_content_is_invalid_with_a_reason(make: Make, reason: str) -> None:
    bench = make()
    pi = bench.join("pi")
    body, changes = bad_contents(bench)[reason]
    meta = {"base": 0, "samples": 1, "codec": "ternary", "encoding": "raw", "sealed": False, "metrics": {}}
    (receipt,) = receipts(bench.receive(pi.topic("update"), pi.frame("update", meta | changes, body=body)))
    assert (receipt.outcome, receipt.reason.split(":")[0]) == ("invalid", reason)
    (record,) = saved(bench.last, records.UpdateAnswered)
    assert record.outcome == "invalid"
    assert bench.core.model.buffer == []
    assert bench.send(pi, ternary_block(bench.schema, 1), 0)[0].outcome == "accepted"


def test_a_box_sealed_for_another_update_is_invalid(make: Make) -> None:
    bench = make()
    pi, eve = bench.join("pi"), bench.join("eve")
    block = ternary_block(bench.schema, 1)
    stolen = parse(pi.update(block, 0, seal_to=bench.identity.public)[0]).body
    meta = {"base": 0, "samples": 1, "codec": "ternary", "encoding": "raw", "sealed": True, "metrics": {}}
    for number in (None, pi.seq):
        frame = eve.frame("update", meta, seq=number, body=stolen)
        (receipt,) = receipts(bench.receive(eve.topic("update"), frame))
        assert (receipt.outcome, receipt.reason.split(":")[0]) == ("invalid", "bad-seal")
        eve.seq = max(eve.seq, pi.seq - 1)


def test_a_sealed_body_longer_than_any_update_is_not_opened(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    meta = {"base": 0, "samples": 1, "codec": "ternary", "encoding": "raw", "sealed": True, "metrics": {}}
    frame = pi.frame("update", meta, body=bytes(4 * bench.schema.elements + 2000))
    (receipt,) = receipts(bench.receive(pi.topic("update"), frame))
    assert (receipt.outcome, receipt.reason.split(":")[0]) == ("invalid", "bad-length")


def test_an_update_in_more_parts_than_any_needs_is_invalid_at_its_first(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    meta = {"base": 0, "samples": 1, "codec": "ternary", "encoding": "raw", "sealed": False, "metrics": {}}
    frame = pi.frame("update", meta, body=bytes(1024), part=3, parts=60_000)
    (receipt,) = receipts(bench.receive(pi.topic("update"), frame))
    assert (receipt.outcome, receipt.reason) == ("invalid", "too-long")


# --- keys


def test_what_is_not_signed_by_the_device_gets_no_answer(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    good = pi.update(ternary_block(bench.schema, 1), 0)[0]
    header_end = 8 + int.from_bytes(good[4:8], "little")
    forged = {
        "bad-signature": good[:header_end] + bytes(64) + good[header_end + 64 :],
        "bad-digest": good[:-1] + bytes([good[-1] ^ 1]),
        "not-a-frame": good[:50],
        "unknown-key": Device("pi", bench.schema, seq=5).update(ternary_block(bench.schema, 1), 0)[0],
    }
    for payload in forged.values():
        assert published(bench.receive(pi.topic("update"), payload)) == []
    assert refusals(bench.tick(1.0)) == dict.fromkeys(forged, 1)
    assert receipts(bench.receive(pi.topic("update"), good))[0].outcome == "accepted"


def test_a_device_that_never_enrolled_gets_no_answer(make: Make) -> None:
    bench = make()
    stranger = Device("stranger", bench.schema)
    for kind, payload in [
        ("update", stranger.update(ternary_block(bench.schema, 1), 0)[0]),
        ("status", stranger.status("idle")),
    ]:
        assert published(bench.receive(stranger.topic(kind), payload)) == []
    assert refusals(bench.tick(1.0)) == {"unknown-device": 2}


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
    assert len(receipts(bench.receive(pi.topic("status"), *frames))) == 20
    eve, guest = Device("eve", bench.schema), Device("guest", bench.schema)
    assert len(receipts(bench.receive(eve.topic("enroll"), *[eve.enroll("guess") for _ in range(5)]))) == 2
    code = bench.invite("guest")
    assert receipts(bench.receive(guest.topic("enroll"), guest.enroll(code)))[0].outcome == "enrolled"
    bench.now += 1.0
    assert len(receipts(bench.receive(eve.topic("enroll"), *[eve.enroll("guess") for _ in range(5)]))) == 2
    bench.tick(1.0)
    counted = bench.ledger.db.execute("SELECT value FROM counts WHERE name = 'invalid:too-many-enrolments'").fetchone()
    assert counted == (6,)


# --- enroll


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


# --- statuses and metrics


def test_statuses_are_taken_in_order_and_offline_is_final(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    member = bench.core.registry.members["pi"]

    def after(state: str, session: int, seq: int) -> str:
        bench.receive(pi.topic("status"), pi.status(state, session, seq=seq))
        assert member.status is not None
        return member.status.state

    assert after("idle", 2, 10) == "idle"
    assert after("training", 2, 12) == "training"
    assert after("idle", 2, 11) == "training"  # a lower seq
    assert after("offline", 1, 13) == "training"  # a lower session
    assert after("offline", 2, 1) == "offline"  # the last will was made before connecting
    assert after("idle", 2, 14) == "offline"  # final within its session
    assert after("idle", 3, 15) == "idle"


def test_a_status_reaches_the_ledger_a_second_later(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    assert bench.receive(pi.topic("status"), pi.status("training", base=0)) == []
    assert bench.core.deadline == bench.now + 1.0
    (record,) = saved(bench.tick(1.0), records.Observed)
    assert record.statuses["pi"].state == "training"
    assert bench.core.deadline is None


def test_metrics_are_saved_once(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    frame = pi.metrics(0, accuracy=0.5)
    (record,) = saved(bench.receive(pi.topic("metrics"), frame), records.MetricsReceived)
    assert (record.device, record.metrics.values) == ("pi", {"accuracy": 0.5})
    bench.receive(pi.topic("metrics"), frame)
    bench.receive(pi.topic("metrics"), pi.metrics(1, accuracy=1.0))
    assert refusals(bench.tick(1.0)) == {"replayed-metrics": 1, "bad-meta": 1}
    bench.restart()
    bench.start()
    bench.receive(pi.topic("metrics"), frame)
    assert refusals(bench.tick(1.0)) == {"replayed-metrics": 1}


# --- connections


def test_connecting_begins_a_session_with_a_last_will(make: Make) -> None:
    bench = make(started=False)
    actions = bench.dial()
    assert place(actions, records.SessionBegun) < place(actions, events.Connect)
    (connect,) = [action for action in actions if isinstance(action, events.Connect)]
    assert connect.will_topic == STATUS
    frame = parse(connect.will_payload)
    frame.check_authentic(bench.identity.public)
    assert Status.from_meta(frame.meta) == Status(state="offline", session=1, base=-1, software="test")


def test_a_connection_subscribes_and_says_online(make: Make) -> None:
    bench = make(started=False)
    actions = bench.start()
    (subscribe,) = [action for action in actions if isinstance(action, events.Subscribe)]
    assert {"ternbus/1/lab/up/#", HEAD} <= set(subscribe.filters)
    (status,) = frames_of(actions, "status")
    assert Status.from_meta(status.meta) == Status(state="online", session=1, base=-1, software="test")
    assert bench.retained[STATUS]


def test_the_first_connection_publishes_the_model(make: Make) -> None:
    bench = make()
    assert follow(bench.retained, bench.identity.public) == (0, bench.core.model.digest)
    assert bench.core.deadline is None


def reconnected(bench: Bench) -> int:
    """A new connection that has not heard of its head yet; returns how much was published before it."""
    bench.dial()
    before = len(bench.published)
    bench.handle(events.Connected(frame_bytes=120 * 1024))
    return before + 1  # its status


def test_a_broker_that_shows_the_head_is_left_in_peace(make: Make) -> None:
    bench = make()
    before = reconnected(bench)
    assert bench.core.deadline == bench.now + 5.0
    bench.receive(HEAD, bench.retained[HEAD])
    bench.tick(10.0)
    assert len(bench.published) == before
    assert bench.core.deadline is None


@pytest.mark.parametrize("shown", [None, b"", b"another"])
def test_a_broker_that_does_not_show_the_head_within_5_s_is_given_everything_again(
    make: Make, shown: bytes | None
) -> None:
    """Unchanged: snapshot, deltas since, head."""
    bench = make(merge__buffer_size=1, downlink__slots=6)
    pi = bench.join("pi")
    for version in range(5):
        bench.send(pi, ternary_block(bench.schema, version), version)
    kept = {topic: payload for topic, payload in bench.retained.items() if topic != STATUS}
    before = reconnected(bench)
    bench.retained.clear()
    bench.tick(4.9)
    assert len(bench.published) == before
    if shown is None:
        bench.tick(0.1)
    else:
        bench.receive(HEAD, shown)
    again = bench.published[before:]
    assert [action.topic for action in again] == [
        topics.snapshot(LAB, 1, 0),
        topics.delta(LAB, 4, 0),
        topics.delta(LAB, 5, 0),
        HEAD,
    ]
    assert all(kept[action.topic] == action.payload and action.retain for action in again)
    assert follow(bench.retained, bench.identity.public) == (5, bench.core.model.digest)
    bench.receive(HEAD, b"the next says nothing: everything was just given")
    assert len(bench.published) == before + len(again)


def test_a_merge_while_the_broker_is_in_doubt_publishes_all_that_a_device_needs(make: Make) -> None:
    """Else the new head would come back, and look like a broker that has lost nothing."""
    bench = make(merge__buffer_size=1)
    pi = bench.join("pi")
    bench.send(pi, ternary_block(bench.schema, 0), 0)
    reconnected(bench)
    bench.retained.clear()
    bench.send(pi, ternary_block(bench.schema, 1), 1)
    assert follow(bench.retained, bench.identity.public) == (2, bench.core.model.digest)
    sent = [action for action in bench.last if isinstance(action, events.Publish | events.RepublishRetained)]
    assert isinstance(sent[-2], events.RepublishRetained)
    assert isinstance(sent[-1], events.Publish)
    assert sent[-1].topic == HEAD
    bench.receive(HEAD, bench.retained[HEAD])
    assert bench.core.deadline is not None
    assert bench.core.deadline <= bench.now + 1.0  # the counters


def test_the_head_that_is_given_again_is_that_of_now(make: Make) -> None:
    """Records of later events share its commit; a head read from there would name what is not published yet."""
    bench = make(merge__buffer_size=1)
    pi = bench.join("pi")
    reconnected(bench)
    head = bench.ledger.frame(HEAD)
    first = bench.core.handle(events.MessageArrived(topic=HEAD, payload=b""), bench.now)
    (frame,) = pi.update(ternary_block(bench.schema, 0), 0)
    second = bench.core.handle(events.MessageArrived(topic=pi.topic("update"), payload=frame), bench.now)
    bench.published.clear()
    bench.perform(first + second)
    given = [action.payload for action in bench.published if action.topic == HEAD]
    assert given[0] == head
    assert parse(given[1]).meta["version"] == 1


def test_a_lost_connection_waits_for_no_head(make: Make) -> None:
    bench = make()
    reconnected(bench)
    bench.handle(events.Disconnected())
    assert {type(action) for action in bench.tick(10.0)} == {events.Save, events.Connect}
    bench.handle(events.ConnectFailed())
    assert {type(action) for action in bench.tick(10.0)} == {events.Save, events.Connect}


def test_its_own_status_offline_while_it_lives_is_answered_one_session_higher(make: Make) -> None:
    bench = make()
    will = parse(bench.retained[STATUS])
    meta = Status(state="offline", session=1, software="test").meta()
    offline = build(bench.identity, federation=LAB, sender="aggregator", kind="status", seq=9, meta=meta)
    assert will.meta["session"] == 1
    actions = bench.receive(STATUS, offline)
    assert place(actions, records.SessionBegun) < place(actions, events.Publish)
    (frame,) = frames_of(actions, "status")
    assert Status.from_meta(frame.meta) == Status(state="online", session=2, base=-1, software="test")
    assert bench.receive(STATUS, offline) == []  # of a session that is over
    assert bench.receive(STATUS, bench.retained[STATUS]) == []
    assert bench.receive(STATUS, b"") == []
    bench.dial()
    assert bench.ledger.fact("session") == 3


def test_a_forged_status_of_its_own_is_counted_only(make: Make) -> None:
    bench = make()
    eve = Identity.generate()
    meta = Status(state="offline", session=99).meta()
    about = {"federation": LAB, "sender": "aggregator", "seq": 9, "meta": meta}
    for forged in (build(eve, kind="status", **about), build(bench.identity, kind="head", **about)):
        assert [type(action) for action in bench.receive(STATUS, forged)] == [events.Log]
    assert refusals(bench.tick(1.0)) == {"bad-signature": 1, "wrong-topic": 1}
    assert bench.core.session == 1


# --- merging


def test_a_merge_happens_at_buffer_size(make: Make) -> None:
    bench = make(merge__buffer_size=2, downlink__codec="float32", staleness__discount="constant")
    pi, other = bench.join("pi"), bench.join("other")
    before = bench.core.model.published.copy()
    one, two = ternary_block(bench.schema, 1), float32_block(bench.schema, 2)
    bench.send(pi, one, 0, samples=10)
    assert bench.version == 0
    bench.send(other, two, 0, samples=30)
    assert bench.version == 1
    mean = (10 * one.value().astype(np.float64) + 30 * two.value()) / 40
    np.testing.assert_allclose(bench.core.model.published, before + mean, atol=1e-6)
    assert [head.version for head in heads(bench.last)] == [1]


def test_the_version_is_saved_before_its_delta_and_the_delta_stands_before_its_head(make: Make) -> None:
    bench = make(merge__buffer_size=1)
    pi = bench.join("pi")
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    actions = bench.last
    order = [
        place(actions, records.UpdateAccepted),
        place(actions, events.Publish, "receipt"),
        place(actions, records.VersionMade),
        place(actions, records.FramesRetained),
        place(actions, events.Publish, "delta"),
        place(actions, events.Publish, "head"),
    ]
    assert order == sorted(order)
    (record,) = saved(actions, records.VersionMade)
    assert (record.version, record.updates, record.staleness_mean, record.staleness_max) == (1, 1, 0.0, 0)
    assert follow(bench.retained, bench.identity.public) == (1, record.digest)


def test_a_smaller_buffer_is_merged_when_it_waited_long_enough(make: Make) -> None:
    bench = make(merge__max_wait_s=7.0)
    pi, other = bench.join("pi"), bench.join("other")
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    began = bench.now
    bench.tick(5.0)
    bench.send(other, ternary_block(bench.schema, 2), 0)  # the second does not prolong the wait
    assert bench.core.deadline is not None
    bench.now = began + 6.9
    bench.tick()
    assert bench.core.deadline == began + 7.0
    assert bench.version == 0
    bench.tick(0.1)
    assert (bench.version, bench.core.model.buffer) == (1, [])


def test_a_buffer_from_before_a_restart_is_merged_in_time(make: Make) -> None:
    bench = make(merge__max_wait_s=7.0)
    bench.send(bench.join("pi"), ternary_block(bench.schema, 1), 0)
    bench.restart()
    bench.start()
    bench.tick(6.9)
    assert bench.version == 0
    bench.tick(0.1)
    assert bench.version == 1


def test_a_merge_happens_when_everybody_online_has_contributed(make: Make) -> None:
    bench = make()
    bench.tick(5.0)
    pi, other = bench.join("pi"), bench.join("other")
    for device in (pi, other):
        bench.receive(device.topic("status"), device.status("training"))
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    assert bench.version == 0
    bench.send(other, ternary_block(bench.schema, 2), 0)
    assert bench.version == 1
    bench.send(pi, ternary_block(bench.schema, 3), 1)
    assert bench.version == 1
    bench.receive(other.topic("status"), other.status("offline"))
    assert bench.version == 2


def test_after_a_connect_the_broker_first_tells_who_is_online(make: Make) -> None:
    """Retained statuses come one by one: the first of them is not everybody."""
    bench = make(merge__buffer_size=3)
    pi, other = bench.join("pi"), bench.join("other")
    for device in (pi, other):
        bench.receive(device.topic("status"), device.status("training"))
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    bench.restart()
    bench.start()
    bench.connect()
    bench.receive(pi.topic("status"), pi.status("training"))
    assert bench.version == 0
    bench.receive(other.topic("status"), other.status("training"))
    bench.tick(5.1)
    assert bench.version == 0
    bench.receive(other.topic("status"), other.status("offline"))
    assert bench.version == 1


def test_versions_keep_their_distance(make: Make) -> None:
    bench = make(merge__buffer_size=1, downlink__min_interval_s=3.0, merge__max_wait_s=10.0)
    devices = [bench.join(name) for name in ("a", "b", "c")]
    bench.send(devices[0], ternary_block(bench.schema, 1), 0)
    assert bench.version == 1
    bench.tick(1.0)
    for device in devices[1:]:
        bench.send(device, ternary_block(bench.schema, 2), 1)
    assert bench.version == 1
    assert bench.core.deadline == bench.now + 1.0  # what was counted
    bench.tick(1.0)
    assert bench.core.deadline == bench.now + 1.0
    bench.tick(1.0)
    assert bench.version == 2
    assert not bench.core.model.buffer


def test_no_distance_is_longer_than_the_longest_wait(make: Make) -> None:
    bench = make(merge__buffer_size=1, downlink__min_interval_s=30.0, merge__max_wait_s=10.0)
    a, b = bench.join("a"), bench.join("b")
    bench.send(a, ternary_block(bench.schema, 1), 0)
    bench.send(b, ternary_block(bench.schema, 2), 1)
    bench.tick(9.9)
    assert bench.version == 1
    bench.tick(0.1)
    assert bench.version == 2


def test_nobody_online_means_nobody_known(make: Make) -> None:
    """A contributor that never said a word about itself does not make the merge happen at once."""
    bench = make()
    bench.send(bench.join("pi"), ternary_block(bench.schema, 1), 0)
    assert bench.version == 0


def test_evaluators_are_not_waited_for(make: Make) -> None:
    bench = make()
    bench.tick(5.0)
    pi, judge = bench.join("pi"), bench.join("judge")
    for device in (pi, judge):
        bench.receive(device.topic("status"), device.status("idle"))
    bench.receive(judge.topic("metrics"), judge.metrics(0, accuracy=0.1))
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    assert bench.version == 1
    bench.restart()
    bench.start()
    bench.tick(5.0)
    for device in (pi, judge):
        bench.receive(device.topic("status"), device.status("idle", 2))
    bench.send(pi, ternary_block(bench.schema, 2), 1)
    assert bench.version == 2


def test_a_device_that_reports_of_its_own_data_is_no_evaluator(make: Make) -> None:
    """Even before its first update: the buffer waits for it, before and after a restart."""
    bench = make(merge__buffer_size=3)
    bench.tick(5.0)
    pi, other = bench.join("pi"), bench.join("other")
    for session in (1, 2):
        for device in (pi, other):
            bench.receive(device.topic("status"), device.status("idle", session))
        bench.receive(other.topic("metrics"), other.metrics(0, "local", accuracy=0.1))
        if session == 1:
            bench.restart()
            bench.start()
            bench.tick(5.0)
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    assert bench.version == 0
    bench.send(other, ternary_block(bench.schema, 2), 0)
    assert bench.version == 1


def test_a_device_that_trains_and_evaluates_is_waited_for(make: Make) -> None:
    bench = make(merge__buffer_size=2)
    pi, both = bench.join("pi"), bench.join("both")
    for device in (pi, both):
        bench.receive(device.topic("status"), device.status("idle"))
    for device in (pi, both):
        bench.send(device, ternary_block(bench.schema, 1), 0)
    bench.receive(both.topic("metrics"), both.metrics(1, accuracy=0.1))
    bench.receive(both.topic("metrics"), both.metrics(1, "local", loss=0.1))
    bench.send(pi, ternary_block(bench.schema, 2), 1)
    assert bench.version == 1


def test_the_discount_and_the_norm_bound_weigh_an_update(make: Make) -> None:
    bench = make(merge__buffer_size=1, merge__max_update_norm=0.5, downlink__codec="float32")
    pi, late = bench.join("pi"), bench.join("late")
    block = float32_block(bench.schema, 1)
    length = float(np.linalg.norm(block.value().astype(np.float64)))
    assert length > 0.5
    bench.send(pi, block, 0)
    before = bench.core.model.published.copy()
    bench.send(late, block, 0)
    step = block.value().astype(np.float64) * 0.5 / length / np.sqrt(2)
    np.testing.assert_allclose(bench.core.model.published, before + step, atol=1e-6)


def test_an_update_that_is_too_large_is_refused_where_the_operator_wants_it(make: Make) -> None:
    bench = make(merge__buffer_size=1, merge__max_update_norm=0.5, merge__on_large="refuse")
    pi = bench.join("pi")
    before = bench.core.model.published.copy()
    (receipt,) = bench.send(pi, float32_block(bench.schema, 1), 0)
    length = float(np.linalg.norm(float32_block(bench.schema, 1).value().astype(np.float64)))
    assert (receipt.outcome, receipt.reason) == ("invalid", f"too-large: an L2 norm of {length:.4g}, at most 0.5")
    assert (bench.version, bench.core.model.buffer) == (0, [])
    assert np.array_equal(bench.core.model.published, before)
    counted = bench.ledger.db.execute("SELECT value FROM counts WHERE name = 'invalid:too-large'").fetchone()
    assert counted == (1,)
    small = Block.of_float32(bench.schema, float32_block(bench.schema, 1).value() * np.float32(0.499 / length))
    assert bench.send(pi, small, 0)[0].outcome == "accepted"
    np.testing.assert_allclose(bench.core.model.server.target, before + small.value(), atol=1e-6)


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "krum", "multi-krum", "norm-clip"])
def test_a_robust_rule_merges_a_whole_buffer_and_a_smaller_one_in_time(make: Make, rule: str) -> None:
    bench = make(merge__buffer_size=5, merge__rule=rule, downlink__codec="float32")
    devices = [bench.join(name) for name in "abcde"]
    honest = float32_block(bench.schema, 1)
    evil = Block.of_float32(bench.schema, np.full(bench.schema.elements, 60_000, dtype=np.float32))
    before = bench.core.model.published.copy()
    bench.send(devices[0], evil, 0, samples=2**32 - 1)
    for device in devices[1:]:
        assert bench.version == 0
        bench.send(device, honest, 0)
    assert bench.version == 1
    moved = bench.core.model.published - before
    if rule == "norm-clip":
        assert np.linalg.norm(moved) <= np.linalg.norm(honest.value()) * 1.001
    else:
        np.testing.assert_allclose(moved, honest.value(), atol=1e-6)
    before = bench.core.model.published.copy()
    bench.send(devices[1], honest, 1)
    bench.tick(31.0)
    assert bench.version == 2
    np.testing.assert_allclose(bench.core.model.published - before, honest.value(), atol=1e-6)


# --- what stands on the broker


def test_a_snapshot_is_published_to_the_other_place_every_half_of_the_slots(make: Make) -> None:
    bench = make(merge__buffer_size=1, downlink__slots=5)
    pi = bench.join("pi")
    named = []
    for version in range(7):
        bench.send(pi, ternary_block(bench.schema, version), version)
        head = bench.head
        named.append((head.snapshot.version, head.snapshot.place))
        assert head.slots == 5
        assert follow(bench.retained, bench.identity.public) == (version + 1, bench.core.model.digest)
        if head.snapshot.version == version + 1:
            kinds = [parse(action.payload).kind for action in published(bench.last)]
            assert kinds == ["receipt", "delta", "head", "snapshot", "head"]
    assert named == [(0, 0), (0, 0), (3, 1), (3, 1), (3, 1), (6, 0), (6, 0)]


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_at_every_moment_a_device_can_follow(make: Make, slots: int) -> None:
    """It never overwrites a delta that is newer than the snapshot named by the last head."""
    bench = make(merge__buffer_size=1, downlink__slots=slots, started=False, frame_bytes=1500)
    bench.start(1500)
    pi = bench.join("pi")
    for version in range(3 * slots):
        before = dict(bench.retained)
        already = len(bench.published)
        bench.send(pi, float32_block(bench.schema, version), version)
        for action in bench.published[already:]:
            if action.retain and action.payload:
                before[action.topic] = action.payload
            elif action.retain:
                before.pop(action.topic)
            assert follow(before, bench.identity.public)[0] in (version, version + 1)
    assert bench.version == 3 * slots


def test_topics_beyond_the_last_part_of_a_delta_are_cleared(make: Make) -> None:
    bench = make(merge__buffer_size=1, downlink__slots=1, downlink__codec="float32", frame_bytes=1500)
    pi = bench.join("pi")
    bench.send(pi, float32_block(bench.schema, 1), 0)
    parts = [topic for topic in bench.retained if "/delta/0/" in topic]
    assert len(parts) == 2
    nothing = Block.of_float32(bench.schema, np.zeros(bench.schema.elements, dtype=np.float32))
    bench.send(pi, nothing, 1)
    assert [topic for topic in bench.retained if "/delta/0/" in topic] == parts[:1]
    order = [action.topic for action in published(bench.last) if action.retain]
    assert order.index(parts[1]) < order.index(HEAD)
    assert bench.ledger.frame(parts[1]) == b""


def test_a_broker_with_smaller_packets_gets_a_snapshot_in_smaller_parts(make: Make) -> None:
    bench = make(merge__buffer_size=1)
    pi = bench.join("pi")
    bench.send(pi, float32_block(bench.schema, 1), 0)
    assert bench.head.snapshot.parts == 1
    bench.handle(events.Disconnected())
    bench.connect(1500)
    assert bench.head.snapshot.parts == 3
    assert follow(bench.retained, bench.identity.public) == (1, bench.core.model.digest)
    needed = [topics.snapshot(LAB, bench.head.snapshot.place, part) for part in range(3)]
    assert all(len(bench.retained[topic]) <= 1500 for topic in [*needed, HEAD])
    assert bench.head.direct_parts >= 3
    # and it is done once, though what no device needs any more is still there
    bench.handle(events.Disconnected())
    before = len(bench.published)
    bench.connect(1500)
    assert len(bench.published) == before + 1
    # a broker with larger packets gets fewer parts at the next snapshots, and the others are cleared
    bench.handle(events.Disconnected())
    bench.connect()
    for version in range(1, 34):
        bench.send(pi, ternary_block(bench.schema, version), version)
    assert len([topic for topic in bench.retained if "/snapshot/" in topic]) == 2


def test_the_head_announces_as_many_direct_parts_as_the_largest_update_needs(make: Make) -> None:
    bench = make(frame_bytes=1500, limits__direct_parts=4)
    largest = pi_parts(bench, 1500)
    assert bench.head.direct_parts >= largest > 1
    assert make(limits__direct_parts=9).head.direct_parts == 9


def pi_parts(bench: Bench, frame_bytes: int) -> int:
    """Into how many parts a device cuts a sealed float32 update."""
    pi = Device("p" * 64, bench.schema, seq=2**63)
    return len(pi.update(float32_block(bench.schema, 1), 0, seal_to=bench.identity.public, frame_bytes=frame_bytes))


def test_other_slots_begin_at_a_snapshot_and_clear_the_old_layout(make: Make) -> None:
    bench = make(merge__buffer_size=1, downlink__slots=6)
    pi = bench.join("pi")
    for version in range(5):
        bench.send(pi, ternary_block(bench.schema, version), version)
    reconfigure(bench, downlink={"slots": 2})
    bench.restart()
    actions = bench.perform(bench.core.start(bench.now))
    cleared = [
        number for number, action in enumerate(actions) if isinstance(action, events.Publish) and not action.payload
    ]
    assert len(cleared) == 5
    assert min(cleared) > place(actions, events.Publish, "head")
    bench.connect()
    assert (bench.head.slots, bench.head.snapshot.version) == (2, 5)
    assert not any("/delta/" in topic for topic in bench.retained)
    assert follow(bench.retained, bench.identity.public) == (5, bench.core.model.digest)
    bench.send(pi, ternary_block(bench.schema, 9), 5)
    assert follow(bench.retained, bench.identity.public) == (6, bench.core.model.digest)


def test_changed_settings_are_in_the_next_head(make: Make) -> None:
    bench = make(merge__buffer_size=1)
    pi = bench.join("pi")
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    reconfigure(bench, plan={"local_epochs": 3}, staleness={"max": 2})
    bench.restart()
    bench.start()
    assert (bench.head.plan, bench.head.max_staleness) == ({"local_epochs": 3}, 2)
    assert follow(bench.retained, bench.identity.public) == (1, bench.core.model.digest)
    frame = bench.retained[HEAD]
    bench.restart()
    bench.start()
    assert bench.retained[HEAD] == frame


def test_another_optimizer_does_not_rewrite_what_was_merged(make: Make) -> None:
    bench = make(merge__buffer_size=1, downlink__codec="float32")
    pi = bench.join("pi")
    for version in range(3):
        bench.send(pi, float32_block(bench.schema, version), version)
    target = bench.core.model.server.target.copy()
    for changes in (
        {"learning_rate": 0.1},
        {"name": "fedavgm"},
        {"momentum": 0.5},
        {"name": "fedyogi"},
        {"tau": 0.1},
        {"name": "fedadagrad"},
        {"name": "fedavg"},
    ):
        reconfigure(bench, optimizer=changes)
        bench.restart()
        bench.start()
        assert bench.core.model.server.target.tobytes() == target.tobytes()
        bench.restart()
        bench.start()
        assert bench.core.model.server.target.tobytes() == target.tobytes()


# --- the operator


def test_pausing_and_resuming_are_said_in_the_head(make: Make) -> None:
    bench = make()
    actions = bench.handle(events.StateRequested(state="paused", request=7))
    order = [
        place(actions, records.StateChanged),
        place(actions, records.FramesRetained),
        place(actions, events.Publish),
    ]
    assert order == sorted(order)
    assert saved(actions, records.RequestDone) == [records.RequestDone(request=7)]
    assert bench.head.state == "paused"
    again = bench.handle(events.StateRequested(state="paused"))
    assert again == []
    # what a device sent before it heard of it is still accepted
    assert bench.send(bench.join("pi"), ternary_block(bench.schema, 1), 0)[0].outcome == "accepted"
    bench.handle(events.StateRequested(state="open"))
    assert bench.head.state == "open"


def test_closing_merges_what_is_accepted_and_takes_no_more(make: Make) -> None:
    bench = make()
    pi, late = bench.join("pi"), bench.join("late")
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    bench.handle(events.StateRequested(state="closed"))
    assert (bench.version, bench.head.state) == (1, "closed")
    (receipt,) = bench.send(late, ternary_block(bench.schema, 2), 1)
    assert (receipt.outcome, receipt.reason) == ("invalid", "closed")
    bench.restart()
    bench.start()
    (receipt,) = bench.send(late, ternary_block(bench.schema, 2), 1)
    assert (receipt.outcome, receipt.reason) == ("invalid", "closed")
    bench.handle(events.StateRequested(state="open"))
    assert bench.send(late, ternary_block(bench.schema, 2), 1)[0].outcome == "accepted"


def test_counts_asked_for_are_saved_before_the_request_is_done(make: Make) -> None:
    bench = make()
    bench.receive("nonsense", b"")
    actions = bench.handle(events.CountsRequested(request=3))
    assert place(actions, records.Observed) < place(actions, records.RequestDone)
    assert refusals(actions) == {"unknown-topic": 1}


def test_stopping_finishes_what_is_accepted_and_says_goodbye(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    actions = bench.handle(events.StopRequested())
    assert bench.version == 1
    assert Status.from_meta(parse(bench.retained[STATUS]).meta).state == "offline"
    assert isinstance(actions[-1], events.Stop)
    # what still comes in is not an answer, and not lost: the device sends it again
    (receipt,) = bench.send(pi, ternary_block(bench.schema, 2), 1)
    assert receipt.outcome == "busy"
    assert receipt.retry_after_s > 0
    assert bench.receive(STATUS, bench.retained[STATUS]) == []
    counted = saved(bench.tick(1.0), records.Observed)[0]
    assert counted.outcomes == {"busy": 1}
    bench.handle(events.Connected(frame_bytes=100_000))
    assert Status.from_meta(parse(bench.retained[STATUS]).meta).state == "offline"
    bench.restart()
    bench.start()
    assert bench.send(pi, ternary_block(bench.schema, 2), 1, seq=pi.seq)[0].outcome == "accepted"


def test_stopping_with_nothing_accepted_merges_nothing(make: Make) -> None:
    bench = make()
    bench.handle(events.StopRequested())
    assert bench.version == 0


# --- offers and grants


def grants(actions: list[events.Action]) -> list[Grant]:
    return [Grant.from_meta(frame.meta) for frame in frames_of(actions, "grant")]


def test_parts_beyond_the_direct_ones_are_dropped_unless_they_were_granted(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    limits = replace(bench.core.settings.limits, direct_parts=2)  # as if the model were a large one
    bench.core._frames.settings = replace(bench.core.settings, limits=limits)
    wide = pi.update(float32_block(bench.schema, 1), 0, frame_bytes=1500)
    assert len(wide) == 3
    assert published(bench.receive(pi.topic("update"), wide[0])) == []
    assert refusals(bench.tick(1.0)) == {"not-granted": 1}
    (grant,) = grants(bench.receive(pi.topic("offer"), pi.offer(0, 3, seq=pi.seq)))
    assert (grant.device, grant.device_key, grant.seq, grant.parts) == ("pi", pi.identity.key_id, pi.seq, ((0, 2),))
    assert grant.deadline_s > 0
    bench.receive(pi.topic("update"), wide[1])
    (grant,) = grants(bench.receive(pi.topic("offer"), pi.offer(0, 3, seq=pi.seq)))
    assert grant.parts == ((0, 0), (2, 2))
    bench.receive(pi.topic("update"), wide[0])
    (grant,) = grants(bench.receive(pi.topic("offer"), pi.offer(0, 3, seq=pi.seq)))
    assert grant.parts == ((2, 2),)
    (receipt,) = receipts(bench.receive(pi.topic("update"), wide[2]))
    assert (receipt.outcome, receipt.seq) == ("accepted", pi.seq)


def test_a_grant_names_at_most_500_ranges_and_joins_what_adjoins() -> None:
    assert ranges([]) == ()
    assert ranges(list(range(7))) == ((0, 6),)
    assert ranges([0, 1, 2, 5, 7, 8]) == ((0, 2), (5, 5), (7, 8))
    assert ranges(list(range(0, 2000, 2))) == tuple((part, part) for part in range(0, 1000, 2))


def test_grants_together_stay_within_their_room() -> None:
    grants = Grants(parts_max=10)
    assert grants.grant("a", list(range(6)), 0.0) == ((0, 5),)
    assert grants.grant("b", list(range(6)), 1.0) == ((0, 3),)
    assert grants.grant("c", list(range(6)), 2.0) == ()
    assert grants.grant("b", [4, 5], 3.0) == ((4, 5),)
    grants.close("a")
    assert grants.grant("c", list(range(20)), 4.0) == ((0, 7),)
    assert grants.grant("d", [0], 63.0 + 0.5) == ((0, 0),)  # b's deadline has passed


def test_an_offer_may_be_answered_at_once(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    (receipt,) = receipts(bench.receive(pi.topic("offer"), pi.offer(3, 50)))
    assert (receipt.outcome, receipt.reason, receipt.seq) == ("invalid", "base-in-future", pi.seq)
    (again,) = receipts(bench.receive(pi.topic("offer"), pi.offer(3, 50, seq=pi.seq)))
    assert again == receipt
    (receipt,) = receipts(bench.receive(pi.topic("offer"), pi.offer(0, 0)))
    assert (receipt.outcome, receipt.reason.partition(":")[0]) == ("invalid", "bad-meta")
    (receipt,) = receipts(bench.receive(pi.topic("offer"), pi.offer(0, 65_535)))
    assert (receipt.outcome, receipt.reason) == ("invalid", "too-long")


def test_an_offer_that_there_is_no_room_for_is_told_to_come_again(make: Make) -> None:
    bench = make(limits__broker_queue_messages=100)
    first, second = bench.join("first"), bench.join("second")
    bench.core._updates._grants.parts_max = 3
    (grant,) = grants(bench.receive(first.topic("offer"), first.offer(0, 3)))
    assert grant.parts == ((0, 2),)
    (receipt,) = receipts(bench.receive(second.topic("offer"), second.offer(0, 3)))
    assert (receipt.outcome, receipt.retry_after_s > 0) == ("busy", True)
    bench.tick(60.0)
    (grant,) = grants(bench.receive(second.topic("offer"), second.offer(0, 3, seq=second.seq)))
    assert grant.parts == ((0, 2),)


# --- bounds


def test_a_device_has_at_least_500_frames_a_second(make: Make) -> None:
    bench = make()
    pi, other = bench.join("pi"), bench.join("other")
    frames = [pi.status("idle", seq=100 + number) for number in range(1100)]
    bench.receive(pi.topic("status"), *frames)
    member = bench.core.registry.members["pi"]
    assert 500 <= member.status_seq - 99 <= 1000
    refused = refusals(bench.tick(1.0))
    assert set(refused) == {"too-fast"}
    assert bench.send(other, ternary_block(bench.schema, 1), 0)[0].outcome == "accepted"
    assert bench.send(pi, ternary_block(bench.schema, 1), 0)[0].outcome == "accepted"


def test_messages_never_finished_take_bounded_memory(make: Make) -> None:
    """Four of a device may be in assembly; of thousands the oldest are dropped and counted."""
    bench = make()
    pi = bench.join("pi")
    for number in range(300):
        frames = pi.update(float32_block(bench.schema, number), 0, frame_bytes=1500)
        bench.now += 0.01
        bench.receive(pi.topic("update"), frames[0])
    collector = bench.core.registry.members["pi"].collector
    assert collector is not None
    assert len(collector) == 4
    assert collector.size_bytes < 4 * 1500
    assert bench.ledger.db.execute("SELECT value FROM counts WHERE name = 'invalid:unfinished'").fetchone()[0] >= 190
    assert receipts(bench.receive(pi.topic("update"), *frames[1:]))[0].outcome == "accepted"
    # the last four were complete but for two parts each; the finished one is gone
    assert len(collector) == 3


def test_all_devices_together_stay_within_the_assembly_bound(make: Make) -> None:
    bench = make(limits__assembly_bytes=2**20)
    bench.core._updates.validation.settings = replace(
        bench.core.settings, limits=replace(bench.core.settings.limits, assembly_bytes=4000)
    )
    devices = [bench.join(f"d{number}") for number in range(4)]
    sent = [device.update(float32_block(bench.schema, 1), 0, frame_bytes=1500) for device in devices]
    for device, frames in zip(devices, sent, strict=True):
        bench.receive(device.topic("update"), frames[0])
    sizes = [
        member.collector.size_bytes if member.collector is not None else 0
        for member in bench.core.registry.members.values()
    ]
    assert sum(sizes) <= 4000
    assert sizes[0] == 0  # the longest silent goes first
    assert sizes[-1] > 0
    assert receipts(bench.receive(devices[-1].topic("update"), *sent[-1][1:]))[0].outcome == "accepted"
    # and whoever was dropped sends all of it again
    assert receipts(bench.receive(devices[0].topic("update"), *sent[0]))[0].outcome == "accepted"


def test_a_short_part_is_dropped_and_counted(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    meta = {"base": 0, "samples": 1, "codec": "ternary", "encoding": "raw", "sealed": False, "metrics": {}}
    frame = pi.frame("update", meta, body=bytes(100), part=0, parts=3)
    assert published(bench.receive(pi.topic("update"), frame)) == []
    assert refusals(bench.tick(1.0)) == {"short-part": 1}


def test_bytes_on_the_wire_are_counted_for_a_device(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    frame = pi.update(ternary_block(bench.schema, 2), 0)[0]
    bench.receive(pi.topic("update"), frame)
    (record,) = saved(bench.tick(1.0), records.Observed)
    assert record.update_bytes == {"pi": 2 * (len(frame) + 50)}


def test_numbers_are_made_durable_before_they_are_used(make: Make) -> None:
    """After a crash none is used again."""
    bench = make()
    highest = max(parse(action.payload).seq for action in bench.published if action.payload)
    assert highest <= bench.ledger.fact("seq")
    reserved = bench.ledger.fact("seq")
    bench.restart()
    actions = bench.start()
    assert saved(actions, records.SeqReserved)
    assert min(frame.seq for frame in frames_of(actions, "status")) > reserved


def test_the_content_length_follows_from_the_schema(make: Make, tmp_path: Path) -> None:
    bench = make()
    assert content_bytes(bench.schema, "ternary") == 4 + 128 + 12
    frames = cut(bench.identity, federation=LAB, sender="a", kind="delta", seq=1, meta={}, body=b"x", frame_bytes=5000)
    assert len(frames) == 1


# --- an older copy


def test_a_head_of_ours_that_we_do_not_know_means_that_we_are_an_older_copy(make: Make) -> None:
    bench = make(merge__buffer_size=1)
    pi = bench.join("pi")
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    newer = bench.core._frames.head(
        version=7, digest=bench.core.model.digest, snapshot=bench.core.published.snapshot, state="open"
    )[1][1]
    before = bench.retained[topics.head(LAB)]
    bench.restart()
    bench.retained.pop(topics.head(LAB))
    bench.start()
    bench.receive(topics.head(LAB), newer)
    (stop,) = [action for action in bench.last if isinstance(action, events.Stop)]
    assert "version 7" in stop.error
    assert "restored" in stop.error
    assert topics.head(LAB) not in bench.retained
    assert before != newer


@pytest.mark.parametrize("damage", [lambda frame: b"junk", lambda frame: frame[:-1] + b"x", lambda frame: b""])
def test_a_head_that_is_not_ours_is_replaced(make: Make, damage: Callable[[bytes], bytes]) -> None:
    bench = make()
    bench.restart()
    kept = bench.retained.pop(topics.head(LAB))
    bench.start()
    bench.receive(topics.head(LAB), damage(kept))
    assert bench.retained[topics.head(LAB)] == kept


def test_what_unfinished_messages_hold_is_counted_along(make: Make) -> None:
    """Also over a refused part, a finished message, a replaced key and the bound over all devices."""
    bench = make(limits__assembly_bytes=2**20)
    validation = bench.core._updates.validation

    def check() -> None:
        assert validation._held_bytes == sum(collector.size_bytes for collector in validation._assembling.values())

    devices = [bench.join(name) for name in ("a", "b", "c")]
    for device in devices:
        parts = device.update(float32_block(bench.schema, 1), 0, frame_bytes=1500)
        bench.receive(device.topic("update"), *parts[:-1])
        check()
    assert validation._held_bytes > 0
    bench.join("b")
    last = devices[0].update(float32_block(bench.schema, 2), 0, frame_bytes=1500)
    bench.receive(devices[0].topic("update"), *last)
    check()
    validation.settings = replace(bench.core.settings, limits=replace(bench.core.settings.limits, assembly_bytes=1))
    more = devices[2].update(float32_block(bench.schema, 3), 0, frame_bytes=1500)
    bench.receive(devices[2].topic("update"), more[0])
    check()
    assert validation._held_bytes == 0
