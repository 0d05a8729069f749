"""Preverification: updates are opened ahead of the core within its limits, and the core decides."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from support.small_world import (
    LAB,
    Bench,
    Device,
    float32_block,
    preverifier_of,
    receipts,
    refusals,
    saved,
    ternary_block,
)
from ternbus.aggregator.core import events, records
from ternbus.aggregator.core.events import Opened
from ternbus.aggregator.merge.influence import Measured
from ternbus.aggregator.shell.preverify import Preverifier
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import FLOAT32, TERNARY, Block, content_bytes, encode

Make = Callable[..., Bench]


def arrived(device: Device, payload: bytes, opened: Opened | None) -> events.MessageArrived:
    return events.MessageArrived(topic=device.topic("update"), payload=payload, opened=opened)


def read_ahead(preverifier: Preverifier, device: Device, payload: bytes, topic: str = "") -> Block | None:
    """The block, of a frame that is opened in any case."""
    opened = preverifier.open(topic or device.topic("update"), payload)
    assert opened is not None
    return None if opened.content is None else opened.content.block


def test_a_frame_that_was_opened_ahead_is_the_same_update(make: Make) -> None:
    bench = make(merge__buffer_size=1)
    pi = bench.join("pi")
    (frame,) = pi.update(ternary_block(bench.schema, 1), 0)
    opened = preverifier_of(bench).open(pi.topic("update"), frame)
    assert opened is not None
    bench.handle(events.MessageArrived(topic=pi.topic("update"), payload=frame, opened=opened))
    assert receipts(bench.last)[-1].outcome == "accepted"


def test_what_was_verified_ahead_is_not_verified_again(make: Make) -> None:
    """The signature of these bytes is wrong: only who looks at it a second time notices."""
    bench = make()
    pi = bench.join("pi")
    (frame,) = pi.update(ternary_block(bench.schema, 1), 0)
    opened = preverifier_of(bench).open(pi.topic("update"), frame)
    assert opened is not None
    false = Opened(frame=replace(opened.frame, signature=bytes(64)), public=opened.public)
    bench.handle(events.MessageArrived(topic=pi.topic("update"), payload=frame, opened=false))
    assert receipts(bench.last)[-1].outcome == "accepted"


def test_what_is_not_authentic_is_not_opened_ahead(make: Make) -> None:
    bench = make()
    pi, stranger = bench.join("pi"), Device("stranger", bench.schema)
    (frame,) = pi.update(ternary_block(bench.schema, 1), 0)
    (strange,) = stranger.update(ternary_block(bench.schema, 1), 0)
    for payload in (b"", frame[:-1], frame[:200] + bytes([frame[200] ^ 1]) + frame[201:], strange):
        assert preverifier_of(bench).open(pi.topic("update"), payload) is None


def test_a_key_that_was_replaced_meanwhile_does_not_pass(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    (frame,) = pi.update(ternary_block(bench.schema, 1), 0)
    opened = preverifier_of(bench).open(pi.topic("update"), frame)
    bench.join("pi")
    bench.handle(events.MessageArrived(topic=pi.topic("update"), payload=frame, opened=opened))
    assert receipts(bench.last) == []
    assert refusals(bench.tick(1.0)) == {"replaced-key": 1}


@pytest.mark.parametrize("encoding", ["raw", "zstd"])
@pytest.mark.parametrize("of", [ternary_block, float32_block])
def test_an_update_in_one_part_is_read_ahead(make: Make, of: Callable[[Schema, int], Block], encoding: str) -> None:
    bench = make()
    pi, block = bench.join("pi"), of(bench.schema, 1)
    found = read_ahead(preverifier_of(bench), pi, pi.update(block, 0, encoding=encoding)[0])
    assert found is not None
    assert (found.codec, found.content) == (block.codec, block.content)


def test_what_was_read_ahead_is_what_is_merged_and_the_body_as_it_came_is_what_is_kept(make: Make) -> None:
    """Another block than the frame's shows which of them the core takes."""
    bench = make()
    pi, block, other = bench.join("pi"), ternary_block(bench.schema, 1), ternary_block(bench.schema, 2)
    (frame,) = pi.update(block, 0, encoding="zstd")
    opened = preverifier_of(bench).open(pi.topic("update"), frame)
    assert opened is not None
    assert opened.content is not None
    swapped = Opened(frame=opened.frame, public=opened.public, content=Measured(opened.content.update, other))
    (receipt,) = receipts(bench.handle(arrived(pi, frame, swapped)))
    assert receipt.outcome == "accepted"
    (record,) = saved(bench.last, records.UpdateAccepted)
    assert record.body == encode(block.content)
    bench.core.model.step_server()
    twin = make()
    twin.send(twin.join("pi"), other, 0)
    twin.core.model.step_server()
    assert bench.core.model.server.target.tobytes() == twin.core.model.server.target.tobytes()


@pytest.mark.parametrize(
    "wrong",
    [
        {"block": b"nonsense", "encoding": "zstd"},
        {"block": b"nonsense"},
        {"block": encode(bytes(10**6)), "encoding": "zstd"},
        {"block": b"", "encoding": "lzma"},
        {"block": b"", "codec": "int8"},
        {"block": b"", "metrics": {"loss": float("nan")}},
    ],
)
def test_what_is_wrong_with_an_update_is_left_for_the_core_to_find(make: Make, wrong: dict[str, Any]) -> None:
    bench, plain = make(), make()
    answers = []
    for each in (bench, plain):
        pi = each.join("pi")
        (frame,) = pi.update(base=0, **wrong)
        preverifier = preverifier_of(each)
        opened = preverifier.open(pi.topic("update"), frame) if each is bench else None
        assert (opened is None) == (each is plain)
        assert opened is None or opened.content is None
        (receipt,) = receipts(each.handle(arrived(pi, frame, opened)))
        answers.append((receipt.outcome, receipt.reason))
        (good,) = pi.update(ternary_block(each.schema, 1), 0)
        assert read_ahead(preverifier, pi, good) is not None  # the wrong one holds no room
    assert answers[0] == answers[1]
    assert answers[0][0] == "invalid"


def test_what_may_not_be_read_before_the_core_has_asked_is_not(make: Make) -> None:
    bench = make()
    pi, eva, preverifier = bench.join("pi"), bench.join("eva"), preverifier_of(bench)
    block = ternary_block(bench.schema, 1)
    sealed = pi.update(block, 0, seal_to=bench.identity.public)[0]
    part = pi.update(float32_block(bench.schema, 1), 0, frame_bytes=1500)[0]
    good = pi.update(block, 0)[0]
    assert read_ahead(preverifier, pi, sealed) is None
    assert read_ahead(preverifier, pi, part) is None
    for topic in (eva.topic("update"), topics.up(LAB, "pi", "offer"), topics.up("other", "pi", "update"), "elsewhere"):
        assert preverifier.open(topic, good) is None
    assert read_ahead(preverifier, pi, pi.metrics(0), pi.topic("metrics")) is None
    assert receipts(bench.receive(pi.topic("update"), good))[0].outcome == "accepted"
    assert read_ahead(preverifier, pi, good) is None  # it was answered, and is only told so again
    assert read_ahead(preverifier, pi, pi.update(block, 0)[0]) is None  # nor is another on the same version wanted
    assert read_ahead(preverifier, eva, eva.update(block, 0)[0]) is not None


def test_one_update_of_each_device_is_read_ahead_until_the_core_has_had_it(make: Make) -> None:
    bench = make()
    preverifier, block = preverifier_of(bench), ternary_block(bench.schema, 1)
    pi, eva = bench.join("pi"), bench.join("eva")
    first = preverifier.open(pi.topic("update"), pi.update(block, 0)[0])
    assert first is not None
    assert first.content is not None
    second = preverifier.open(pi.topic("update"), pi.update(block, 0)[0])
    assert second is not None
    assert second.content is None
    assert read_ahead(preverifier, eva, eva.update(block, 0)[0]) is not None
    preverifier.close(second)
    preverifier.close(None)
    assert read_ahead(preverifier, pi, pi.update(block, 0)[0]) is None
    preverifier.close(first)
    assert read_ahead(preverifier, pi, pi.update(block, 0)[0]) is not None


def test_what_is_read_ahead_has_room_and_what_is_larger_waits_alone(make: Make) -> None:
    bench = make()
    small, large = content_bytes(bench.schema, TERNARY), content_bytes(bench.schema, FLOAT32)
    preverifier = preverifier_of(bench, room_bytes=2 * small)
    assert large > 2 * small
    a, b, c, d = (bench.join(name) for name in "abcd")
    opened = [
        preverifier.open(each.topic("update"), each.update(ternary_block(bench.schema, 1), 0)[0]) for each in (a, b, c)
    ]
    assert [each is not None and each.content is not None for each in opened] == [True, True, False]
    for each in opened[:2]:
        assert read_ahead(preverifier, d, d.update(float32_block(bench.schema, 1), 0)[0]) is None
        preverifier.close(each)
    assert read_ahead(preverifier, d, d.update(float32_block(bench.schema, 1), 0)[0]) is not None
    assert read_ahead(preverifier, a, a.update(ternary_block(bench.schema, 1), 0)[0]) is None


@pytest.mark.parametrize("lead", [1, 10])  # so many frames the preverifier is ahead of the core
def test_a_device_that_floods_has_no_more_read_ahead_than_it_has_receipts(make: Make, lead: int) -> None:
    """Of 300 bad and good updates at once; the core takes 20, and the preverifier reads at most one beyond them."""
    bench = make(limits__receipts_per_s=10)
    bad, good = bench.join("bad"), bench.join("good")
    block, preverifier, ahead, waiting = ternary_block(bench.schema, 1), preverifier_of(bench), 0, []
    for number in range(300):
        (frame,) = bad.update(block, number % 2 * 10**6, encoding="zstd")  # every other one is of a base in the future
        opened = preverifier.open(bad.topic("update"), frame)
        assert opened is not None
        ahead += opened.content is not None
        waiting.append((frame, opened))
        if len(waiting) == lead:
            for payload, each in waiting:
                bench.handle(arrived(bad, payload, each))
                preverifier.close(each)
            waiting.clear()
    assert len(receipts(bench.last)) == 0
    assert 1 <= ahead <= 21
    assert read_ahead(preverifier, good, good.update(block, 0)[0]) is not None
