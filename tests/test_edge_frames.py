"""Which frames a device believes, which heads are replays, and what a head's state and schema mean."""

from typing import Any

import pytest

from support.core_device import (
    DEVICE,
    DEVICE_KEY,
    TENSORS,
    Device,
    aggregator,
    connected,
    following,
    logged,
    of,
    only,
    published,
    sending,
)
from support.scripted_aggregator import FEDERATION, Message, ScriptedAggregator
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.parts import message_digest
from ternbus.broker.protocol.schema import Schema
from ternbus.edge.core import events
from ternbus.edge.core.actions import Log, Publish, Save, StartTraining, Stop
from ternbus.edge.core.log_sampler import LINES, WINDOW_S


def test_what_is_not_the_aggregators_is_dropped_and_counted_in_the_protocols_order() -> None:
    scripted, device = following()
    before = device.disk
    topic, payload = scripted.head()
    forged = ScriptedAggregator(identity=Identity(b"f" * 32))
    own = of(device.actions, Publish)[0]
    assert own.topic == topics.up(FEDERATION, DEVICE, "status")
    flipped = bytearray(scripted.head()[1])
    flipped[8 + int.from_bytes(flipped[4:8], "little")] ^= 1
    device.arrive(
        forged.head(),
        ("ternbus/1/other/all/head", payload),
        (topics.status(FEDERATION), payload),
        (topic, bytes(flipped)),
        (topic, payload + b"body"),
        (own.topic, own.payload),
        (topic, scripted.cut("head", parse(payload).meta, b"x" * 3000)[0]),
    )
    device.handle(events.FrameMalformed(reason="not-a-frame"))
    assert device.core.dropped == {
        "unknown-key": 1,
        "wrong-federation": 1,
        "wrong-topic": 1,
        "bad-signature": 1,
        "bad-digest": 1,
        "not-ours": 1,
        "bad-body": 1,
        "not-a-frame": 1,
    }
    assert device.disk is before


def test_drops_are_logged_the_first_tenth_and_hundredth_time() -> None:
    device = connected()
    done = [action for _ in range(120) for action in device.handle(events.FrameMalformed(reason="not-a-frame"))]
    assert [action.fields["count"] for action in of(done, Log)] == [1, 10, 100]


def test_a_receipt_that_a_broker_repeats_fills_no_log() -> None:
    scripted, device, frame = sending()
    receipt = scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "busy", retry_after_s=5.0)
    texts = [log.text for log in of(device.arrive(*[receipt] * 1000), Log)]
    assert len(texts) == LINES
    assert [text for text in texts if "more of this is not logged" in text] == texts[-1:]
    device.wait(WINDOW_S)
    assert logged(device.arrive(*[receipt] * 2)) == ["busy", "busy"]


def test_a_head_that_a_broker_repeats_fills_no_log() -> None:
    scripted, device = aggregator(plan={"batch_size": -1}), connected()
    assert logged(device.arrive(*[scripted.head()] * 1000)).count("bad-plan") == LINES


def test_a_head_below_the_highest_accepted_is_a_replay_also_after_a_restart() -> None:
    scripted, device = following()
    old = scripted.head()
    scripted.advance()
    same_version_later = scripted.head(version=0, digest=parse(old[1]).meta["digest"])
    device.arrive(*scripted.delta(1), scripted.head())
    again = device.restarted()
    again.connect()
    for life in (device, again):
        life.arrive(scripted.status(), old, same_version_later, scripted.head(seq=1))
        assert life.core.dropped["old-head"] == 3
    assert again.core.follower.head is None
    assert again.disk is not None
    assert again.disk.head_version == 1


def behind(device: Device, *messages: Message) -> list[tuple[Any, Any]]:
    """State and base of each status that is published when the messages arrive."""
    return [(frame.meta["state"], frame.meta["base"]) for frame in published(device.arrive(*messages), "status")]


def test_a_head_that_is_too_old_is_answered_once_a_connection_with_the_version_that_was_seen() -> None:
    """An aggregator whose folder was copied back by hand learns of it in no other way from a device that is idle."""
    scripted, device = following()
    old = [scripted.head(), scripted.head()]
    for version in (1, 2):
        scripted.advance()
        device.arrive(*scripted.delta(version), scripted.head())
    again = device.restarted()
    for _ in range(2):
        assert [frame.meta["base"] for frame in published(again.connect(), "status")] == [-1]
        assert behind(again, scripted.status(), *old) == [("idle", 2)]
        again.handle(events.Disconnected(reason="gone"))
        again.wait(100)
    again.connect()
    again.arrive(old[0], scripted.head())
    assert behind(again, old[1]) == [("idle", 2)]  # it had accepted one since


def test_a_head_that_is_too_old_leaves_the_base_of_a_training_until_it_ends() -> None:
    scripted, device = following()
    old = scripted.head()
    scripted.advance()
    device.arrive(scripted.head())  # its delta has not come, and the training on version 0 goes on
    assert behind(device, old) == [("training", 0)]
    done = device.handle(events.TrainingFailed(base=0, reason="odd"))
    assert [(frame.meta["state"], frame.meta["base"]) for frame in published(done, "status")] == [("idle", 1)]


@pytest.mark.parametrize("changes", [{"state": {"enrolled": False}}, {"role": "join"}])
def test_a_device_that_publishes_no_status_answers_no_old_head(changes: dict[str, Any]) -> None:
    scripted = aggregator()
    old = scripted.head()
    scripted.advance()
    device = connected(**changes)
    device.arrive(scripted.head())
    assert behind(device, old) == []


def test_the_log_names_the_aggregators_restore_before_the_devices_rejoin() -> None:
    scripted, device = following()
    old = scripted.head()
    scripted.advance()
    device.arrive(scripted.head())
    text = only(device.arrive(old), Log).text
    assert 0 < text.index("ternbus aggregator restored DIR") < text.index("ternbus edge rejoin")


def test_the_same_head_again_is_no_news() -> None:
    scripted, device = aggregator(), connected()
    head = scripted.head()
    assert len(of(device.arrive(head), Save)) == 1
    assert of(device.arrive(head), Save) == []
    assert device.core.dropped == {}


def test_paused_follows_and_keeps_what_is_outstanding_but_sends_nothing() -> None:
    scripted, device, frame = sending()
    scripted.state = "paused"
    scripted.advance()
    device.arrive(*scripted.delta(1), scripted.head())
    assert device.core.follower.version == 1
    device.handle(events.Disconnected(reason="gone"))
    device.wait(1)
    device.connect()
    assert published(device.arrive(scripted.status(), scripted.head()) + device.wait(5000), "update") == []
    assert published(device.arrive(scripted.grant(DEVICE, DEVICE_KEY.key_id, frame.seq, [[0, 0]])), "update") == []
    scripted.state = "open"
    assert published(device.arrive(scripted.head()), "update") == [frame]


def test_paused_begins_no_training() -> None:
    _, device = following(scripted=aggregator(state="paused"))
    assert of(device.actions, StartTraining) == []


def test_closed_forgets_what_is_outstanding_and_ends_the_device() -> None:
    scripted, device, frame = sending()
    scripted.state = "closed"
    done = device.arrive(scripted.head())
    saved = only(done, Save)
    assert saved.state.outstanding is None
    assert saved.answered is not None  # a receipt may have been lost
    assert (saved.answered.seq, saved.answered.outcome) == (frame.seq, "unanswered")
    assert saved.answered.digest == message_digest([frame.header])
    assert only(done, Stop).code == 0
    assert published(done, "status")[-1].meta["state"] == "offline"
    fresh = connected()
    assert only(fresh.arrive(scripted.head()), Stop).reason == "the federation is closed"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({**TENSORS, "w": (20, 50)}, "tensor 'w' is (20, 50) in the task and (50, 20) in the federation"),
        ({"w": (50, 20)}, "tensor 'b' is missing in the task"),
        ({**TENSORS, "c": (3,)}, "tensor 'c' is (3,) in the task and missing in the federation"),
    ],
)
def test_a_device_whose_task_does_not_fit_ends_and_names_the_tensor(tensors: Any, words: str) -> None:
    _, device = following(tensors=tensors)
    stop = only(device.actions, Stop)
    assert stop.code == 1
    assert words in stop.reason


def test_a_task_is_checked_again_when_another_one_fitted_before() -> None:
    scripted, device, _ = sending()
    again = device.restarted(tensors={**TENSORS, "c": (3,)})
    again.connect()
    assert only(again.arrive(scripted.status(), scripted.head(), *scripted.snapshot()), Stop).code == 1


def test_another_schema_than_the_one_joined_is_not_followed() -> None:
    other = Schema.of({"x": (9,)})
    _, device = following(state={"schema": other.encoded})
    assert only(device.actions, Stop).code == 1


@pytest.mark.parametrize("lives", [True, False], ids=["the process lives", "it was restarted"])
def test_a_schema_that_changes_later_is_not_followed_either(lives: bool) -> None:
    """Its names are others and its elements as many: the device would add its residual to another model."""
    scripted, device, _ = sending()
    scripted.schema = Schema.of({f"other.{name}": shape for name, shape in TENSORS.items()})
    for _ in range(scripted.slots + 1):
        scripted.advance()
    snapshot = scripted.new_snapshot()
    if not lives:
        device = device.restarted()
        device.connect()
    stop = only(device.arrive(scripted.status(), scripted.head(), *snapshot), Stop)
    assert stop.code == 1
    assert "schema" in stop.reason
