"""Evaluation: an evaluator's of each version, and a device's on the data that it holds out."""

from typing import Any

import pytest

from support.core_device import (
    VALUES,
    aggregator,
    evaluated,
    following,
    logged,
    metrics_in,
    of,
    only,
    published,
    trained,
)
from ternbus.broker.protocol.messages import Metrics
from ternbus.edge.core import events
from ternbus.edge.core.actions import Publish, Save, StartEvaluation, StartTraining, Stop


def test_the_evaluator_takes_each_version_once_and_the_newest_whenever_free() -> None:
    scripted, device = following("evaluate")
    job = only(device.actions, StartEvaluation)
    assert (job.version, job.vector.tobytes()) == (0, scripted.vectors[0].tobytes())
    for _ in range(2):
        scripted.advance()
        assert of(device.arrive(*scripted.delta(scripted.version), scripted.head()), StartEvaluation) == []
    done = device.handle(events.Evaluated(version=0, samples=9, values={"accuracy": 0.5, "loss": 2.0}))
    assert isinstance(done[0], Save)
    assert done[0].state.evaluated == 0
    (frame,) = published(done, "metrics")
    assert Metrics.from_meta(frame.meta) == Metrics(
        version=0, samples=9, split="test", values={"accuracy": 0.5, "loss": 2.0}
    )
    assert only(done, StartEvaluation).version == 2
    assert published(device.actions, "update") == []
    again = device.restarted()
    again.connect()
    done = again.arrive(
        scripted.status(), scripted.head(), *scripted.snapshot(), *scripted.delta(1), *scripted.delta(2)
    )
    assert only(done, StartEvaluation).version == 2


def test_an_evaluation_follows_the_federations_plan_unless_it_cannot_be_read() -> None:
    for given, wanted in ((64, 64), (-1, None)):
        scripted = aggregator(plan={"evaluation_batch_size": given})
        job = only(following("evaluate", scripted)[1].actions, StartEvaluation)
        assert (job.plan.evaluation_batch_size if job.plan is not None else None) == wanted


def test_metrics_are_published_until_the_broker_has_them() -> None:
    _, device = following("evaluate")
    device.handle(events.Disconnected(reason="gone"))
    done = device.handle(events.Evaluated(version=0, samples=9, values={"accuracy": 0.5}))
    assert published(done, "metrics") == []
    device.wait(1)
    (frame,) = published(device.connect(), "metrics")
    device.handle(events.Published(seq=frame.seq))
    device.handle(events.Disconnected(reason="gone"))
    device.wait(1)
    assert published(device.connect(), "metrics") == []


def test_metrics_that_nobody_takes_are_bounded() -> None:
    _, device = following("evaluate")
    for version in range(100):
        device.handle(events.Evaluated(version=version, samples=9, values={}))
    assert len(device.core.evaluation.unacknowledged) == 64


def test_the_evaluator_of_a_closed_federation_evaluates_the_last_version_first() -> None:
    scripted, device = following("evaluate")
    scripted.state = "closed"
    assert of(device.arrive(scripted.head()), Stop) == []
    done = device.handle(events.Evaluated(version=0, samples=9, values={"accuracy": 0.5}))
    assert of(done, Stop) == []
    (frame,) = published(done, "metrics")
    assert only(device.handle(events.Published(seq=frame.seq)), Stop).code == 0


def test_the_evaluator_stops_after_so_many_versions() -> None:
    scripted, device = following("evaluate", versions=1)
    scripted.advance()
    device.arrive(*scripted.delta(1), scripted.head())
    done = device.handle(events.Evaluated(version=0, samples=9, values={"accuracy": 0.5}))
    assert of(done, StartEvaluation) == []
    (frame,) = published(done, "metrics")
    assert only(device.handle(events.Published(seq=frame.seq)), Stop).code == 0


def test_a_device_that_reports_tries_a_version_before_it_trains_on_it_and_calls_it_local() -> None:
    scripted, device = following(reports=True)
    kinds = [type(action) for action in device.actions if isinstance(action, StartEvaluation | StartTraining)]
    assert kinds == [StartEvaluation, StartTraining]
    done = device.handle(evaluated())
    assert only(done, Save).state.evaluated == 0
    assert metrics_in(done) == Metrics(version=0, samples=9, split="local", values=VALUES)
    scripted.advance()
    assert of(device.arrive(*scripted.delta(1), scripted.head()), StartEvaluation) == []  # it is training
    assert only(device.handle(trained(only(device.actions, StartTraining))), StartEvaluation).version == 1


def test_a_device_that_was_not_allowed_to_reports_nothing() -> None:
    _, device = following()
    assert of(device.actions, StartEvaluation) == []


PRIVATE = {"dp": "device", "dp_clip": 1.0, "dp_noise": 1.0, "dp_epsilon": 8.0}


@pytest.mark.parametrize("plan", [{"seal": True}, PRIVATE, {"batch_size": -1}])
def test_metrics_of_a_devices_own_data_stay_here_where_the_plan_seals_or_adds_noise_or_cannot_be_read(
    plan: dict[str, Any],
) -> None:
    _, device = following(scripted=aggregator(plan=plan), reports=True)
    done = device.handle(evaluated())
    assert logged(done) == ["evaluated"]
    assert published(done, "metrics") == []
    judged = following("evaluate", aggregator(plan=plan))[1].handle(evaluated())
    assert metrics_in(judged).split == "test"  # the test data are the task's


def test_many_reports_do_not_end_a_device_that_was_to_make_so_many_updates() -> None:
    scripted, device = following(reports=True, versions=2)
    done = device.handle(evaluated())
    for version in (1, 2):
        scripted.advance()
        device.arrive(*scripted.delta(version), scripted.head())
        done += device.handle(evaluated(version))
    assert of(done, Stop) == []


def test_a_device_that_reports_tries_the_last_version_before_it_leaves() -> None:
    scripted, device = following(reports=True)
    device.handle(evaluated())
    scripted.advance()
    scripted.state = "closed"
    assert of(device.arrive(*scripted.delta(1), scripted.head()), Stop) == []
    assert only(device.handle(trained(only(device.actions, StartTraining))), StartEvaluation).version == 1
    done = device.handle(evaluated(1))
    assert of(done, Stop) == []
    reports = published(device.actions, "metrics")
    assert [frame.meta["version"] for frame in reports] == [0, 1]
    for frame in reports:
        done = device.handle(events.Published(seq=frame.seq))
    assert only(done, Stop).code == 0


# --- names, directions and classes


def test_the_directions_that_the_task_states_travel_with_the_values_that_have_them() -> None:
    _, device = following("evaluate", classes={"cat": 3})
    values, better = {"mae": 0.5, "r2": 0.25}, {"mae": "lower", "r2": "higher", "not-finite": "lower"}
    done = device.handle(events.Evaluated(version=0, samples=9, values=values, better=better))  # type: ignore[arg-type]
    found = metrics_in(done)
    assert (found.values, found.better) == (values, {"mae": "lower", "r2": "higher"})
    assert found.classes == {}  # of the test data, which are no device's


def test_classes_travel_with_a_devices_own_metrics_and_never_where_these_stay_here() -> None:
    _, device = following(reports=True, classes={"cat": 3, "dog": 0})
    assert metrics_in(device.handle(evaluated())).classes == {"cat": 3, "dog": 0}
    for plan in ({"seal": True}, PRIVATE):
        _, device = following(scripted=aggregator(plan=plan), reports=True, classes={"cat": 3})
        device.handle(evaluated())
        assert b"cat" not in b"".join(action.payload for action in of(device.actions, Publish))
    _, device = following(classes={"cat": 3})  # its owner did not allow it
    assert b"cat" not in b"".join(action.payload for action in of(device.actions, Publish))


def test_of_more_metrics_than_fit_the_first_are_sent() -> None:
    _, device = following("evaluate")
    values = {f"f1 of {number}": 0.5 for number in range(40)}
    better = dict.fromkeys(values, "lower")
    done = device.handle(events.Evaluated(version=0, samples=9, values=values, better=better))  # type: ignore[arg-type]
    found = metrics_in(done)
    assert [*found.values] == [*found.better] == [*values][:32]
