"""What the broker retains: heads, deltas and snapshots, that a device can follow at every moment."""

from collections.abc import Callable

import numpy as np
import pytest

from support.small_world import (
    LAB,
    Bench,
    Device,
    float32_block,
    follow,
    place,
    published,
    reconfigure,
    ternary_block,
)
from ternbus.aggregator.core import events
from ternbus.aggregator.core.frames import FrameWriter
from ternbus.aggregator.settings import LimitSettings, Settings
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import Block

HEAD = topics.head(LAB)
Make = Callable[..., Bench]


def test_larger_frames_leave_as_many_parts_unasked() -> None:
    """A device that has not seen the new head would send parts that are dropped, and wait for a minute."""
    schema = Schema.of({"w": (1_000_000,)})
    found = []
    for size in (122_880, 2**21):
        settings = Settings(federation="lab", broker="mqtt://x", limits=LimitSettings(frame_bytes=size))
        found.append(FrameWriter(settings=settings, identity=Identity(bytes(32)), schema=schema, seq=0).direct_parts)
    assert found == [34, 34]


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
    bench = make(merge__buffer_size=1, downlink__slots=1, downlink__codec="float32", frame_bytes=1600)
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
    pi = Device("p" * 64, bench.schema, seq=2**62 - 1)
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


def test_a_head_of_ours_that_we_do_not_know_means_that_we_are_an_older_copy(make: Make) -> None:
    bench = make(merge__buffer_size=1)
    pi = bench.join("pi")
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    newer = bench.core._frames.head(
        version=7, digest=bench.core.model.digest, snapshot=bench.core.published.snapshot, state="open", plan={}
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
