"""When a device trains: on which version, by which plan, in which turn."""

from collections.abc import Callable

import pytest

from support.core_device import (
    DEVICE,
    DEVICE_KEY,
    Device,
    aggregator,
    following,
    logged,
    of,
    only,
    published,
    sending,
    trained,
    update_in,
)
from support.scripted_aggregator import ScriptedAggregator
from ternbus.broker.protocol.messages import Status
from ternbus.edge.core.actions import Action, Save, StartTraining, Stop
from ternbus.edge.plan.privacy import Account, Cost


def test_the_newest_version_is_trained_on_and_the_status_says_so() -> None:
    scripted, device = following()
    job = only(device.actions, StartTraining)
    assert (job.base, job.vector.tobytes()) == (0, scripted.vectors[0].tobytes())
    assert Status.from_meta(published(device.actions, "status")[-1].meta).base == 0
    done = device.handle(trained(job))
    assert [status.meta["state"] for status in published(done, "status")] == ["idle"]
    assert of(device.arrive(scripted.head()), StartTraining) == []  # its update has no answer yet


def test_a_plan_that_is_nonsense_is_not_trained_by() -> None:
    scripted, device = following(scripted=aggregator(plan={"batch_size": -1}))
    assert "bad-plan" in logged(device.actions)
    assert of(device.actions, StartTraining) == []
    scripted.plan = {"batch_size": 7, "colour": "blue"}
    plan = only(device.arrive(scripted.head()), StartTraining).plan
    assert (plan.batch_size, dict(plan.extra)) == (7, {"colour": "blue"})


@pytest.mark.parametrize("wrong", [{"batch_size": 7.0}, {"batch_size": 7, "seal": 0}, {"batch_size": True}], ids=repr)
def test_a_plan_is_read_by_itself_whatever_the_one_before_was(wrong: dict[str, object]) -> None:
    """A number that equals the last one may be of a type that no plan has."""
    scripted, device = following(scripted=aggregator(plan={"batch_size": 7, "seal": False}))
    job = only(device.actions, StartTraining)
    assert "bad-plan" not in logged(device.arrive(scripted.head()))
    scripted.plan = wrong
    assert "bad-plan" in logged(device.arrive(scripted.head()))
    scripted.plan = {"batch_size": 7, "seal": False}
    assert "bad-plan" not in logged(device.arrive(scripted.head()))
    assert device.core.training.plan == job.plan


def test_the_federations_plan_goes_before_the_tasks_own() -> None:
    _, device = following(
        scripted=aggregator(plan={"batch_size": 7}), default_plan={"batch_size": 3, "local_epochs": 2}
    )
    plan = only(device.actions, StartTraining).plan
    assert (plan.batch_size, plan.local_epochs) == (7, 2)


def test_a_result_that_nobody_waits_for_is_ignored() -> None:
    _, device, _ = sending()
    job = only(device.actions, StartTraining)
    before = device.disk
    assert of(device.handle(trained(job)), Save) == []
    assert device.disk is before


def test_the_seed_differs_by_device_and_version_and_is_the_same_again() -> None:
    scripted, device = following()
    seeds = [only(device.actions, StartTraining).seed]
    seeds.append(only(following(scripted=aggregator())[1].actions, StartTraining).seed)
    seeds.append(only(following(scripted=aggregator(plan={"seed": 1}))[1].actions, StartTraining).seed)
    assert seeds[0] == seeds[1] != seeds[2]
    assert scripted.version == 0


def contributed(scripted: ScriptedAggregator, device: Device, done: list[Action]) -> int | None:
    """The version that the device has begun to train on, if any. Its update is accepted at once."""
    for job in of(done, StartTraining):
        frame = update_in(device.handle(trained(job)))
        device.arrive(scripted.receipt(DEVICE, frame.key, frame.seq, "accepted"))
        return int(job.base)
    return None


def taking_turns(**plan: float) -> tuple[ScriptedAggregator, Device, Callable[[], bool]]:
    """A device that has just had its turn, and what makes a version and says whether the device trains on it."""
    scripted, device = following(scripted=aggregator(plan=plan))

    def advance() -> bool:
        scripted.advance()
        done = device.arrive(*scripted.delta(scripted.version), scripted.head())
        return contributed(scripted, device, done) is not None

    trains = contributed(scripted, device, device.actions) is not None
    while not trains:
        trains = advance()
    return scripted, device, advance


def test_a_device_that_takes_part_in_a_third_trains_on_every_third_version() -> None:
    scripted, _, advance = taking_turns(participation=1 / 3)
    assert scripted.version < 3
    assert [advance() for _ in range(9)] == [False, False, True] * 3


def test_a_version_that_lasts_passes_the_turns_on_and_none_is_taken_twice() -> None:
    scripted, device, advance = taking_turns(participation=1 / 3, turn_s=100.0)
    assert not advance()  # this one and the next are others'
    assert logged(device.actions)[-1] == "resting"
    assert logged(device.wait(199.9)) == logged(device.arrive(scripted.head())) == []  # said once
    assert contributed(scripted, device, device.wait(0.2)) == scripted.version
    assert device.core.training.due_s is None
    assert [advance() for _ in range(6)] == [False, False, False, False, True, False]


def test_it_stops_after_so_many_accepted_updates() -> None:
    scripted, device = following(versions=2)
    for version in range(2):
        frame = update_in(device.handle(trained(of(device.actions, StartTraining)[-1])))
        done = device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "accepted"))
        assert len(of(done, Stop)) == (version == 1)
        scripted.advance()
        device.arrive(*scripted.delta(version + 1), scripted.head())


def test_a_training_by_an_earlier_plan_may_leave_an_account_that_does_not_cover_the_next_one() -> None:
    """The plan was read while it ran; nobody waits for an update by it."""
    privacy = {"dp_clip": 1.0, "dp_noise": 1.0, "dp_epsilon": 9.0}
    scripted, device = following(scripted=aggregator(plan={**privacy, "dp": "sample"}))
    job = only(device.actions, StartTraining)
    scripted.plan = {**privacy, "dp": "device"}
    scripted.advance()
    device.arrive(*scripted.delta(1), scripted.head())
    account = Account(spent=(Cost(kind="sample", noise=1.0, rate=0.1, steps=1),))
    done = device.handle(trained(job, account=account))
    (frame,) = published(done, "update")
    done = device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "accepted"))
    assert of(done, StartTraining) == []
    failing = Status.from_meta(published(done, "status")[-1].meta).failing
    assert failing.startswith('it has dp = "device", but this device has trained under dp = "sample"')
