"""The aggregator of private sums, killed at any moment: each accepted update is in one version, or dropped, once."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import pytest

from support.set_world import PrivateDevice, World, content_of
from support.small_world import receipts
from ternbus.aggregator.core import events
from ternbus.aggregator.shell import log
from ternbus.aggregator.store import soundness
from ternbus.broker.protocol.messages import CLOSED

BEFORE, AFTER, BETWEEN = "before the save", "after the save", "between two messages"
ROUNDS: Final = 3


class KilledError(Exception):
    """The process is gone."""


class MortalWorld(World):
    """It is killed at the ``at``-th time that it has to save something, and begins again."""

    at = 0
    when = BEFORE
    saves = 0
    kills = 0
    _left = -1  # messages until it is killed between two

    def perform(self, actions: Sequence[events.Action]) -> list[events.Action]:
        saves = any(isinstance(action, events.Save) for action in actions)
        self.saves += saves
        if not saves or self.saves != self.at:
            return super().perform(actions)
        if self.when == BEFORE:
            raise KilledError
        if self.when == AFTER:
            super().perform([action for action in actions if isinstance(action, events.Save)])
            raise KilledError
        self._left = sum(isinstance(action, events.Publish) for action in actions) // 2
        done = super().perform(actions)
        self._left = -1
        return done

    def publish(self, action: events.Publish) -> None:
        if self._left == 0:
            self._left = -1
            raise KilledError
        self._left -= 1
        super().publish(action)

    def surely(self, work: Callable[[], Any]) -> None:
        """Do it again, if the aggregator was killed meanwhile: nobody has had an answer."""
        try:
            work()
        except KilledError:
            self.kills += 1
            self.at, self._left = 0, -1
            self.restart()
            work()


def send(world: MortalWorld, device: PrivateDevice, frames: list[bytes]) -> None:
    answers = receipts(world.receive(device.topic("update"), *frames))
    assert answers[-1].outcome == "accepted"


def live(world: MortalWorld) -> None:
    """Rounds with a device that one helper does not admit, a spoiled set, a revocation, a small group, and a close."""
    devices = world.begin(8)
    for helper in world.helpers.values():
        for device in devices[0 if helper.name == "h-1" else 1 :]:
            helper.records.admit(device.name, device.identity.public)
    for number in range(ROUNDS):
        base = world.version
        for device in devices[:7]:
            content = content_of(world.terms_of[base], f"{device.name} {base}")
            if (device.name, number) == ("pi-3", 1):
                content[1][0] = 2**30
            frames = device.private_update(world, base, content)
            world.surely(partial(send, world, device, frames))
        world.surely(lambda: world.revoke("pi-7"))
        for _ in range(4):
            world.surely(world.settle)
            world.surely(lambda: world.tick(40.0))
        if world.version == base:  # the set was spoiled: go on from a version of no update
            for device in devices[:7]:
                world.surely(partial(world.say, device, "idle", base))
            world.surely(lambda: world.tick(10.0))
    last = devices[1].private_update(world, world.version)
    world.surely(lambda: send(world, devices[1], last))
    world.surely(lambda: world.handle(events.StateRequested(state=CLOSED)))
    world.surely(world.settle)
    world.surely(lambda: world.tick(1000.0))


def check(world: MortalWorld) -> None:
    rows = world.ledger.db.execute("SELECT device, seq, merged FROM updates").fetchall()
    assert len(rows) == 7 * ROUNDS + 1
    merged, dropped = world.merged(), world.dropped()
    assert not merged.keys() & dropped.keys()
    assert merged.keys() | dropped.keys() == {(device, seq) for device, seq, _ in rows}
    for device, seq, version in rows:
        assert version == merged.get((device, seq), -1)
    assert world.head.state == CLOSED
    assert log.verify_ledger(world.ledger, world.identity.public, None).faults == []
    assert list(soundness.faults(world.ledger, world.identity.public)) == []
    target = world.core.model.server.target
    world.restart()
    assert np.array_equal(world.core.model.server.target, target)


def mortal(at: int, when: str) -> MortalWorld:
    world = MortalWorld("h-1", "h-2", roster="own", private__close_wait_s=500.0, merge__buffer_size=7)
    world.at, world.when = at, when
    return world


def saves_of_a_life() -> int:
    world = mortal(0, BEFORE)
    live(world)
    check(world)
    assert {reason.partition(":")[0] for reason in world.dropped().values()} == {
        "below-min", "refused", "sum-out-of-range",
    }  # fmt: skip
    return world.saves


def test_an_aggregator_that_lives_long_loses_nothing() -> None:
    assert saves_of_a_life() >= SAVES


JOINED: Final = 18  # saves until the devices have joined
SAVES: Final = 72


def die(moments: Iterable[int], when: str) -> None:
    for at in moments:
        world = mortal(at, when)
        live(world)
        check(world)
        assert world.kills == 1 or when == BETWEEN  # there need not be messages


@pytest.mark.parametrize("when", [BEFORE, AFTER, BETWEEN])
def test_each_accepted_update_is_in_one_version_or_dropped_whenever_it_is_killed(when: str) -> None:
    die(range(JOINED, SAVES, 9), when)


@pytest.mark.extended
@pytest.mark.parametrize("when", [BEFORE, AFTER, BETWEEN])
def test_so_it_is_at_every_single_moment(when: str) -> None:
    die(range(JOINED, SAVES), when)
