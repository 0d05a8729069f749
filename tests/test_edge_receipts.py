"""What each receipt changes: in the state, in the residual, in what is sent next."""

import numpy as np
import pytest

from support.core_device import DEVICE, DEVICE_KEY, of, only, published, sending, trained, update_in
from support.scripted_aggregator import FEDERATION
from ternbus.broker.exit_codes import EXIT_REFUSED
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.messages import Update
from ternbus.broker.protocol.ternary import Block
from ternbus.edge.core import events
from ternbus.edge.core.actions import Save, StartTraining, Stop


def test_an_accepted_update_is_forgotten_and_the_next_is_on_a_newer_version() -> None:
    scripted, device, frame = sending()
    done = device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "accepted"))
    save = only(done, Save)
    assert save.answered is not None
    assert (save.answered.seq, save.answered.base, save.answered.outcome) == (frame.seq, 0, "accepted")
    assert (save.state.outstanding, save.state.answered_base, save.state.accepted) == (None, 0, 1)
    assert of(done, StartTraining) == []
    again = device.restarted()
    again.connect()
    assert of(again.arrive(scripted.status(), scripted.head(), *scripted.snapshot()), StartTraining) == []
    scripted.advance()
    assert only(again.arrive(*scripted.delta(1), scripted.head()), StartTraining).base == 1


@pytest.mark.parametrize("outcome", ["duplicate", "invalid"])
def test_an_update_that_is_not_wanted_is_forgotten_and_its_base_not_trained_on_again(outcome: str) -> None:
    scripted, device, frame = sending()
    done = device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, outcome, reason="why"))
    assert device.disk is not None
    assert (device.disk.outstanding, device.disk.answered_base, device.disk.accepted) == (None, 0, 0)
    assert device.disk.residual is None
    assert of(done, StartTraining) == []


def test_a_device_with_an_evaluators_invitation_ends_in_words() -> None:
    """It would train for ever, and be refused each time."""
    scripted, device, frame = sending()
    why = "evaluator: a member that was invited as an evaluator sends no updates"
    done = device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "invalid", reason=why))
    stop = only(done, Stop)
    assert stop.code == EXIT_REFUSED
    assert "takes no updates of this device (evaluator:" in stop.reason
    assert "run `ternbus edge evaluate`" in stop.reason
    assert device.disk is not None
    assert device.disk.outstanding is None  # which `edge evaluate` would send again


def test_who_evaluates_is_not_ended_by_the_answer_to_an_update_of_before() -> None:
    scripted, device, frame = sending()
    again = device.restarted(role="evaluate")
    again.connect()
    again.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
    why = "evaluator: a member that was invited as an evaluator sends no updates"
    assert of(again.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "invalid", reason=why)), Stop) == []


def test_a_stale_update_goes_back_into_the_residual_in_the_same_write_that_forgets_it() -> None:
    scripted, device, frame = sending()
    save = only(device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "stale")), Save)
    assert save.state.outstanding is None
    assert save.state.residual is not None
    assert (save.state.residual == 1).all()
    scripted.advance()
    job = only(device.arrive(*scripted.delta(1), scripted.head()), StartTraining)
    assert job.residual is save.state.residual
    kept_back = np.full(job.schema.elements, 0.5, np.float32)
    frame = update_in(device.handle(trained(job, residual=kept_back)))
    update = Update.from_meta(frame.meta)
    assert (Block.read(job.schema, update.codec, update.encoding, frame.body).value() == 2).all()
    save = only(device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "stale")), Save)
    assert save.state.residual is not None
    assert (save.state.residual == 2.5).all()


def test_a_stale_receipt_after_a_restart_needs_no_model() -> None:
    scripted, device, frame = sending()
    again = device.restarted()
    again.connect()
    save = only(again.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "stale")), Save)
    assert save.state.residual is not None
    assert (save.state.residual == 1).all()


def test_busy_is_no_answer_the_update_waits_as_long_as_it_was_asked_to() -> None:
    scripted, device, frame = sending()
    done = device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "busy", retry_after_s=20.0))
    assert of(done, Save) == []
    device.handle(events.Disconnected(reason="gone"))
    device.wait(1)
    device.connect()
    assert published(device.arrive(scripted.status()), "update") == []
    assert published(device.wait(18), "update") == []
    assert published(device.wait(8), "update") == [frame]


def test_who_was_answered_busy_many_times_does_not_wait_an_hour_for_the_next_answer() -> None:
    """A place in the aggregator's line ends after 90 s of silence."""
    scripted, device, frame = sending()
    for _ in range(10):
        device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "busy", retry_after_s=30.0))
        assert published(device.wait(38), "update") == [frame]
        device.handle(events.Published(seq=frame.seq))
    assert published(device.wait(76), "update") == [frame]


def test_a_counter_from_an_old_copy_of_the_disk_goes_on_above_the_highest_answered() -> None:
    scripted, device, frame = sending()
    receipt = scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "duplicate", highest_seq=5000)
    done = device.arrive(receipt)
    again = update_in(done)
    assert again.seq == 5001
    assert (again.meta, again.body) == (frame.meta, frame.body)
    assert isinstance(done[0], Save)
    assert done[0].state.outstanding is not None
    assert done[0].state.outstanding.seq == 5001
    assert done[0].state.seq_limit > 5001
    device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, 5001, "duplicate", highest_seq=2**62))
    assert device.disk is not None
    assert device.disk.outstanding is None


def test_a_receipt_or_grant_for_something_else_is_ignored() -> None:
    scripted, device, frame = sending()
    key = DEVICE_KEY.key_id
    topic = topics.down(FEDERATION, DEVICE, "receipt")
    _, foreign = scripted.receipt("other", key, frame.seq, "accepted")
    bad = [
        scripted.receipt(DEVICE, key, frame.seq + 1, "accepted"),
        scripted.receipt(DEVICE, b"k" * 8, frame.seq, "accepted"),
        (topic, foreign),
        scripted.receipt("other", key, frame.seq, "accepted"),
        scripted.grant(DEVICE, key, frame.seq + 1, [[0, 0]]),
        scripted.receipt(DEVICE, key, frame.seq, "enrolled"),
    ]
    assert published(device.arrive(*bad), "update") == []
    assert device.core.dropped == {"not-outstanding": 4, "not-ours": 1, "odd-receipt": 1}
    assert device.disk is not None
    assert device.disk.outstanding is not None


@pytest.mark.parametrize("outcome", ["revoked", "unknown"])
@pytest.mark.parametrize("reason", ["", "why"])
def test_a_device_that_may_not_go_on_says_why_if_there_is_something_to_say(outcome: str, reason: str) -> None:
    scripted, device, frame = sending()
    done = device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, outcome, reason=reason))
    stop = only(done, Stop)
    assert ("(why)" in stop.reason) is bool(reason)
    assert "()" not in stop.reason
