"""Fine-tuning: the personal model that a device makes before it leaves."""

from typing import Any

import numpy as np

from support.core_device import (
    DEVICE,
    VALUES,
    Device,
    aggregator,
    evaluated,
    following,
    logged,
    metrics_in,
    of,
    only,
    published,
    trained,
    update_in,
)
from ternbus.broker.protocol.messages import Metrics
from ternbus.edge.core import events
from ternbus.edge.core.actions import Log, Publish, Save, SavePersonal, StartFineTuning, StartTraining, Stop


def closed(**changes: Any) -> tuple[Device, StartFineTuning]:
    """A device that makes a model of its own from the last version, which is 1."""
    scripted, device = following(fine_tune=3.0, **changes)
    scripted.advance()
    scripted.state = "closed"
    device.arrive(*scripted.delta(1), scripted.head())
    for version in (0, 1) if changes.get("reports") else ():
        device.handle(evaluated(version))
    device.handle(trained(only(device.actions, StartTraining)))
    if changes.get("reports"):
        for frame in published(device.actions, "metrics"):
            device.handle(events.Published(seq=frame.seq))
        device.handle(evaluated(1))
    return device, only(device.actions, StartFineTuning)


def tuned(version: int = 1) -> events.FineTuned:
    better = {"accuracy": 0.75, "loss": 1.0}
    return events.FineTuned(
        version=version, samples=9, before=VALUES, after=better, tensors={"w": np.ones(2, np.float32)}
    )


def test_before_it_leaves_a_device_makes_a_model_of_its_own_and_tells_its_owner_only() -> None:
    device, job = closed()
    assert (job.version, job.plan.local_epochs) == (1, 3.0)
    assert of(device.actions, Stop) == []
    assert of(device.handle(events.TimeReached()), StartFineTuning) == []  # it is on its way
    done = device.handle(tuned())
    kinds = [type(action) for action in done if not isinstance(action, Publish)]
    assert kinds in ([SavePersonal, Log, Stop], [Save, SavePersonal, Log, Stop])
    saved = only(done, SavePersonal)
    assert saved.about.startswith("pi: personal model from version 1, on 9 held-out samples: accuracy 0.5000 -> 0.7500")
    assert published(done, "metrics") == []


def test_what_the_own_model_gains_is_reported_where_the_owner_allows_it() -> None:
    device, _ = closed(reports=True)
    done = device.handle(tuned())
    assert of(done, Stop) == []
    assert metrics_in(done) == Metrics(
        version=1, samples=9, split="local", values={**VALUES, "personal_accuracy": 0.75, "personal_loss": 1.0}
    )
    for frame in published(device.actions, "metrics"):
        done = device.handle(events.Published(seq=frame.seq))
    assert only(done, Stop).code == 0


def test_a_model_of_its_own_that_came_to_nothing_keeps_nobody() -> None:
    device, _ = closed()
    done = device.handle(events.FineTuningFailed(version=1, reason="diverged"))
    assert logged(done) == ["fine-tuning-failed"]
    assert of(done, SavePersonal) == []
    assert only(done, Stop).code == 0


def test_without_a_plan_that_can_be_followed_there_is_no_model_of_its_own() -> None:
    scripted, device = following(scripted=aggregator(plan={"batch_size": -1}), fine_tune=3.0)
    scripted.state = "closed"
    assert only(device.arrive(scripted.head()), Stop).code == 0


def test_after_so_many_updates_the_own_model_is_made_and_nothing_else_trained() -> None:
    scripted, device = following(fine_tune=1.0, versions=1)
    update = update_in(device.handle(trained(only(device.actions, StartTraining))))
    scripted.advance()
    device.arrive(*scripted.delta(1), scripted.head())
    done = device.arrive(scripted.receipt(DEVICE, update.key, update.seq, "accepted"))
    assert only(done, StartFineTuning).version == 1
    assert of(done, StartTraining) == []
    assert only(device.handle(tuned()), Stop).code == 0


def test_a_federation_that_opens_again_while_the_own_model_is_made_is_trained_for() -> None:
    scripted, device = following(fine_tune=1.0)
    scripted.state = "closed"
    assert len(of(device.arrive(scripted.head()), StartFineTuning)) == 1
    scripted.advance()
    scripted.state = "open"
    device.arrive(*scripted.delta(1), scripted.head())
    device.handle(trained(only(device.actions, StartTraining)))
    assert of(device.handle(tuned(0)), Stop) == []
    (frame,) = published(device.actions, "update")
    assert only(device.arrive(scripted.receipt(DEVICE, frame.key, frame.seq, "accepted")), StartTraining).base == 1


def test_the_direction_of_a_metric_travels_with_those_of_both_models() -> None:
    device, _ = closed(reports=True)
    metrics = {"mae": 0.5}
    done = device.handle(
        events.FineTuned(version=1, samples=9, before=metrics, after={"mae": 0.25}, tensors={}, better={"mae": "lower"})
    )
    found = metrics_in(done)
    assert found.values == {"mae": 0.5, "personal_mae": 0.25}
    assert found.better == {"mae": "lower"}
