"""The outstanding update: on disk first, sent or offered, sent again, cut and sealed anew."""

from dataclasses import replace
from hashlib import blake2b
from typing import Any

import numpy as np
import pytest

from support.core_device import (
    AGGREGATOR_KEY,
    DEVICE,
    DEVICE_KEY,
    FRAME_BYTES,
    Device,
    aggregator,
    connected,
    following,
    logged,
    of,
    only,
    published,
    sending,
    trained,
    update_in,
)
from support.scripted_aggregator import Message, ScriptedAggregator
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.identity import seal
from ternbus.broker.protocol.messages import Offer, Update
from ternbus.broker.protocol.parts import message_digest
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import Block
from ternbus.edge.core import events
from ternbus.edge.core.actions import Action, Publish, Save, StartTraining
from ternbus.edge.core.state import SEQ_BLOCK

LARGE = Schema.of({"w": (100_000,)})
TELLS_NO_LIMIT = events.Connected(frame_bytes=FRAME_BYTES, most_bytes=2**28)


def test_an_update_is_on_disk_before_it_is_sent() -> None:
    _, device = following()
    job = only(device.actions, StartTraining)
    done = device.handle(
        trained(job, residual=np.ones(job.schema.elements, np.float32), metrics={"loss": 1.0, "bad": float("nan")})
    )
    assert isinstance(done[0], Save)
    state = done[0].state
    frame = update_in(done)
    assert state.outstanding is not None
    assert state.outstanding.seq == frame.seq
    assert state.residual is not None
    update = Update.from_meta(frame.meta)
    assert (update.base, update.samples, dict(update.metrics)) == (0, 10, {"loss": 1.0})
    block = Block.read(job.schema, update.codec, update.encoding, frame.body)
    assert (block.value() == 1).all()


def test_its_frames_are_cut_and_signed_once_and_again_where_they_have_to_be_others() -> None:
    scripted, device, frame = sending()
    first = only_update(device.actions)
    device.handle(events.Disconnected(reason="gone"))
    device.wait(60.0)
    device.connect()
    again = only_update(device.arrive(scripted.status(session=2)))
    assert again is first
    behind = scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "duplicate", highest_seq=frame.seq + 70)
    renumbered = device.arrive(behind)
    assert update_in(renumbered).seq == frame.seq + 71
    receipt = scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq + 71, "accepted")
    answered = only(device.arrive(receipt), Save).answered
    assert answered is not None
    assert answered.digest == message_digest([update_in(renumbered).header])


def only_update(actions: list[Action]) -> bytes:
    """The very bytes."""
    (found,) = {id(each.payload): each.payload for each in of(actions, Publish) if "/update" in each.topic}.values()
    assert isinstance(found, bytes)
    return found


def test_a_sealed_update_binds_key_and_number() -> None:
    scripted = aggregator(plan={"seal": True})
    _, device = following(scripted=scripted, seal=lambda plain: seal(AGGREGATOR_KEY.public, plain))
    frame = update_in(device.handle(trained(only(device.actions, StartTraining))))
    assert frame.meta["sealed"]
    plain = AGGREGATOR_KEY.unseal(frame.body)
    assert plain[:16] == DEVICE_KEY.key_id + frame.seq.to_bytes(8, "little")
    update = Update.from_meta(frame.meta)
    assert dict(update.metrics) == {}  # anybody could read them
    assert (Block.read(scripted.schema, update.codec, update.encoding, plain[16:]).value() == 1).all()
    device.handle(events.Disconnected(reason="gone"))
    device.wait(30)
    device.connect()
    assert update_in(device.arrive(scripted.status())) == frame


def test_an_update_of_a_training_that_ends_while_disconnected_is_sent_later() -> None:
    scripted, device = following()
    device.handle(events.Disconnected(reason="gone"))
    done = device.handle(trained(only(device.actions, StartTraining)))
    assert of(done, Publish) == []
    assert only(done, Save).state.outstanding is not None
    device.wait(1)
    device.connect()
    assert len(published(device.arrive(scripted.status(), scripted.head()), "update")) == 1


def test_the_number_of_an_update_that_ends_while_disconnected_is_reserved_with_it() -> None:
    """Wherever it falls in a block of reserved numbers: a crash must not give it to another message."""
    for attempts in range(SEQ_BLOCK):
        _, device = following()
        device.handle(events.Disconnected(reason="gone"))
        for _ in range(attempts):  # each uses a number, for its last will
            device.wait(30)
            device.handle(events.ConnectFailed(reason="refused"))
        device.handle(trained(only(device.actions, StartTraining)))
        assert device.disk is not None
        assert device.disk.outstanding is not None
        assert device.disk.outstanding.seq < device.disk.seq_limit


def test_an_update_is_sent_again_60_s_after_the_last_puback_then_doubling_to_an_hour() -> None:
    _, device, frame = sending()
    device.now += 5
    device.handle(events.Published(seq=frame.seq))
    gaps, last = [], device.now
    for _ in range(9):
        while not (done := published(device.wait(1), "update")):
            pass
        assert done == [frame]
        gaps.append(device.now - last)
        last = device.now
        device.handle(events.Published(seq=frame.seq))
    for number, gap in enumerate(gaps):
        least = min(60 * 2**number, 3600)
        assert least <= gap <= 1.25 * least + 1
    assert len({round(gap / min(60 * 2**number, 3600), 3) for number, gap in enumerate(gaps)}) > 3  # jitter


def test_what_the_broker_has_not_acknowledged_is_given_more_time() -> None:
    _, device, frame = sending()
    assert published(device.wait(590), "update") == []
    assert published(device.wait(200), "update") == [frame]


def test_an_update_is_sent_again_after_a_reconnect_and_when_the_aggregator_comes() -> None:
    scripted, device, frame = sending()
    device.handle(events.Disconnected(reason="gone"))
    device.wait(1)
    assert published(device.connect(), "update") == []  # whether the aggregator is there is not known yet
    assert published(device.arrive(scripted.status(session=1)), "update") == [frame]
    assert published(device.arrive(scripted.status(session=1)), "update") == []
    assert published(device.arrive(scripted.status(session=2)), "update") == [frame]
    device.arrive(scripted.status("offline", session=2))
    assert published(device.wait(10_000), "update") == []
    assert published(device.arrive(scripted.status(session=2)), "update") == []  # offline is final within a session
    assert published(device.arrive(scripted.status(session=1)), "update") == []
    assert published(device.arrive(scripted.status(session=3)), "update") == [frame]


def test_a_large_update_is_offered_and_sent_by_grant() -> None:
    scripted, device = following(scripted=aggregator(direct_parts=1))
    job = only(device.actions, StartTraining)
    big = np.random.default_rng(1).normal(size=job.schema.elements).astype(np.float32)
    device.core.uplink.frame_bytes = 2000
    event = replace(trained(job), content=Block.of_float32(job.schema, big))
    done = device.handle(event)
    (frame,) = published(done, "offer")
    assert published(done, "update") == []
    assert Offer.from_meta(frame.meta) == Offer(base=0, parts=3)
    key = DEVICE_KEY.key_id
    grant = scripted.grant(DEVICE, key, frame.seq, [[2, 9], [0, 0], [2, 2]], deadline_s=20.0)
    parts = published(device.arrive(grant), "update")
    assert [part.part for part in parts] == [0, 2]
    assert {part.seq for part in parts} == {frame.seq}
    assert of(device.arrive(grant), Publish) == []  # once is enough
    assert published(device.wait(19), "offer") == []
    assert published(device.wait(2), "offer") == [frame]
    scripted.direct_parts = 3
    device.arrive(scripted.head())
    device.handle(events.Disconnected(reason="gone"))
    device.wait(1)
    device.handle(events.Connected(frame_bytes=2000))
    assert len(published(device.arrive(scripted.status()), "update")) == 3


def test_an_update_of_several_parts_that_waits_for_its_turn_is_offered_and_not_sent_again_and_again() -> None:
    scripted, device = following(scripted=aggregator(direct_parts=8))
    job = only(device.actions, StartTraining)
    big = np.random.default_rng(1).normal(size=job.schema.elements).astype(np.float32)
    device.core.uplink.frame_bytes = 2000
    parts = published(device.handle(replace(trained(job), content=Block.of_float32(job.schema, big))), "update")
    assert len(parts) == 3
    key, seq = DEVICE_KEY.key_id, parts[0].seq
    for _ in range(3):
        device.arrive(scripted.receipt(DEVICE, key, seq, "busy", retry_after_s=30.0))
        done = device.wait(38)
        assert [frame.seq for frame in published(done, "offer")] == [seq]
        assert published(done, "update") == []
    grant = scripted.grant(DEVICE, key, seq, [[1, 2]], deadline_s=20.0)
    assert [part.part for part in published(device.arrive(grant), "update")] == [1, 2]
    assert len(published(device.arrive(scripted.status(session=2)), "update")) == 3  # it knows of no turns


@pytest.mark.parametrize(
    ("asked", "most", "parts"),
    [
        (0, 10**6, 3),
        (FRAME_BYTES, 10**6, 1),
        (FRAME_BYTES, 3000, 2),  # the broker takes no more
        (FRAME_BYTES, 0, 3),  # the device's owner has set 2,000
    ],
)
def test_frames_are_as_large_as_the_head_asks_for_where_broker_and_owner_allow_it(
    asked: int, most: int, parts: int
) -> None:
    scripted, device = aggregator(), connected()
    device.handle(events.Disconnected(reason="gone"))
    device.wait(1)
    device.handle(events.Connected(frame_bytes=2000, most_bytes=most))
    done = device.arrive(scripted.status(), scripted.head(frame_bytes=asked), *scripted.snapshot())
    job = only(done, StartTraining)
    big = np.random.default_rng(1).normal(size=job.schema.elements).astype(np.float32)
    sent = published(device.handle(replace(trained(job), content=Block.of_float32(job.schema, big))), "update")
    assert [part.parts for part in sent] == [parts] * parts
    assert device.disk is not None
    again = device.restarted()  # it knows no head yet, and sends what it has
    again.handle(events.Connected(frame_bytes=2000, most_bytes=most))
    seqs = {part.seq for part in published(again.arrive(scripted.status(), scripted.head(frame_bytes=asked)), "update")}
    assert seqs == {sent[0].seq}


@pytest.mark.parametrize("restarts", [False, True])
def test_an_update_in_larger_frames_than_the_head_asks_for_is_cut_anew_once(restarts: bool) -> None:
    """A broker that does not tell its limit may have dropped them, and the operator has gone back from them."""
    scripted, device = aggregator(direct_parts=8, schema=LARGE), connected(tensors={"w": (100_000,)})
    device.handle(events.Disconnected(reason="gone"))
    device.wait(1)
    device.handle(TELLS_NO_LIMIT)
    device.arrive(scripted.status(), scripted.head(frame_bytes=2**20), *scripted.snapshot())
    big = np.random.default_rng(1).normal(size=LARGE.elements).astype(np.float32)
    update = replace(trained(only(device.actions, StartTraining)), content=Block.of_float32(LARGE, big))
    (frame,) = published(device.handle(update), "update")
    if restarts:
        device = device.restarted()
        device.handle(TELLS_NO_LIMIT)
        device.arrive(scripted.status(session=2))
    parts = published(device.arrive(scripted.head(frame_bytes=300_000)), "update")
    assert [part.parts for part in parts] == [4] * 4
    assert parts[0].seq > frame.seq
    outcomes = [save.answered.outcome for save in of(device.actions, Save) if save.answered is not None]
    assert outcomes == ["renumbered"]  # the whole may have been accepted
    device.arrive(*(scripted.head(frame_bytes=size) for size in (200_000, 130_000, FRAME_BYTES, 0)))
    assert device.disk is not None
    assert device.disk.outstanding is not None
    assert device.disk.outstanding.seq == parts[0].seq  # each number is a write of the whole update


def large_sent(scripted: ScriptedAggregator, device: Device) -> Frame:
    """The update of a device that the head, and a broker that tells no limit, let send larger frames."""
    device.handle(events.Disconnected(reason="gone"))
    device.wait(60.0)
    device.handle(TELLS_NO_LIMIT)
    device.arrive(scripted.status(), scripted.head(frame_bytes=2**18), *scripted.snapshot())
    big = np.random.default_rng(1).normal(size=LARGE.elements).astype(np.float32)
    job = only(device.actions, StartTraining)
    return published(device.handle(replace(trained(job), content=Block.of_float32(LARGE, big))), "update")[0]


def large_lost(scripted: ScriptedAggregator, device: Device) -> list[Frame]:
    """What is sent on the connection after one that was lost."""
    device.handle(events.Disconnected(reason="gone"))
    device.wait(60.0)
    device.handle(TELLS_NO_LIMIT)
    return published(device.arrive(scripted.status(session=2), scripted.head(frame_bytes=2**18)), "update")


def test_a_broker_that_ends_each_connection_at_a_larger_frame_gets_smaller_ones() -> None:
    """As mosquitto does above its message_size_limit, of which it does not tell."""
    scripted, device = aggregator(direct_parts=8, schema=LARGE), connected(tensors={"w": (100_000,)})
    first = large_sent(scripted, device)
    again = large_lost(scripted, device)  # it may have been the line
    assert [(part.seq, part.parts) for part in again] == [(first.seq, 2)] * 2
    parts = large_lost(scripted, device)
    assert [part.parts for part in parts] == [4] * 4
    assert logged(device.actions).count("smaller-frames") == 1
    receipt = scripted.receipt(DEVICE, DEVICE_KEY.key_id, parts[0].seq, "accepted")
    device.arrive(receipt)
    assert device.core.uplink.frame_bytes == FRAME_BYTES
    assert large_lost(scripted, device) == []
    assert device.core.uplink.frame_bytes == FRAME_BYTES


def test_larger_frames_that_a_broker_acknowledges_and_drops_are_cut_smaller_after_two_attempts() -> None:
    scripted, device = aggregator(direct_parts=8, schema=LARGE), connected(tensors={"w": (100_000,)})
    first = large_sent(scripted, device)
    seen = [first.seq]
    while len(seen) < 3:
        for _ in range(2):
            device.handle(events.Published(seq=seen[-1]))  # each part
        done = device.wait(400.0)
        sent = published(done, "update")
        seen.append(sent[0].seq)
        assert [part.parts for part in sent] == ([2] * 2 if len(seen) == 2 else [4] * 4)
    assert seen[1] == first.seq < seen[2]
    assert logged(device.actions).count("smaller-frames") == 1


def test_an_update_in_larger_frames_that_is_answered_shows_that_they_get_through() -> None:
    scripted, device = aggregator(direct_parts=8, schema=LARGE), connected(tensors={"w": (100_000,)})
    first = large_sent(scripted, device)
    large_lost(scripted, device)
    device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, first.seq, "accepted"))
    scripted.advance()
    device.arrive(*scripted.delta(1), scripted.head(frame_bytes=2**18))
    job = of(device.actions, StartTraining)[-1]
    big = np.random.default_rng(1).normal(size=LARGE.elements).astype(np.float32)
    done = device.handle(replace(trained(job), content=Block.of_float32(LARGE, big)))
    assert [part.parts for part in published(done, "update")] == [2, 2]
    assert [part.parts for part in large_lost(scripted, device)] == [2, 2]


def test_a_broker_that_refuses_a_frame_as_too_large_gets_smaller_ones() -> None:
    scripted, device = aggregator(direct_parts=8, schema=LARGE), connected(tensors={"w": (100_000,)})
    first = large_sent(scripted, device)
    assert published(device.handle(events.Refused(seq=first.seq, reason="Quota exceeded")), "update") == []
    parts = published(device.handle(events.Refused(seq=first.seq, reason="Packet too large")), "update")
    assert [part.parts for part in parts] == [4] * 4
    assert parts[0].seq > first.seq
    assert published(device.handle(events.Refused(seq=first.seq, reason="Packet too large")), "update") == []
    assert published(device.handle(events.Refused(seq=parts[0].seq, reason="Packet too large")), "update") == []


def test_an_update_that_no_longer_fits_is_cut_and_signed_anew_under_a_new_number() -> None:
    scripted = aggregator(plan={"seal": True}, direct_parts=8)
    _, device = following(scripted=scripted)
    job = only(device.actions, StartTraining)
    big = np.random.default_rng(1).normal(size=job.schema.elements).astype(np.float32)
    (frame,) = published(device.handle(replace(trained(job), content=Block.of_float32(job.schema, big))), "update")
    device.handle(events.Disconnected(reason="gone"))
    device.wait(1)
    device.handle(events.Connected(frame_bytes=2000))
    parts = published(device.arrive(scripted.status()), "update")
    assert len(parts) == 3
    assert {part.seq for part in parts} == {parts[0].seq}
    assert parts[0].seq > frame.seq
    (before,) = [save.answered for save in of(device.actions, Save) if save.answered is not None]
    header = blake2b(frame.header, digest_size=32).digest()
    assert (before.seq, before.outcome) == (frame.seq, "renumbered")  # it may have been accepted
    assert before.digest == blake2b(header, digest_size=32).digest()
    assert device.disk is not None
    assert device.disk.outstanding is not None
    plain = b"".join(part.body for part in parts).removeprefix(b"sealed:")
    assert plain[:16] == DEVICE_KEY.key_id + parts[0].seq.to_bytes(8, "little")
    device.handle(events.Published(seq=frame.seq))  # of the old number: means nothing now


def asked_by_status(scripted: ScriptedAggregator, seq: int, turn: int) -> Message:
    return scripted.status(session=2 + turn)


def asked_by_receipt(scripted: ScriptedAggregator, seq: int, turn: int) -> Message:
    return scripted.receipt(DEVICE, DEVICE_KEY.key_id, seq, "duplicate", highest_seq=seq + 1)


def asked_by_grant(scripted: ScriptedAggregator, seq: int, turn: int) -> Message:
    return scripted.grant(DEVICE, DEVICE_KEY.key_id, seq, ((0, 9),))


@pytest.mark.parametrize("ask", [asked_by_status, asked_by_receipt, asked_by_grant])
@pytest.mark.parametrize("size", [1_400, 12_000])
def test_small_messages_of_an_aggregator_fill_no_memory_with_copies_of_the_update(ask: Any, size: int) -> None:
    """What the broker has not taken yet waits in the memory: each of them asks for all of the update again."""
    scripted, device = following(scripted=aggregator(direct_parts=100))
    job = only(device.actions, StartTraining)
    big = np.random.default_rng(1).normal(size=job.schema.elements).astype(np.float32)
    device.core.uplink.frame_bytes = size
    device.handle(replace(trained(job), content=Block.of_float32(job.schema, big)))
    assert device.disk is not None
    assert device.disk.outstanding is not None
    parts, first = len(device.core.profile.update(device.disk.outstanding)), device.disk.outstanding.seq
    for turn in range(300):
        seq = device.disk.outstanding.seq
        device.arrive(ask(scripted, seq, turn))
    waiting = published(device.actions, "update")
    assert len(waiting) < max(64, 2 * parts) + parts
    assert device.disk.outstanding.seq <= first + 2 * 64  # each number is a write of the whole update

    for frame in waiting:
        device.handle(events.Published(seq=frame.seq))
    device.arrive(scripted.status("offline", session=999), scripted.status(session=1000))
    assert len(published(device.actions, "update")) == len(waiting) + parts


def test_a_refusal_of_the_broker_is_said_and_the_update_tried_again_later() -> None:
    _, device, frame = sending()
    done = device.handle(events.Refused(seq=frame.seq, reason="Quota exceeded"))
    assert logged(done) == ["refused"]
    assert published(device.wait(80), "update") == [frame]
