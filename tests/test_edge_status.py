"""When a device publishes its status: at once when it matters, seldom while trainings begin and end quickly."""

import pytest

from support.core_device import DEVICE, DEVICE_KEY, Device, following, of, only, published, trained
from support.private_device import finished
from support.private_device import training as private_training
from support.scripted_aggregator import ScriptedAggregator
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.messages import Status
from ternbus.edge.core import events
from ternbus.edge.core.actions import Action, StartTraining
from ternbus.edge.core.own_status import BURST, PER_S


def statuses(actions: list[Action]) -> list[Status]:
    return [Status.from_meta(frame.meta) for frame in published(actions, "status")]


def round_of(scripted: ScriptedAggregator, device: Device) -> list[Action]:
    """The training at hand ends, its update is accepted, and the next version begins another."""
    job = of(device.actions, StartTraining)[-1]
    done = device.handle(trained(job))
    (frame,) = published(done, "update")
    scripted.advance()
    accepted = scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "accepted")
    done += device.arrive(accepted, *scripted.delta(scripted.version), scripted.head())
    assert len(of(done, StartTraining)) == 1
    return done


def said(frames: list[Frame]) -> list[tuple[str, int]]:
    return [(frame.meta["state"], frame.meta["base"]) for frame in frames]


def test_slow_trainings_are_each_told_of_at_once() -> None:
    scripted, device = following()
    for version in range(1, 30):
        device.wait(2.0)
        done = round_of(scripted, device)
        assert said(published(done, "status")) == [("idle", -1), ("training", version)]


def test_of_many_quick_ones_some_are_told_of_and_then_one_a_second_of_what_is_so_by_then() -> None:
    scripted, device = following()
    done = [action for _ in range(20) for action in round_of(scripted, device)]
    assert len(statuses(done)) == BURST - 1  # the first training was told of
    late = device.wait(1.0 / PER_S)
    assert said(published(late, "status")) == [("training", 20)]
    assert device.wait(60.0) == []
    done = [action for _ in range(10) for step in (device.wait(0.1), round_of(scripted, device)) for action in step]
    assert said(published(done, "status"))[:2] == [("idle", -1), ("training", 21)]


def test_over_a_time_there_are_no_more_than_the_burst_and_one_a_second() -> None:
    scripted, device = following()
    done = [action for _ in range(200) for step in (device.wait(0.1), round_of(scripted, device)) for action in step]
    assert BURST + 18 * PER_S <= len(statuses(done)) <= BURST + 20 * PER_S
    last = device.handle(events.Disconnected(reason="gone"))
    assert statuses(last) == []


def test_their_numbers_and_what_they_say_keep_the_order_in_which_they_were_made() -> None:
    scripted, device = following()
    done = [action for _ in range(100) for step in (device.wait(0.05), round_of(scripted, device)) for action in step]
    frames = published(done, "status")
    assert [frame.seq for frame in frames] == sorted({frame.seq for frame in frames})
    bases = [base for state, base in said(frames) if state == "training"]
    assert bases == sorted(set(bases))


def test_what_else_there_is_to_say_waits_for_nothing_and_takes_along_what_waits() -> None:
    scripted, device = following()
    for _ in range(20):
        round_of(scripted, device)
    job = of(device.actions, StartTraining)[-1]
    failed = device.handle(events.TrainingFailed(base=job.base, reason="no data", trace=""))
    assert [status.failing for status in statuses(failed)] == ["no data"]
    assert statuses(device.wait(0.5 / PER_S)) == []


@pytest.mark.parametrize("seconds", [0.0, 5.0])
def test_one_that_waits_is_told_at_the_next_connect_and_not_meanwhile(seconds: float) -> None:
    scripted, device = following()
    for _ in range(20):
        round_of(scripted, device)
    device.handle(events.Disconnected(reason="gone"))
    assert statuses(device.wait(seconds)) == []
    assert [(status.state, status.base) for status in statuses(device.connect())] == [("training", 20)]
    assert statuses(device.wait(5.0)) == []


def test_a_private_device_tells_of_each_training_at_once() -> None:
    """The aggregator waits for all that train on a version before it makes a sum of fewer."""
    scripted, device, job = private_training()
    for version in range(1, 21):
        done = device.handle(finished(job))
        (frame,) = published(done, "update")
        scripted.advance()
        accepted = scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "accepted")
        done += device.arrive(accepted, *scripted.delta(version), scripted.head())
        job = only(done, StartTraining)
        assert said(published(done, "status")) == [("idle", -1), ("training", version)]
