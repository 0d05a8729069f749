"""Merges, as the core makes them: when, of which updates, and by what weights."""

from collections.abc import Callable

import numpy as np
import pytest

from support.small_world import (
    Bench,
    float32_block,
    follow,
    heads,
    place,
    saved,
    ternary_block,
)
from ternbus.aggregator.core import events, records
from ternbus.broker.protocol.messages import Status
from ternbus.broker.protocol.ternary import Block

Make = Callable[..., Bench]


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


@pytest.mark.parametrize("restarted", [False, True])
def test_a_device_that_hangs_is_not_waited_for_after_five_of_its_usual_times(make: Make, restarted: bool) -> None:
    bench = make(merge__buffer_size=3, merge__max_wait_s=1e6)
    bench.tick(5.0)
    pi, hangs = bench.join("pi"), bench.join("hangs")
    for device in (pi, hangs):
        bench.receive(device.topic("status"), device.status("training"))
    for version in range(3):  # one in a minute
        bench.tick(60.0)
        for device in (pi, hangs):
            bench.send(device, ternary_block(bench.schema, version), version)
    assert bench.version == 3
    bench.tick(2.0)  # what was observed is saved
    if restarted:
        bench.restart()
        bench.start()
        for device in (pi, hangs):
            bench.receive(device.topic("status"), device.status("training"))
    began = bench.now
    bench.tick(60.0)
    bench.send(pi, ternary_block(bench.schema, 3), 3)
    while bench.version == 3:
        assert bench.core.deadline is not None
        bench.now = max(bench.now, bench.core.deadline)
        bench.tick()
    assert bench.now == pytest.approx(began + 300.0, abs=3.0)
    bench.tick(60.0)
    bench.send(pi, ternary_block(bench.schema, 4), 4)
    assert bench.version == 5  # nor for the next version
    bench.receive(hangs.topic("status"), hangs.status("training"))
    bench.tick(60.0)
    bench.send(pi, ternary_block(bench.schema, 5), 5)
    assert bench.version == 5  # it is back
    bench.send(hangs, ternary_block(bench.schema, 6), 4)
    assert bench.version == 6


def test_a_device_that_says_that_its_work_fails_is_not_waited_for_until_it_tries_again(make: Make) -> None:
    bench = make(merge__buffer_size=3, merge__max_wait_s=1e6)
    bench.tick(5.0)
    pi, fails = bench.join("pi"), bench.join("fails")
    for device in (pi, fails):
        bench.receive(device.topic("status"), device.status("training"))
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    assert bench.version == 0
    failing = Status(state="idle", session=1, failing="NaN in the data")
    bench.receive(fails.topic("status"), fails.frame("status", failing.meta()))
    assert bench.version == 1
    bench.send(pi, ternary_block(bench.schema, 2), 1)
    assert bench.version == 2
    bench.receive(fails.topic("status"), fails.status("training"))
    bench.send(pi, ternary_block(bench.schema, 3), 2)
    assert bench.version == 2


def test_a_device_whose_usual_time_is_not_known_is_waited_for(make: Make) -> None:
    bench = make(merge__buffer_size=3, merge__max_wait_s=1e6)
    bench.tick(5.0)
    pi, first = bench.join("pi"), bench.join("first")
    for device in (pi, first):
        bench.receive(device.topic("status"), device.status("training"))
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    bench.tick(900_000.0)
    assert bench.version == 0
    bench.send(first, ternary_block(bench.schema, 2), 0)
    assert bench.version == 1


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
    pi, judge = bench.join("pi"), bench.join("judge", evaluator=True)
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
