"""Bounds on what devices can make the aggregator do and hold."""

from collections.abc import Callable
from pathlib import Path

import pytest

from support.small_world import (
    LAB,
    Bench,
    float32_block,
    frames_of,
    published,
    receipts,
    refusals,
    saved,
    ternary_block,
)
from ternbus.aggregator.core import records
from ternbus.aggregator.core.places import Places
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.parts import cut
from ternbus.broker.protocol.ternary import content_bytes

Make = Callable[..., Bench]


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
    """The newest of a device is assembled; thousands before it are dropped and counted."""
    bench = make()
    pi = bench.join("pi")
    for number in range(300):
        frames = pi.update(float32_block(bench.schema, number), 0, frame_bytes=1500)
        bench.now += 0.02
        bench.receive(pi.topic("update"), frames[0])
    place = bench.core._updates.places.of("pi")
    assert place is not None
    assert place.collector.size_bytes < 1500
    assert bench.ledger.db.execute("SELECT value FROM counts WHERE name = 'invalid:unfinished'").fetchone()[0] >= 190
    assert receipts(bench.receive(pi.topic("update"), *frames[1:]))[0].outcome == "accepted"
    assert bench.core._updates.places.of("pi") is None


@pytest.mark.parametrize("in_order", [True, False])
def test_an_update_larger_than_the_assembly_bound_is_whole_even_beside_one_that_is_never_finished(
    in_order: bool, make: Make
) -> None:
    """The longest silent, which is on a slow line, was dropped at each part."""
    bench = make()
    updates = bench.core._updates
    updates.places = Places(updates.validation.largest_bytes, 1000, 100)  # as if the model were a large one
    slow, hostile = bench.join("slow"), bench.join("hostile")
    meta = {"base": 0, "samples": 1, "codec": "float32", "encoding": "raw", "sealed": False, "metrics": {}}
    outcomes = []
    for part in slow.update(float32_block(bench.schema, 1), 0, frame_bytes=1500)[:: 1 if in_order else -1]:
        outcomes += [receipt.outcome for receipt in receipts(bench.receive(slow.topic("update"), part))]
        hostile.next_seq()
        flood = [
            hostile.frame("update", meta, body=bytes(1100), part=number, parts=4, seq=hostile.seq)
            for number in range(3)
        ]
        bench.receive(hostile.topic("update"), *flood)
    assert outcomes == ["accepted"]


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
