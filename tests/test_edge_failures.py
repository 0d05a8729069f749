"""A device whose training, evaluation or fine-tuning fails: it says why, waits, and goes on."""

from typing import Any

import pytest

from support.core_device import (
    DEVICE,
    Device,
    aggregator,
    evaluated,
    following,
    logged,
    of,
    only,
    published,
    sending,
    trained,
    update_in,
)
from ternbus.broker.protocol.messages import FAILING_BYTES_MAX, Status
from ternbus.edge.core import events
from ternbus.edge.core.actions import Action, Log, StartEvaluation, StartTraining, Stop
from ternbus.edge.core.failures import shown

REASON = "a bug in the task: mine.py, line 3: ValueError: odd"
PRIVATE = {"dp": "device", "dp_clip": 1.0, "dp_noise": 1.0, "dp_epsilon": 8.0}
LONG_S = 3600.0


def status_in(actions: list[Action]) -> Status:
    return Status.from_meta(published(actions, "status")[-1].meta)


def fail(device: Device, base: int = 0, reason: str = REASON, trace: str = "") -> list[Action]:
    return device.handle(events.TrainingFailed(base=base, reason=reason, trace=trace))


def test_a_training_that_failed_is_tried_again_ever_later_and_the_status_says_why() -> None:
    _, device = following()
    waits = []
    for _ in range(12):
        done = fail(device)
        assert logged(done) == ["training-failed"]
        status = status_in(done)
        assert (status.state, status.failing) == ("idle", REASON)
        began = device.now
        while not (again := of(device.wait(1.0), StartTraining)):
            assert device.now - began < LONG_S
        assert again[0].base == 0
        waits.append(device.now - began)
        assert status_in(device.actions).failing == REASON  # nothing has succeeded yet
    assert waits[0] <= 1.0
    assert all(150 <= wait <= 301 for wait in waits[-2:])  # they double, up to a limit, with jitter


def test_a_new_version_does_not_shorten_the_wait() -> None:
    scripted, device = following()
    for _ in range(8):
        fail(device)
        device.wait(LONG_S)
    fail(device)
    scripted.advance()
    assert of(device.arrive(*scripted.delta(1), scripted.head()), StartTraining) == []
    assert only(device.wait(LONG_S), StartTraining).base == 1


def test_a_training_that_succeeds_ends_the_report_and_the_backoff() -> None:
    scripted, device = following()
    for _ in range(8):
        fail(device)
        device.wait(LONG_S)
    done = device.handle(trained(of(device.actions, StartTraining)[-1]))
    assert status_in(done).failing == ""
    frame = update_in(done)
    scripted.advance()
    device.arrive(*scripted.delta(1), scripted.head())
    assert only(device.arrive(scripted.receipt(DEVICE, frame.key, frame.seq, "accepted")), StartTraining).base == 1
    fail(device, base=1)
    assert only(device.wait(1.0), StartTraining).base == 1  # as after a first failure


def test_a_traceback_is_logged_once_until_there_is_another() -> None:
    _, device = following()
    texts = []
    for trace in ("at line 3", "at line 3", "at line 4"):
        done = fail(device, trace=trace)
        texts.append(only(done, Log).text)
        device.wait(LONG_S)
    reason = f"training on version 0 failed: {REASON}"
    assert texts == [f"{reason}\nat line 3", reason, f"{reason}\nat line 4"]


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({}, REASON),
        ({"seal": True}, "the device's log says why"),
        (PRIVATE, ""),
        ({"dp": "?"}, "bad-plan: dp is '?', not one of none, device, sample, sum"),  # what is wrong with the plan
    ],
)
def test_what_others_learn_of_a_failure_depends_on_the_plan(plan: dict[str, Any], said: str) -> None:
    """A reason may depend on the data, or quote them."""
    scripted, device = following()
    scripted.plan = plan
    device.arrive(scripted.head())
    assert status_in(fail(device)).failing == said


@pytest.mark.parametrize("reason", ["€" * 100, "x" * 201, "\udcff" * 100])
def test_a_long_reason_is_cut_to_what_a_status_holds(reason: str) -> None:
    text = shown(reason, private=False, sealed=False)
    assert len(text.encode()) <= FAILING_BYTES_MAX
    assert Status.from_meta(Status(state="idle", session=1, failing=text).meta()).failing == text


def test_a_timeout_ends_a_device_that_keeps_failing() -> None:
    _, device = following(timeout_s=60.0)
    stops: list[Stop] = []
    while not stops and device.now < LONG_S:
        fail(device)
        stops = of(device.wait(1.0), Stop)
    assert device.now <= 61.0
    assert stops[0].code == 1
    assert stops[0].reason == f"gave up after waiting 60 s for a training that succeeds ({REASON})"


def test_a_device_that_fails_in_a_paused_federation_does_not_wait_for_itself() -> None:
    scripted, device = following(timeout_s=60.0)
    scripted.state = "paused"
    device.arrive(scripted.head())
    fail(device)
    assert of(device.wait(LONG_S), Stop) == []


def test_a_wanted_number_of_updates_still_ends_a_device_that_failed_before() -> None:
    scripted, device = following(versions=1)
    fail(device)
    frame = update_in(device.handle(trained(only(device.wait(1.0), StartTraining))))
    assert only(device.arrive(scripted.receipt(DEVICE, frame.key, frame.seq, "accepted")), Stop).code == 0


def test_an_evaluation_that_failed_is_tried_again_and_publishes_nothing_meanwhile() -> None:
    _, device = following("evaluate", versions=1)
    failed = events.EvaluationFailed(version=0, reason=REASON, trace="at line 3")
    done = device.handle(failed)
    assert logged(done) == ["evaluation-failed"]
    assert published(done, "metrics") == []
    assert status_in(done).failing == REASON
    assert of(device.wait(0.1), StartEvaluation) == []
    assert only(device.wait(1.0), StartEvaluation).version == 0
    done = device.handle(evaluated())
    assert status_in(done).failing == ""
    assert of(done, Stop) == []  # its metrics are not acknowledged yet
    (frame,) = published(done, "metrics")
    assert only(device.handle(events.Published(seq=frame.seq)), Stop).code == 0


def test_a_timeout_ends_an_evaluator_that_keeps_failing() -> None:
    _, device = following("evaluate", timeout_s=5.0)
    device.handle(events.EvaluationFailed(version=0, reason=REASON))
    device.wait(1.0)
    device.handle(events.EvaluationFailed(version=0, reason=REASON))
    stop = only(device.wait(60.0), Stop)
    assert (stop.code, "an evaluation that succeeds" in stop.reason) == (1, True)


def test_an_evaluator_tries_the_last_version_of_a_closed_federation_once() -> None:
    scripted, device = following("evaluate")
    for _ in range(9):
        device.handle(events.EvaluationFailed(version=0, reason=REASON))
        device.wait(LONG_S)
    device.handle(events.EvaluationFailed(version=0, reason=REASON))
    scripted.advance()
    scripted.state = "closed"
    assert only(device.arrive(*scripted.delta(1), scripted.head()), StartEvaluation).version == 1
    stop = only(device.handle(events.EvaluationFailed(version=1, reason=REASON)), Stop)
    assert stop.code == 0
    assert stop.reason == f"the federation is closed; its last version is not evaluated: {REASON}"


def test_a_device_whose_own_evaluation_fails_trains_nevertheless() -> None:
    _, device = following(reports=True, timeout_s=60.0)
    device.handle(events.EvaluationFailed(version=0, reason=REASON))
    done = device.handle(trained(only(device.actions, StartTraining)))
    assert status_in(done).failing == REASON
    assert of(device.wait(LONG_S), Stop) == []


def test_a_device_that_stays_waits_through_closed_and_comes_back() -> None:
    scripted, device, frame = sending()
    device = device.restarted(stays=True)
    device.connect()
    scripted.advance()
    scripted.state = "closed"
    done = device.arrive(scripted.status(), scripted.head(), *scripted.snapshot(), *scripted.delta(1))
    done += device.wait(LONG_S)
    assert of(done, Stop) == []
    assert published(done, "update") == []
    scripted.state = "open"
    done = device.arrive(scripted.head())
    assert update_in(done).seq == frame.seq  # what was trained before is not lost
    done = device.arrive(scripted.receipt(DEVICE, frame.key, frame.seq, "accepted"))
    assert only(done, StartTraining).base == 1


def test_an_evaluator_that_stays_waits_through_closed() -> None:
    scripted, device = following("evaluate", scripted=aggregator(), stays=True)
    device.handle(events.Published(seq=published(device.handle(evaluated()), "metrics")[0].seq))
    scripted.state = "closed"
    assert of(device.arrive(scripted.head()), Stop) == []


def test_what_a_session_has_missed_does_not_end_a_device_before_the_head_of_now_has_come() -> None:
    """The federation was closed and opened again while the device was away: both heads wait for it at the broker."""
    scripted, device, frame = sending()
    device.handle(events.Disconnected(reason="a cable"))
    device.wait(LONG_S)
    device.handle(events.Connected(frame_bytes=2**20))
    device.arrive(scripted.status())
    scripted.state = "closed"
    done = device.arrive(scripted.head(), retained=False)
    done += device.wait(LONG_S)
    assert (of(done, Stop), published(done, "update")) == ([], [])
    scripted.state = "open"
    assert update_in(device.arrive(scripted.head())).seq == frame.seq  # what was trained before is not lost
    scripted.state = "closed"
    done = device.arrive(scripted.head(), retained=False)
    assert only(done, Stop).reason == "the federation is closed"
