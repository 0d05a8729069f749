"""Private updates in the aggregator's core, over its real ledger, with the cores of helpers in process."""

from support.private_world import World


def test_updates_of_one_context_become_a_version(  ) -> None:
    world = World()
    devices = world.begin()
    world.give_all(devices)
    world.settle()
    assert world.version == 1
    print(world.entries(), world.asked)
    assert 0
