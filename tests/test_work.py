"""Work before and after authorization: who has little of it read, who pays for it, and who has to wait meanwhile."""

from collections.abc import Callable

import msgpack
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from support.small_world import LAB, Bench, Device, float32_block, preverifier_of, receipts, refusals, ternary_block
from ternbus.aggregator.core import events
from ternbus.aggregator.core.work import DEBT_S, LARGE_BODY_BYTES, LARGE_HEADER_BYTES, PATIENCE_S, WorkShares
from ternbus.aggregator.shell import preverify
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import MAGIC, Frame, header_bytes, parse
from ternbus.broker.protocol.ternary import content_bytes, encode

Make = Callable[..., Bench]
LATE_S = 2 * PATIENCE_S
LEAST = 2**20  # of limits.work_bytes_per_s


def receive_late(bench: Bench, topic: str, *payloads: bytes, waited_s: float = LATE_S) -> list[events.Action]:
    actions: list[events.Action] = []
    for payload in payloads:
        actions += bench.handle(events.MessageArrived(topic=topic, payload=payload, waited_s=waited_s))
    return actions


# --- before anything is parsed


def test_of_unknown_names_few_frames_are_read_all_together(make: Make) -> None:
    """However many names there are: and none of them is remembered."""
    bench = make(limits__refusals_per_s=5)
    for number in range(1000):
        bench.receive(topics.up(LAB, f"stranger-{number}", "update"), b"nonsense")
    assert refusals(bench.tick(1.0)) == {"not-a-frame": 5, "too-fast": 995}
    bench.tick(10.0)
    bench.receive(topics.up(LAB, "another", "enroll"), *[b"nonsense"] * 6)
    assert refusals(bench.tick(1.0)) == {"not-a-frame": 5, "too-fast": 1}


def test_of_a_revoked_or_invited_name_few_frames_are_read_each(make: Make) -> None:
    bench = make(limits__refusals_per_s=5)
    gone, good = bench.join("gone"), bench.join("good")
    bench.revoke("gone")
    for name in ("guest", "other-guest"):
        bench.invite(name)
        bench.receive(topics.up(LAB, name, "enroll"), *[b"nonsense"] * 100)
    bench.receive(gone.topic("update"), *[b"nonsense"] * 100)
    assert refusals(bench.tick(1.0)) == {"not-a-frame": 30, "too-fast": 270}
    assert bench.send(good, ternary_block(bench.schema, 1), 0)[0].outcome == "accepted"
    late = Device("guest", bench.schema)
    bench.receive(late.topic("enroll"), late.enroll(bench.invite("guest")))
    assert receipts(bench.last)[-1].outcome == "enrolled"


def test_buckets_of_guests_are_as_many_as_there_are_invitations(make: Make) -> None:
    bench = make()
    for number in range(20):
        bench.invite(f"guest-{number}")
        bench.receive(topics.up(LAB, f"guest-{number}", "status"), b"nonsense")
        bench.handle(events.CancelRequested(device=f"guest-{number}"))
    bench.invite("last")
    assert set(bench.core._enrollment._guests) <= {"last"}


def test_of_who_may_not_write_nothing_is_parsed_ahead(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the other thread, which sees large frames first; it asks the topic before it looks at the payload."""
    bench = make(limits__refusals_per_s=5)
    pi, gone, stranger = bench.join("pi"), bench.join("gone"), Device("stranger", bench.schema)
    bench.revoke("gone")
    bench.invite("guest")
    guest = Device("guest", bench.schema)
    ahead = preverifier_of(bench)
    frames = [(each, each.update(float32_block(bench.schema, 1), 0)[0]) for each in (pi, gone, stranger, guest)]
    parsed: list[bytes] = []

    def noting(payload: bytes) -> Frame:
        parsed.append(payload)
        return parse(payload)

    monkeypatch.setattr(preverify, "parse", noting)
    opened = [ahead.open(each.topic("update"), frame) for each, frame in frames]
    assert [each is not None for each in opened] == [True, False, False, False]
    bench.receive(pi.topic("update"), *[b"nonsense"] * 3000)
    assert ahead.open(pi.topic("update"), frames[0][1]) is None
    assert parsed == [frames[0][1]]


@pytest.mark.parametrize("topic", ["status", "revocations/0", "snapshot/0/0"])
def test_on_the_aggregators_own_topics_large_headers_are_not_read(
    topic: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a broker has no access list, anybody may write there, and no name has a rate."""
    bench = make()
    header = msgpack.packb({"kind": topic.partition("/")[0], "meta": {"later": [{}] * 2000}})
    costly = b"".join((MAGIC, len(header).to_bytes(4, "little"), header, bytes(64)))
    monkeypatch.setattr("ternbus.aggregator.core.core.parse", lambda _: pytest.fail("it was parsed"))
    monkeypatch.setattr("ternbus.aggregator.core.revocations.parse", lambda _: pytest.fail("it was parsed"))
    monkeypatch.setattr("ternbus.aggregator.core.retained.parse", lambda _: pytest.fail("it was parsed"))
    bench.handle(events.Published(topic=topics.snapshot(LAB, 0, 0)))  # so that the part is asked for
    bench.receive(f"{topics.root(LAB)}/all/{topic}", *[costly] * 3)
    assert refusals(bench.tick(1.0)) == {"header-too-long": 3}


def test_on_the_aggregators_own_topics_no_more_is_read_than_of_a_device(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    bench.receive(topics.status(LAB), *[b"no"] * 3000)
    found = refusals(bench.tick(1.0))
    assert set(found) == {"not-a-frame", "too-fast"}
    assert 500 <= found["not-a-frame"] <= 1000
    bench.receive(topics.snapshot(LAB, 0, 0), *[b"no"] * 3000)  # parts come as fast as they are asked for
    assert refusals(bench.tick(1.0)) == {}
    assert bench.send(pi, ternary_block(bench.schema, 1), 0)[0].outcome == "accepted"


def test_what_was_dropped_where_it_came_in_is_counted(make: Make) -> None:
    bench = make()
    bench.handle(events.MessagesDropped(reason="qos-0", count=3, detail="a publication at QoS 0"))
    bench.handle(events.MessagesDropped(reason="qos-0", count=4, detail="a publication at QoS 0"))
    assert refusals(bench.tick(1.0)) == {"qos-0": 7}


# --- shares of the work


def test_nobody_owes_at_first_and_who_owes_pays_with_time() -> None:
    work = WorkShares(100.0)
    assert not work.owes("a", 5.0)
    work.charge("a", 50, 5.0)
    assert work.owes("a", 5.4)
    assert work.wait_s("a", 5.4) == pytest.approx(0.1)
    assert work.may_owe("a")
    assert not work.owes("a", 5.6)
    assert not work.may_owe("a")


def test_who_owes_shares_the_payment_with_all_that_owe() -> None:
    work = WorkShares(100.0)
    work.charge("a", 50, 0.0)
    work.charge("b", 150, 0.0)
    assert work.wait_s("a", 0.0) == pytest.approx(1.0)
    assert not work.owes("a", 1.01)  # both paid 50
    assert work.owes("b", 1.9)  # and then b alone the other 100
    assert not work.owes("b", 2.1)


def test_a_debt_has_an_end_however_much_was_given() -> None:
    """What a device was given while nobody waited is not held against it for long."""
    work = WorkShares(100.0)
    for _ in range(1000):
        work.charge("a", 90, 0.0)
    assert work.wait_s("a", 0.0) == pytest.approx(DEBT_S)
    work.charge("b", 10_000, 0.0)
    assert work.wait_s("b", 0.0) == pytest.approx(2 * 100.0)  # one single piece of work is paid whole
    work.charge("b", 1, 0.0)
    assert work.wait_s("b", 0.0) == pytest.approx(2 * 100.0)  # also if a small one follows


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 500), st.floats(0, 3)), max_size=40))
@example([("a", 203, 0.0), ("b", 49, 0.0), ("a", 1, 0.0), ("b", 151, 1.0), ("a", 1, 3.0)])
def test_all_together_pay_as_much_as_time_allows(steps: list[tuple[str, int, float]]) -> None:
    """Held against a simulation in small steps."""
    work, owed, now = WorkShares(100.0), dict.fromkeys("abcd", 0.0), 0.0
    for device, size, pause in steps:
        left = pause
        while left > 0 and (some := [name for name in owed if owed[name] > 0]):
            step = min(left, min(owed[name] for name in some) * len(some) / 100)
            left -= step
            for name in some:
                owed[name] -= step * 100 / len(some)
                owed[name] = 0.0 if owed[name] < 1e-9 else owed[name]
        now += pause
        owed[device] = min(owed[device] + size, max(owed[device], size, DEBT_S * 100))
        work.charge(device, size, now)
        count = sum(each > 0 for each in owed.values())
        for name, debt in owed.items():
            assert work.wait_s(name, now) == pytest.approx(debt * count / 100, abs=1e-4)


def test_who_had_its_share_is_told_to_come_again_while_others_wait(make: Make) -> None:
    """Before anything of it is decoded; and who had none is served."""
    bench = make(limits__work_bytes_per_s=LEAST)
    bad, good = bench.join("bad"), bench.join("good")
    bench.core.work.charge("bad", 100 * LEAST, bench.now)
    actions = receive_late(bench, bad.topic("update"), bad.update(b"no block at all", 0)[0])
    (receipt,) = receipts(actions)
    assert (receipt.outcome, receipt.retry_after_s) == ("busy", 60.0)
    assert receipt.reason == "this device has used its share of the work"
    (receipt,) = receipts(receive_late(bench, good.topic("update"), good.update(ternary_block(bench.schema, 1), 0)[0]))
    assert receipt.outcome == "accepted"


def test_who_had_its_share_is_served_while_nobody_waits(make: Make) -> None:
    bench = make(limits__work_bytes_per_s=LEAST)
    pi = bench.join("pi")
    bench.core.work.charge("pi", 10**9, bench.now)
    frame = pi.update(ternary_block(bench.schema, 1), 0)[0]
    (receipt,) = receipts(receive_late(bench, pi.topic("update"), frame, waited_s=PATIENCE_S))
    assert receipt.outcome == "accepted"


def test_what_is_busy_comes_again_and_is_accepted_with_all_its_parts(make: Make) -> None:
    bench = make(limits__work_bytes_per_s=LEAST)
    pi = bench.join("pi")
    bench.core.work.charge("pi", LEAST, bench.now)
    parts = pi.update(float32_block(bench.schema, 1), 0, frame_bytes=1500)
    assert [receipt.outcome for receipt in receipts(receive_late(bench, pi.topic("update"), *parts))] == ["busy"]
    bench.now += 2.0
    assert [receipt.outcome for receipt in receipts(receive_late(bench, pi.topic("update"), *parts))] == ["accepted"]


def test_an_update_is_paid_by_what_it_decodes_to(make: Make) -> None:
    for of, codec in ((ternary_block, "ternary"), (float32_block, "float32")):
        bench = make(limits__work_bytes_per_s=LEAST)
        pi = bench.join("pi")
        (frame,) = pi.update(of(bench.schema, 1), 0, encoding="zstd")
        bench.receive(pi.topic("update"), frame)
        header = header_bytes(frame)
        paid = len(frame) - 72 - header + content_bytes(bench.schema, codec)
        assert bench.core.work.wait_s("pi", bench.now) == pytest.approx(paid / LEAST)


def test_an_update_of_a_codec_that_is_none_is_invalid_at_any_time(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    (receipt,) = receipts(receive_late(bench, pi.topic("update"), pi.update(b"", 0, codec="int8")[0]))
    assert receipt.outcome == "invalid"


def test_what_was_decoded_ahead_is_taken_and_paid(make: Make) -> None:
    bench = make(limits__work_bytes_per_s=LEAST)
    pi = bench.join("pi")
    frame = pi.update(ternary_block(bench.schema, 1), 0)[0]
    opened = preverifier_of(bench).open(pi.topic("update"), frame)
    bench.core.work.charge("pi", 10**7, bench.now)
    event = events.MessageArrived(topic=pi.topic("update"), payload=frame, opened=opened, waited_s=LATE_S)
    assert receipts(bench.handle(event))[0].outcome == "accepted"


def test_of_who_owes_nothing_is_decoded_ahead_while_others_wait(make: Make) -> None:
    bench = make(limits__work_bytes_per_s=LEAST)
    pi = bench.join("pi")
    ahead = preverifier_of(bench)
    frame = pi.update(ternary_block(bench.schema, 1), 0)[0]
    bench.core.work.charge("pi", 10**7, bench.now)
    for waited_s, is_decoded in ((LATE_S, False), (0.0, True)):
        opened = ahead.open(pi.topic("update"), frame, waited_s)
        assert opened is not None
        assert (opened.content is not None) == is_decoded


def test_of_who_owes_no_large_header_is_parsed_while_others_wait(make: Make) -> None:
    """A header of 1 KB is more than any of ours has; what it costs is paid like what is decoded."""
    bench = make(limits__work_bytes_per_s=LEAST)
    pi = bench.join("pi")
    later = msgpack.unpackb(msgpack.packb({"later": [[]] * 1100}))
    large = pi.frame("status", {"state": "idle", "session": 1, "base": -1, "software": "", **later})
    assert header_bytes(large) > LARGE_HEADER_BYTES
    ahead = preverifier_of(bench)
    for number in range(50):
        receive_late(bench, pi.topic("status"), large)
        assert (ahead.open(pi.topic("status"), large, LATE_S) is None) == bench.core.work.may_owe("pi"), number
    refused = refusals(bench.tick(1.0))
    assert refused == {"too-much-work": 49}
    receive_late(bench, pi.topic("status"), pi.status("idle", 2))
    member = bench.core.registry.members["pi"]
    assert member.status is not None
    assert member.status.session == 2


def test_what_was_decoded_ahead_is_paid_whatever_the_answer(make: Make) -> None:
    """Refused for what the header says, or for the content: an update of 2 KB has cost a hundred megabytes."""
    for closed, wrong in ((True, False), (False, True)):
        bench = make(limits__work_bytes_per_s=LEAST)
        pi = bench.join("pi")
        if closed:
            bench.handle(events.StateRequested(state="closed"))
        nan = np.full(bench.schema.elements, np.nan, dtype=np.float32)
        block = encode(nan.tobytes()) if wrong else float32_block(bench.schema, 1)
        frame = pi.update(block, 0, codec="float32", encoding="zstd" if wrong else "raw")[0]
        opened = preverifier_of(bench).open(pi.topic("update"), frame)
        assert opened is not None
        assert (opened.content is None) == wrong
        event = events.MessageArrived(topic=pi.topic("update"), payload=frame, opened=opened)
        assert receipts(bench.handle(event))[0].outcome == "invalid"
        assert bench.core.work.wait_s("pi", bench.now) * LEAST >= content_bytes(bench.schema, "float32")


@pytest.mark.parametrize("base", [10**6, -1, 0])  # in the future, not a base, and accepted before
def test_of_an_update_that_its_header_refuses_nothing_is_decoded_ahead(make: Make, base: int) -> None:
    bench = make()
    pi = bench.join("pi")
    bench.send(pi, float32_block(bench.schema, 1), 0)
    frame = pi.update(float32_block(bench.schema, 2), base)[0]
    opened = preverifier_of(bench).open(pi.topic("update"), frame)
    assert opened is not None
    assert (opened.content, opened.decoded_bytes) == (None, 0)


def test_who_hashes_in_vain_pays_and_its_large_bodies_are_hashed_no_more_while_others_wait(make: Make) -> None:
    bench = make(limits__work_bytes_per_s=LEAST)
    pi = bench.join("pi")
    body = bytes(LARGE_BODY_BYTES + 1)
    false = pi.update(body, 0, frame_bytes=2 * LARGE_BODY_BYTES)[0][:-1] + b"\1"
    receive_late(bench, pi.topic("update"), false)
    assert bench.core.work.wait_s("pi", bench.now) == pytest.approx(len(body) / LEAST)
    receive_late(bench, pi.topic("update"), false)
    assert receipts(bench.last) == []  # a debt of one message is no more than its own size
    bench.core.work.charge("pi", 2 * LEAST, bench.now)
    assert preverifier_of(bench).open(pi.topic("update"), false, LATE_S) is None
    (receipt,) = receipts(receive_late(bench, pi.topic("update"), false))
    assert (receipt.outcome, receipt.reason) == ("busy", "this device has used its share of the work")
    receive_late(bench, pi.topic("status"), pi.frame("status", {}, body=body))
    receive_late(bench, pi.topic("update"), false[: -len(body) - 64] + bytes(64) + body)  # signed by nobody
    assert refusals(bench.tick(1.0)) == {"bad-digest": 2, "too-much-work": 1, "bad-signature": 1}


def test_the_parts_of_an_update_are_no_debt_that_it_waits_for(make: Make) -> None:
    """However late they are."""
    bench = make(limits__work_bytes_per_s=LEAST)
    pi = bench.join("pi")
    parts = pi.update(float32_block(bench.schema, 1), 0, frame_bytes=1500)
    assert len(parts) > 1
    assert [receipt.outcome for receipt in receipts(receive_late(bench, pi.topic("update"), *parts))] == ["accepted"]
    assert bench.core.work.wait_s("pi", bench.now) * LEAST == pytest.approx(2 * content_bytes(bench.schema, "float32"))
