"""How a federation with private sums stops and is closed: what helpers can open is opened, the rest is dropped."""

import pytest

from support.set_world import World
from support.small_world import saved
from ternbus.aggregator.core import events, records
from ternbus.broker.protocol.messages import CLOSED, PAUSED


def test_a_stop_merges_nothing_and_the_next_start_goes_on() -> None:
    world = World()
    devices = world.begin()
    world.give_all(devices[:4])
    world.handle(events.StopRequested())
    world.tick(100.0)
    assert (world.asked, world.version) == ([], 0)
    world.restart()
    world.give_all(devices[4:])
    world.tick(10.0)  # the broker has delivered all statuses
    world.settle()
    assert len(world.merged()) == 6


def closing(world: World, state: str = CLOSED) -> None:
    world.handle(events.StateRequested(state=state, request=7))
    assert saved(world.last, records.RequestDone)


def test_a_federation_that_holds_nothing_closes_at_once() -> None:
    world = World()
    world.begin()
    closing(world)
    assert world.head.state == CLOSED
    closing(world)
    assert world.head.state == CLOSED


def test_closing_opens_what_it_can_and_drops_what_is_too_small() -> None:
    world = World(merge__buffer_size=8)
    devices = world.begin(7)
    world.give_all(devices[:5])
    assert world.asked == []
    closing(world)
    assert world.head.state == PAUSED
    assert world.give(devices[6], 0).reason == "closed"
    closing(world)  # once more
    world.settle()
    assert (world.version, world.head.state, len(world.merged())) == (1, CLOSED, 5)


def test_closing_names_what_it_drops_in_a_last_version() -> None:
    world = World()
    devices = world.begin(2)
    world.give_all(devices)
    closing(world)
    assert (world.version, world.head.state, len(world.dropped())) == (1, CLOSED, 2)


@pytest.mark.parametrize("step", ["prepare", "open"])
def test_closing_waits_for_helpers_and_gives_up_after_a_while(step: str) -> None:
    world = World(private__close_wait_s=100.0)
    devices = world.begin()
    world.lose = lambda topic: topic.endswith("/ask") and world.asked[-1][1] == step
    world.give_all(devices)
    world.settle()
    closing(world)
    world.tick(50.0)
    world.restart()  # the wait begins anew
    world.settle()
    world.tick(99.0)
    world.settle()
    assert (world.version, world.head.state) == (0, PAUSED)
    world.tick(1.1)
    assert (world.version, world.head.state) == (1, CLOSED)
    assert len(world.dropped()) == 6
    assert all(reason.startswith("helper-lost: no answer of h-1") for reason in world.dropped().values())
    assert ("h-1", "abandon") in world.asked or step == "open"


def test_a_federation_that_closes_can_be_opened_again() -> None:
    world = World()
    devices = world.begin()
    world.down.add("h-1")
    world.give_all(devices)
    closing(world)
    closing(world, "open")
    assert world.head.state == "open"
    world.restart()
    world.down.clear()
    world.tick(60.0)
    world.settle()
    assert (world.version, world.head.state) == (1, "open")


def test_what_a_helper_refuses_while_the_federation_closes_still_makes_a_set_of_the_rest() -> None:
    world = World(roster="own")
    devices = world.begin()
    for device in devices[1:]:
        world.helpers["h-1"].records.admit(device.name, device.identity.public)
    world.down.add("h-1")
    world.give_all(devices)
    closing(world)
    world.down.clear()
    world.tick(60.0)
    world.settle()
    assert (world.head.state, len(world.merged()), len(world.dropped())) == (CLOSED, 5, 1)


def test_a_sum_that_waits_for_another_one_while_the_federation_closes_keeps_nobody_busy() -> None:
    world = World(merge__buffer_size=3, merge__max_wait_s=30.0, private__close_wait_s=500.0)
    devices = world.begin()
    world.give_all(devices[:3])
    world.lose = lambda topic: topic.endswith("/ask")
    world.give_all(devices[3:])
    world.settle()
    (first,) = world.ledger.db.execute("SELECT digest FROM sets ORDER BY rowid LIMIT 1").fetchone()
    world.lose = lambda topic: topic.endswith("/ask") and first not in world.published[-1].payload
    world.tick(20.0)
    world.settle()
    assert world.states() == ["opened", "made"]
    closing(world)
    for _ in range(50):
        due = world.core.deadline
        assert due is not None
        assert due > world.now
        world.tick(due - world.now)
    assert (world.head.state, len(world.merged()), len(world.dropped())) == (CLOSED, 3, 3)
