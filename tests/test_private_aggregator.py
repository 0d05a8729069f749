"""Private updates in the aggregator's core, over its real ledger, with the cores of helpers in process."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from support.set_world import World, content_of, truth
from support.small_world import follow, initial_model, preverifier_of, receipts, ternary_block
from ternbus.aggregator.core import events
from ternbus.aggregator.store import set_rows
from ternbus.aggregator.sums.decode import decode
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.merge_log import DroppedUpdate
from ternbus.broker.protocol.schema import to_vector
from ternbus.broker.sums.masks import BOX_BYTES
from ternbus.broker.sums.words import DENSE_STEPS

SOMEBODY = Identity(bytes([1]) * 32)


def unlogged(world: World) -> list[DroppedUpdate]:
    """What was dropped and is in no entry of the log of merges yet."""
    return world.core._versions.dropped


# --- from updates to a version


@pytest.mark.parametrize("helpers", [("h-1",), ("h-1", "h-2", "h-3")])
def test_the_updates_of_one_context_become_a_version_that_has_their_sum(helpers: tuple[str, ...]) -> None:
    world = World(*helpers, downlink__codec="float32")
    devices = world.begin()
    world.give_all(devices)
    assert [step for _, step in world.asked] == ["prepare"] * len(helpers)
    world.settle()
    assert [step for _, step in world.asked] == ["prepare"] * len(helpers) + ["open"] * len(helpers)
    assert world.version == 1
    terms = world.terms_of[0]
    total = truth(terms, [content_of(terms, f"{each.name} 0") for each in devices])
    expected = to_vector(world.schema, initial_model()) + decode(terms, world.schema, total, 6).block.value()
    assert np.allclose(world.core.model.published, expected, atol=1e-6)
    assert world.merged() == {(each.name, each.seq): 1 for each in devices}
    assert follow(world.retained, world.identity.public) == (1, world.core.model.digest)


def test_the_log_names_the_set_as_helpers_were_asked_for_it() -> None:
    world = World()
    world.give_all(world.begin())
    world.settle()
    (merged,) = world.entries()[1].sets
    assert (merged.context, merged.base, merged.weight) == (world.contexts[0], 0, 1.0)
    assert world.helpers["h-1"].records.state_of(merged.digest) == "opened"
    assert world.entries()[1].updates == ()


def test_scales_follow_what_devices_state() -> None:
    world = World()
    devices = world.begin()
    terms = world.terms_of[0]
    for device in devices:
        ternary, plain = content_of(terms, device.name)
        buckets = plain[terms.dense + 1 :].reshape(-1, 7)
        buckets[:] = 0
        buckets[0, 4] = buckets[1, 1] = 1
        world.give(device, 0, (ternary, plain))
    world.settle()
    assert world.terms_of[1].scales == (terms.scales[0] * 2, terms.scales[1] / 4)


def test_sets_of_several_bases_are_merged_together_each_with_its_own_discount() -> None:
    world = World(merge__buffer_size=6, staleness__discount="polynomial")
    devices = world.begin(9)
    world.give_all(devices[:6])
    world.settle()
    world.give_all(devices[6:], 0)
    world.give_all(devices[:3], 1)
    world.settle()
    assert world.version == 2
    by_base = {each.base: each for each in world.entries()[2].sets}
    assert by_base.keys() == {0, 1}
    assert by_base[1].weight == pytest.approx(0.5)
    assert by_base[0].weight == pytest.approx(0.5 / 2**0.5)
    row = world.ledger.db.execute("SELECT updates, staleness_mean, staleness_max FROM versions WHERE version = 2")
    assert row.fetchone() == (6, 0.5, 1)


def test_an_update_in_parts_is_asked_for_by_its_first_part() -> None:
    world = World(model={"w": np.ones((60, 100), np.float32)})
    devices = world.begin()
    for number, device in enumerate(devices):
        frames = device.private_update(world, 0, frame_bytes=2000 if number else 2500)
        assert len(frames) > 1
        answers = receipts(world.receive(device.topic("update"), *reversed(frames)))
        assert answers[-1].outcome == "accepted"
    world.settle()
    assert world.version == 1


def test_the_bodies_of_updates_go_with_their_merge_and_sums_with_the_snapshot() -> None:
    world = World(downlink__slots=4)
    devices = world.begin()
    count = "SELECT count(*) FROM updates WHERE segment IS NOT NULL"
    world.give_all(devices)
    assert world.ledger.db.execute(count).fetchone() == (6,)
    world.settle()
    assert world.ledger.db.execute(count).fetchone() == (0,)
    assert world.ledger.db.execute("SELECT count(*) FROM private_updates").fetchone() == (0,)
    assert world.ledger.db.execute("SELECT merged, length(sum) > 0 FROM sets").fetchall() == [(1, 1)]
    world.give_all(devices)
    world.settle()
    world.beside.work()
    world.tick()
    world.give_all(devices[:1])  # the ledger lets go at its next write
    assert world.ledger.db.execute("SELECT count(*) FROM sets").fetchone() == (0,)


def test_a_snapshot_is_looked_for_on_the_broker_though_its_terms_were_published_before() -> None:
    """Terms that stay as they are have no acknowledgement to wait for; all are asked for by name."""
    world = World(downlink__slots=1)
    devices = world.begin()
    for _ in range(2):
        world.give_all(devices)
        world.settle()
    assert world.head.snapshot.version == world.version == 2
    parts = {topic for topic in world.core.awaited if "/snapshot/" in topic}
    assert parts == world.core.awaited != set()
    done = [each for topic in sorted(parts) for each in world.handle(events.Published(topic=topic))]
    asked = {topic for each in done if isinstance(each, events.Subscribe) for topic in each.filters}
    assert asked == parts | {topic for topic in world.retained if "/terms/" in topic} > parts


# --- acceptance


def test_other_updates_than_private_ones_are_invalid_and_the_other_way_round() -> None:
    world = World()
    devices = world.begin()
    (receipt,) = world.send(devices[0], ternary_block(world.schema, 1), 0)
    assert (receipt.outcome, receipt.reason.partition(":")[0]) == ("invalid", "private-only")
    assert "--private" in receipt.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"context": bytes(32)}, "wrong-context"),
        ({"boxes": ()}, "'boxes' is not"),
        ({"boxes": (bytes(BOX_BYTES), bytes(BOX_BYTES))}, "bad-boxes"),
        ({"boxes": (bytes(BOX_BYTES - 1),)}, "bad-boxes"),
        ({"min": 32}, "bad-min"),
        ({"min": 1}, "'min'"),
        ({"sealed": False}, "bad-private"),
        ({"encoding": "zstd"}, "bad-private"),
        ({"samples": 2}, "bad-private"),
        ({"metrics": {"epsilon": 1.0, "loss": 0.5}}, "no metrics but epsilon"),
        ({"body": b""}, "bad-length"),
        ({"body": b"\xff" * 8 * 73}, "bad-words"),
        ({"seal_to": SOMEBODY.public}, "bad-seal"),
    ],
)
def test_a_private_update_that_is_not_its_base_s_is_invalid(changes: dict[str, Any], reason: str) -> None:
    world = World()
    (device, *_) = world.begin(1)
    receipt = world.give(device, 0, **changes)
    assert receipt.outcome == "invalid"
    assert reason in receipt.reason
    assert world.give(device, 0, metrics={"epsilon": 1.0}, min=31).outcome == "accepted"
    assert world.give(device, 0).outcome == "duplicate"


def test_nothing_is_unsealed_of_an_update_whose_header_is_refused() -> None:
    world = World()
    (device, *_) = world.begin(1)
    receipt = world.give(device, 0, context=bytes(32), body=b"", seal_to=SOMEBODY.public)
    assert receipt.reason.startswith("wrong-context")


def test_an_update_on_a_version_without_terms_is_invalid() -> None:
    world = World()
    (device, *_) = world.begin(1)
    del world.core.sums.contexts[0]  # type: ignore[union-attr]
    assert world.give(device, 0).reason.startswith("wrong-context")


def test_a_private_update_is_authenticated_ahead_and_its_words_are_read_in_the_core() -> None:
    world = World()
    (device, *_) = world.begin(1)
    (frame,) = device.private_update(world, 0)
    opened = preverifier_of(world).open(device.topic("update"), frame)
    assert opened is not None
    assert (opened.content, opened.decoded_bytes) == (None, 0)
    event = events.MessageArrived(topic=device.topic("update"), payload=frame, opened=opened)
    assert receipts(world.handle(event))[0].outcome == "accepted"


# --- which updates become sets


def test_a_group_that_is_too_small_waits_and_is_dropped_when_it_is_stale() -> None:
    world = World(staleness__max=1)
    devices = world.begin(8)
    world.give_all(devices[:6])
    world.settle()
    world.give_all(devices[6:], 0)
    world.give_all(devices[:6], 1)
    world.settle()
    assert (world.version, world.merged().get((devices[6].name, devices[6].seq))) == (2, None)
    assert world.dropped() == {}
    world.give_all(devices[:6], 2)
    world.settle()
    reasons = world.dropped()
    assert reasons.keys() == {(each.name, each.seq) for each in devices[6:]}
    assert all(reason.startswith("below-min: 2 on version 0") for reason in reasons.values())
    assert world.ledger.db.execute("SELECT count(*) FROM updates WHERE merged = -1").fetchone() == (2,)


def test_a_group_waits_for_devices_that_would_be_left_alone_but_not_for_ever() -> None:
    world = World(merge__buffer_size=6, merge__max_wait_s=30.0)
    devices = world.begin(8)
    world.tick(10.0)  # the broker has delivered all statuses
    for device in devices:
        world.say(device, "training", 0)
    world.give_all(devices[:6])
    assert world.asked == []
    world.give_all(devices[6:7])
    assert world.asked == []
    world.give_all(devices[7:])
    assert [step for _, step in world.asked] == ["prepare"]
    world.settle()
    assert len(world.entries()[-1].sets[0].members) == 8
    for device in devices:
        world.say(device, "training", 1)
    world.give_all(devices[:6])
    world.tick(31.0)
    world.settle()
    assert len(world.entries()[-1].sets[0].members) == 6


def test_all_that_are_online_have_contributed() -> None:
    world = World()
    devices = world.begin(4)
    world.tick(10.0)
    for device in devices:
        world.say(device, "training", 0)
    world.give_all(devices[:3])
    world.say(devices[0], "idle", 0)
    assert world.asked == []
    world.say(devices[3], "offline", 0)
    assert [step for _, step in world.asked] == ["prepare"]


def test_where_all_that_was_sent_is_dropped_a_version_of_no_update_lets_devices_go_on() -> None:
    world = World()
    devices = world.begin(3)
    world.tick(10.0)
    for device in devices:
        world.say(device, "idle", 0)
    content = content_of(world.terms_of[0], "x")
    content[1][0] = 5 * DENSE_STEPS
    for device in devices:
        world.give(device, 0, content)
    world.settle()
    world.tick(10.0)
    assert world.version == 1
    assert len(world.dropped()) == 3
    assert world.ledger.db.execute("SELECT updates FROM versions WHERE version = 1").fetchone() == (0,)
    world.give_all(devices)
    world.settle()
    assert (world.version, len(world.merged())) == (2, 3)


def test_it_does_so_after_a_restart_too_once_the_broker_has_delivered_all_statuses() -> None:
    world = World()
    devices = world.begin(3)
    world.tick(10.0)
    content = content_of(world.terms_of[0], "x")
    content[1][0] = 5 * DENSE_STEPS
    for device in devices:
        world.give(device, 0, content)
    world.tick(40.0)
    world.settle()
    assert world.version == 0  # nobody is known to be online
    world.restart()
    for device in devices:
        world.say(device, "idle", 0)
    while world.version == 0:
        assert world.core.deadline is not None
        assert world.now < world.core.deadline <= world.now + 5.0
        world.tick(world.core.deadline - world.now)
    assert len(world.dropped()) == 3


# --- sums that cannot be


def test_a_device_beyond_the_range_spoils_its_set_which_is_dropped_and_counted() -> None:
    world = World()
    devices = world.begin()
    content = content_of(world.terms_of[0], "x")
    content[1][1] = -(2**30)
    world.give(devices[0], 0, content)
    world.give_all(devices[1:])
    world.settle()
    (reason,) = {each.reason for each in unlogged(world)}
    assert reason.startswith("sum-out-of-range: the sum of a dense element")
    assert "helpers h-1" in reason
    assert world.version == 0
    assert world.merged() == {}
    rows = world.ledger.db.execute("SELECT count(*) FROM private_updates WHERE why LIKE 'sum-out-of-range%'")
    assert rows.fetchone() == (6,)
    assert set_rows.status(world.ledger.db)["spoiled"] == {each.name: 1 for each in devices}
    assert world.ledger.db.execute("SELECT count(*) FROM sets").fetchone() == (0,)


@pytest.mark.parametrize("body", [b"", bytes(8), None])
def test_a_wrong_sum_of_masks_is_found_and_the_set_dropped(body: bytes | None) -> None:
    world = World("h-1", "h-2")
    devices = world.begin()
    world.lie = ("h-2", body)
    world.give_all(devices)
    world.settle()
    assert (world.version, len(unlogged(world))) == (0, 6)
    world.lie = None
    world.tick(31.0)
    world.settle()
    world.member("late")
    assert world.give(devices[0], 0).outcome == "duplicate"


# --- refusals


def test_updates_that_a_helper_names_are_dropped_and_the_rest_is_opened() -> None:
    world = World("h-1", "h-2", roster="own")
    devices = world.begin()
    for helper in world.helpers.values():
        for device in devices[1:] if helper.name == "h-2" else devices:
            helper.records.admit(device.name, device.identity.public)
    world.give_all(devices)
    world.settle()
    assert world.version == 1
    assert world.merged().keys() == {(each.name, each.seq) for each in devices[1:]}
    ((name, reason),) = world.dropped().items()
    assert name == (devices[0].name, devices[0].seq)
    assert reason.startswith("refused: helper h-2: not-admitted")
    steps = [step for helper, step in world.asked if helper == "h-1"]
    assert steps == ["prepare", "abandon", "prepare", "open"]
    assert world.ledger.db.execute("SELECT state FROM sets").fetchall() == [("opened",)]


def test_devices_whose_updates_are_all_refused_get_no_version_after_the_other() -> None:
    """As before a helper's operator has admitted anybody: each version of no update has them train again."""
    world = World(roster="own")
    devices = world.begin()
    versions: list[int] = []
    for _ in range(100):
        is_new = world.version not in versions
        if is_new:
            versions.append(world.version)
        for device in devices:
            if is_new:
                assert world.give(device).outcome == "accepted"
            world.say(device, "idle", world.version)
        world.tick(1.0)
        world.settle()
    assert world.merged() == {}
    assert len(world.dropped()) >= 6
    assert 5 <= len(versions) <= 12


def test_a_refusal_that_names_nobody_drops_the_set() -> None:
    world = World()
    devices = world.begin()
    world.down.add("h-1")
    world.give_all(devices)
    world.refuse("h-1", "old-card", "somebody-else")
    world.settle()
    assert world.version == 0
    assert [each.reason for each in unlogged(world)] == ["refused: helper h-1: old-card"] * 6


def test_a_refusal_at_the_second_step_drops_the_set_for_good() -> None:
    world = World("h-1", "h-2")
    devices = world.begin()
    world.lose = lambda topic: topic.endswith("h-2/ask") and world.asked[-1][1] == "open"
    world.give_all(devices)
    world.settle()
    assert world.states() == ["opening"]
    world.lose = lambda topic: False
    world.refuse("h-2", "old-card")
    assert world.states() == []
    assert len(unlogged(world)) == 6
    assert "abandon" not in {step for _, step in world.asked}


# --- helpers that do not answer


def test_a_silent_helper_is_asked_again_ever_more_rarely() -> None:
    world = World()
    devices = world.begin()
    world.down.add("h-1")
    world.give_all(devices)
    world.settle()
    moments = []
    for _ in range(2000):
        before = len(world.asked)
        world.tick(1.0)
        world.settle()
        if len(world.asked) > before:
            moments.append(world.now)
    gaps = [round(later - earlier) for earlier, later in pairwise(moments)]
    assert gaps[:5] == [10, 20, 40, 80, 160]
    assert set(gaps[5:]) == {300}
    assert world.core.deadline is not None


def test_a_helper_that_comes_online_is_asked_at_once() -> None:
    world = World()
    devices = world.begin()
    world.cut_helper("h-1")
    world.give_all(devices)
    world.settle()
    assert (world.version, len(world.asked)) == (0, 1)
    world.restart_helper("h-1")
    assert world.version == 1


def test_what_was_not_answered_is_asked_again_after_a_new_connection() -> None:
    world = World()
    devices = world.begin()
    world.lose = lambda topic: topic.endswith("/ask")
    world.give_all(devices)
    world.settle()
    world.lose = lambda topic: False
    world.connect()
    world.settle()
    assert world.version == 1


def test_without_a_connection_nobody_is_asked() -> None:
    world = World()
    devices = world.begin()
    world.handle(world.disconnected)
    world.give_all(devices)
    assert world.asked == []
    assert world.states() == ["made"]
    world.connect()
    world.settle()
    assert world.version == 1


def test_a_set_that_is_opened_does_not_wait_for_ever_for_one_that_is_not() -> None:
    world = World("h-1", merge__max_wait_s=30.0, merge__buffer_size=3)
    devices = world.begin(6)
    world.give_all(devices[:3])
    world.lose = lambda topic: topic.endswith("/answer")
    world.settle()
    first = world.states()
    world.lose = lambda topic: False
    world.give_all(devices[3:])
    world.settle()
    assert first == ["made"]
    world.tick(31.0)
    world.settle()
    assert world.version >= 1
    assert len(world.merged()) == 6


def test_a_set_is_added_up_once_and_masks_are_taken_from_its_sum_only() -> None:
    """A sum of a part of its updates, or of none, would be merged as if it were of all."""
    world = World()
    world.give_all(world.begin())
    sets = world.core._updates.sets
    assert sets is not None
    (found,) = sets.in_flight
    with pytest.raises(ValueError, match="broadcast"):
        found.take_answer("h-1", world.terms_of[0].layout.zeros().tobytes())
    found.begin_opening(b"secret")
    with pytest.raises(ValueError, match="6 updates of a set have no content"):
        found.begin_opening(b"secret")


# --- revocation


def test_a_revoked_device_is_taken_out_of_groups_and_of_sets_that_are_not_opening() -> None:
    world = World()
    devices = world.begin(7)
    world.give_all(devices[:2])
    world.revoke(devices[0].name)
    assert len(unlogged(world)) == 1
    world.down.add("h-1")
    world.give_all(devices[2:])
    world.settle()
    assert world.states() == ["made"]
    world.revoke(devices[1].name)
    assert sorted(world.states()) == ["abandoned", "made"]  # the others are due again
    world.down.clear()
    world.tick(60.0)
    world.settle()
    assert world.version == 1
    assert world.merged().keys() == {(each.name, each.seq) for each in devices[2:]}
    assert {name for name, _ in world.dropped()} == {devices[0].name, devices[1].name}
    assert set(world.dropped().values()) == {"revoked"}
    steps = [step for _, step in world.asked]
    assert steps.index("abandon") < len(steps) - 1 - steps[::-1].index("prepare")


def test_what_helpers_were_asked_to_open_stays_and_what_the_operator_keeps_too() -> None:
    world = World()
    devices = world.begin()
    world.give_all(devices)
    world.lose = lambda topic: topic.endswith("/ask")
    world.settle()
    assert world.states() == ["opening"]
    world.revoke(devices[0].name)
    world.lose = lambda topic: False
    world.tick(60.0)
    world.settle()
    assert len(world.merged()) == 6
    world.give_all(devices[1:3])
    world.revoke(devices[1].name, keep=True)
    world.give_all(devices[3:])
    world.tick(60.0)
    world.settle()
    assert len(world.merged()) == 11
