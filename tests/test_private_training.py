"""What a training gives for a private sum: drawn anew each time, after the noise of differential privacy, if any."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from support.private_sums import terms_for
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.schema import Schema, to_vector
from ternbus.broker.sums.terms import Terms
from ternbus.broker.sums.words import WEIGHT_STEPS
from ternbus.edge import TorchTask
from ternbus.edge.core.actions import StartFineTuning, StartTraining
from ternbus.edge.core.events import FineTuningFailed, TrainingFailed, TrainingFinished
from ternbus.edge.learn.subnetwork import narrow
from ternbus.edge.learn.sum_content import SumContent, SumJob, value
from ternbus.edge.learn.task import Evaluation, Trained, TrainingError
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.plan import Plan
from ternbus.edge.shell.worker import fine_tune, train
from ternbus.edge.torch.objective import default_loss

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


def test_what_only_one_device_of_full_width_trains_is_its_own_in_a_sum() -> None:
    """So `edge join` refuses --width with --private: no set of a private federation has narrow devices."""
    terms = terms_for(SCHEMA, scales=(0.01,) * len(SCHEMA.tensors))
    total, wide = terms.layout.zeros(), terms.layout.zeros()
    for number in range(5):
        of = narrow(TASK, 0.5) if number else TASK
        done = train(of.trainer(data=None, partition=f"iid:{number}/5"), job(terms))
        assert isinstance(done, TrainingFinished)
        assert isinstance(done.content, SumContent)
        for words in (total,) if number else (total, wide):
            terms.layout.add(words, terms.layout.read(done.content.words))
    outer = slice(64 * 64, 128 * 64)  # the hidden units that narrow devices leave out
    start = next(each.offset for each in SCHEMA.segments if each.tensor.name == "hidden.weight")
    shown, own = (terms.layout.unpack(words)[0][start:][outer] for words in (total, wide))
    assert own.any()
    assert np.array_equal(shown, own)


class Failing:
    """A trainer that fails, as on a model by which only some data overflow."""

    samples = 7

    def __init__(self, fault: Exception | None, states: Any = 7) -> None:
        self.fault = fault
        self.states = states

    def train(self, start: Any, plan: Plan, *, version: int, seed: int) -> Trained:
        if self.fault is not None:
            raise self.fault
        value = 2.0**41 if self.states == self.samples else 1.0
        tensors = {name: np.full_like(tensor, value) for name, tensor in start.items()}
        return Trained(tensors=tensors, samples=self.states, metrics={})

    def evaluate(self, tensors: Any) -> Evaluation:
        raise AssertionError


@pytest.mark.parametrize("fault", [TrainingError("training diverged"), ValueError("a NaN"), None])
def test_a_training_that_fails_sends_a_change_of_0_which_no_sum_shows(fault: Exception | None) -> None:
    """Whoever sent nothing would tell of its data alone."""
    done = train(Failing(fault), job())
    assert isinstance(done, TrainingFinished)
    assert isinstance(done.content, SumContent)
    assert not value(SCHEMA, TERMS, done.content.words).any()
    assert (omega(done.content), done.metrics, done.samples, done.local) == (64, {}, 1, None)
    assert (str(fault) if fault is not None else "beyond 2^40") in done.failure


def test_what_a_trainer_states_wrongly_of_its_data_is_a_failure_like_any_other() -> None:
    done = train(Failing(None, states="many"), job())
    assert isinstance(done, TrainingFinished)
    assert isinstance(done.content, SumContent)
    assert not value(SCHEMA, TERMS, done.content.words).any()
    assert "samples is 'many', of the type str: it must be a whole number" in done.failure


def test_a_plan_that_a_machine_cannot_carry_out_has_it_send_nothing() -> None:
    """With a change of 0 from all others, a batch that one memory alone holds would have the sum show its update."""
    assert isinstance(train(Failing(MemoryError()), job()), TrainingFailed)
    with pytest.raises(ConfigError):
        train(Failing(ConfigError("no such plan, whatever the data")), job())


@pytest.mark.parametrize("loss", ["cross entropy", "own"])
@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_no_data_decide_whether_a_trainer_of_pytorch_sends_an_update(loss: str, precision: str) -> None:
    """Shares of classes that are none in one sample: whether it is in a batch is nobody's to see."""

    def data(folder: Any, split: str) -> Any:
        targets = torch.full((8, 2), 0.5)
        targets[0] = torch.tensor([0.3, 0.3])
        return torch.ones(8, 4), targets

    def own(outputs: torch.Tensor, targets: torch.Tensor) -> Any:
        return default_loss(outputs, targets)

    more = {} if loss == "cross entropy" else {"loss": own}
    task = TorchTask(name="shares", model=lambda: torch.nn.Linear(4, 2), data=data, **more)  # type: ignore[arg-type]
    schema = Schema.of({name: tensor.shape for name, tensor in task.initial(0).items()})
    terms = terms_for(schema, scales=(0.01,) * len(schema.tensors))
    asked = Plan.from_meta({"codec": "private", "precision": precision})
    sums = SumJob(terms=terms, context=bytes(32))
    work = replace(job(), schema=schema, vector=to_vector(schema, task.initial(0)), plan=asked, sums=sums)
    done = [train(task.trainer(data=None, partition=f"iid:{number}/2"), work) for number in range(2)]
    assert [isinstance(each, TrainingFinished) and bool(each.failure) for each in done] == [False, True]
    with pytest.raises(ConfigError, match="fraction"):
        train(task.trainer(data=None, partition="all"), replace(work, plan=Plan(), sums=None))


def test_a_model_that_fails_on_some_data_only_gets_an_update_from_all() -> None:
    """A hidden unit that a bright pixel alone sets, before weights by which its gradient overflows: a question."""
    parts = [TASK.trainer(data=None, partition=f"iid:{number}/8") for number in range(2)]
    brightest = np.array([part._images.max(axis=0) for part in parts])  # type: ignore[attr-defined]
    pixel = int(np.argmax(brightest[0] - brightest[1]))
    asked = {name: np.zeros_like(tensor) for name, tensor in START.items()}
    asked["hidden.weight"][0, pixel], asked["hidden.bias"][0] = 1.0, -brightest[:, pixel].mean()
    asked["output.weight"][::2, 0] = 2.0**39
    work = replace(job(learning_rate=1000.0, batch_size=1000), vector=to_vector(SCHEMA, asked))
    yes, no = (train(part, work) for part in parts)
    assert isinstance(yes, TrainingFinished)
    assert isinstance(no, TrainingFinished)
    assert "beyond 2^40" in yes.failure or "not finite" in yes.failure
    assert no.failure == ""
    assert isinstance(yes.content, SumContent)
    assert isinstance(no.content, SumContent)
    assert len(yes.content.words) == len(no.content.words)


def test_a_fine_tuning_of_a_private_device_that_fails_does_all_that_others_do() -> None:
    class Counting(Failing):
        count = 0

        def evaluate(self, tensors: Any) -> Evaluation:
            self.count += 1
            return Evaluation(values={}, samples=1)

    held, work = Counting(None), job()
    asked = StartFineTuning(version=0, schema=SCHEMA, vector=work.vector, plan=work.plan, seed=1, local=b"")
    assert isinstance(fine_tune(Failing(ValueError("a NaN")), held, asked), FineTuningFailed)
    assert held.count == 2
