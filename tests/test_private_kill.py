"""SIGKILL of aggregator, helpers and devices at the steps of a set: each accepted update is in one version, or dropped.

`make crash-test PRIVATE=yes KILLS=200` kills at random, as often as asked for.
"""

from pathlib import Path

import pytest

from crash import private_differences
from crash.private import ENDS, PrivateFederation
from ternbus.broker.server.running import Engine


@pytest.mark.slow
def test_each_accepted_update_is_in_one_version_or_dropped_whoever_is_killed_at_whatever_step(tmp_path: Path) -> None:
    with PrivateFederation(tmp_path, Engine.NATS) as federation:
        for name, ends in ENDS.items():
            federation.plan(name, *ends)
        federation.assemble()
        federation.start(*federation.devices)
        federation.until(lambda: federation.left() == 0, "end of the planned ends")
        federation.until_later(2)
        federation.close()
        story = private_differences.read(federation)
        assert private_differences.found(federation, story) == []
        assert federation.ended.total() == sum(map(len, ENDS.values()))
        assert len(story.sets) > 1
        print(federation.ended.total(), "kills,", story.summary())
