"""What a training gives for a private sum: drawn anew each time, after the noise of differential privacy, if any."""

from typing import Any

import pytest

from support.private_sums import terms_for
from ternbus.broker.protocol.schema import Schema, to_vector
from ternbus.broker.sums.terms import Terms
from ternbus.broker.sums.words import WEIGHT_STEPS
from ternbus.edge.core.actions import StartTraining
from ternbus.edge.core.events import TrainingFinished
from ternbus.edge.learn.sum_content import SumContent, SumJob, value
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.plan import Plan
from ternbus.edge.shell.worker import train

TASK = load_task("digits-numpy")
START = TASK.initial(1)
SCHEMA = Schema.of({name: tensor.shape for name, tensor in START.items()})
TERMS = terms_for(SCHEMA, scales=(0.01,) * len(SCHEMA.tensors), samples=1_000_000.0)
DP: dict[str, Any] = {"dp": "device", "dp_clip": 1.0, "dp_noise": 0.5, "dp_epsilon": 1e6}


def job(of: Terms = TERMS, **plan: Any) -> StartTraining:
    asked = {**TASK.default_plan, "local_steps": 3, "seed": 7, "error_feedback": True, **plan}
    return StartTraining(
        base=0,
        schema=SCHEMA,
        vector=to_vector(SCHEMA, START),
        residual=None,
        plan=Plan.from_meta({**asked, "codec": "private"}),
        seed=1,
        sums=SumJob(terms=of, context=bytes(32)),
    )


def trained(work: StartTraining) -> tuple[TrainingFinished, SumContent]:
    done = train(TASK.trainer(data=None, partition="iid:0/8"), work)
    assert isinstance(done, TrainingFinished)
    assert isinstance(done.content, SumContent)
    return done, done.content


def omega(content: SumContent) -> int:
    _, plain = TERMS.layout.unpack(TERMS.layout.read(content.words))
    return int(plain[TERMS.dense])


def test_two_runs_with_one_seed_of_the_plan_train_the_same_and_draw_different_trits() -> None:
    (one, first), (other, second) = trained(job()), trained(job())
    assert first.words != second.words
    assert set(first.seeds).isdisjoint(second.seeds)
    assert one.metrics["loss"] == other.metrics["loss"]
    assert one.residual is other.residual is None  # in spite of error feedback
    assert value(SCHEMA, TERMS, first.words).any()


def test_a_device_with_few_samples_weighs_a_quarter_and_one_under_privacy_all() -> None:
    assert omega(trained(job())[1]) == 64
    assert omega(trained(job(**DP))[1]) == WEIGHT_STEPS


def test_noise_goes_on_before_anything_is_drawn() -> None:
    wide = terms_for(SCHEMA, scales=(2.0,) * len(SCHEMA.tensors), bits=8, levels=25, samples=1_000_000.0)
    done, content = trained(job(**DP, of=wide))
    assert done.account is not None
    assert done.account.epsilon > 0
    total = value(SCHEMA, wide, content.words)
    assert total.std() == pytest.approx(0.5, rel=0.1)  # dp_noise times dp_clip: the weight scales no noise
