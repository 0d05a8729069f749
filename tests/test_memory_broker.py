"""The broker in memory and its virtual clock: MQTT filters, retained messages, sessions, and lines with a speed."""

import pytest

from ternbus.broker.link.link import packet_bytes
from ternbus.lab.virtual.clock import Alarm, Clock
from ternbus.lab.virtual.memory_broker import Line, MemoryBroker, Session, matches


def test_what_is_asked_for_at_the_same_moment_happens_in_that_order() -> None:
    clock, seen = Clock(), list[str]()
    clock.at(2.0, lambda: seen.append("b"))
    clock.at(1.0, lambda: clock.at(0.5, lambda: seen.append("a, though its time has passed")))
    clock.at(2.0, lambda: seen.append("c"))
    while clock.next_at is not None:
        clock.step()
    assert (seen, clock.now) == (["a, though its time has passed", "b", "c"], 2.0)


def test_an_alarm_follows_what_is_due() -> None:
    clock, rung = Clock(), list[float]()
    due: list[float | None] = [5.0]

    def wake() -> None:
        rung.append(clock.now)
        due[0] = 8.0 if clock.now < 8 else None

    alarm = Alarm(clock, lambda: due[0], wake)
    alarm.look()
    due[0] = 3.0
    alarm.look()  # sooner
    due[0] = 4.0
    alarm.look()  # later again
    while clock.next_at is not None:
        clock.step()
    assert rung == [4.0, 8.0]


@pytest.mark.parametrize(
    ("pattern", "topic", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/#", "a/b/c", True),
        ("a/#", "a", True),
        ("a/b/#", "a", False),
        ("#", "a/b", True),
        ("a/+/c", "a/b/c", True),
        ("a/+", "a/b/c", False),
        ("+/+/#", "a/b/c/d", True),
        ("a/+/d/#", "a/b/c", False),
    ],
)
def test_filters_match_as_mqtt_says(pattern: str, topic: str, expected: bool) -> None:
    assert matches(pattern, topic) is expected


class Ear:
    """A client that notes what it is told, and when."""

    def __init__(self, broker: MemoryBroker, line: Line | None = None, *filters: str) -> None:
        self.clock = broker.clock
        self.heard: list[tuple[float, str, bytes]] = []
        self.retained: list[bool] = []  # of each that was heard
        self.told: list[str] = []
        self.acknowledged_seqs: list[int] = []
        self.filters = filters
        self.session: Session = broker.session(self, line or Line())
        self.session.connect("will", b"dead")

    def connected(self) -> None:
        self.told.append("connected")
        self.session.subscribe(self.filters)

    def disconnected(self, reason: str) -> None:
        self.told.append(reason)

    def arrived(self, topic: str, payload: bytes, *, retained: bool) -> None:
        self.heard.append((self.clock.now, topic, payload))
        self.retained.append(retained)

    def acknowledged(self, seq: int) -> None:
        self.acknowledged_seqs.append(seq)

    @property
    def payloads(self) -> list[bytes]:
        return [payload for _, _, payload in self.heard]


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker(Clock())


def settle(broker: MemoryBroker) -> None:
    while broker.clock.next_at is not None:
        broker.clock.step()


@pytest.mark.parametrize("pattern", ["x/y", "x/#", "x/+", "#"])
def test_what_is_retained_comes_with_the_subscription(broker: MemoryBroker, pattern: str) -> None:
    broker.route("x/y", b"old", retain=True)
    broker.route("x/z", b"gone", retain=True)
    broker.route("x/z", b"", retain=True)
    broker.route("x/z", b"passing", retain=False)
    ear = Ear(broker, None, pattern)
    settle(broker)
    assert ear.payloads == [b"old"]


def test_overlapping_filters_deliver_once(broker: MemoryBroker) -> None:
    ear = Ear(broker, None, "x/#", "x/+", "x/y")
    settle(broker)
    broker.route("x/y", b"news", retain=False)
    settle(broker)
    assert ear.payloads == [b"news"]
    ear.session.unsubscribe(["x/#", "x/+"])
    settle(broker)
    broker.route("x/y", b"more", retain=False)
    broker.route("x/z", b"not asked for", retain=False)
    settle(broker)
    assert ear.payloads == [b"news", b"more"]


def test_a_line_carries_one_thing_after_the_other(broker: MemoryBroker) -> None:
    line = Line(up_bits_s=8_000.0, down_bits_s=4_000.0, latency_s=1.0)
    speaker, ear = Ear(broker, line), Ear(broker, line, "x")
    settle(broker)
    began = broker.clock.now
    for number in range(2):
        speaker.session.publish("x", bytes(1000), seq=number)
    settle(broker)
    size = packet_bytes("x", 1000, 5)
    up_s, down_s = size / 1000, size / 500
    assert [when - began for when, _, _ in ear.heard] == pytest.approx(
        [up_s + 1 + down_s + 1, up_s + 1 + 2 * down_s + 1]
    )
    assert speaker.acknowledged_seqs == [0, 1]
    assert speaker.session.sent["other"] == ear.session.carried["other"] == 2 * size


def test_what_was_under_way_to_a_client_that_died_comes_when_it_is_back(broker: MemoryBroker) -> None:
    ear = Ear(broker, Line(down_bits_s=8.0), "x")
    settle(broker)
    broker.route("x", b"under way", retain=False)
    ear.session.cut()
    broker.route("x", b"while away", retain=False)
    settle(broker)
    assert ear.heard == []
    assert broker.retained["will"] == b"dead"
    ear.session.connect("will", b"dead")
    settle(broker)
    assert ear.payloads == [b"under way", b"while away"]


def test_a_client_is_told_what_the_broker_holds_and_what_is_of_the_session(broker: MemoryBroker) -> None:
    broker.route("x", b"old", retain=True)
    ear = Ear(broker, None, "x")
    settle(broker)
    ear.session.cut()
    broker.route("x", b"while away", retain=True)
    ear.session.connect("will", b"dead")  # it subscribes again
    settle(broker)
    assert [*zip(ear.payloads, ear.retained, strict=True)] == [
        (b"old", True),
        (b"while away", False),
        (b"while away", True),
    ]


def test_what_was_under_way_from_a_client_that_died_is_lost(broker: MemoryBroker) -> None:
    speaker, ear = Ear(broker, Line(up_bits_s=8.0)), Ear(broker, None, "x")
    settle(broker)
    speaker.session.publish("x", b"too late")
    speaker.session.cut()
    settle(broker)
    assert ear.heard == []
    assert speaker.acknowledged_seqs == []


def test_who_takes_leave_has_no_will(broker: MemoryBroker) -> None:
    ear = Ear(broker)
    settle(broker)
    ear.session.publish("x", b"goodbye", retain=True)
    ear.session.disconnect()
    settle(broker)
    assert broker.retained == {"x": b"goodbye"}
    ear.session.publish("x", b"too late", retain=True)
    settle(broker)
    assert broker.retained == {"x": b"goodbye"}


def test_a_broker_that_is_down_says_so(broker: MemoryBroker) -> None:
    ear = Ear(broker)
    settle(broker)
    broker.stop()
    ear.session.connect("will", b"dead")
    settle(broker)
    broker.start()
    ear.session.connect("will", b"dead")
    settle(broker)
    assert ear.told == ["connected", "the broker was stopped", "the broker does not answer", "connected"]
    assert broker.retained == {}
