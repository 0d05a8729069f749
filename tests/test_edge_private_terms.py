"""The terms of private sums at a device: collected, compared with its owner's pins, refused in words."""

from dataclasses import replace
from typing import Any

import pytest

from support.core_device import (
    DEVICE,
    DEVICE_KEY,
    Device,
    following,
    of,
    only,
    published,
)
from support.core_device import aggregator as plain_aggregator
from support.private_device import (
    PINS,
    aggregator,
    named,
    private,
    refusals,
    sending,
    terms_messages,
    training,
)
from support.private_sums import card, helper_key, terms_for
from support.scripted_aggregator import FEDERATION, ScriptedAggregator
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.frame import build, parse
from ternbus.broker.protocol.identity import AGGREGATOR, Identity
from ternbus.broker.protocol.messages import Status, Update
from ternbus.broker.sums.terms import Terms, digest_of
from ternbus.edge.core import events
from ternbus.edge.core.actions import Log, StartTraining, Subscribe
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.sum_policy import SumPolicy

OTHER_KEY = Identity(b"e" * 32)
TWO = (card(1), card(2))


def standard(scripted: ScriptedAggregator) -> Terms:
    return terms_for(scripted.schema)


def receipt(scripted: ScriptedAggregator, seq: int, outcome: str, key: Identity = DEVICE_KEY, **more: Any) -> Any:
    return scripted.receipt(DEVICE, key.key_id, seq, outcome, **more)


def trained_as(device: Device) -> events.TrainingFailed:
    job = device.core.training.running
    assert job is not None
    return events.TrainingFailed(base=job.base, reason="quotes the data")


# -- the terms


def test_terms_are_used_when_their_digest_is_the_heads_and_not_before() -> None:
    scripted, device = aggregator(), private()
    assert [f"ternbus/1/{FEDERATION}/all/terms/#" in each.filters for each in of(device.actions, Subscribe)] == [True]
    done = device.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
    assert of(done, StartTraining) == []
    other = terms_for(scripted.schema, scales=(2.0, 2.0))
    assert of(device.arrive(*terms_messages(scripted, other.content())), StartTraining) == []
    assert device.core.state.refusal == ""
    job = only(device.arrive(*terms_messages(scripted)), StartTraining)
    assert job.sums is not None
    assert job.sums.terms == standard(scripted)


def test_a_device_says_that_it_waits_for_terms_and_asks_for_them_by_name() -> None:
    scripted, device = aggregator(), private(timeout_s=100.0)
    device.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
    first = f"ternbus/1/{FEDERATION}/all/terms/0"
    assert [each.filters for each in of(device.wait(0.9), Subscribe)] == []
    done = device.wait(5.0)
    assert [each.filters for each in of(done, Subscribe)] == [(first,)]
    assert [each.text for each in of(done, Log) if each.event == "waiting"] == [
        "waiting for the terms of private sums for version 0"
    ]
    assert device.disk is not None
    assert device.disk.refusal == "the terms of private sums that the aggregator's head names have not arrived"
    (frame,) = published(done, "status")
    assert "have not arrived" in Status.from_meta(frame.meta).failing
    assert [each.filters for each in of(device.wait(31.0), Subscribe)] == [(first,)]  # again, after the timeout
    done = device.arrive(*terms_messages(scripted))
    assert len(of(done, StartTraining)) == 1
    assert device.disk.refusal == ""
    (frame, *_) = published(done, "status")
    assert Status.from_meta(frame.meta).failing == ""
    assert of(device.wait(50.0), Subscribe) == []


def test_a_device_gives_up_where_terms_never_come() -> None:
    scripted, device = aggregator(), private(timeout_s=100.0)
    device.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
    assert "the terms of private sums" in str(device.wait(120.0)[-1])


def large(scripted: ScriptedAggregator) -> tuple[Terms, list[Any]]:
    """Terms in three parts or more, and their messages."""
    usual, scripted.frame_bytes = scripted.frame_bytes, 1260
    terms = terms_for(scripted.schema, helpers=tuple(card(each, helper=f"{'x' * 50}-{each}") for each in range(1, 9)))
    messages = named(scripted, terms)
    scripted.frame_bytes = usual
    assert len(messages) == 3
    return terms, messages


def test_parts_come_in_any_order_and_twice() -> None:
    scripted, device = aggregator(), private()
    terms, messages = large(scripted)
    device.arrive(messages[2], messages[0], messages[0])
    device.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
    done = device.arrive(*messages[1:])
    job = only(done, StartTraining)
    assert job.sums is not None
    assert job.sums.terms == terms


def test_the_missing_parts_are_asked_for_and_no_others() -> None:
    scripted, device = aggregator(), private()
    _, messages = large(scripted)
    device.arrive(scripted.status(), scripted.head(), *scripted.snapshot(), messages[1])
    (asked,) = of(device.wait(2.0), Subscribe)
    assert asked.filters == tuple(topic for place, (topic, _) in enumerate(messages) if place != 1)
    device.handle(events.Disconnected(reason="gone"))
    device.wait(3.0)
    assert asked in of(device.connect(), Subscribe)
    assert len(of(device.arrive(scripted.status(), messages[0], *messages[2:]), StartTraining)) == 1


def test_the_first_part_by_name_says_how_many_more_there_are() -> None:
    scripted, device = aggregator(), private()
    _, messages = large(scripted)
    device.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
    assert [each.filters for each in of(device.wait(2.0), Subscribe)] == [(messages[0][0],)]
    (asked,) = of(device.arrive(messages[0]), Subscribe)
    assert asked.filters == tuple(topic for topic, _ in messages[1:])
    assert len(of(device.arrive(*messages[1:]), StartTraining)) == 1


def test_terms_of_another_head_that_come_when_asked_for_are_not_asked_for_at_once_again() -> None:
    scripted, device = aggregator(), private()
    others = terms_messages(scripted, terms_for(scripted.schema, scales=(2.0, 2.0)).content())
    device.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
    device.wait(2.0)
    assert of(device.arrive(*others), Subscribe) == []
    assert of(device.wait(50.0), Subscribe) == []
    assert len(of(device.wait(20.0), Subscribe)) == 1
    assert of(device.arrive(*others, *others), StartTraining) == []


def test_an_old_part_by_name_is_not_asked_for_in_a_loop() -> None:
    scripted, device = aggregator(), private()
    _, messages = large(scripted)
    device.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
    device.arrive(*messages)  # complete, and held: then nothing is asked for
    scripted.plan["terms"] = bytes(32)
    device.handle(trained_as(device))
    scripted.advance()
    device.arrive(*scripted.delta(1), scripted.head())
    device.wait(2.0)
    device.arrive(messages[0])
    asked = of(device.arrive(*messages[1:]), Subscribe)
    assert asked == []
    assert device.core.terms.missing


def test_terms_that_stay_are_not_asked_for_again_with_the_next_version() -> None:
    scripted, device, frame = sending()
    device.arrive(receipt(scripted, frame.seq, "accepted"))
    scripted.advance()
    done = device.arrive(*scripted.delta(1), scripted.head())
    job = only(done, StartTraining)
    assert job.base == 1
    assert job.sums is not None
    assert job.sums.context != Update.from_meta(frame.meta).context


def test_terms_that_came_before_their_head_are_there_when_it_names_them() -> None:
    scripted, device, frame = sending()
    terms = terms_for(scripted.schema, scales=(3.0, 3.0))
    device.arrive(receipt(scripted, frame.seq, "accepted"), *named(scripted, terms))
    scripted.advance()
    job = only(device.arrive(*scripted.delta(1), scripted.head()), StartTraining)
    assert job.sums is not None
    assert job.sums.terms.scales == (3.0, 3.0)


def test_what_an_aggregator_publishes_as_terms_is_kept_within_bounds() -> None:
    scripted, device = aggregator(), private()
    scripted.frame_bytes = 120 * 1024
    for number in range(20):
        device.arrive(*terms_messages(scripted, b"no terms" + bytes([number])))
    assert len(device.core.terms._held) == 4
    device.arrive(*terms_messages(scripted, bytes(1_000_000)))
    assert device.core.dropped["too-long"] == 1
    body = scripted.frame("terms", {})
    frame = build(scripted.identity, federation=FEDERATION, sender=AGGREGATOR, kind="terms", seq=9, meta={},
                  body=bytes(2000), part=0, parts=60_000)  # fmt: skip
    device.arrive((terms_messages(scripted)[0][0], frame))
    assert device.core.dropped["too-long"] == 2
    assert body
    assert len(device.core.terms._held) == 4


@pytest.mark.parametrize("content", [b"", b"\xc0", bytes(100), b"\x81\xa4kind\xa4mask"])
def test_terms_that_are_none_are_refused_in_words_though_the_head_names_them(content: bytes) -> None:
    scripted, device = aggregator(), private()
    scripted.plan["terms"] = digest_of(content)
    done = device.arrive(*terms_messages(scripted, content), scripted.status(), scripted.head(), *scripted.snapshot())
    assert of(done, StartTraining) == []
    assert [text.split("(")[0] for text in refusals(done)] == ["its terms of private sums are not valid "]
    assert of(device.wait(100.0), StartTraining) == []
    assert not [each for each in of(device.actions, Subscribe) if any("terms/0" in name for name in each.filters)]


def test_a_device_that_is_not_private_wants_no_terms() -> None:
    scripted, device = following()
    device.arrive(*terms_messages(aggregator(), None))
    assert device.core.dropped == {"not-asked": 1}
    assert not [each for each in of(device.actions, Subscribe) if any("terms" in name for name in each.filters)]
    assert scripted.version == 0


# -- what the owner pinned


def short(scripted: ScriptedAggregator, **changes: Any) -> Terms:
    return replace(standard(scripted), **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"helpers": (card(2),)}, "which its owner has pinned, is not in the terms"),
        ({"min": 4}, "sums of 4 devices, and its owner requires 5"),
        ({"helpers": (card(1, roster="aggregator"),)}, "lets the aggregator say which devices there are"),
        ({"kind": "bfv"}, "its terms of private sums are not valid"),
        ({"dense": 8}, "a model of other tensors"),
        ({"ternary": 1001}, "a model of other tensors"),
        ({"scales": (1.0,)}, "a model of other tensors"),
        ({"dp": "sum", "theta": 0.1, "norm": 1.0}, "the terms have dp, theta and norm sum, 0.1 and 1"),
    ],
)
def test_terms_that_break_a_pin_are_refused_in_words(changes: dict[str, Any], said: str) -> None:
    own = replace(PINS, roster="own")
    scripted = aggregator()
    terms = short(scripted, **changes)
    device = private(sums=own)
    messages = named(scripted, terms)
    done = device.arrive(*messages, scripted.status(), scripted.head(), *scripted.snapshot())
    (text,) = refusals(done)
    assert said in text
    assert of(done, StartTraining) == []
    assert device.disk is not None
    assert device.disk.refusal == text
    frames = published(done, "status")
    assert Status.from_meta(frames[-1].meta).failing.startswith(text[:100])
    assert refusals(device.arrive(scripted.head())) == []  # it is said once
    done = device.arrive(*named(scripted, standard(scripted)), scripted.head())
    assert len(of(done, StartTraining)) == 1
    assert device.disk.refusal == ""


def test_a_card_of_another_federation_is_refused_in_words() -> None:
    """A helper keeps the used bases of each federation apart."""
    scripted, device = aggregator(), private()
    terms = short(scripted, helpers=(card(2), card(1, federation="other")))
    done = device.arrive(*named(scripted, terms), scripted.status(), scripted.head(), *scripted.snapshot())
    assert refusals(done) == ["the helper 'h-1' in its terms is one of the federation 'other'"]
    assert of(done, StartTraining) == []
    done = device.arrive(*named(scripted, standard(scripted)), scripted.head())
    assert len(of(done, StartTraining)) == 1


def test_an_aggregator_that_is_its_own_helper_gets_nothing() -> None:
    """The same name, another key: names prove nothing."""
    scripted, device = aggregator(), private()
    forged = replace(card(2).card, helper="h-1").signed(helper_key(2))
    done = device.arrive(
        *named(scripted, short(scripted, helpers=(forged,))), scripted.status(), scripted.head(), *scripted.snapshot()
    )
    assert helper_key(1).public.hex() in refusals(done)[0]
    assert published(device.wait(1000.0), "update") == []


def test_a_box_key_below_one_that_was_seen_is_refused_also_after_a_restart() -> None:
    scripted, device, frame = sending(of=terms_for(aggregator().schema, helpers=(card(1, number=3),)))
    assert device.disk is not None
    assert device.disk.cards == {helper_key(1).public: 3}
    device.arrive(receipt(scripted, frame.seq, "accepted"))
    again = device.restarted()
    again.connect()
    scripted.advance()
    old = named(scripted, short(scripted, helpers=(card(1, number=2),)))
    done = again.arrive(*old, scripted.status(), scripted.head(), *scripted.snapshot(), *scripted.delta(1))
    assert "has the box key 2, and number 3 was seen before" in refusals(done)[0]
    assert of(done, StartTraining) == []
    done = again.arrive(*named(scripted, short(scripted, helpers=(card(1, number=4),))), scripted.head())
    assert len(of(done, StartTraining)) == 1
    assert again.disk is not None
    assert again.disk.cards == {helper_key(1).public: 4}


@pytest.mark.parametrize("plan", [{"codec": "ternary"}, {"codec": "float32"}, {"codec": "ternary", "terms": bytes(32)}])
def test_a_private_device_sends_no_other_codec_whatever_heads_say(plan: dict[str, Any]) -> None:
    scripted, device = plain_aggregator(), private()
    scripted.plan = plan
    done = device.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
    assert refusals(done) == [f'its owner requires private sums (--private), the plan has the codec "{plan["codec"]}"']
    assert of(done + device.wait(1000.0), StartTraining) == []
    assert published(device.actions, "update") + published(device.actions, "offer") == []
    assert device.disk is not None
    assert "requires private sums" in device.disk.refusal


@pytest.mark.parametrize("named_as", [None, b"short", "text", 7])
def test_a_head_that_is_private_and_names_no_terms_is_refused(named_as: Any) -> None:
    scripted, device = aggregator(), private()
    scripted.plan["terms"] = named_as
    if named_as is None:
        del scripted.plan["terms"]
    done = device.arrive(*terms_messages(scripted), scripted.status(), scripted.head(), *scripted.snapshot())
    (refusal,) = refusals(done)
    assert refusal.startswith("it names no terms of private sums; the aggregator has none while it waits for a helper")
    assert of(done, StartTraining) == []
    assert refusals(device.arrive(scripted.head())) == []


def test_a_device_that_was_not_joined_for_private_sums_refuses_them_and_says_how_to_join() -> None:
    scripted = plain_aggregator()
    scripted.plan = {"codec": "private", "terms": bytes(32)}
    _, device = following(scripted=scripted)
    (text,) = refusals(device.actions)
    assert "edge join … --private --helper KEY" in text
    assert of(device.actions, StartTraining) == []
    assert device.disk is not None
    assert device.disk.refusal == text  # for `edge status`
    failing = Status.from_meta(published(device.actions, "status")[-1].meta).failing
    assert failing == text  # for `aggregator status`, and nobody waits for this device
    scripted.plan = {}
    device.arrive(scripted.head())
    assert device.disk.refusal == ""
    assert Status.from_meta(published(device.actions, "status")[-1].meta).failing == ""


def test_an_evaluator_needs_no_helpers_and_says_nothing_of_them() -> None:
    scripted = plain_aggregator()
    scripted.plan = {"codec": "private", "terms": bytes(32)}
    _, device = following(scripted=scripted, role="evaluate", state={"refusal": "of a time when it trained"})
    assert Status.from_meta(published(device.actions, "status")[-1].meta).failing == ""


def test_whether_a_training_failed_does_not_change_what_is_said_of_a_plan() -> None:
    scripted, device, job = training()
    scripted.plan["codec"] = "ternary"
    device.arrive(scripted.head())
    before = Status.from_meta(published(device.actions, "status")[-1].meta).failing
    assert "its owner requires private sums" in before
    done = device.handle(events.TrainingFailed(base=job.base, reason="out of memory"))
    assert Status.from_meta(published(done, "status")[-1].meta).failing == before


def test_a_plan_of_no_bytes_of_its_own_changes_nothing() -> None:
    """A head that is ambiguous to a reader of bytes is dropped before anything of it is believed."""
    scripted, device = aggregator(), private()
    meta: dict[Any, Any] = {**parse(scripted.head()[1]).meta, b"plan": {}}
    device.arrive(("ternbus/1/fed/all/head", scripted.frame("head", meta)))
    assert device.core.dropped == {"bad-meta": 1}
    assert device.core.state.head_seq == 0


# -- the policy by itself


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"helpers": ()}, "1 to 8 different helpers"),
        ({"helpers": (bytes(32),) * 2}, "1 to 8 different helpers"),
        ({"helpers": tuple(bytes([each]) * 32 for each in range(9))}, "1 to 8 different helpers"),
        ({"min": 1}, "--private-min is 1"),
        ({"min": 2001}, "--private-min is 2001"),
        ({"roster": "mine"}, "--private-roster is 'mine'"),
    ],
)
def test_pins_that_cannot_be_are_refused(about: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SumPolicy(**{"helpers": (bytes(32),), **about})


def test_plans_with_other_terms_are_the_same_plan_to_train_by() -> None:
    scripted, device, _ = training()
    first = device.core.training.plan
    device.arrive(*named(scripted, short(scripted, scales=(9.0, 9.0))), scripted.head())
    assert device.core.training.plan == first == Plan.from_meta({"codec": "private", "error_feedback": True})
