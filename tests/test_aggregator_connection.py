"""The aggregator's connections: sessions, last wills, and a broker that may have lost what it retained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.small_world import (
    LAB,
    Bench,
    float32_block,
    follow,
    frames_of,
    make_directory,
    place,
    refusals,
    ternary_block,
)
from ternbus.aggregator.core import events, records
from ternbus.aggregator.core.retained import LOOK_S
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import build, parse
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.messages import Status

HEAD, STATUS = topics.head(LAB), topics.status(LAB)
Make = Callable[..., Bench]


def test_connecting_begins_a_session_with_a_last_will(make: Make) -> None:
    bench = make(started=False)
    actions = bench.dial()
    assert place(actions, records.SessionBegun) < place(actions, events.Connect)
    (connect,) = [action for action in actions if isinstance(action, events.Connect)]
    assert connect.will_topic == STATUS
    frame = parse(connect.will_payload)
    frame.check_authentic(bench.identity.public)
    assert Status.from_meta(frame.meta) == Status(state="offline", session=1, base=-1, software="test")


def test_a_connection_subscribes_and_says_online(make: Make) -> None:
    bench = make(started=False)
    actions = bench.start()
    (subscribe,) = [action for action in actions if isinstance(action, events.Subscribe)]
    assert {"ternbus/1/lab/up/#", HEAD} <= set(subscribe.filters)
    (status,) = frames_of(actions, "status")
    assert Status.from_meta(status.meta) == Status(state="online", session=1, base=-1, software="test")
    assert bench.retained[STATUS]


def test_the_first_connection_publishes_the_model(make: Make) -> None:
    bench = make()
    assert follow(bench.retained, bench.identity.public) == (0, bench.core.model.digest)
    assert bench.core.deadline is None


def reconnected(bench: Bench) -> int:
    """A new connection that has not heard of its head yet; returns how much was published before it."""
    bench.dial()
    before = len(bench.published)
    bench.handle(events.Connected(frame_bytes=120 * 1024))
    return before + 1  # its status


def test_a_broker_that_shows_the_head_is_left_in_peace(make: Make) -> None:
    bench = make()
    before = reconnected(bench)
    assert bench.core.deadline == bench.now + 5.0
    (asked,) = [action for action in bench.receive(HEAD, bench.retained[HEAD]) if isinstance(action, events.Subscribe)]
    assert asked.filters == (topics.snapshot(LAB, 0, 0),)  # not seen yet that the broker holds it
    bench.receive(asked.filters[0], bench.retained[asked.filters[0]])
    bench.tick(10.0)
    assert len(bench.published) == before
    assert bench.core.deadline is not None
    assert bench.core.deadline > bench.now + LOOK_S / 2  # then it is asked again


@pytest.mark.parametrize("shown", [None, b"", b"another"])
def test_a_broker_that_does_not_show_the_head_within_5_s_is_given_everything_again(
    make: Make, shown: bytes | None
) -> None:
    """Unchanged: snapshot, deltas since, head."""
    bench = make(merge__buffer_size=1, downlink__slots=6)
    pi = bench.join("pi")
    for version in range(5):
        bench.send(pi, ternary_block(bench.schema, version), version)
    kept = {topic: payload for topic, payload in bench.retained.items() if topic != STATUS}
    before = reconnected(bench)
    bench.retained.clear()
    bench.tick(4.9)
    assert len(bench.published) == before
    if shown is None:
        bench.tick(0.1)
    else:
        bench.receive(HEAD, shown)
    again = bench.published[before:]
    assert [action.topic for action in again] == [
        topics.snapshot(LAB, 1, 0),
        topics.delta(LAB, 4, 0),
        topics.delta(LAB, 5, 0),
        HEAD,
    ]
    assert all(kept[action.topic] == action.payload and action.retain for action in again)
    assert follow(bench.retained, bench.identity.public) == (5, bench.core.model.digest)
    bench.receive(HEAD, b"the next says nothing: everything was just given")
    assert len(bench.published) == before + len(again)


def test_a_merge_while_the_broker_is_in_doubt_publishes_all_that_a_device_needs(make: Make) -> None:
    """Else the new head would come back, and look like a broker that has lost nothing."""
    bench = make(merge__buffer_size=1)
    pi = bench.join("pi")
    bench.send(pi, ternary_block(bench.schema, 0), 0)
    reconnected(bench)
    bench.retained.clear()
    bench.send(pi, ternary_block(bench.schema, 1), 1)
    assert follow(bench.retained, bench.identity.public) == (2, bench.core.model.digest)
    sent = [action for action in bench.last if isinstance(action, events.Publish | events.RepublishRetained)]
    assert isinstance(sent[-2], events.RepublishRetained)
    assert sent[-2].why  # for the operator
    assert isinstance(sent[-1], events.Publish)
    assert sent[-1].topic == HEAD
    bench.receive(HEAD, bench.retained[HEAD])
    assert bench.core.deadline is not None
    assert bench.core.deadline <= bench.now + 1.0  # the counters


def test_the_head_that_is_given_again_is_that_of_now(make: Make) -> None:
    """Records of later events share its commit; a head read from there would name what is not published yet."""
    bench = make(merge__buffer_size=1)
    pi = bench.join("pi")
    reconnected(bench)
    head = bench.ledger.frame(HEAD)
    first = bench.core.handle(events.MessageArrived(topic=HEAD, payload=b""), bench.now)
    (frame,) = pi.update(ternary_block(bench.schema, 0), 0)
    second = bench.core.handle(events.MessageArrived(topic=pi.topic("update"), payload=frame), bench.now)
    bench.published.clear()
    bench.perform(first + second)
    given = [action.payload for action in bench.published if action.topic == HEAD]
    assert given[0] == head
    assert parse(given[1]).meta["version"] == 1


def test_the_newest_delta_is_given_again_even_where_a_snapshot_of_its_version_is(make: Make) -> None:
    """A crash may have come before any of it was published: devices one version behind wait for that delta."""
    bench = make(merge__buffer_size=1, downlink__slots=2)
    pi = bench.join("pi")
    bench.send(pi, ternary_block(bench.schema, 0), 0)
    delta = topics.delta(LAB, 1, 0)
    kept = bench.retained[delta]
    assert bench.head.snapshot.version == bench.version == 1
    before = reconnected(bench)
    bench.retained.clear()
    bench.tick(5.0)
    assert [action.topic for action in bench.published[before:]] == [topics.snapshot(LAB, 1, 0), delta, HEAD]
    assert bench.retained[delta] == kept


def test_a_newest_delta_too_large_for_the_broker_is_not_given_again(make: Make) -> None:
    bench = make(merge__buffer_size=1, downlink__slots=2, downlink__codec="float32")
    pi = bench.join("pi")
    bench.send(pi, float32_block(bench.schema, 0), 0)
    bench.dial()
    before = len(bench.published)
    bench.handle(events.Connected(frame_bytes=1500))
    assert not [action.topic for action in bench.published[before:] if "/delta/" in action.topic]
    assert follow(bench.retained, bench.identity.public) == (1, bench.core.model.digest)


@pytest.mark.parametrize(
    ("limit", "broker", "most", "told"),
    [
        (120 * 1024, 10**6, 10**6, 2**18),
        (120 * 1024, 10**6, 2**17, 2**17),
        (120 * 1024, 10**6, 100_000, 0),
        (120 * 1024, 10**6, 0, 0),  # the broker does not say what it takes
        (2**19, 10**6, 0, 2**19),
        (2**19, 10**6, 10**6, 2**19),
        (2**19, 2**17, 2**17, 2**17),
        (4096, 10**6, 10**6, 0),  # the operator wants smaller ones
    ],
)
def test_a_head_says_which_frames_are_taken_where_they_are_larger_than_usual(
    make: Make, limit: int, broker: int, most: int, told: int
) -> None:
    bench = make(limits__frame_bytes=limit)
    bench.dial()
    bench.handle(events.Connected(frame_bytes=broker, most_bytes=most))
    assert bench.head.frame_bytes == told
    assert ("frame_bytes" in parse(bench.retained[HEAD]).meta) == bool(told)


@pytest.mark.parametrize(("broker", "warned"), [(8 * 2**20 - 1024, False), (8 * 2**20 - 1023, True)])
def test_frames_that_most_devices_do_not_take_are_warned_of(make: Make, broker: int, warned: bool) -> None:
    bench = make(limits__frame_bytes=2**24)
    bench.dial()
    actions = bench.handle(events.Connected(frame_bytes=broker))
    assert ("large-frames" in [each.event for each in actions if isinstance(each, events.Log)]) == warned


def test_a_broker_is_not_blamed_for_a_head_that_the_aggregator_changed(make: Make) -> None:
    bench = make(limits__frame_bytes=2**18)
    bench.dial()
    actions = bench.handle(events.Connected(frame_bytes=2**17))
    (given,) = [action.why for action in actions if isinstance(action, events.RepublishRetained)]
    assert given == "the head changed before the broker showed what it holds"


@pytest.mark.parametrize("most", [0, 2**28])  # the head asks for larger frames, or not
def test_what_a_broker_gets_for_the_first_time_is_no_news_for_the_operator(tmp_path: Path, most: int) -> None:
    bench = Bench(make_directory(tmp_path / "first"))
    (first,) = [action for action in bench.start(most_bytes=most) if isinstance(action, events.RepublishRetained)]
    assert first.why == ""
    bench.close()


def test_a_lost_connection_waits_for_no_head(make: Make) -> None:
    bench = make()
    reconnected(bench)
    bench.handle(events.Disconnected())
    assert {type(action) for action in bench.tick(10.0)} == {events.Save, events.Connect}
    bench.handle(events.ConnectFailed())
    assert {type(action) for action in bench.tick(10.0)} == {events.Save, events.Connect}


def test_its_own_status_offline_while_it_lives_is_answered_one_session_higher(make: Make) -> None:
    bench = make()
    will = parse(bench.retained[STATUS])
    meta = Status(state="offline", session=1, software="test").meta()
    offline = build(bench.identity, federation=LAB, sender="aggregator", kind="status", seq=9, meta=meta)
    assert will.meta["session"] == 1
    actions = bench.receive(STATUS, offline)
    assert place(actions, records.SessionBegun) < place(actions, events.Publish)
    (frame,) = frames_of(actions, "status")
    assert Status.from_meta(frame.meta) == Status(state="online", session=2, base=-1, software="test")
    assert bench.receive(STATUS, offline) == []  # of a session that is over
    assert bench.receive(STATUS, bench.retained[STATUS]) == []
    assert bench.receive(STATUS, b"") == []
    bench.dial()
    assert bench.ledger.fact("session") == 3


def test_a_forged_status_of_its_own_is_counted_only(make: Make) -> None:
    bench = make()
    eve = Identity.generate()
    meta = Status(state="offline", session=99).meta()
    about: dict[str, Any] = {"federation": LAB, "sender": "aggregator", "seq": 9, "meta": meta}
    for forged in (build(eve, kind="status", **about), build(bench.identity, kind="head", **about)):
        assert [type(action) for action in bench.receive(STATUS, forged)] == [events.Log]
    assert refusals(bench.tick(1.0)) == {"bad-signature": 1, "wrong-topic": 1}
    assert bench.core.session == 1
