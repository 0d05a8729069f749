"""Under differential privacy the time of a training is the plan's, not the data's: also where it fails."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.schema import Schema, to_vector
from ternbus.edge.core import events
from ternbus.edge.core.actions import StartEvaluation, StartFineTuning, StartTraining
from ternbus.edge.learn import local_optimizer
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.plan.plan import Plan
from ternbus.edge.shell.worker import evaluate, fine_tune, train
from ternbus.edge.torch.samples import TensorSamples
from ternbus.edge.torch.trainer import TorchTask

pytest.importorskip("dp_accounting")

SAMPLES, BATCH = 12, 3
PLAN: dict[str, object] = {
    "dp": "device", "dp_clip": 1.0, "dp_noise": 1.0, "dp_epsilon": 1e6, "batch_size": BATCH, "local_steps": 8,
}  # fmt: skip
ODD = 1e6


@dataclass
class Clock:
    """Only forward passes, steps of the optimizer and sleep take time: a second for each pass, two for each step."""

    now: float = 0.0
    seen: list[Tensor] = field(default_factory=list)

    def read(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def pass_over(self, inputs: Tensor) -> None:
        self.now += 1.0
        self.seen.append(inputs.detach().clone())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock.read)
    monkeypatch.setattr(time, "sleep", clock.sleep)
    step = local_optimizer.Sgd.step

    def timed(own: local_optimizer.Sgd, gradients: Sequence[Any], rate: float) -> None:
        clock.sleep(2.0)
        step(own, gradients, rate)

    monkeypatch.setattr(local_optimizer.Sgd, "step", timed)
    return clock


class Device:
    """A device with one sample that stops a training, or without it."""

    def __init__(
        self,
        clock: Clock,
        *,
        odd: bool,
        refuses: Callable[[Tensor], bool] = lambda _: False,
        form: Any = None,
        **task_arguments: Any,
    ) -> None:
        class Timed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(4, 3)

            def forward(self, inputs: Tensor) -> Tensor:
                clock.pass_over(inputs)
                if (odd and (inputs >= ODD).any()) or refuses(inputs):
                    raise ValueError("a sample that the model does not take")
                outputs: Tensor = self.linear(inputs)
                return outputs

        def data(folder: Path | None, split: str) -> Any:
            inputs = torch.ones(SAMPLES, 4)
            inputs[:BATCH] = ODD if odd else 1.0
            return (inputs, torch.zeros(SAMPLES, dtype=torch.long)) if form is None else form(inputs)

        self.clock = clock
        task = TorchTask(name="own", model=Timed, data=data, **task_arguments)
        self.start = task.initial(0)
        self.trainer = task.trainer(data=None, partition="all")

    def train(self, **plan: Any) -> tuple[float, events.TrainingFinished]:
        """How long it takes, and the result."""
        schema = Schema.of({name: tensor.shape for name, tensor in self.start.items()})
        vector = to_vector(schema, self.start)
        wanted = Plan.from_meta({**PLAN, **plan})
        job = StartTraining(base=0, schema=schema, vector=vector, residual=None, plan=wanted, seed=1)
        began = self.clock.now
        result = train(self.trainer, job, RandomSource(np.random.default_rng(3).bytes))
        assert isinstance(result, events.TrainingFinished)
        return self.clock.now - began, result


@pytest.mark.parametrize("limit", [{}, {"local_seconds": 3.0}, {"local_seconds": 100.0}, {"local_steps": 1}])
def test_a_training_that_fails_takes_as_long_as_one_that_does_not(clock: Clock, limit: dict[str, object]) -> None:
    """The very first one too."""
    took, result = Device(clock, odd=False).train(**limit)
    failed_in, failed = Device(clock, odd=True).train(**{**limit, "batch_size": SAMPLES})  # so that the first step does
    assert (result.failure, bool(failed.failure)) == ("", True)
    assert failed_in == took


def test_the_loss_and_the_optimizer_count_in_the_time_of_a_training_that_fails(clock: Clock) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        clock.sleep(4.0)
        return nn.functional.cross_entropy(outputs, targets)

    took, _ = Device(clock, odd=False, loss=loss).train(batch_size=SAMPLES)
    failed_in, failed = Device(clock, odd=True, loss=loss).train(batch_size=SAMPLES)
    assert failed.failure
    assert failed_in == took


def test_no_other_plan_decides_how_long_a_training_that_fails_takes(clock: Clock) -> None:
    device, without = Device(clock, odd=True), Device(clock, odd=False)
    for steps in (40, 2, 40, 7):
        took, _ = without.train(local_steps=steps)
        failed_in, failed = device.train(local_steps=steps, batch_size=SAMPLES)
        assert failed.failure
        assert failed_in == took


def augmented(inputs: Tensor) -> Tensor:
    if (inputs >= ODD).any():
        raise ValueError("a sample that cannot be augmented")
    return inputs


@pytest.mark.parametrize("augment", [None, augmented])
def test_a_training_that_fails_reads_the_data_that_one_that_does_not_reads(clock: Clock, augment: Any) -> None:
    """Reading, as of images in files, may take longer than the steps."""

    class Slow:
        def __init__(self, inputs: Tensor) -> None:
            self.inputs = inputs

        def __len__(self) -> int:
            return len(self.inputs)

        def __getitem__(self, number: int) -> tuple[Tensor, int]:
            clock.sleep(2.0)
            return self.inputs[number], 0

    took = []
    for odd in (False, True):
        device = Device(clock, odd=odd, form=Slow, augment=augment)
        clock.now = 0.0
        seconds, result = device.train(batch_size=SAMPLES)
        assert bool(result.failure) == odd
        took.append(seconds)
    assert took[0] == took[1] > 8 * SAMPLES * 2.0


def test_a_training_that_diverges_takes_as_long_as_one_that_does_not(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass over all data, to say whether these are finite, would tell it."""
    monkeypatch.setattr(TensorSamples, "faults", lambda _: clock.sleep(50.0))
    took = []
    for large in (1.0, 3e38):
        inputs = torch.ones(SAMPLES, 4)
        inputs[0] = large
        device = Device(clock, odd=False, form=lambda _, inputs=inputs: (inputs, torch.zeros(SAMPLES).long()))
        seconds, result = device.train(learning_rate=1e3, batch_size=SAMPLES)
        assert bool(result.failure) == (large > 1)
        took.append(seconds)
    assert took[0] == took[1]


@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_what_is_measured_before_a_training_counts_in_its_time(clock: Clock, precision: str) -> None:
    """An owner's --max-seconds bounds both: a step of a plan's large batch may take minutes."""
    took, result = Device(clock, odd=False).train(local_seconds=6.0, local_steps=1000, precision=precision)
    assert result.failure == ""
    assert took <= 6.0 + 2 * 3.0  # no step begins after the limit, but each of two at its end


def test_the_steps_that_are_measured_for_a_time_limit_count_in_it(clock: Clock) -> None:
    pytest.importorskip("opacus")
    _, result = Device(clock, odd=False).train(dp="sample", local_seconds=4.5, local_steps=1000, batch_size=SAMPLES)
    assert result.failure == ""
    assert sum(len(inputs) == SAMPLES for inputs in clock.seen) == 4  # of a second each


def test_no_plan_has_the_ways_to_train_measured_for_each_batch_size(clock: Clock) -> None:
    device = Device(clock, odd=False)
    passes = []
    for size in range(1, SAMPLES + 1):
        clock.seen.clear()
        device.train(dp="none", precision="auto", batch_size=size, local_steps=1)
        passes.append(len(clock.seen))
    assert passes[0] > 1 == passes[-1]


def test_a_step_of_ones_own_is_measured_with_its_augmentation(clock: Clock) -> None:
    def augment(inputs: Tensor) -> Tensor:
        clock.sleep(4.0)
        return augmented(inputs)

    def train_step(net: nn.Module, batch: Any, plan: Plan, optimizers: Any) -> dict[str, float]:
        optimizers.minimize(net(batch[0]).square().mean())
        return {}

    took = []
    for odd in (False, True):
        seconds, result = Device(clock, odd=odd, augment=augment, train_step=train_step).train(batch_size=SAMPLES)
        assert bool(result.failure) == odd
        took.append(seconds)
    assert took[1] >= took[0]


@pytest.mark.parametrize("size", [1, SAMPLES])
def test_a_fine_tuning_that_fails_takes_as_long_as_one_that_does_not(clock: Clock, size: int) -> None:
    """Others see when the device goes."""
    took = []
    for odd in (False, True):
        device, held = Device(clock, odd=False), Device(clock, odd=odd)
        schema = Schema.of({name: tensor.shape for name, tensor in device.start.items()})
        plan = Plan.from_meta({**PLAN, "evaluation_batch_size": size})
        vector, clock.now = to_vector(schema, device.start), 0.0
        done = fine_tune(
            device.trainer, held.trainer, StartFineTuning(version=0, schema=schema, vector=vector, plan=plan, seed=1)
        )
        assert isinstance(done, events.FineTuningFailed if odd else events.FineTuned)
        took.append(clock.now)
    assert took[0] == took[1]


@pytest.mark.parametrize("size", [1, BATCH, SAMPLES])
@pytest.mark.parametrize("follows", [True, False], ids=["plan", "a plan that the owner refuses"])
def test_an_evaluation_that_fails_takes_as_long_as_one_that_does_not(clock: Clock, size: int, follows: bool) -> None:
    """Whoever publishes the version sees when the training after it begins."""
    given: dict[str, object] = {"evaluation_batch_size": size}
    took = []
    for odd in (False, True):
        device = Device(clock, odd=odd, default_plan=given)
        schema = Schema.of({name: tensor.shape for name, tensor in device.start.items()})
        plan = Plan.from_meta({**PLAN, **given}) if follows else None
        vector, clock.now = to_vector(schema, device.start), 0.0
        job = StartEvaluation(version=0, schema=schema, vector=vector, plan=plan, private=True)
        found = evaluate(device.trainer, job)
        assert isinstance(found, events.Evaluated)
        assert bool(found.failure) == odd
        took.append(clock.now)
    assert took == [SAMPLES / size] * 2


def test_the_fastest_way_is_measured_without_the_data_under_differential_privacy(clock: Clock) -> None:
    device = Device(clock, odd=True)
    device.train(precision="auto")
    first = next(number for number, inputs in enumerate(clock.seen) if inputs.any())
    assert first >= 10  # passes to find the way, and the time of a step
    clock.seen.clear()
    Device(clock, odd=False).train(precision="auto", dp="none")
    assert clock.seen[0].any()


def test_a_model_that_takes_no_zeros_is_trained_all_the_same(clock: Clock) -> None:
    device = Device(clock, odd=False, refuses=lambda inputs: not inputs.any())
    _, result = device.train(precision="auto")
    assert result.failure == ""


def test_what_a_step_returns_of_one_sample_is_released_as_noise_too() -> None:
    """It raises ConfigError, which is for what is wrong whatever the data are; nothing would be sent."""
    inputs = torch.ones(SAMPLES, 4)
    inputs[:BATCH] = ODD

    def train_step(net: nn.Module, batch: Any, plan: Plan, optimizers: Any) -> Any:
        optimizers.minimize(net(batch[0]).square().mean())
        return {"odd": None if (batch[0] == ODD).any() else 1.0}

    task = TorchTask(
        name="own",
        model=lambda: nn.Linear(4, 3),
        data=lambda folder, split: (inputs, torch.zeros(SAMPLES, dtype=torch.long)),
        train_step=train_step,
    )
    start = task.initial(0)
    schema = Schema.of({name: tensor.shape for name, tensor in start.items()})
    plan = Plan.from_meta({**PLAN, "batch_size": SAMPLES})
    job = StartTraining(base=0, schema=schema, vector=to_vector(schema, start), residual=None, plan=plan, seed=1)
    result = train(task.trainer(data=None, partition="all"), job, RandomSource(np.random.default_rng(3).bytes))
    assert isinstance(result, events.TrainingFinished)
    assert "train_step()'s odd returned NoneType" in result.failure


def test_a_step_that_returns_no_number_for_any_sample_costs_no_budget() -> None:
    task = TorchTask(
        name="own",
        model=lambda: nn.Linear(4, 3),
        data=lambda folder, split: (torch.ones(SAMPLES, 4), torch.zeros(SAMPLES, dtype=torch.long)),
        train_step=lambda net, batch, plan, optimizers: {"loss": "none"},
    )
    with pytest.raises(ConfigError, match="it must return one number"):
        task.trainer(data=None, partition="all").train(task.initial(0), Plan.from_meta(PLAN), version=0, seed=1)
