"""DP-SGD in PyTorch: each sample's gradient is clipped, noise is added, and some models are refused."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.schema import Schema, to_vector
from ternbus.edge.core import events
from ternbus.edge.core.actions import StartTraining
from ternbus.edge.learn.accountant import epsilon
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.task import PrivateTrainer
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.privacy import cost
from ternbus.edge.plan.tensors import FloatArray
from ternbus.edge.shell.preflight import check
from ternbus.edge.shell.worker import train
from ternbus.edge.torch.dp_checks import PROBES
from ternbus.edge.torch.dp_sgd import clipped_sum
from ternbus.edge.torch.trainer import TorchTask, TorchTrainer

pytest.importorskip("opacus")

SAMPLES = 24
CLIP = 0.5
PLAN: dict[str, object] = {
    "dp": "sample", "dp_clip": CLIP, "dp_noise": 1e-9, "dp_epsilon": 1e6, "batch_size": SAMPLES, "local_steps": 1,
    "learning_rate": 1.0, "momentum": 0.0,
}  # fmt: skip


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))


def data(folder: Path | None, split: str) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 2, 6, 6, generator=draw)
    inputs[0] *= 1000  # one that would pull much harder than the others
    return inputs, torch.randint(0, 3, (SAMPLES,), generator=draw)


def task(model: Callable[[], nn.Module] = network) -> TorchTask:
    return TorchTask(name="own", model=model, data=data)


def seeded(seed: int = 3) -> RandomSource:
    return RandomSource(np.random.default_rng(seed).bytes)


def stepped(
    random_source: RandomSource | None = None, made: TorchTask | None = None, **plan: Any
) -> dict[str, FloatArray]:
    """What one training changes of each tensor."""
    made = made or task()
    start = made.initial(0)
    trainer = made.trainer(data=None, partition="all")
    wanted = Plan.from_meta({**PLAN, **plan})
    trained = trainer.train_privately(start, wanted, version=0, seed=1, random_source=random_source or seeded())
    return {name: tensor - start[name] for name, tensor in trained.tensors.items()}


def flat(change: dict[str, FloatArray]) -> FloatArray:
    return np.concatenate([tensor.reshape(-1) for tensor in change.values()])


def gradients() -> list[FloatArray]:
    """Each sample's own, one at a time."""
    net = network()
    net.load_state_dict({name: torch.tensor(array) for name, array in task().initial(0).items()})
    inputs, targets = data(None, "train")
    found = []
    for row in range(SAMPLES):
        loss = nn.functional.cross_entropy(net(inputs[row : row + 1]), targets[row : row + 1])
        found.append(np.concatenate([g.numpy().reshape(-1) for g in torch.autograd.grad(loss, list(net.parameters()))]))
    return found


def test_a_step_is_the_mean_of_each_samples_clipped_gradient() -> None:
    own = gradients()
    lengths = [float(np.linalg.norm(g)) for g in own]
    assert min(lengths) < 5.0 < max(lengths)  # so that one of these clips some and leaves others
    for clip in (CLIP, 5.0, 1e6):
        clipped = sum(g * min(1.0, clip / length) for g, length in zip(own, lengths, strict=True)) / SAMPLES
        np.testing.assert_allclose(flat(stepped(dp_clip=clip, dp_noise=1e-12)), -clipped, atol=2e-5)


def test_the_clipping_of_steps_stays_out_and_the_schedule_of_steps_applies() -> None:
    assert np.array_equal(flat(stepped(grad_clip=1e-3)), flat(stepped()))
    half = flat(stepped(step_schedule="linear", warmup_steps=2, local_steps=1, momentum=0.0))
    np.testing.assert_allclose(half, flat(stepped(local_steps=1, momentum=0.0)) / 2, atol=1e-6)


def test_the_noise_of_a_step_has_the_deviation_that_was_paid_for() -> None:
    noisy = [flat(stepped(seeded(seed), dp_noise=8.0)) - flat(stepped()) for seed in range(8)]
    values = np.concatenate(noisy)
    assert values.std() == pytest.approx(8.0 * CLIP / SAMPLES, rel=4 / math.sqrt(2 * values.size))
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(values.size)


def test_steps_that_draw_nobody_are_noise_all_the_same() -> None:
    change = flat(stepped(seeded(), dp_noise=8.0, batch_size=1, local_steps=60))  # (23/24)^24: a third of all batches
    # 60 steps of noise 8·C/1, one on another, and at most one clipped gradient or two in each
    assert change.std() == pytest.approx(8.0 * CLIP * math.sqrt(60), rel=0.1)


def test_batches_and_noise_are_not_the_jobs_seeds() -> None:
    one, other = (flat(stepped(RandomSource(), batch_size=6, dp_noise=1e-9)) for _ in range(2))
    assert not np.allclose(one, other, atol=1e-5)  # other samples
    assert np.array_equal(flat(stepped(seeded(4), batch_size=6)), flat(stepped(seeded(4), batch_size=6)))


def test_a_training_is_charged_its_steps_on_its_own_samples() -> None:
    made = task()
    start = made.initial(0)
    schema = Schema.of({name: tensor.shape for name, tensor in start.items()})
    plan = Plan.from_meta({**PLAN, "dp_noise": 1.1, "batch_size": 6, "local_steps": 5})
    job = StartTraining(base=0, schema=schema, vector=to_vector(schema, start), residual=None, plan=plan, seed=1)
    trainer = made.trainer(data=None, partition="all")
    assert isinstance(trainer, PrivateTrainer)
    result = train(trainer, job)
    assert isinstance(result, events.TrainingFinished)
    assert result.account is not None
    (charged,) = result.account.spent
    assert charged == cost(plan, SAMPLES)
    assert (charged.rate, charged.steps) == (0.25, 5)
    assert result.metrics["epsilon"] == epsilon([charged], 1e-5)
    assert result.samples == SAMPLES


def test_the_model_is_as_before_once_it_has_been_trained_privately() -> None:
    """Devices of one process share it; hooks that stayed would cost, and then fail."""
    made = task()
    trainer = made.trainer(data=None, partition="all")
    start, plan = made.initial(0), Plan.from_meta(PLAN)
    before = trainer.train(start, plan, version=0, seed=1)
    for _ in range(2):
        trainer.train_privately(start, plan, version=0, seed=1, random_source=seeded())
    after = trainer.train(start, plan, version=0, seed=1)
    assert all(np.array_equal(before.tensors[name], after.tensors[name]) for name in start)


def test_a_model_whose_samples_share_statistics_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot train this model"):
        stepped(made=task(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))))


class Idle(nn.Module):
    """Has a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(72, 3), nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.used(inputs.flatten(1))
        return outputs


def test_a_model_with_a_parameter_that_nothing_uses_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not depend on"):
        stepped(made=task(Idle))


class Running(nn.Module):
    """Keeps a statistic of what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(72, 3)
        self.watch = Watch()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.linear(self.watch(inputs.flatten(1)))
        return outputs


class Watch(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += inputs.abs().mean().detach()
        return inputs


def test_statistics_of_the_samples_are_not_sent() -> None:
    change = stepped(made=task(Running))
    assert not change["watch.seen"].any()
    assert change["linear.weight"].any()


# -- one sample that is not like the others


def with_first(value: float) -> Callable[[Path | None, str], tuple[Tensor, Tensor]]:
    def made(folder: Path | None, split: str) -> tuple[Tensor, Tensor]:
        inputs, targets = data(folder, split)
        inputs[0] = value
        return inputs, targets

    return made


def odd(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that a sample can stop."""
    if (outputs.abs().sum(1) > 1e30).any() or outputs.isnan().any():
        raise ValueError("a sample that no loss is known for")
    return nn.functional.cross_entropy(outputs, targets)


def leaving(outputs: Tensor, targets: Tensor) -> Tensor:
    """Likewise, by what `except Exception` does not catch."""
    try:
        return odd(outputs, targets)
    except ValueError as error:
        raise SystemExit from error


def plain() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 3))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, 1e30, 1e-45])
@pytest.mark.parametrize("loss", [nn.functional.cross_entropy, odd, leaving])
@pytest.mark.parametrize("model", [plain, network])
def test_one_sample_moves_a_step_by_its_clip_whatever_it_holds(
    value: float, loss: Callable[[Tensor, Tensor], Tensor], model: Callable[[], nn.Module]
) -> None:
    """The others' part is the same, bit for bit or nearly; also where the sample makes the loss raise an exception."""
    absent, there = (
        flat(stepped(made=TorchTask(name="own", model=model, data=with_first(first), loss=loss)))
        for first in (0.0, value)
    )
    assert np.isfinite(there).all()
    assert there.any()
    assert np.linalg.norm((there - absent).astype(float)) <= 2 * CLIP / SAMPLES * (1 + 1e-4)


def test_samples_that_fail_are_counted_for_the_devices_own_log() -> None:
    made = TorchTask(name="own", model=plain, data=with_first(3e38), loss=odd)
    trainer = made.trainer(data=None, partition="all")
    plan = Plan.from_meta({**PLAN, "local_steps": 2})
    trained = trainer.train_privately(made.initial(0), plan, version=0, seed=1, random_source=seeded())
    assert (trained.metrics["failed_samples"], trained.metrics["steps"]) == (2, 2)


def test_the_steps_go_on_where_every_sample_fails() -> None:
    def data_of_nothing(folder: Path | None, split: str) -> tuple[Tensor, Tensor]:
        inputs, targets = data(folder, split)
        return inputs * math.nan, targets

    change = flat(stepped(made=TorchTask(name="own", model=plain, data=data_of_nothing, loss=odd), dp_noise=8.0))
    assert change.std() == pytest.approx(8.0 * CLIP / SAMPLES, rel=0.2)


GRADIENTS = st.lists(
    st.one_of(st.sampled_from([0.0, -0.0, 1e-45, 3.4e38, -3.4e38, 1e20, math.inf, math.nan]), st.floats(width=32)),
    min_size=1,
    max_size=12,
)


@given(values=GRADIENTS, samples=st.integers(1, 9), clip=st.sampled_from([1e-6, 1.0, 1e6]))
def test_a_sum_of_gradients_changes_by_the_clip_at_most(values: list[float], samples: int, clip: float) -> None:
    weight = torch.tensor(np.resize(np.array(values, np.float32), (samples, 4, 5)))
    bias = torch.tensor(np.resize(np.array(values[::-1], np.float32), (samples, 3)))
    whole, failed = clipped_sum([weight, bias], clip)
    rest, _ = clipped_sum([weight[1:], bias[1:]], clip) if samples > 1 else ([each * 0 for each in whole], 0)
    assert all(each.isfinite().all() for each in whole)
    assert failed == sum(not (w.isfinite().all() and b.isfinite().all()) for w, b in zip(weight, bias, strict=True))
    moved = math.sqrt(sum(float((one - other).square().sum()) for one, other in zip(whole, rest, strict=True)))
    assert moved <= clip


# -- samples that fail beside others


class Squeezed(nn.Module):
    """Has outputs without the dimension of samples for one sample, and dropout, for two samples never the same."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(72, 16), nn.Dropout(), nn.Linear(16, 1), nn.Sigmoid())

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layers(inputs)
        return outputs.squeeze()


class Strict(Squeezed):
    """Its forward pass raises an exception, not its loss."""

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.isnan().any():
            raise ValueError("a sample that is not a number")
        return super().forward(inputs)


def halves(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy(outputs, (targets > 1).float())


def changed_with(model: Callable[[], nn.Module], failing: set[int]) -> FloatArray:
    """The change where these samples are not a number, in double the precision."""

    def made(folder: Path | None, split: str) -> tuple[Tensor, Tensor]:
        inputs, targets = data(folder, split)
        inputs[list(failing)] = math.nan
        return inputs, targets

    own = TorchTask(name="own", model=model, data=made, loss=halves)
    return flat(stepped(made=own, dp_clip=0.25, dp_noise=1e-12)).astype(np.float64)


@settings(max_examples=20, deadline=None)
@given(model=st.sampled_from([Squeezed, Strict]), failing=st.sets(st.integers(0, SAMPLES - 1)), one=st.integers(0, 23))
def test_a_sample_that_fails_changes_nothing_but_its_own_part(
    model: Callable[[], nn.Module], failing: set[int], one: int
) -> None:
    """Others would have other dropout, or fail too, if they were tried one by one."""
    without, with_it = changed_with(model, failing - {one}), changed_with(model, failing | {one})
    assert np.linalg.norm(with_it - without) <= 0.25 / SAMPLES * (1 + 1e-4)
    assert with_it.any() == (failing | {one} != set(range(SAMPLES)))


def test_a_batch_in_which_no_sample_has_a_loss_takes_no_longer_search() -> None:
    """Its time would tell whether there is one sample that has a loss."""
    passes: list[int] = []

    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        raise ValueError("no loss at all")

    class Counted(Squeezed):
        def forward(self, inputs: Tensor) -> Tensor:
            passes.append(len(inputs))
            return super().forward(inputs)

    assert not flat(stepped(made=TorchTask(name="own", model=Counted, data=data, loss=broken), dp_noise=1e-12)).any()
    assert passes[-1] == SAMPLES
    assert set(passes[:-1]) == set(PROBES)


def test_dropout_is_not_the_jobs_seed() -> None:
    made = TorchTask(name="own", model=Squeezed, data=data, loss=halves)
    trainer, start, plan = made.trainer(data=None, partition="all"), made.initial(0), Plan.from_meta(PLAN)

    def change(seed: int, random_source: RandomSource) -> FloatArray:
        trained = trainer.train_privately(start, plan, version=0, seed=seed, random_source=random_source)
        return flat({name: tensor - start[name] for name, tensor in trained.tensors.items()})

    assert np.array_equal(change(1, seeded()), change(2, seeded()))
    assert not np.allclose(change(1, seeded(3)), change(1, seeded(4)), atol=1e-4)


# -- the number of steps


def outcome(made: TorchTask, **plan: Any) -> events.TrainingFinished:
    start = made.initial(0)
    schema = Schema.of({name: tensor.shape for name, tensor in start.items()})
    wanted = Plan.from_meta({**PLAN, "dp_noise": 1.1, "batch_size": 6, "local_steps": 5, **plan})
    job = StartTraining(base=0, schema=schema, vector=to_vector(schema, start), residual=None, plan=wanted, seed=1)
    result = train(made.trainer(data=None, partition="all"), job, seeded())
    assert isinstance(result, events.TrainingFinished)
    return result


@pytest.mark.parametrize(("limit_s", "steps"), [(0.0, 1), (1e7, 5)])
def test_a_time_limit_shortens_a_training_and_its_cost_tells_nothing_of_it(limit_s: float, steps: int) -> None:
    result, unlimited = outcome(task(plain), local_seconds=limit_s), outcome(task(plain))
    assert result.metrics["steps"] == steps
    assert result.account == unlimited.account
    assert result.account is not None
    assert result.account.spent == (
        cost(Plan.from_meta({**PLAN, "dp_noise": 1.1, "batch_size": 6, "local_steps": 5}), SAMPLES),
    )
    assert result.metrics["epsilon"] == epsilon(result.account.spent, 1e-5)


def test_samples_that_take_long_change_the_number_of_steps_by_nothing() -> None:
    """The time limit is over in the first step with them."""
    seen: list[int] = []

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = plain()

        def forward(self, inputs: Tensor) -> Any:
            if len(inputs) == SAMPLES and inputs.any():  # and none that are made up
                seen.append(len(inputs))
                began = time.perf_counter()
                while len(seen) == 1 and time.perf_counter() < began + 1.0:
                    pass
            return self.layers(inputs)

    made = task(Slow)
    assert outcome(made, batch_size=SAMPLES, local_seconds=1.0, local_steps=2).metrics["steps"] == len(seen) == 2


def test_a_failed_training_costs_what_one_with_a_time_limit_costs() -> None:
    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        raise ValueError("no loss at all")

    failed = outcome(TorchTask(name="own", model=plain, data=data, loss=broken), local_seconds=0.0)
    assert failed.account == outcome(task(plain), local_seconds=0.0).account


# -- what a sample is, and what a forward pass writes


class Sequence(nn.Module):
    """Of `times` vectors a sample; `arrange` brings them before the first layer."""

    def __init__(self, times: int, arrange: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.times, self.arrange = times, arrange
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        count = len(inputs)
        hidden: Tensor = self.first(self.arrange(inputs))
        if hidden.dim() == 3 and hidden.shape[1] == self.times:
            rows = hidden.mean(1)
        elif hidden.dim() == 3:
            rows = hidden.mean(0)
        else:
            rows = hidden.reshape(count, self.times, 3).mean(1)
        outputs: Tensor = self.last(rows)
        return outputs


def of_times(times: int, arrange: Callable[[Tensor], Tensor]) -> TorchTask:
    def made(folder: Path | None, split: str) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(1)
        return torch.randn(SAMPLES, times, 4, generator=draw), torch.randint(0, 3, (SAMPLES,), generator=draw)

    return TorchTask(name="own", model=lambda: Sequence(times, arrange), data=made, default_plan=PLAN)


def folded(inputs: Tensor) -> Tensor:
    return inputs.flatten(0, 1)


def time_first(inputs: Tensor) -> Tensor:
    return inputs.transpose(0, 1)


def folded_if_many(inputs: Tensor) -> Tensor:
    return inputs.flatten(0, 1) if len(inputs) > max(PROBES) else inputs


@pytest.mark.parametrize("times", [2, 3, 60])
@pytest.mark.parametrize("arrange", [folded, time_first])
def test_a_model_whose_rows_are_not_its_samples_is_refused(times: int, arrange: Callable[[Tensor], Tensor]) -> None:
    """Each time step would be clipped alone, so a sample would count as many times."""
    with pytest.raises(ConfigError, match="in the layer first the rows are not the samples"):
        stepped(made=of_times(times, arrange))
    assert flat(stepped(made=of_times(times, torch.clone))).any()


def test_a_batch_whose_rows_are_not_its_samples_gives_noise_alone() -> None:
    change = flat(stepped(made=of_times(5, folded_if_many), dp_noise=1e-9))
    assert np.abs(change).max() < 1e-6


def test_the_check_of_a_task_names_the_layer_whose_rows_are_not_samples() -> None:
    affordable = {"dp_noise": 2.0}
    assert check(of_times(60, torch.clone), plan=affordable).problems == []
    (problem,) = check(of_times(60, folded), plan=affordable).problems
    assert "in the layer first the rows are not the samples" in problem


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_a_layer_that_changes_what_it_looks_up_is_refused(layer: Callable[..., nn.Module]) -> None:
    def words(folder: Path | None, split: str) -> tuple[Tensor, Tensor]:
        inputs, targets = data(folder, split)
        return inputs[:, 0, 0].abs().long() % 9, targets

    made = TorchTask(
        name="own", model=lambda: nn.Sequential(layer(9, 4, max_norm=1.0), nn.Flatten(), nn.Linear(24, 3)), data=words
    )
    with pytest.raises(ConfigError, match="the layer 0 has max_norm"):
        stepped(made=made)


class Writing(nn.Module):
    """Writes to a parameter, and to buffers, what it sees; before it uses them, or after."""

    def __init__(self, *, before: bool = False) -> None:
        super().__init__()
        self.linear, self.watch, self.before = nn.Linear(72, 3), Watch(), before

    def forward(self, inputs: Tensor) -> Tensor:
        if self.before:
            self.write(inputs)
        outputs: Tensor = self.linear(inputs.flatten(1))
        self.write(inputs)
        return outputs

    def write(self, inputs: Tensor) -> None:
        with torch.no_grad():
            self.linear.weight[0, 0] = inputs.max()
            self.watch.seen = self.watch.seen + math.inf
            self.watch.register_buffer("late", inputs.mean())


def test_what_a_forward_pass_writes_is_gone_after_it() -> None:
    change = stepped(made=TorchTask(name="own", model=Writing, data=with_first(1e6)), local_steps=3)
    assert 0 < np.linalg.norm(flat(change)) <= 3 * CLIP
    assert not change["watch.seen"].any()  # not 0 times infinity, which is no number
    with pytest.raises(ConfigError, match="of one sample depend on the other samples"):
        stepped(made=task(lambda: Writing(before=True)))


@pytest.mark.slow
def test_digits_are_learned_under_per_sample_privacy() -> None:
    """719 samples, 6 passes, epsilon below 8: chance is 10 %."""
    digits = load_task("digits")
    trainer = digits.trainer(data=None, partition="iid:0/2")
    assert isinstance(trainer, TorchTrainer)
    plan = Plan.from_meta({
        **digits.default_plan, "dp": "sample", "dp_clip": 1.0, "dp_noise": 1.0, "dp_epsilon": 8.0, "batch_size": 64,
        "learning_rate": 0.1, "local_epochs": 6,
    })  # fmt: skip
    assert epsilon([cost(plan, trainer.samples)], 1e-5) < 8
    trained = trainer.train_privately(digits.initial(0), plan, version=0, seed=1, random_source=seeded())
    found = digits.evaluator(data=None).evaluate(trained.tensors).values["accuracy"]
    assert found > 0.55
