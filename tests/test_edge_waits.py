"""Waiting for broker and aggregator: presence, what is logged, and when a device gives up."""

from support.core_device import DEVICE_KEY, Device, aggregator, connected, logged, of, only, profile
from ternbus.edge.core import events
from ternbus.edge.core.actions import Log, Stop
from ternbus.edge.core.core import Core
from ternbus.edge.core.state import State


def test_an_old_status_within_a_session_is_ignored() -> None:
    scripted, device = aggregator(), connected()
    old = scripted.status(session=1)
    device.arrive(scripted.status(session=1))
    device.handle(events.Disconnected(reason="gone"))
    device.wait(1)
    device.connect()
    device.arrive(old)
    assert device.core.presence.online is None


def test_it_says_for_whom_it_waits_every_ten_seconds() -> None:
    device = Device(Core(profile(), State(key=DEVICE_KEY.key_id, enrolled=True)))
    device.handle(events.Started())
    assert logged(device.wait(25)) == ["waiting"] * 3
    device.handle(events.ConnectFailed(reason="refused"))
    device.wait(1)
    device.connect()
    scripted = aggregator()
    device.wait(5)
    device.arrive(scripted.status())
    device.wait(5)
    device.arrive(scripted.head())
    device.wait(5)
    texts = [action.text for action in of(device.actions, Log) if action.event == "waiting"]
    assert texts[3:] == [
        "waiting for the aggregator",
        "waiting for the first head from the aggregator",
        "waiting for version 0 of the model",
    ]
    device.arrive(*scripted.snapshot())
    assert logged(device.wait(100)) == []


def test_a_device_that_gets_none_of_many_versions_says_that_it_waits() -> None:
    scripted, device = aggregator(), connected()
    device.arrive(scripted.status())
    for _ in range(10):
        scripted.advance()
        device.arrive(scripted.head())
        device.wait(1)
    texts = [action.text for action in of(device.actions, Log) if action.event == "waiting"]
    assert texts[0] == "waiting for version 3 of the model"
    assert 1 <= len(texts) <= 3


def test_an_enrolment_without_an_answer_is_waited_for_too() -> None:
    device = connected("join", state={"enrolled": False}, code="c", timeout_s=20.0)
    scripted = aggregator()
    device.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
    stop = only(device.wait(21), Stop)
    assert stop.code == 1
    assert "gave up after waiting 20 s for the aggregator to enroll this device" in stop.reason


def test_it_gives_up_only_when_told_to() -> None:
    device = Device(Core(profile(timeout_s=60.0), State(key=DEVICE_KEY.key_id, enrolled=True)))
    device.handle(events.Started())
    device.handle(events.ConnectFailed(reason="refused"))
    done = device.wait(59)
    assert of(done, Stop) == []
    for _ in range(100):
        if (stops := of(device.wait(1), Stop)) or of(device.handle(events.ConnectFailed(reason="refused")), Stop):
            break
    assert "the broker (refused)" in (stops or of(device.actions, Stop))[0].reason
