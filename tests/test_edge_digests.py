"""A device hashes a version before it uses it, and not while it trains or waits for the answer to its update."""

import numpy as np

from support.core_device import Device, following, logged, of
from support.scripted_aggregator import ScriptedAggregator
from ternbus.edge.core import events
from ternbus.edge.core.actions import StartTraining


def with_a_wrong_version() -> tuple[ScriptedAggregator, Device]:
    """A device that trains on version 0, and was told a digest of version 1 that its delta does not make."""
    scripted, device = following()
    scripted.advance()
    scripted.vectors[1] = scripted.vectors[1] + np.float32(1)
    assert "resync" not in logged(device.arrive(*scripted.delta(1), scripted.head()))
    return scripted, device


def test_nobody_trains_on_a_version_that_was_not_hashed() -> None:
    _, device = with_a_wrong_version()
    done = device.handle(events.TrainingFailed(base=0, reason="no memory"))
    assert "resync" in logged(done)
    assert of(done, StartTraining) == []
    device.now += 4000
    assert of(device.handle(events.TimeReached()), StartTraining) == []


def test_a_version_that_another_follows_before_it_is_used_is_not_hashed() -> None:
    scripted, device = following()
    scripted.advance()
    true = scripted.vectors[1]
    scripted.vectors[1] = true + np.float32(1)
    device.arrive(*scripted.delta(1), scripted.head())
    scripted.vectors[1] = true
    scripted.advance()
    device.arrive(*scripted.delta(2), scripted.head())
    done = device.handle(events.TrainingFailed(base=0, reason="no memory"))
    assert "resync" not in logged(done)
    device.now += 4000
    (job,) = of(device.handle(events.TimeReached()), StartTraining)
    assert (job.base, job.vector.tobytes()) == (2, scripted.vectors[2].tobytes())
