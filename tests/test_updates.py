"""What becomes of an update: accepted, or refused by the protocol's checks in their order, and answered once."""

from collections.abc import Callable

import numpy as np
import pytest

from support.small_world import (
    LAB,
    Bench,
    float32_block,
    place,
    published,
    receipts,
    refusals,
    saved,
    ternary_block,
)
from ternbus.aggregator.core import events, records
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import parse

Make = Callable[..., Bench]


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
