"""A device's enrollment, its refusal and revocation, and a new key."""

from dataclasses import replace
from typing import Any

import pytest

from support.core_device import (
    DEVICE,
    DEVICE_KEY,
    Device,
    aggregator,
    connected,
    following,
    logged,
    of,
    only,
    profile,
    published,
    sending,
    update_in,
)
from support.private_device import PINS, terms_messages
from support.private_device import aggregator as private_aggregator
from support.scripted_aggregator import FEDERATION
from ternbus.broker.exit_codes import EXIT_CONFIG
from ternbus.broker.protocol.identity import Identity, enroll_proof
from ternbus.broker.protocol.messages import Enroll
from ternbus.broker.sums.terms import KINDS, MASK
from ternbus.edge.core import events
from ternbus.edge.core.actions import Stop
from ternbus.edge.core.core import Core
from ternbus.edge.core.profile import ENROLL_SEQ
from ternbus.edge.core.state import State


def test_the_enrolment_is_the_same_frame_each_time_until_it_is_answered() -> None:
    device = connected("join", state={"enrolled": False}, code="secret")
    scripted = aggregator()
    assert published(device.actions, "enroll") == []  # nobody is there to hear it
    (frame,) = published(device.arrive(scripted.status()), "enroll")
    assert frame.seq == ENROLL_SEQ
    assert Enroll.from_meta(frame.meta).public_key == DEVICE_KEY.public
    assert frame.body == enroll_proof("secret", FEDERATION, DEVICE, DEVICE_KEY.public)
    device.handle(events.Published(seq=ENROLL_SEQ))
    assert published(device.wait(9.9), "enroll") == []
    assert published(device.wait(5), "enroll") == [frame]
    again = device.restarted()
    again.connect()
    assert published(again.arrive(scripted.status()), "enroll") == [frame]
    again.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, ENROLL_SEQ, "busy", retry_after_s=100))
    assert published(again.wait(99), "enroll") == []
    assert published(again.wait(30), "enroll") == [frame]
    again.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, ENROLL_SEQ, "accepted"))
    assert again.core.dropped["odd-receipt"] == 1
    done = again.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, ENROLL_SEQ, "enrolled"))
    assert again.disk is not None
    assert again.disk.enrolled
    assert of(done, Stop) == []
    done = again.arrive(scripted.head(), *scripted.snapshot())
    assert only(done, Stop).code == 0
    assert published(done, "status")[-1].meta["state"] == "offline"


def test_a_join_that_is_interrupted_is_no_success() -> None:
    device = connected("join", state={"enrolled": False})
    stop = only(device.handle(events.StopRequested(reason="SIGINT")), Stop)
    assert (stop.code, stop.reason) == (1, "SIGINT came before the device had joined: join again")


@pytest.mark.parametrize("outcome", ["refused", "revoked"])
def test_a_device_that_is_not_wanted_stops_and_says_so(outcome: str) -> None:
    scripted = aggregator()
    device = connected("join", state={"enrolled": False}, code="secret")
    device.arrive(scripted.status())
    done = device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, ENROLL_SEQ, outcome, reason="spent"))
    stop = only(done, Stop)
    assert stop.code == 3
    assert "(spent)" in stop.reason
    assert device.core.due_s() is None
    assert device.handle(events.TimeReached()) == []


def test_a_revocation_may_answer_a_status() -> None:
    scripted, device = following()
    seq = published(device.actions, "status")[-1].seq
    assert only(device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, seq, "revoked")), Stop).code == 3


def test_a_device_that_the_aggregator_does_not_know_stops_and_says_how_to_rejoin() -> None:
    """The aggregator was restored from before it joined."""
    scripted, device = following()
    seq = published(device.actions, "status")[-1].seq
    stop = only(device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, seq, "unknown", reason="why")), Stop)
    assert (stop.code, "ternbus edge rejoin" in stop.reason) == (3, True)
    scripted, device, frame = sending()
    assert only(device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "unknown")), Stop).code == 3


def test_unknown_is_believed_neither_for_other_numbers_nor_by_a_device_that_joins() -> None:
    """An aggregator cannot check whose frames it answers so."""
    scripted, device = following()
    assert of(device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, 10**6, "unknown")), Stop) == []
    scripted = aggregator()
    device = connected("join", state={"enrolled": False}, code="secret")
    device.arrive(scripted.status())
    assert of(device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, ENROLL_SEQ, "unknown")), Stop) == []


def test_a_new_key_enrols_anew_and_signs_what_is_outstanding_anew() -> None:
    scripted, device, frame = sending()
    fresh = Identity(b"n" * 32)
    again = device.restarted(identity=fresh, code="second")
    again.connect()
    done = again.arrive(scripted.status(), scripted.head())
    assert published(done, "update") == []
    (enroll,) = published(done, "enroll")
    assert enroll.key == fresh.key_id
    done = again.arrive(scripted.receipt(DEVICE, fresh.key_id, ENROLL_SEQ, "enrolled"))
    update = update_in(done)
    assert (update.key, update.body, update.meta) == (fresh.key_id, frame.body, frame.meta)
    assert update.seq != ENROLL_SEQ
    assert Device(Core(profile(identity=fresh), State(key=DEVICE_KEY.key_id))).core.state.outstanding is None


PRIVATE_PLAN = {"codec": "private", "terms": bytes(32)}


def test_a_device_that_joins_to_train_keeps_its_invitation_where_it_would_need_pins() -> None:
    scripted = aggregator(plan=PRIVATE_PLAN)
    device = connected("join", state={"enrolled": False}, code="secret", trains_next=True)
    assert published(device.arrive(scripted.status()), "enroll") == []  # it does not know the plan
    done = device.arrive(scripted.head())
    stop = only(done, Stop)
    assert published(device.actions, "enroll") == []
    assert stop.code == 2
    assert "its invitation is still good; join with `--private --helper KEY`" in stop.reason
    assert "new invitation" not in " ".join(logged(done))


def test_a_plan_that_becomes_private_after_the_enrolment_was_sent_ends_nothing() -> None:
    """Whether the invitation is spent is not known then."""
    scripted = aggregator()
    device = connected("join", state={"enrolled": False}, code="secret", trains_next=True)
    assert published(device.arrive(scripted.status(), scripted.head()), "enroll")
    scripted.plan = PRIVATE_PLAN
    assert of(device.arrive(scripted.head()), Stop) == []
    done = device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, ENROLL_SEQ, "enrolled"), *scripted.snapshot())
    assert only(done, Stop).code == 0


def test_an_evaluator_joins_private_sums_without_pins() -> None:
    scripted = aggregator(plan=PRIVATE_PLAN)
    device = connected("join", state={"enrolled": False}, code="secret")
    assert published(device.arrive(scripted.status(), scripted.head()), "enroll")


def test_one_that_joins_private_sums_to_train_spends_its_invitation_only_on_those_of_its_kind() -> None:
    """The kind is in the terms: it waits for them, whether they come before the model or after it."""
    for kind in KINDS:
        scripted = private_aggregator()
        pins = replace(PINS, kind=kind)
        device = connected("join", state={"enrolled": False}, code="secret", trains_next=True, sums=pins)
        done = device.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
        assert not of(done, Stop)
        assert not published(done, "enroll")
        device.wait(100)
        assert device.core._wait_timer.awaited == "the terms of private sums for version 0"
        done = device.arrive(*terms_messages(scripted))
        if kind == MASK:
            assert published(done, "enroll")
            assert not of(done, Stop)
        else:
            stop = only(done, Stop)
            assert stop.code == EXIT_CONFIG
            assert 'are of the kind "mask", and pi was given "bfv"' in stop.reason
            assert "its invitation is still good; join with `--private-kind mask`" in stop.reason
            assert not published(device.actions, "enroll")


@pytest.mark.parametrize(
    ("pins", "says"),
    [
        ({"helpers": (bytes(32),)}, "which its owner has pinned, is not in the terms; compare the key with"),
        ({"min": 1000}, "and its owner requires 1000 (--private-min)"),
    ],
)
def test_one_that_joins_private_sums_to_train_spends_no_invitation_on_others_than_it_pins(
    pins: dict[str, Any], says: str
) -> None:
    """As where the key of a helper is mistyped."""
    scripted = private_aggregator()
    own = replace(PINS, **pins)
    device = connected("join", state={"enrolled": False}, code="secret", trains_next=True, sums=own)
    device.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
    stop = only(device.arrive(*terms_messages(scripted)), Stop)
    assert stop.code == EXIT_CONFIG
    assert says in stop.reason
    assert "its invitation is still good" in stop.reason
    assert not published(device.actions, "enroll")


def test_one_joins_private_sums_before_there_are_terms() -> None:
    """There are none until the helpers have enrolled, which may be after the devices."""
    scripted = aggregator(plan={"codec": "private"})
    pins = replace(PINS, kind="bfv")
    device = connected("join", state={"enrolled": False}, code="secret", trains_next=True, sums=pins)
    done = device.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
    assert published(done, "enroll")
    assert not of(done, Stop)
