"""A device and a search: the arm that its key and the base choose, what it says of it, and what it keeps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.core_device import (
    DEVICE,
    DEVICE_KEY,
    aggregator,
    evaluated,
    following,
    logged,
    of,
    only,
    trained,
    update_in,
)
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.arms import drawn
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.messages import Update
from ternbus.broker.protocol.schema import Schema, to_vector
from ternbus.edge.core.actions import StartEvaluation, StartTraining
from ternbus.edge.core.events import Evaluated, TrainingFinished
from ternbus.edge.core.state import OutstandingUpdate, State
from ternbus.edge.learn.subnetwork import evaluators_by_width, is_narrowing, trainers_by_width
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.arm import with_arm
from ternbus.edge.plan.plan import Plan
from ternbus.edge.shell.worker import evaluate, train
from ternbus.edge.store.outbox import Outbox
from ternbus.edge.tasks import digits_numpy

RATES = [{"learning_rate": 0.01}, {"learning_rate": 0.1, "local_epochs": 2.0}, {"local_steps": 7, "grad_clip": 1.0}]
PLAN: dict[str, Any] = {"learning_rate": 0.5, "local_steps": 3, "seed": 4, "arms": RATES}


def arm(base: int = 0, weights: tuple[int, ...] = (1, 1, 1)) -> int:
    return drawn(weights, DEVICE_KEY.public, base)


def test_a_device_trains_by_the_arm_that_its_key_and_the_base_choose() -> None:
    scripted, device = following(scripted=aggregator(plan=PLAN))
    seen = set()
    for base in range(6):
        job = of(device.actions, StartTraining)[-1]
        assert (job.base, job.arm) == (base, arm(base))
        expected = with_arm(Plan(learning_rate=0.5, local_steps=3, seed=4), RATES[arm(base)], is_elastic=False)
        assert job.plan == expected
        seen.add(job.arm)
        frame = update_in(device.handle(trained(job)))
        assert Update.from_meta(frame.meta).arm == job.arm
        device.arrive(scripted.receipt(DEVICE, frame.key, frame.seq, "accepted"))
        scripted.advance()
        device.arrive(*scripted.delta(scripted.version), scripted.head())
    assert len(seen) > 1


def test_an_arm_changes_what_it_states_and_the_owners_limits_stay() -> None:
    plan = Plan(learning_rate=0.5, local_steps=3, steps_max=5)
    found = [with_arm(plan, each, is_elastic=False) for each in RATES]
    assert [(each.learning_rate, each.local_steps, each.local_epochs) for each in found if each is not None] == [
        (0.01, 3, 1.0),
        (0.1, None, 2.0),
        (0.5, 7, 1.0),
    ]
    assert found[2] is not None
    assert (found[2].steps(1000), found[2].grad_clip) == (5, 1.0)
    assert with_arm(plan, {"colour": "blue"}, is_elastic=True) is None
    assert with_arm(plan, {"width": 0.5}, is_elastic=False) is None
    assert with_arm(plan, {"width": 1}, is_elastic=False) == replace(plan, width=1)
    assert with_arm(plan, {"width": 0.5}, is_elastic=True) == replace(plan, width=0.5)


@pytest.mark.parametrize(
    ("plan", "changes"),
    [
        ({"arms": RATES, "arm_weights": [["other-", [1, 1, 1]]]}, {}),
        ({"arms": [{"colour": "blue"}]}, {}),
        ({"arms": [{"width": 0.5}]}, {}),
        ({"arms": RATES, "dp": "device", "dp_clip": 1.0, "dp_noise": 1.0, "dp_epsilon": 9.0}, {}),
    ],
)
def test_a_device_that_takes_no_part_trains_by_the_plan_and_says_no_arm(
    plan: dict[str, Any], changes: dict[str, Any]
) -> None:
    _, device = following(scripted=aggregator(plan={"learning_rate": 0.5, **plan}), **changes)
    job = only(device.actions, StartTraining)
    assert (job.arm, job.plan.learning_rate, job.plan.width) == (None, 0.5, 1.0)
    assert "arm" not in update_in(device.handle(trained(job))).meta


def test_a_plan_with_malformed_arms_is_refused_as_a_whole() -> None:
    _, device = following(scripted=aggregator(plan={"arms": [{"learning_rate": -1.0}]}))
    assert "bad-plan" in logged(device.actions)
    assert of(device.actions, StartTraining) == []


def test_an_update_keeps_its_arm_over_a_restart_and_the_next_one_has_its_own() -> None:
    scripted, device = following(scripted=aggregator(plan=PLAN))
    frame = update_in(device.handle(trained(only(device.actions, StartTraining))))
    again = device.restarted()
    again.connect()
    again.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
    (resent,) = [each for each in of(again.actions, object) if getattr(each, "topic", "").endswith("/update")]
    assert update_in([resent]).meta == frame.meta
    assert update_in([resent]).seq == frame.seq


def test_the_outbox_keeps_the_arm_of_the_outstanding_update_alone(tmp_path: Path) -> None:
    update = OutstandingUpdate(
        seq=5, base=3, samples=1, metrics={}, codec="float32", encoding="raw", encoded=b"x", frame_bytes=2000, arm=2
    )
    key = Identity(b"k" * 32).key_id
    for kept, expected in ((update, 2), (replace(update, arm=None), None), (replace(update, arm=0), 0), (None, None)):
        with Outbox(tmp_path, key) as outbox:
            outbox.save(replace(State(key=key), outstanding=kept), None, {})
        with Outbox(tmp_path, key) as outbox:
            found = outbox.state.outstanding
            assert (None if found is None else found.arm) == expected


# --- what a training gains, and sub-networks


def job_for(task: Any, **plan: Any) -> StartTraining:
    start = task.initial(0)
    schema = Schema.of({name: tensor.shape for name, tensor in start.items()})
    return StartTraining(
        base=0,
        schema=schema,
        vector=to_vector(schema, start),
        residual=None,
        plan=replace(Plan.from_meta({**task.default_plan, "codec": "float32"}), **plan),
        seed=1,
        arm=0,
    )


def test_a_training_by_an_arm_is_judged_on_the_held_out_data() -> None:
    task = digits_numpy.TASK
    job, start = job_for(task), task.initial(0)
    trainer, held = (task.trainer(data=None, partition=f"iid:0/8;{half}:0.2") for half in ("train", "test"))
    found = train(trainer, job, held=held)
    assert isinstance(found, TrainingFinished)
    before = held.evaluate(start).values
    done = trainer.train(start, job.plan, version=0, seed=1)
    after = held.evaluate(done.tensors).values
    assert found.metrics["gain_accuracy"] == after["accuracy"] - before["accuracy"] > 0
    assert found.metrics["gain_loss"] == before["loss"] - after["loss"] > 0
    alone = train(trainer, replace(job, arm=None), held=held)
    assert isinstance(alone, TrainingFinished)
    assert not any(name.startswith("gain_") for name in alone.metrics)


def test_an_arm_of_a_width_trains_the_sub_network_and_nothing_else() -> None:
    task = digits_numpy.TASK
    job = job_for(task, width=0.5)
    narrowed = trainers_by_width(task, data=None, partition="iid:0/8", hold_out=0.2)
    trainer = task.trainer(data=None, partition="iid:0/8;train:0.2")
    assert narrowed(0.5) is narrowed(0.5)
    assert narrowed(0.5).samples == trainer.samples
    assert trainers_by_width(task, data=None, partition="iid:0/8", hold_out=0.0)(0.5).samples > trainer.samples
    found = train(trainer, job, narrowed=narrowed)
    assert isinstance(found, TrainingFinished)
    value = found.block.value()
    half = digits_numpy.HIDDEN // 2
    hidden = value[: digits_numpy.HIDDEN * 64].reshape(digits_numpy.HIDDEN, 64)
    assert hidden[:half].any()
    assert not hidden[half:].any()
    whole = train(trainer, replace(job, plan=replace(job.plan, width=1.0)), narrowed=narrowed)
    assert isinstance(whole, TrainingFinished)
    assert whole.block.value()[: digits_numpy.HIDDEN * 64].reshape(digits_numpy.HIDDEN, 64)[half:].any()


def test_an_evaluator_measures_the_sub_networks_of_the_plans_widths() -> None:
    task = digits_numpy.TASK
    job = job_for(task)
    work = StartEvaluation(version=0, schema=job.schema, vector=job.vector, widths=(0.5, 1.0))
    found = evaluate(task.evaluator(data=None), work, evaluators_by_width(task, data=None))
    assert isinstance(found, Evaluated)
    assert list(found.values) == ["accuracy", "loss", "accuracy@0.5", "accuracy@1", "loss@0.5", "loss@1"]
    assert found.values["accuracy@1"] == found.values["accuracy"]
    alone = task.narrowed(0.5)
    corner = {name: task.initial(0)[name][tuple(map(slice, t.shape))] for name, t in alone.initial(0).items()}
    assert found.values["loss@0.5"] == pytest.approx(alone.evaluator(data=None).evaluate(corner).values["loss"])
    assert np.isfinite(list(found.values.values())).all()


def test_an_evaluator_is_told_the_widths_and_a_device_that_trains_is_not() -> None:
    plan = {"arms": [{"width": 0.5}, {"width": 1.0}]}
    _, judge = following("evaluate", scripted=aggregator(plan=plan), is_elastic=True)
    assert only(judge.actions, StartEvaluation).widths == (0.5, 1.0)
    judge.handle(evaluated())
    _, rigid = following("evaluate", scripted=aggregator(plan=plan))
    assert only(rigid.actions, StartEvaluation).widths == ()
    _, plain = following("evaluate", is_elastic=True)
    assert only(plain.actions, StartEvaluation).widths == ()
    _, device = following(scripted=aggregator(plan=plan), is_elastic=True, reports=True)
    assert only(device.actions, StartEvaluation).widths == ()


def test_tasks_say_whether_they_have_narrower_models() -> None:
    assert is_narrowing(digits_numpy.TASK)
    assert not is_narrowing(digits_numpy.LINEAR_TASK)
    with pytest.raises(ConfigError, match="no narrower model"):
        trainers_by_width(digits_numpy.LINEAR_TASK, data=None, partition="all", hold_out=0.0)(0.5)
    assert is_narrowing(load_task("digits"))
