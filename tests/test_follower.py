"""Following: head, snapshot and deltas to the vector, bit for bit, whatever the network does with the frames."""

from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.following import Broker, a_head, connected, deliver, has, started
from support.scripted_aggregator import FEDERATION, ScriptedAggregator
from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.frame import PARTS_MAX, build, parse
from ternbus.broker.protocol.model_messages import Head
from ternbus.broker.protocol.parts import parts_max
from ternbus.broker.protocol.schema import Schema, to_tensors
from ternbus.broker.protocol.ternary import Block
from ternbus.edge.core.actions import Subscribe, Unsubscribe
from ternbus.edge.core.follower import (
    DELTAS_MAX,
    HEAD_S,
    MESSAGES_MAX,
    OCCUPIED_S,
    REQUESTED_MAX,
    Follower,
    InitialModel,
)
from ternbus.edge.core.part_requests import PartRequests


def test_a_snapshot_in_parts_is_asked_for_by_name_and_unsubscribed_when_it_has_come() -> None:
    aggregator, follower, broker = started()
    assert has(follower, aggregator, 0)
    assert broker.asked == [topic for topic, _ in aggregator.snapshot()]
    assert len(broker.asked) == 3
    assert broker.subscribed == set()
    assert follower.schema is not None
    assert follower.schema.digest == aggregator.schema.digest


def test_deltas_are_applied_when_a_head_names_them_in_any_order_and_before_it() -> None:
    aggregator, follower, _ = started()
    for _ in range(3):
        aggregator.advance()
    messages = [message for version in (3, 1, 2) for message in aggregator.delta(version)]
    assert deliver(follower, messages[::-1]) == []
    assert has(follower, aggregator, 0)
    follower.head_accepted(a_head(aggregator), 1.0)
    assert has(follower, aggregator, 3)


def test_a_message_can_wait_only_where_it_changes_nothing() -> None:
    aggregator, follower, broker = started()
    delta, head = f"ternbus/1/{FEDERATION}/all/delta/1/0", f"ternbus/1/{FEDERATION}/all/head"
    others = [f"ternbus/1/{FEDERATION}/{rest}" for rest in ("all/status", "all/snapshot/0/0", "down/pi/receipt")]

    def waits(*, is_occupied: bool) -> list[float]:
        return [follower.can_wait_s(topic, is_occupied=is_occupied) for topic in (delta, head, *others)]

    assert waits(is_occupied=False) == [HEAD_S, 0, 0, 0, 0]
    assert waits(is_occupied=True) == [OCCUPIED_S, OCCUPIED_S, 0, 0, 0]
    aggregator.advance()
    follower.head_accepted(a_head(aggregator), 1.0)  # its delta is missing
    assert waits(is_occupied=False) == waits(is_occupied=True) == [0] * 5
    broker.perform(follower, follower.time_reached(10.0), 10.0)
    assert follower.requests  # by name
    deliver(follower, aggregator.delta(1))
    assert has(follower, aggregator, 1)
    assert waits(is_occupied=False) == [HEAD_S, 0, 0, 0, 0]
    assert Follower(federation=FEDERATION).can_wait_s(delta, is_occupied=True) == 0  # it has no model yet


def test_deltas_that_come_before_the_first_head_are_kept() -> None:
    aggregator = ScriptedAggregator()
    follower, broker = connected()
    aggregator.advance()
    deliver(follower, aggregator.delta(1))
    broker.publish(aggregator.snapshot())
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 0.0), 0.0)
    assert has(follower, aggregator, 1)


def test_deltas_that_come_before_the_first_head_take_bounded_memory() -> None:
    aggregator = ScriptedAggregator()
    follower, _ = connected()
    aggregator.advance()
    topic, payload = aggregator.delta(1)[0]
    meta = parse(payload).meta
    for seq in range(1, 20):  # of 8 MiB each, as a broker may take
        large = build(
            aggregator.identity, federation=FEDERATION, sender="aggregator", kind="delta", seq=seq, meta=meta,
            body=bytes(8 << 20),
        )  # fmt: skip
        follower.part_arrived(topic, parse(large), 0.0)
    assert [frame.seq for _, frame in follower._before_head] == list(range(12, 20))


def test_an_early_delta_from_a_slot_that_is_not_its_own_is_forgotten() -> None:
    aggregator = ScriptedAggregator()
    follower, broker = connected()
    aggregator.advance()
    for _, payload in aggregator.delta(1):
        frame = parse(payload)
        follower.part_arrived(f"ternbus/1/{FEDERATION}/all/delta/3/{frame.part}", frame, 0.0)
    broker.publish(aggregator.snapshot())
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 0.0), 0.0)
    assert has(follower, aggregator, 0)


def test_a_delta_that_does_not_come_by_itself_is_asked_for_after_a_second_its_first_part_first() -> None:
    aggregator, follower, broker = started()
    aggregator.advance()
    broker.publish(aggregator.delta(1))
    broker.asked.clear()
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 10.0), 10.0)
    assert broker.asked == []
    assert follower.due_s() == 11.0
    broker.perform(follower, follower.time_reached(10.5), 10.5)
    assert broker.asked == []
    broker.perform(follower, follower.time_reached(11.0), 11.0)
    assert broker.asked == [topic for topic, _ in aggregator.delta(1)]
    assert broker.subscribed == set()
    assert has(follower, aggregator, 1)
    assert follower.due_s() is None


def test_only_the_missing_parts_of_a_delta_are_asked_for() -> None:
    aggregator, follower, broker = started()
    aggregator.advance()
    deliver(follower, aggregator.delta(1)[:1])
    broker.publish(aggregator.delta(1))
    broker.asked.clear()
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 1.0), 1.0)
    broker.perform(follower, follower.time_reached(2.0), 2.0)
    assert broker.asked == [topic for topic, _ in aggregator.delta(1)][1:]
    assert has(follower, aggregator, 1)


def test_a_delta_missing_30_s_after_it_was_asked_for_gives_way_to_a_snapshot() -> None:
    aggregator, follower, broker = started()
    for _ in range(2):
        aggregator.advance()
    broker.publish(aggregator.delta(2))
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 0.0), 0.0)
    broker.perform(follower, follower.time_reached(1.0), 1.0)
    broker.perform(follower, follower.time_reached(30.9), 30.9)
    assert has(follower, aggregator, 0)
    broker.publish(aggregator.new_snapshot())
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 30.9), 30.9)
    broker.perform(follower, follower.time_reached(31.0), 31.0)
    assert broker.logs == ["snapshot", "resync", "snapshot"]
    assert has(follower, aggregator, 2)


def test_a_head_with_another_digest_for_our_version_is_followed_from_its_snapshot_and_then_rested_from() -> None:
    aggregator, follower, broker = started()
    head = Head.from_meta(parse(aggregator.head(digest=bytes(32))[1]).meta)
    broker.perform(follower, follower.head_accepted(head, 1.0), 1.0)
    assert broker.logs == ["snapshot", "resync", "snapshot", "resync", "resting"]
    assert not follower.synced
    assert follower.due_s() == 61.0
    broker.perform(follower, follower.time_reached(61.0), 61.0)
    assert broker.logs[-3:] == ["snapshot", "resync", "resting"]
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 70.0), 70.0)
    assert has(follower, aggregator, 0)


def test_more_than_d_versions_behind_means_a_snapshot() -> None:
    aggregator, follower, broker = started()
    for _ in range(5):
        aggregator.advance()
    broker.publish(aggregator.new_snapshot())
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 1.0), 1.0)
    assert broker.logs == ["snapshot", "resync", "snapshot"]
    assert has(follower, aggregator, 5)


def test_a_snapshot_that_does_not_come_is_looked_for_in_the_other_place_and_then_rested_from() -> None:
    aggregator = ScriptedAggregator()
    follower, broker = connected()
    aggregator.advance()
    old = aggregator.snapshot()
    broker.publish(aggregator.delta(1))
    aggregator.new_snapshot()
    broker.silent = True
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 0.0), 0.0)
    broker.perform(follower, follower.time_reached(30.0), 30.0)
    assert broker.subscribed == {old[0][0]}
    broker.perform(follower, follower.time_reached(60.0), 60.0)
    assert broker.logs == ["snapshot-failed", "resting"]
    assert broker.subscribed == set()
    broker.silent = False
    broker.publish(old)
    broker.perform(follower, follower.time_reached(119.0), 119.0)
    assert follower.version is None
    for now in (120.0, 150.0, 151.0, 152.0):
        broker.perform(follower, follower.time_reached(now), now)
    assert has(follower, aggregator, 1)


def test_the_other_place_is_rested_from_where_it_has_the_next_snapshot_before_all_parts_have_come() -> None:
    aggregator = ScriptedAggregator()
    follower, broker = connected()
    aggregator.advance()
    old = aggregator.snapshot()
    aggregator.new_snapshot()
    broker.silent = True
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 0.0), 0.0)
    broker.perform(follower, follower.time_reached(30.0), 30.0)
    broker.perform(follower, deliver(follower, old[:1], 30.0), 30.0)
    aggregator.advance()
    new = aggregator.new_snapshot()
    assert [topic for topic, _ in new] == [topic for topic, _ in old]
    broker.perform(follower, deliver(follower, new[1:], 31.0), 31.0)
    assert broker.logs == ["snapshot-failed", "resting"]
    assert (broker.subscribed, follower.due_s()) == (set(), 91.0)


def test_a_snapshot_is_not_given_up_while_its_parts_keep_coming() -> None:
    aggregator = ScriptedAggregator()
    follower, broker = connected()
    broker.silent = True
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 0.0), 0.0)
    for number, message in enumerate(aggregator.snapshot(), start=1):
        broker.perform(follower, follower.time_reached(25.0 * number), 25.0 * number)
        deliver(follower, [message], 25.0 * number)
    assert has(follower, aggregator, 0)


@pytest.mark.parametrize("fault", ["schema", "digest", "length", "bound", "not finite"])
def test_a_snapshot_that_is_not_what_it_says_is_not_taken(fault: str) -> None:
    aggregator = ScriptedAggregator()
    if fault in {"bound", "not finite"}:
        aggregator.vectors[0][5] = 3e38 if fault == "bound" else np.nan
    follower, broker = connected()
    head = a_head(aggregator)
    if fault == "schema":
        head = Head.from_meta(parse(aggregator.head(schema=bytes(32))[1]).meta)
    elif fault == "digest":
        aggregator.snapshot_frames.clear()
        true, aggregator.vectors[0] = aggregator.vectors[0], aggregator.vectors[0] + 1
        for _, payload in aggregator.snapshot():
            meta = dict(parse(payload).meta)
        aggregator.vectors[0] = true
        meta["digest"] = bytes(32)
        frames = aggregator.cut("snapshot", meta, aggregator.schema.encoded + true.tobytes())
        place = [topic for topic, _ in aggregator.snapshot()]
        aggregator.snapshot_frames[0] = list(zip(place, frames, strict=True))
    elif fault == "length":
        named = head.snapshot
        longer = type(named)(version=0, parts=named.parts, content_bytes=named.content_bytes + 4, place=named.place)
        head = Head.from_meta(parse(aggregator.head(snapshot=longer)[1]).meta)
    broker.publish(aggregator.snapshot())
    broker.perform(follower, follower.head_accepted(head, 0.0), 0.0)
    assert follower.version is None
    assert broker.logs == ["snapshot-failed"]


def test_a_model_beyond_the_bound_is_rested_from_and_not_asked_for_again_and_again() -> None:
    aggregator = ScriptedAggregator()
    aggregator.vectors[0][5] = 3e38
    follower, broker = connected()
    broker.publish(aggregator.snapshot())
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 0.0), 0.0)
    broker.perform(follower, follower.time_reached(30.0), 30.0)
    assert broker.logs == ["snapshot-failed", "resting"]
    assert follower.due_s() == 90.0


def test_a_snapshot_newer_than_the_head_waits_for_its_head() -> None:
    aggregator = ScriptedAggregator()
    follower, broker = connected()
    old = a_head(aggregator)
    aggregator.advance()
    aggregator.snapshot_frames.clear()
    aggregator.snapshot_version = 1  # in the place that the old head names
    broker.publish(aggregator.snapshot())
    broker.perform(follower, follower.head_accepted(old, 0.0), 0.0)
    assert follower.version is None
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 1.0), 1.0)
    assert has(follower, aggregator, 1)


def test_a_delta_in_a_slot_that_is_not_its_own_or_far_ahead_is_refused() -> None:
    aggregator, follower, _ = started()
    for _ in range(6):
        aggregator.advance()
    frame = parse(aggregator.delta(1)[0][1])
    with pytest.raises(ProtocolError, match="wrong-slot"):
        follower.part_arrived(f"ternbus/1/{FEDERATION}/all/delta/2/0", frame, 0.0)
    topic, payload = aggregator.delta(6)[0]
    with pytest.raises(ProtocolError, match="far-ahead"):
        follower.part_arrived(topic, parse(payload), 0.0)


@pytest.mark.parametrize("kind", ["delta", "snapshot"])
def test_a_message_of_more_parts_than_the_model_needs_is_refused(kind: str) -> None:
    """Each of its parts would be asked for by name."""
    aggregator, follower, broker = started()
    if kind == "snapshot":
        follower, broker = connected()
        broker.perform(follower, follower.head_accepted(a_head(aggregator), 0.0), 0.0)
    else:
        aggregator.advance()
    topic, payload = (aggregator.snapshot() if kind == "snapshot" else aggregator.delta(1))[0]
    meta, most = parse(payload).meta, parts_max(a_head(aggregator).snapshot.content_bytes)
    about: dict[str, Any] = {"federation": FEDERATION, "sender": "aggregator", "kind": kind, "seq": 99, "meta": meta}
    for parts in (most + 1, PARTS_MAX):
        frame = parse(build(aggregator.identity, body=bytes(1024), parts=parts, **about))
        with pytest.raises(ProtocolError, match="too-long"):
            follower.part_arrived(topic, frame, 0.0)
    follower.part_arrived(topic, parse(build(aggregator.identity, body=bytes(1024), parts=most, **about)), 0.0)


def test_many_missing_deltas_are_requested_some_at_a_time_until_all_have_come() -> None:
    aggregator, follower, broker = started(slots=3000)
    for _ in range(300):
        aggregator.vectors.append(aggregator.vectors[0])
        aggregator.blocks.append(Block.of_float32(aggregator.schema, np.zeros(aggregator.schema.elements, np.float32)))
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 1.0), 1.0)
    follower.time_reached(2.0)
    assert len(follower.requests) == MESSAGES_MAX // 2
    broker.perform(follower, follower.time_reached(32.0), 32.0)  # they time out, and give way to a snapshot
    assert broker.logs[-1] == "snapshot"
    for version in range(1, 301):
        broker.publish(aggregator.delta(version))
    broker.perform(follower, follower.time_reached(40.0), 40.0)
    assert has(follower, aggregator, 300)


def test_many_parts_of_a_delta_are_requested_some_at_a_time_until_all_have_come() -> None:
    aggregator = ScriptedAggregator(frame_bytes=1400, schema=Schema.of({"w": (1000, 600)}))
    follower, broker = connected()
    aggregator.advance()
    broker.publish(aggregator.snapshot())
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 0.0), 0.0)
    assert len(aggregator.delta(1)) > 2 * REQUESTED_MAX
    broker.silent = True
    follower.time_reached(1.0)
    deliver(follower, aggregator.delta(1)[:1], 1.0)
    assert len(follower.requests) == REQUESTED_MAX
    broker.silent = False
    broker.publish(aggregator.delta(1))
    follower.disconnected()
    broker.perform(follower, follower.reconnected(2.0), 2.0)
    assert has(follower, aggregator, 1)


def test_a_snapshot_is_taken_where_it_is_smaller_than_the_deltas_up_to_it() -> None:
    for behind, logs in ((DELTAS_MAX, ["snapshot"]), (DELTAS_MAX + 1, ["snapshot", "resync", "snapshot"])):
        aggregator, follower, broker = started(slots=200)
        for _ in range(behind):
            aggregator.advance()
            broker.publish(aggregator.delta(aggregator.version))
        broker.publish(aggregator.new_snapshot())
        for now in (1.0, 2.0):
            broker.perform(follower, follower.head_accepted(a_head(aggregator), now), now)
            broker.perform(follower, follower.time_reached(now + 1), now + 1)
        assert broker.logs == logs
        assert has(follower, aggregator, behind)


def test_deltas_that_wait_for_an_earlier_one_take_bounded_memory() -> None:
    """The latest ones are dropped, and asked for when it is their turn."""
    aggregator, follower, broker = started(slots=20)
    for _ in range(15):
        aggregator.advance()
    follower._collector.bytes_max = 5 * len(b"".join(parse(payload).body for _, payload in aggregator.delta(1)))
    for version in range(2, 16):
        deliver(follower, aggregator.delta(version))
    assert sorted(follower._deltas) == [2, 3, 4, 5, 6]
    deliver(follower, aggregator.delta(1))
    assert sorted(follower._deltas) == [1, 2, 3, 4, 5]
    head = a_head(aggregator)
    for version in range(1, 16):
        broker.publish(aggregator.delta(version))
    for now in range(1, 10):
        broker.perform(follower, follower.head_accepted(head, now) if now == 1 else follower.time_reached(now), now)
    assert has(follower, aggregator, 15)
    assert follower._delta_bytes == 0


def test_an_old_delta_and_a_second_copy_change_nothing() -> None:
    aggregator, follower, _ = started(versions=1)
    assert deliver(follower, aggregator.delta(1)) == []
    aggregator.advance()
    deliver(follower, aggregator.delta(2) * 2)
    follower.head_accepted(a_head(aggregator), 0.0)
    assert has(follower, aggregator, 2)


def test_a_snapshot_part_that_nobody_asked_for_is_unsubscribed() -> None:
    aggregator, follower, _ = started()
    topic, payload = aggregator.snapshot()[0]
    assert follower.part_arrived(topic, parse(payload), 0.0) == [Unsubscribe(filters=(topic,))]
    follower.disconnected()
    assert follower.part_arrived(topic, parse(payload), 0.0) == []


def test_after_a_reconnect_what_is_missing_is_asked_for_again() -> None:
    aggregator = ScriptedAggregator()
    follower, broker = connected()
    broker.silent = True
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 0.0), 0.0)
    follower.disconnected()
    assert follower.due_s() is None
    broker.subscribed.clear()
    broker.silent = False
    broker.publish(aggregator.snapshot())
    broker.perform(follower, follower.reconnected(50.0), 50.0)
    assert has(follower, aggregator, 0)


def test_a_missing_delta_gets_its_second_of_grace_after_a_reconnect() -> None:
    aggregator, follower, broker = started()
    aggregator.advance()
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 0.0), 0.0)
    follower.disconnected()
    broker.perform(follower, follower.reconnected(50.0), 50.0)
    assert follower.due_s() == 51.0


def test_at_most_forty_topics_are_asked_for_at_once() -> None:
    requests = PartRequests()
    wanted = [f"t/{number}" for number in range(100)]
    assert requests.request(wanted, 0.0) == []
    assert requests.reconnected(0.0) == [Subscribe(filters=tuple(wanted[:40]))]
    assert requests.request(wanted, 0.0) == []
    assert requests.arrived("t/3", 1.0) == [Unsubscribe(filters=("t/3",)), Subscribe(filters=("t/40",))]
    assert requests.arrived("t/3", 1.0) == []
    assert "t/99" in requests
    requests.connected = False
    assert requests.cancel() == []
    assert not requests
    left = requests.reconnected(2.0)
    assert [type(action) for action in left] == [Unsubscribe]
    requests.request(["a"], 3.0)
    assert requests.cancel() == [Unsubscribe(filters=("a",))]


def test_the_digits_of_a_long_run_agree_with_ternary_deltas_too() -> None:
    aggregator, follower, broker = started()
    aggregator.codec = "ternary"
    rng = np.random.default_rng(7)
    for _ in range(20):
        aggregator.advance(rng.normal(size=aggregator.schema.elements).astype(np.float32) / np.float32(50))
        if aggregator.version - aggregator.snapshot_version >= 2:
            broker.publish(aggregator.new_snapshot())
        deliver(follower, aggregator.delta(aggregator.version))
        follower.head_accepted(a_head(aggregator), 0.0)
        assert has(follower, aggregator, aggregator.version)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_lost_doubled_or_disordered_the_newest_version_is_reached(data: st.DataObject) -> None:
    """The broker keeps what is retained; live parts get lost, come twice, and in any order."""
    aggregator = ScriptedAggregator()
    follower, broker = connected()
    broker.publish(aggregator.snapshot())
    now = 0.0
    heads = [a_head(aggregator)]
    for _ in range(data.draw(st.integers(1, 8), label="versions")):
        aggregator.advance()
        parts = aggregator.delta(aggregator.version)
        broker.publish(parts)
        if aggregator.version - aggregator.snapshot_version >= 2:
            broker.publish(aggregator.new_snapshot())
        live = data.draw(st.lists(st.sampled_from(range(len(parts))), max_size=5), label="live")
        for topic, payload in (parts[part] for part in live):
            with suppress(ProtocolError):  # too far ahead of the last head that arrived
                broker.perform(follower, follower.part_arrived(topic, parse(payload), now), now)
        heads.append(a_head(aggregator))
        if data.draw(st.booleans(), label="head arrives"):
            broker.perform(follower, follower.head_accepted(heads[-1], now), now)
        if data.draw(st.booleans(), label="reconnect"):
            follower.disconnected()
            broker.subscribed.clear()
            broker.perform(follower, follower.reconnected(now), now)
        now += data.draw(st.floats(0, 40), label="time")
        broker.perform(follower, follower.time_reached(now), now)
        if follower.version is not None:
            assert has(follower, aggregator, follower.version)
    broker.perform(follower, follower.head_accepted(heads[-1], now), now)
    for _ in range(20):
        due = follower.due_s()
        if due is None:
            break
        now = max(now, due)
        broker.perform(follower, follower.time_reached(now), now)
    assert has(follower, aggregator, aggregator.version)
    assert all(earlier.version <= later.version for earlier, later in pairwise(heads))


def initial_model_of(aggregator: ScriptedAggregator) -> InitialModel:
    """What a task makes of itself where the federation began with its model."""
    return InitialModel(tensors=to_tensors(aggregator.schema, aggregator.vectors[0].copy()))


def with_initial_model(aggregator: ScriptedAggregator, initial_model: InitialModel) -> tuple[Follower, Broker]:
    follower, broker = Follower(federation=FEDERATION, initial_model=initial_model), Broker()
    broker.perform(follower, follower.reconnected(0.0), 0.0)
    broker.publish(aggregator.snapshot())
    return follower, broker


def test_the_tasks_own_first_model_is_not_fetched() -> None:
    aggregator = ScriptedAggregator()
    follower, broker = with_initial_model(aggregator, initial_model_of(aggregator))
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 0.0), 0.0)
    assert has(follower, aggregator, 0)
    assert follower.synced
    assert broker.asked == []
    assert follower.initial_model is None  # it is as large as the model


def test_from_the_tasks_own_first_model_the_deltas_lead_to_the_head() -> None:
    aggregator = ScriptedAggregator()
    follower, broker = with_initial_model(aggregator, initial_model_of(aggregator))
    for _ in range(3):
        aggregator.advance()
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 0.0), 0.0)
    deliver(follower, [message for version in (1, 2, 3) for message in aggregator.delta(version)])
    assert has(follower, aggregator, 3)
    assert broker.asked == []


@pytest.mark.parametrize("versions", [0, 2])
def test_a_federation_that_began_with_another_model_has_it_fetched(versions: int) -> None:
    aggregator = ScriptedAggregator()
    other = initial_model_of(aggregator)
    next(iter(other.tensors.values())).flat[0] += 1
    follower, broker = with_initial_model(aggregator, other)
    for _ in range(versions):
        aggregator.advance()
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 0.0), 0.0)
    for version in range(1, versions + 1):
        for topic, payload in aggregator.delta(version):
            broker.perform(follower, follower.part_arrived(topic, parse(payload), 0.0), 0.0)
    assert broker.logs[0] == "other-beginning"
    assert broker.logs.count("snapshot") == 1
    for version in range(1, versions + 1):  # the first came before there was anything to apply it to
        deliver(follower, aggregator.delta(version))
    assert has(follower, aggregator, versions)


def test_where_a_later_snapshot_is_named_it_is_fetched() -> None:
    aggregator = ScriptedAggregator()
    initial_model = initial_model_of(aggregator)
    for _ in range(2):
        aggregator.advance()
    aggregator.snapshot_version = 2
    follower, broker = with_initial_model(aggregator, initial_model)
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 0.0), 0.0)
    assert has(follower, aggregator, 2)
    assert follower.initial_model is None


def test_a_task_whose_tensors_are_not_the_federations_begins_with_a_snapshot() -> None:
    aggregator = ScriptedAggregator()
    initial_model = InitialModel(tensors={"another": np.zeros(3, dtype=np.float32)})
    follower, broker = with_initial_model(aggregator, initial_model)
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 0.0), 0.0)
    assert has(follower, aggregator, 0)
    assert broker.asked != []
