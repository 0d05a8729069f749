"""For whom private updates wait: devices that hang or never send, company that does not come."""

from support.set_world import World, content_of
from ternbus.aggregator.core import events
from ternbus.broker.sums.words import DENSE_STEPS


def test_a_device_that_never_sends_keeps_nobody_from_going_on() -> None:
    """It may hang, or lie: it says that it trains, ever again."""
    world = World()
    *devices, silent = world.begin(4)
    world.tick(10.0)
    for device in (*devices, silent):
        world.say(device, "training", 0)
    content = content_of(world.terms_of[0], "x")
    content[1][0] = 5 * DENSE_STEPS
    for device in devices:
        world.give(device, 0, content)
    began = world.now
    while world.version == 0:
        world.say(silent, "training", 0)
        assert world.core.deadline is not None
        assert world.core.deadline <= began + world.core.settings.merge.max_wait_s
        world.tick(max(0.1, world.core.deadline - world.now))
        world.settle()
    assert len(world.dropped()) == 3
    world.give_all(devices)
    world.tick(1000.0)
    world.settle()
    assert (world.version, len(world.merged())) == (2, 3)


def test_too_few_that_have_sent_get_no_version_though_others_never_send() -> None:
    world = World()
    *devices, one, other = world.begin(4)
    world.tick(10.0)
    for device in (*devices, one, other):
        world.say(device, "training", 0)
    world.give_all(devices)
    for _ in range(100):
        world.tick(10.0)
    assert world.version == 0
    world.give_all([one])
    world.tick(1000.0)
    world.settle()
    assert (world.version, len(world.merged())) == (1, 3)


def test_the_operator_is_told_at_each_change_that_too_few_devices_have_sent() -> None:
    world = World()
    devices = world.begin(4)

    def told(actions: list[events.Action]) -> list[str]:
        return [each.text for each in actions if isinstance(each, events.Log) and "wait for more" in each.text]

    world.tick(10.0)
    for device in devices:
        world.say(device, "training", 0)
    world.give(devices[0], 0)
    assert told(world.last) == []  # three may still send
    assert world.core.deadline is not None
    assert world.core.deadline <= world.now + 30.0
    assert told(world.tick(30.0)) == ["private updates wait for more: 1 device on version 0, and a sum has 3 or more"]
    assert told(world.tick(100.0)) == []
    world.give(devices[1], 0)
    assert told(world.last) == ["private updates wait for more: 2 devices on version 0, and a sum has 3 or more"]
    world.give_all(devices[2:3])
    world.settle()
    assert (world.version, told(world.tick(100.0))) == (1, [])


def test_the_operator_is_told_once_though_a_device_comes_and_goes() -> None:
    world = World()
    one, other = world.begin(2)
    world.say(one, "training", 0)
    world.give(one, 0)
    told = [world.last]
    for state in ("training", "offline", "training", "offline"):
        world.say(other, state, 0)
        told.append(world.last)
    lines = [each.text for actions in told for each in actions if isinstance(each, events.Log)]
    assert lines.count("private updates wait for more: 1 device on version 0, and a sum has 3 or more") == 1


def test_nobody_waits_for_a_second_update_of_a_device_on_one_version() -> None:
    """Its status may come late, or not at all."""
    world = World(merge__max_wait_s=30.0)
    devices = world.begin(9)
    world.tick(10.0)
    for device in devices:
        world.say(device, "training", 0)
    world.give_all(devices[:3])
    world.tick(31.0)  # they are a set, which the helper has not answered for
    world.say(devices[0], "idle", 0)
    world.asked.clear()
    world.give_all(devices[3:])
    assert [step for _, step in world.asked] == ["prepare"]


def test_a_device_that_is_silent_for_long_is_not_waited_for() -> None:
    world = World(merge__max_wait_s=1e6)
    devices = world.begin(4)
    for device in devices:
        world.say(device, "training", 0)
    for base in range(4):
        world.tick(10.0)
        world.give_all(devices, base)
        world.settle()
        for device in devices:
            world.say(device, "training", base + 1)
    assert world.version == 4
    world.give_all(devices[:3])
    world.settle()
    assert world.version == 4  # the fourth would be left alone
    assert world.core.deadline is not None
    assert world.core.deadline <= world.now + 60.0
    for _ in range(20):
        world.tick(10.0)
        world.settle()
    assert (world.version, len(world.entries()[-1].sets[0].members)) == (5, 3)


def test_who_has_sent_is_given_a_version_however_long_ago_that_was() -> None:
    """Sets are spoiled one after the other, and the devices are quick. They fall silent, as they must."""
    world = World()
    devices = world.begin(3)
    world.tick(10.0)
    for base in range(6):
        content = content_of(world.terms_of[base], "x")
        if base >= 4:
            content[1][0] = 5 * DENSE_STEPS
        for device in devices:
            world.say(device, "training", base)
        for device in devices:
            world.give(device, base, content)
        world.settle()
        world.tick(1.0)
        assert world.version == min(base + 1, 5)
    world.tick(10.0)
    assert (world.version, len(world.merged()), len(world.dropped())) == (6, 12, 6)
