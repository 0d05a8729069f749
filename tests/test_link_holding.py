"""Messages that wait for others, so that their receiver wakes up once: delivered in order, and never lost."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.brokers import WITHIN_S, Inbox, linked
from ternbus.broker.link import link as module
from ternbus.broker.link.events import Arrived, Connected, Published
from ternbus.broker.link.link import Link
from ternbus.broker.server import nats
from ternbus.broker.server.running import Engine, RunningBroker, choose, start

ROOT = "ternbus/1/demo/all"
DELTA, HEAD = f"{ROOT}/delta/1/0", f"{ROOT}/head"
WILL = ("ternbus/1/demo/up/pi/status", b"dead")


@pytest.fixture
def broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningBroker]:
    monkeypatch.setattr(nats, "ACK_WAIT_S", 2)  # nats-server sends again after this time, not at a reconnect
    with start(choose(Engine.AUTO), host="127.0.0.1", port=0, directory=tmp_path) as running:
        yield running


def until_subscribed(link: Link, inbox: Inbox, topics: list[str]) -> None:
    link.subscribe(topics)
    link.publish("ternbus/1/demo/up/pi/metrics", b"so that the subscription has been dealt with")
    inbox.next(Published)


def holding(link: Link, seconds: Callable[[str], float]) -> list[str]:
    """Have the link hold messages; what it was asked of."""
    asked: list[str] = []

    def holds_s(topic: str) -> float:
        asked.append(topic)
        return seconds(topic)

    link.holds_s = holds_s
    return asked


def test_a_message_that_can_wait_comes_with_the_next_one_and_before_it(broker: RunningBroker) -> None:
    with linked(broker.url, "pi") as (link, inbox), linked(broker.url, "writer") as (writer, written):
        until_subscribed(link, inbox, [f"{ROOT}/#"])
        when_asked: list[bool] = []

        def seconds(topic: str) -> float:
            when_asked.append(inbox.is_empty)
            return 600.0 if topic == DELTA else 0.0

        asked = holding(link, seconds)
        for topic in (DELTA, HEAD):
            writer.publish(topic, topic.encode())
            written.next(Published)
        assert [each.topic for each in inbox.arrivals(2)] == [DELTA, HEAD]
        assert (asked, when_asked) == ([DELTA, HEAD], [True, True])  # the delta had not been delivered before


def test_one_that_waits_in_vain_comes_after_its_time_and_the_next_ones_do_not_wait(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PASSING", 3)
    with linked(broker.url, "pi") as (link, inbox), linked(broker.url, "writer") as (writer, written):
        until_subscribed(link, inbox, [DELTA])
        asked = holding(link, lambda _: 0.001)
        for number in range(4):
            writer.publish(DELTA, b"%d" % number)
            written.next(Published)
            assert inbox.next(Arrived).payload == b"%d" % number
        assert asked == [DELTA, DELTA]  # of the first, and of the one after two that passed


def test_one_that_waits_when_the_link_ends_comes_again(broker: RunningBroker) -> None:
    with linked(broker.url, "pi") as (link, inbox), linked(broker.url, "writer") as (writer, written):
        until_subscribed(link, inbox, [DELTA])
        has_come = threading.Event()

        def seconds(_: str) -> float:
            has_come.set()
            return 600.0

        link.holds_s = seconds
        writer.publish(DELTA, b"held")
        written.next(Published)
        assert has_come.wait(WITHIN_S)
        link.disconnect()
        assert inbox.is_empty
        link.holds_s = lambda _: 0.0
        link.connect(*WILL)
        inbox.next(Connected)
        assert inbox.next(Arrived).payload == b"held"


def test_no_more_than_a_few_wait(broker: RunningBroker) -> None:
    with linked(broker.url, "pi") as (link, inbox), linked(broker.url, "writer") as (writer, written):
        until_subscribed(link, inbox, [DELTA])
        asked = holding(link, lambda _: 600.0)
        for number in range(module.HELD_MAX + 1):
            writer.publish(DELTA, b"%d" % number)
            written.next(Published)
        found = inbox.arrivals(module.HELD_MAX + 1)
        assert [each.payload for each in found] == [b"%d" % number for number in range(module.HELD_MAX + 1)]
        assert len(asked) == module.HELD_MAX
