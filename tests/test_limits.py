"""Bounds on what devices can make the aggregator do and hold."""

from collections.abc import Callable
from dataclasses import replace
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
from ternbus.aggregator.core.validation import SEAL_BYTES
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
    validation = bench.core._updates.validation
    bound = 3 * (validation.update_bytes_max + SEAL_BYTES)
    validation.settings = replace(bench.core.settings, limits=replace(bench.core.settings.limits, assembly_bytes=bound))
    devices = [bench.join(f"d{number}") for number in range(bound // 1000)]
    sent = [device.update(float32_block(bench.schema, 1), 0, frame_bytes=1500) for device in devices]
    for device, frames in zip(devices, sent, strict=True):
        bench.receive(device.topic("update"), frames[0])
    sizes = [
        member.collector.size_bytes if member.collector is not None else 0
        for member in bench.core.registry.members.values()
    ]
    assert sum(sizes) <= bound
    assert sizes[0] == 0  # the longest silent goes first
    assert sizes[-1] > 0
    assert receipts(bench.receive(devices[-1].topic("update"), *sent[-1][1:]))[0].outcome == "accepted"
    # and whoever was dropped sends all of it again
    assert receipts(bench.receive(devices[0].topic("update"), *sent[0]))[0].outcome == "accepted"


@pytest.mark.parametrize(("body_bytes", "sent"), [(1100, 2), (6000, 1)])
def test_a_device_that_fills_the_assembly_bound_takes_nothing_from_one_on_a_slow_line(
    body_bytes: int, sent: int, make: Make
) -> None:
    """The longest silent went first: whoever sends a part a second, beside one that sends many and finishes none.

    Of each of its messages two parts of three come, or one that is longer than any update.
    """
    bench = make(limits__assembly_bytes=2**20)
    bench.core._updates.validation.settings = replace(
        bench.core.settings, limits=replace(bench.core.settings.limits, assembly_bytes=9200)
    )
    slow, hostile = bench.join("slow"), bench.join("hostile")
    bench.core._updates.validation.update_bytes_max = 3000
    meta = {"base": 0, "samples": 1, "codec": "float32", "encoding": "raw", "sealed": False, "metrics": {}}
    outcomes = []
    for part in slow.update(float32_block(bench.schema, 1), 0, frame_bytes=1500):
        outcomes += [receipt.outcome for receipt in receipts(bench.receive(slow.topic("update"), part))]
        for _ in range(10):
            hostile.next_seq()
            flood = [
                hostile.frame("update", meta, body=bytes(body_bytes), part=number, parts=3, seq=hostile.seq)
                for number in range(sent)
            ]
            bench.receive(hostile.topic("update"), *flood)
    assert outcomes == ["accepted"]
    assert bench.core._updates.validation._held_bytes <= 9200


@pytest.mark.parametrize("in_order", [True, False])
def test_an_update_larger_than_the_assembly_bound_is_whole_even_beside_one_that_is_never_finished(
    in_order: bool, make: Make
) -> None:
    """Neither was beyond one update, and the longest silent, which is on a slow line, was dropped at each part."""
    bench = make()
    validation = bench.core._updates.validation
    limits = replace(bench.core.settings.limits, assembly_bytes=1000)  # as if the model were a large one
    validation.settings = replace(bench.core.settings, limits=limits)
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
        assert validation._held_bytes <= 3 * (validation.update_bytes_max + SEAL_BYTES)
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
    validation.update_bytes_max = 0  # three of the largest would fit
    more = devices[2].update(float32_block(bench.schema, 3), 0, frame_bytes=1500)
    bench.receive(devices[2].topic("update"), more[0])
    check()
    assert validation._held_bytes == 0
