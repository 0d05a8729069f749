"""A broker that acknowledges a retained message and loses it: a device that waits for it trains on, in virtual time.

The device's core and the aggregator's are the true ones. In between is a broker that stores, delivers and loses.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from support import core_device
from support.small_world import FRAME_BYTES, LAB, SHAPES, Bench
from ternbus.aggregator.core import events as aggregator_events
from ternbus.aggregator.core.retained import ASK_S, LOOK_S, RETRY_S
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import parse
from ternbus.edge.core import actions, events
from ternbus.edge.core.core import Core
from ternbus.edge.core.state import State

HEAD, STATUS = topics.head(LAB), topics.status(LAB)
TRAINING_S = 20.0
NOTICED_S = LOOK_S + 2 * ASK_S + RETRY_S  # until something lost is published again
ALL_VERSIONS = 10**6
Make = Callable[..., Bench]


def matches(topic: str, wanted: str) -> bool:
    return topic.startswith(wanted[:-1]) if wanted.endswith("#") else topic == wanted


@dataclass
class World:
    """One device, which trains, and the broker between it and the aggregator."""

    bench: Bench
    device: core_device.Device
    retained: dict[str, bytes]
    lost: Counter[str] = field(default_factory=Counter)  # how many of the next messages on a topic are lost
    subscribed: set[str] = field(default_factory=set)  # filters of the device
    delivered: Counter[str] = field(default_factory=Counter)  # to the aggregator, of its own messages
    training: tuple[float, actions.StartTraining] | None = None
    stays_at: int = ALL_VERSIONS  # the device trains on no version from here on

    @classmethod
    def of(cls, bench: Bench) -> "World":
        own = bench.join("pi")
        about: dict[str, Any] = {
            "federation": LAB,
            "identity": own.identity,
            "aggregator_public": bench.identity.public,
        }
        core_profile = core_device.profile(tensors=SHAPES, **about)
        core = Core(core_profile, State(key=core_profile.key, enrolled=True))
        world = cls(bench=bench, device=core_device.Device(core, now=bench.now), retained=dict(bench.retained))
        bench.published.clear()
        world.acknowledged()
        world.acted(world.device.handle(events.Started()))
        world.acted(world.device.handle(events.Connected(frame_bytes=FRAME_BYTES)))
        return world

    @property
    def version(self) -> int:
        return self.bench.version

    def run(self, seconds: float) -> None:
        """Time passes for all."""
        end = self.bench.now + seconds
        while True:
            dues = [self.bench.core.deadline, self.device.core.due_s(), self.training and self.training[0]]
            due = min((each for each in dues if each is not None), default=end)
            self.bench.now = self.device.now = max(self.bench.now, min(due, end))
            if due > end:
                return
            self.aggregated(self.bench.handle(aggregator_events.TimeReached()))
            if self.training is not None and self.training[0] <= self.bench.now:
                job, self.training = self.training[1], None
                self.acted(self.device.handle(core_device.trained(job, change=0.1)))
            self.acted(self.device.handle(events.TimeReached()))

    def acted(self, done: list[actions.Action]) -> None:
        """Do what the device's core wants."""
        for action in done:
            match action:
                case actions.Subscribe():
                    self.subscribed |= set(action.filters)
                    found = {topic for topic in self.retained if any(matches(topic, each) for each in action.filters)}
                    for topic in sorted(found):
                        self.deliver(topic, self.retained[topic], retained=True)
                case actions.Unsubscribe():
                    self.subscribed -= set(action.filters)
                case actions.Publish():
                    self.aggregated(self.bench.receive(action.topic, action.payload))
                    self.acted(self.device.handle(events.Published(seq=action.seq)))
                case actions.StartTraining() if action.base < self.stays_at:
                    self.training = (self.bench.now + TRAINING_S, action)

    def aggregated(self, done: list[aggregator_events.Action]) -> None:
        """Deliver what the aggregator's core has published, and what it asks for."""
        published = self.bench.published[:]
        self.bench.published.clear()
        for each in published:
            if self.lost[each.topic]:
                self.lost[each.topic] -= 1
                continue
            if each.retain:
                self.retained[each.topic] = each.payload
            self.deliver(each.topic, each.payload, retained=False)
        asked = [topic for each in done if isinstance(each, aggregator_events.Subscribe) for topic in each.filters]
        for topic in asked:
            if topic in self.retained:
                self.delivered[topic] += 1
                self.aggregated(self.bench.receive(topic, self.retained[topic]))
        self.acknowledged()

    def acknowledged(self) -> None:
        """The broker takes everything, also what it loses."""
        for topic in sorted(self.bench.core.awaited):
            self.aggregated_unless_quiet(self.bench.handle(aggregator_events.Published(topic=topic)))

    def aggregated_unless_quiet(self, done: list[aggregator_events.Action]) -> None:
        if done:
            self.aggregated(done)

    def deliver(self, topic: str, payload: bytes, *, retained: bool) -> None:
        if payload and any(matches(topic, each) for each in self.subscribed):
            self.acted(self.device.handle(events.FrameArrived(topic=topic, frame=parse(payload), retained=retained)))


@pytest.fixture
def world(make: Make) -> World:
    """A device that has trained a few versions, alone: its update makes a version, and nothing else does."""
    world = World.of(make(merge__buffer_size=1, downlink__slots=100))
    world.run(3.5 * TRAINING_S)
    assert world.version == 3
    return world


def forget(world: World, topic: str) -> None:
    """The next message on this topic is acknowledged and lost, with what was retained there."""
    world.lost[topic] = 1
    world.retained.pop(topic, None)


def test_a_delta_that_the_broker_lost_is_given_again_and_the_device_trains_on(world: World) -> None:
    forget(world, topics.delta(LAB, 4, 0))
    world.run(TRAINING_S)
    assert world.version == 4
    world.run(0.9 * LOOK_S)
    assert world.version == 4  # the device has no vector to train on, and the aggregator nothing to merge
    world.run(NOTICED_S)
    assert world.version > 4


def test_a_head_that_the_broker_lost_is_given_again_and_the_device_trains_on(world: World) -> None:
    forget(world, HEAD)
    world.run(TRAINING_S)
    assert world.version == 4
    world.run(0.9 * LOOK_S)
    assert world.version == 4
    world.run(NOTICED_S)
    assert world.version > 4


def test_where_the_broker_lost_the_head_it_is_given_all_else_that_it_lost(world: World) -> None:
    world.stays_at = 3
    world.run(TRAINING_S)
    world.retained.clear()
    world.subscribed.clear()
    world.run(2 * NOTICED_S)
    named = world.bench.head.snapshot
    assert {HEAD, STATUS, topics.snapshot(LAB, named.place, 0), topics.delta(LAB, 3, 0)} <= world.retained.keys()


def test_a_status_that_the_broker_lost_is_given_again(world: World) -> None:
    """A device that starts would wait for the aggregator."""
    world.stays_at = 3
    world.run(TRAINING_S)
    del world.retained[STATUS]
    world.run(NOTICED_S)
    assert STATUS in world.retained


def test_while_nothing_is_lost_head_and_status_are_all_that_an_idle_federation_reads(world: World) -> None:
    """And each delta once; while versions come, nothing."""
    world.delivered.clear()
    world.run(LOOK_S)
    assert {topic for topic in world.delivered if "/snapshot/" not in topic} == set()
    world.stays_at = 0
    world.run(LOOK_S + TRAINING_S)
    world.delivered.clear()
    world.run(10 * LOOK_S)
    assert world.delivered == {HEAD: 10, STATUS: 10}
    assert not world.bench.published
