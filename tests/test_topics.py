"""Topics: what is built is taken apart again, and nothing else is."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame, build, parse
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.topics import Address

PI = Identity(bytes(range(32)))


def frame(**about: Any) -> Frame:
    values: dict[str, Any] = {"federation": "lab", "sender": "pi", "kind": "update", "seq": 1, "meta": {}}
    return parse(build(PI, **{**values, **about}))


def test_each_topic_is_taken_apart() -> None:
    assert topics.parse(topics.head("lab")) == Address(federation="lab", group="all", kind="head")
    assert topics.parse(topics.status("lab")) == Address(federation="lab", group="all", kind="status")
    assert topics.parse(topics.delta("lab", 31, 2)) == Address(
        federation="lab", group="all", kind="delta", slot=31, part=2
    )
    assert topics.parse(topics.snapshot("lab", 1, 0)) == Address(
        federation="lab", group="all", kind="snapshot", slot=1, part=0
    )
    for kind in topics.UP_KINDS:
        expected = Address(federation="lab", group="up", kind=kind, device="pi")
        assert topics.parse(topics.up("lab", "pi", kind)) == expected
    for kind in topics.DOWN_KINDS:
        expected = Address(federation="lab", group="down", kind=kind, device="pi")
        assert topics.parse(topics.down("lab", "pi", kind)) == expected


def test_no_topic_has_more_than_seven_slashes() -> None:
    assert topics.delta("lab", 65_535, 65_535).count("/") <= 7
    assert topics.up("lab", "pi", "update").count("/") <= 7


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "ternbus/1/lab",
        "ternbus/2/lab/all/head",
        "ternbus/1/Lab/all/head",
        "ternbus/1/lab/all/heads",
        "ternbus/1/lab/all/delta",
        "ternbus/1/lab/all/delta/1",
        "ternbus/1/lab/all/delta/01/0",
        "ternbus/1/lab/all/delta/-1/0",
        "ternbus/1/lab/all/delta/1/x",
        "ternbus/1/lab/all/delta/1/",
        "ternbus/1/lab/all/delta/\u0661/0",  # a digit, but not one of ours
        "ternbus/1/lab/all/delta/100000/0",
        "ternbus/1/lab/all/head/0/0",
        "ternbus/1/lab/up/aggregator/status",
        "ternbus/1/lab/up/pi/receipt",
        "ternbus/1/lab/down/pi/update",
        "ternbus/1/lab/up/p i/update",
        "ternbus/1/lab/up/pi/update/",
        "/ternbus/1/lab/all/head",
        "ternbus/1/lab/all/head\n",
        "ternbus/1/+/all/head",
    ],
)
def test_other_topics_are_not_ours(topic: str) -> None:
    with pytest.raises(ProtocolError, match="unknown-topic"):
        topics.parse(topic)


@given(st.text(alphabet="/ternbus12laupdowhe-+#é", max_size=40) | st.text(max_size=40))
@settings(max_examples=200)
def test_any_topic_is_taken_apart_or_refused(topic: str) -> None:
    for text in (topic, f"ternbus/1/lab/{topic}"):
        try:
            topics.parse(text)
        except ProtocolError as error:
            assert error.reason == "unknown-topic"


def test_a_frame_is_held_against_its_topic() -> None:
    update = topics.parse(topics.up("lab", "pi", "update"))
    topics.check(frame(), update)
    for wrong, reason in [
        (frame(federation="other"), "wrong-federation"),
        (frame(kind="status"), "wrong-topic"),
        (frame(sender="eve"), "wrong-sender"),
        (frame(sender="aggregator"), "wrong-sender"),
    ]:
        with pytest.raises(ProtocolError) as error:
            topics.check(wrong, update)
        assert error.value.reason == reason


def test_the_aggregator_alone_sends_on_all_and_down() -> None:
    delta, receipt = topics.parse(topics.delta("lab", 3, 1)), topics.parse(topics.down("lab", "pi", "receipt"))
    topics.check(frame(sender="aggregator", kind="delta", part=1, parts=2), delta)
    topics.check(frame(sender="aggregator", kind="receipt"), receipt)
    with pytest.raises(ProtocolError, match="wrong-sender"):
        topics.check(frame(sender="pi", kind="receipt"), receipt)
    with pytest.raises(ProtocolError, match="wrong-topic"):
        topics.check(frame(sender="aggregator", kind="delta", part=0, parts=2), delta)
