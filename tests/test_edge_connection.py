"""A device's connection: the last will, subscriptions, backoff, sequence numbers, and the way it stops."""

from support.core_device import DEVICE, DEVICE_KEY, Device, connected, logged, of, only, profile, published
from support.scripted_aggregator import FEDERATION
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.messages import Status
from ternbus.edge.core import events
from ternbus.edge.core.actions import Connect, Log, Publish, Save, Stop, Subscribe
from ternbus.edge.core.core import Core
from ternbus.edge.core.state import State


def test_the_will_is_a_signed_offline_of_the_session_and_both_are_on_disk_before_the_connection() -> None:
    device = Device(Core(profile(), State(key=DEVICE_KEY.key_id, enrolled=True, session=6)))
    save, connect = device.handle(events.Started())
    assert isinstance(save, Save)
    assert isinstance(connect, Connect)
    will = parse(connect.will_payload)
    will.check_authentic(DEVICE_KEY.public)
    assert connect.will_topic == topics.up(FEDERATION, DEVICE, "status")
    status = Status.from_meta(will.meta)
    assert (status.state, status.session, save.state.session) == ("offline", 7, 7)
    assert will.seq < save.state.seq_limit


def test_at_every_connect_it_subscribes_anew_and_publishes_its_status_retained() -> None:
    device = connected()
    for _ in range(2):
        device.handle(events.Disconnected(reason="gone"))
        will = parse(only(device.wait(30), Connect).will_payload)
        done = device.connect()
        assert only(done, Subscribe).filters == (
            "ternbus/1/fed/all/status",
            "ternbus/1/fed/all/head",
            "ternbus/1/fed/down/pi/#",
            "ternbus/1/fed/all/delta/#",
        )
        (publish,) = of(done, Publish)
        frame = parse(publish.payload)
        assert publish.retain
        assert Status.from_meta(frame.meta).state == "idle"
        assert frame.meta["session"] == will.meta["session"]
        assert frame.seq > will.seq


def test_reconnects_back_off_to_half_a_minute() -> None:
    device = Device(Core(profile(), State(key=DEVICE_KEY.key_id, enrolled=True)))
    device.handle(events.Started())
    waits = []
    for attempt in range(12):
        done = device.handle(events.ConnectFailed(reason="refused"))
        assert ("disconnected" in logged(done)) == (attempt == 0)
        due = device.core._reconnect.due_s
        waits.append(due - device.now)
        device.wait(due - device.now)
    assert 0.1 <= waits[0] <= 0.2
    assert all(0.1 * 2**attempt <= wait <= 0.2 * 2**attempt for attempt, wait in enumerate(waits[:7]))
    assert all(15 <= wait <= 30 for wait in waits[-3:])
    device.connect()
    device.now += 60
    device.handle(events.Disconnected(reason="gone"))
    assert device.core._reconnect.due_s - device.now <= 0.2


def test_no_sequence_number_is_used_twice_over_crashes() -> None:
    device = connected()
    seen = set[int]()
    for _ in range(5):
        frames = published(device.actions, "status")
        for _ in range(40):
            device.handle(events.Disconnected(reason="gone"))
            device.wait(30)
            frames += published(device.connect(), "status")
        assert seen.isdisjoint(frame.seq for frame in frames)
        seen.update(frame.seq for frame in frames)
        device = device.restarted()
        device.connect()


def test_a_stop_says_goodbye_if_somebody_listens() -> None:
    device = connected()
    done = device.handle(events.StopRequested(reason="SIGTERM"))
    assert [type(action) for action in done] == [Publish, Stop]
    assert only(done, Stop).code == 0
    alone = Device(Core(profile(), State(key=DEVICE_KEY.key_id, enrolled=True)))
    assert [type(action) for action in alone.handle(events.StopRequested(reason="SIGTERM"))] == [Stop]


def test_a_broker_that_refuses_everything_does_not_fill_the_log() -> None:
    device = connected()
    done = [action for _ in range(1000) for action in device.handle(events.Refused(seq=9, reason="Quota exceeded"))]
    assert [log.fields["count"] for log in of(done, Log)] == [1, 10, 100, 1000]
