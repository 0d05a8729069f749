"""Private sums in any order of events: messages late, lost and twice, all parties killed, devices revoked."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from support.set_world import PrivateDevice, World, content_of, truth
from support.small_world import receipts
from ternbus.aggregator.core import events
from ternbus.aggregator.shell import log
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.messages import CLOSED

DEVICES = 7


@dataclass
class Chaos:
    """A federation whose messages to and from helpers are delivered one at a time, in their order, or are lost."""

    world: World = field(default_factory=lambda: World("h-1", "h-2", merge__buffer_size=5, staleness__max=2))
    devices: list[PrivateDevice] = field(init=False)
    accepted: set[tuple[str, int, int]] = field(default_factory=set)  # device, seq, base
    revoked: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.devices = self.world.begin(DEVICES)
        self.world.tick(10.0)

    def do(self, step: str, number: int) -> None:
        world, device = self.world, self.devices[number % DEVICES]
        match step:
            case "give" if device.name not in self.revoked:
                self.give(device, max(0, world.version - number % 3))
            case "deliver":
                self.deliver(1 + number % 4)
            case "lose" if world.queue:
                world.queue.popleft()
            case "twice" if world.queue:
                world.queue.append(world.queue[0])
            case "wait":
                world.tick(float(5 * number))
            case "kill":
                world.restart()
            case "kill helper":
                world.restart_helper(f"h-{1 + number % 2}")
            case "revoke" if device.name not in self.revoked and len(self.revoked) < 2:
                self.revoked.add(device.name)
                world.revoke(device.name)

    def give(self, device: PrivateDevice, base: int) -> None:
        frames = device.private_update(self.world, base)
        (receipt,) = receipts(self.world.receive(device.topic("update"), *frames))
        assert receipt.outcome in {"accepted", "duplicate", "stale"}
        if receipt.outcome == "accepted":
            self.accepted.add((device.name, receipt.seq, base))

    def deliver(self, count: int) -> None:
        """The next messages, to whom they are for."""
        world = self.world
        for _ in range(min(count, len(world.queue))):
            topic, payload = world.queue.popleft()
            for helper in world.helpers.values():
                if topic in helper.profile.subscriptions:
                    world.spread(helper, helper.arrive((topic, payload)))
            if "/help/" in topic and topic.rsplit("/", 1)[1] in topics.HELPER_KINDS:
                world.receive(topic, payload)

    def end(self) -> None:
        """All is delivered, and what is too small becomes stale while others go on; then the federation is closed."""
        world = self.world
        for name in world.names:
            world.restart_helper(name)
        for _ in range(4):
            for device in self.devices:
                if device.name not in self.revoked:
                    self.give(device, world.version)
            self.settle()
        world.handle(events.StateRequested(state=CLOSED))
        self.settle()
        assert world.head.state == CLOSED

    def settle(self) -> None:
        for _ in range(4):
            self.deliver(10_000)
            self.world.tick(100.0)

    def check(self) -> None:
        world = self.world
        merged, dropped = world.merged(), world.dropped()
        left = {name for (name,) in world.ledger.db.execute("SELECT device FROM updates WHERE merged IS NULL")}
        assert not left
        assert not merged.keys() & dropped.keys()
        assert merged.keys() | dropped.keys() == {(device, seq) for device, seq, _ in self.accepted}
        assert log.verify_ledger(world.ledger, world.identity.public, None).faults == []
        self.check_helpers()
        target = world.core.model.server.target
        world.restart()
        assert np.array_equal(world.core.model.server.target, target)
        assert not any(member.waiting_bytes for member in world.core.registry.members.values())

    def check_helpers(self) -> None:
        """No device and base is in two sums of a helper, no set has two sums, and each is that of its content."""
        base_of = {(device, seq): base for device, seq, base in self.accepted}
        sets = [each for entry in self.world.entries() for each in entry.sets]
        for answers in self.world.sums.values():
            assert len({digest for digest, _ in answers}) == len(set(answers))
        for each in sets:
            assert all(base_of[member.device, member.seq] == each.base for member in each.members)
            terms = self.world.terms_of[each.base]
            assert terms.min <= len(each.members) <= terms.devices_max
            assert {name for name, answers in self.world.sums.items() if each.digest in dict(answers)} == {"h-1", "h-2"}
        used = [(member.device, each.base) for each in sets for member in each.members]
        assert len(used) == len(set(used))


STEPS = ("give", "give", "give", "deliver", "deliver", "lose", "twice", "wait", "kill", "kill helper", "revoke")


@settings(max_examples=15)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 12)), max_size=60))
def test_in_any_order_each_accepted_update_is_in_one_version_or_dropped(steps: Sequence[tuple[str, int]]) -> None:
    chaos = Chaos()
    for step, number in steps:
        chaos.do(step, number)
        chaos.world.tick()
        due = chaos.world.core.deadline
        assert due is None or due > chaos.world.now  # or the process would be busy doing nothing
    chaos.end()
    chaos.check()


def test_what_is_merged_is_what_devices_sent() -> None:
    """Over a whole run, with refusals and restarts: the sums in the ledger are those of the contents."""
    chaos = Chaos()
    for number in range(30):
        chaos.do(("give", "deliver", "give", "kill", "give", "wait")[number % 6], number)
    chaos.end()
    chaos.check()
    world = chaos.world
    seqs = {(device, seq): base for device, seq, base in chaos.accepted}
    sums = dict(world.ledger.db.execute("SELECT digest, sum FROM sets WHERE sum IS NOT NULL").fetchall())
    assert sums
    for each in (found for entry in world.entries() for found in entry.sets):
        terms = world.terms_of[each.base]
        contents = [content_of(terms, f"{member.device} {seqs[member.device, member.seq]}") for member in each.members]
        if each.digest in sums:
            assert sums[each.digest] == truth(terms, contents).tobytes()
