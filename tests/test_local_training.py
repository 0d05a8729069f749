"""Optimizers, schedules, budgets of time and precision: each formula against a second, plain implementation."""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from itertools import accumulate, count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ternbus.broker.protocol.messages import RESTORE_LEAP
from ternbus.edge.learn import local_optimizer
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.schedule import TURNS, share, turn
from ternbus.edge.torch import autotune
from ternbus.edge.torch.autotune import Way, fastest, ways
from ternbus.edge.torch.trainer import TorchTask

RATE = 0.05


def data(folder: Path | None, split: str) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return inputs, (inputs.mean((1, 2, 3)) > 0).long()


def network() -> nn.Module:
    # Without a bias before batch norm: its gradient is rounding alone, which Adam would enlarge to a step.
    convolution = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 2))


TASK = TorchTask(name="own", model=network, data=data)


def plain(
    plan: Plan,
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
) -> dict[str, Tensor]:
    """The same training as one would write it: torch.optim, backward(), FedProx as a term of the loss."""
    net = network()
    net.load_state_dict({name: torch.tensor(array) for name, array in TASK.initial(0).items()}, strict=False)
    parameters = list(net.parameters())
    began = [parameter.detach().clone() for parameter in parameters]
    optimizer = make(parameters)
    after = schedule(optimizer) if schedule is not None else None
    inputs, targets = data(None, "train")
    for chosen in plan.batches(64, np.random.default_rng(5)):
        loss = nn.functional.cross_entropy(net(inputs[chosen]), targets[chosen])
        for parameter, first in zip(parameters, began, strict=True):
            loss = loss + plan.proximal_mu / 2 * (parameter - first).square().sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        if plan.grad_clip:
            nn.utils.clip_grad_norm_(parameters, plan.grad_clip)
        optimizer.step()
        if after is not None:
            after.step()
    return dict(net.state_dict())


SGD = {"learning_rate": RATE, "momentum": 0.9}
ADAM = {"learning_rate": 0.01, "beta1": 0.8, "beta2": 0.95}
CASES: list[tuple[dict[str, object], Callable[[list[nn.Parameter]], torch.optim.Optimizer]]] = [
    ({**SGD}, lambda ps: torch.optim.SGD(ps, lr=RATE, momentum=0.9)),
    ({**SGD, "weight_decay": 0.1}, lambda ps: torch.optim.SGD(ps, lr=RATE, momentum=0.9, weight_decay=0.1)),
    ({**SGD, "proximal_mu": 2.0}, lambda ps: torch.optim.SGD(ps, lr=RATE, momentum=0.9)),
    (
        {**ADAM, "optimizer": "adam", "weight_decay": 0.1},
        lambda ps: torch.optim.Adam(ps, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1),
    ),
    (
        {**ADAM, "optimizer": "adamw", "weight_decay": 0.1},
        lambda ps: torch.optim.AdamW(ps, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1),
    ),
    ({**SGD, "nesterov": True}, lambda ps: torch.optim.SGD(ps, lr=RATE, momentum=0.9, nesterov=True)),
    (
        {**SGD, "nesterov": True, "weight_decay": 0.1, "grad_clip": 0.05},
        lambda ps: torch.optim.SGD(ps, lr=RATE, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    ({**SGD, "grad_clip": 0.2, "proximal_mu": 2.0}, lambda ps: torch.optim.SGD(ps, lr=RATE, momentum=0.9)),
    (
        {"learning_rate": 0.005, "optimizer": "rmsprop"},
        lambda ps: torch.optim.RMSprop(ps, lr=0.005),
    ),
    (
        {"learning_rate": 0.005, "optimizer": "rmsprop", "rmsprop_alpha": 0.9, "weight_decay": 0.1, "grad_clip": 0.1},
        lambda ps: torch.optim.RMSprop(ps, lr=0.005, alpha=0.9, weight_decay=0.1),
    ),
    (
        {**ADAM, "optimizer": "adamw", "proximal_mu": 2.0},
        lambda ps: torch.optim.AdamW(ps, lr=0.01, betas=(0.8, 0.95), weight_decay=0),
    ),
]


@pytest.mark.parametrize(("meta", "make"), CASES, ids=["-".join(map(str, meta.values())) for meta, _ in CASES])
def test_an_optimizer_does_what_torch_optim_does(
    meta: dict[str, object], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> None:
    plan = Plan.from_meta({"local_steps": 12, "batch_size": 16, "statistics_rate": 1, **meta})
    ours = TASK.trainer(data=None, partition="all").train(TASK.initial(0), plan, version=0, seed=5)
    assert ours.metrics["steps"] == 12
    expected = plain(plan, make)
    for name, tensor in ours.tensors.items():
        # Adam divides by the root of a square that may be next to nothing
        np.testing.assert_allclose(tensor, expected[name].numpy(), atol=2e-5, err_msg=name)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("more", [{}, {"nesterov": True, "grad_clip": 2.0, "step_schedule": "cosine"}])
def test_an_optimizer_is_the_same_on_numpy_and_on_torch(optimizer: str, more: dict[str, Any]) -> None:
    plan = Plan(optimizer=optimizer, weight_decay=0.1, proximal_mu=0.5, local_steps=10, **more)
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=5).astype(np.float32)]
    tensors = [torch.tensor(weight) for weight in weights]
    arrays = [weight.copy() for weight in weights]
    one, other = local_optimizer.begin(plan, arrays), local_optimizer.begin(plan, tensors)
    for rate in plan.rates(0, 100):
        gradients = [rng.normal(size=weight.shape).astype(np.float32) for weight in weights]
        kept = [gradient.copy() for gradient in gradients]
        one.step(gradients, rate)
        other.step([torch.tensor(gradient) for gradient in gradients], rate)
        assert all(np.array_equal(a, b) for a, b in zip(gradients, kept, strict=True))
    for weight, array, tensor in zip(weights, arrays, tensors, strict=True):
        np.testing.assert_allclose(array, tensor.numpy(), rtol=1e-5)
        assert np.abs(array - weight).max() > 0.01


def test_a_step_has_its_share_of_the_rate_as_with_schedulers_of_torch() -> None:
    def warm_and_linear(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (step + 1) / 4 if step < 4 else 1 - 0.9 * min(1, (step - 4) / 8)
        )

    steps = {"local_steps": 12, "batch_size": 16, "statistics_rate": 1, **SGD}
    plan = Plan.from_meta({**steps, "step_schedule": "linear", "warmup_steps": 4, "final_step_rate": 0.1})
    ours = TASK.trainer(data=None, partition="all").train(TASK.initial(0), plan, version=0, seed=5)
    make = partial(torch.optim.SGD, lr=RATE, momentum=0.9)
    expected, constant = plain(plan, make, warm_and_linear), plain(plan, make)
    for name, tensor in ours.tensors.items():
        np.testing.assert_allclose(tensor, expected[name].numpy(), atol=2e-5, err_msg=name)
    assert not np.allclose(ours.tensors["4.weight"], constant["4.weight"].numpy(), atol=1e-3)


def test_the_schedule_of_steps_runs_over_the_steps_of_each_training_and_multiplies_the_version_s_rate() -> None:
    plan = Plan(step_schedule="cosine", warmup_steps=2, final_step_rate=0.2)
    assert [plan.step_share(step, 6) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert plan.step_share(4, 6) == pytest.approx(0.6)  # the middle
    assert plan.step_share(6, 6) == plan.step_share(100, 6) == pytest.approx(0.2)
    assert [plan.step_share(step, 1) for step in (0, 1)] == [0.5, 1.0]  # fewer steps than the warm-up
    halved = Plan(learning_rate=2.0, schedule="linear", schedule_versions=10, step_schedule="linear", local_epochs=2)
    assert list(halved.rates(5, 64)) == pytest.approx([1.0, 0.75, 0.5, 0.25])


def moved(plan: Plan, gradients: list[np.ndarray]) -> list[np.ndarray]:
    """How far one step of SGD with a rate of 1 moves parameters of 0."""
    weights = [np.zeros_like(gradient) for gradient in gradients]
    with np.errstate(over="ignore", invalid="ignore"):
        local_optimizer.begin(plan, weights).step(gradients, 1.0)
    return [-weight for weight in weights]


def test_clipping_bounds_the_norm_over_all_parameters_and_keeps_the_direction() -> None:
    gradients = [np.array([3.0, 0.0]), np.array([[4.0]])]  # of norm 5
    clipped = moved(Plan(grad_clip=1.0), gradients)
    assert clipped[0].tolist() == pytest.approx([0.6, 0])
    assert clipped[1].tolist() == [pytest.approx([0.8])]
    for plan in (Plan(grad_clip=5.0), Plan(grad_clip=1e6), Plan()):
        assert all(np.array_equal(one, other) for one, other in zip(moved(plan, gradients), gradients, strict=True))


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_a_gradient_whose_square_overflows_is_clipped_and_one_that_is_not_finite_is_not_hidden(make: Any) -> None:
    def clipped(*values: float) -> list[float]:
        w = make(np.zeros(len(values), np.float32))
        with np.errstate(over="ignore", invalid="ignore"):
            local_optimizer.begin(Plan(grad_clip=1.0), [w]).step([make(np.array(values, np.float32))], 1.0)
        return [-float(each) for each in w]

    assert clipped(3e30, 4e30) == pytest.approx([0.6, 0.8])
    assert not all(map(math.isfinite, clipped(1.0, math.inf)))
    assert not all(map(math.isfinite, clipped(1.0, math.nan)))


def test_half_precision_is_clipped_by_a_norm_that_it_cannot_hold() -> None:
    w = torch.zeros(4, dtype=torch.float16)
    local_optimizer.begin(Plan(grad_clip=1.0), [w]).step([torch.full((4,), 6e4, dtype=torch.float16)], 1.0)
    assert w.tolist() == pytest.approx([-0.5] * 4, abs=1e-3)


def by_torch(schedule: str, warmup: int, total: int, final: float) -> Iterator[float]:
    """torch.optim.lr_scheduler's, one step a version, with a rate of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    after: torch.optim.lr_scheduler.LRScheduler
    if schedule == "cosine":
        after = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - warmup, eta_min=final)
    elif schedule == "linear":
        after = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, final, total - warmup)
    else:
        after = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, 1)
    for version in range(total):
        if version < warmup:
            yield (version + 1) / warmup
        else:
            yield optimizer.param_groups[0]["lr"]
            optimizer.step()
            after.step()


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "final"), [(0, 0.0), (5, 0.1)])
def test_a_schedule_is_that_of_torch_version_by_version(schedule: str, warmup: int, final: float) -> None:
    plan = Plan(
        learning_rate=2.0, schedule=schedule, warmup_versions=warmup, schedule_versions=30, final_rate=final
    )  # fmt: skip
    ours = [plan.rate(version) / 2 for version in range(30)]
    assert ours == pytest.approx(list(by_torch(schedule, warmup, 30, final)), abs=1e-9)
    end = 1.0 if schedule == "constant" else final
    assert [plan.rate(version) / 2 for version in (30, 31, 10**6)] == pytest.approx([end] * 3)


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 2**40), st.integers(0, 50), st.floats(0, 1))
def test_a_share_is_a_share_and_goes_on_after_a_restore(schedule: str, version: int, warmup: int, final: float) -> None:
    found = share(schedule, version, warmup=warmup, total=warmup + 20, final=final)
    assert 0 <= found <= 1
    assert found == share(schedule, version + RESTORE_LEAP, warmup=warmup, total=warmup + 20, final=final)


@given(st.floats(1e-6, 1), st.integers(0, TURNS - 1), st.integers(0, 2**40))
def test_turns_come_evenly_and_every_version_before_one_names_it(part: float, phase: int, version: int) -> None:
    next_from = partial(turn, participation=part, phase=phase)
    first = next_from(version)
    assert first >= version
    assert {next_from((version + first) // 2), next_from(first)} == {first}
    own = list(accumulate(range(20), lambda last, _: next_from(last + 1), initial=first))
    exact = Fraction(max(1, round(part * TURNS)), TURNS)
    assert {later - earlier for earlier, later in pairwise(own)} <= {math.floor(1 / exact), math.ceil(1 / exact)}


def test_with_phases_all_over_every_version_has_its_share_of_the_devices() -> None:
    for version in range(30):
        on_turn = [turn(version, participation=0.3, phase=device * TURNS // 10) == version for device in range(10)]
        assert sum(on_turn) == 3


@pytest.mark.parametrize("name", ["digits", "digits-numpy"])
def test_a_device_trains_a_version_at_the_rate_of_that_version(name: str) -> None:
    task = load_task(name)
    start, trainer = task.initial(0), task.trainer(data=None, partition="iid:0/8")
    scheduled = Plan(local_steps=3, learning_rate=0.1, schedule="linear", schedule_versions=10)
    fixed = Plan(local_steps=3, learning_rate=0.1 * 0.6)
    one = trainer.train(start, scheduled, version=4, seed=1).tensors
    two = trainer.train(start, fixed, version=0, seed=1).tensors
    assert all(np.allclose(one[key], two[key], atol=1e-7) for key in start)
    ended = trainer.train(start, scheduled, version=10, seed=1).tensors
    assert all(np.array_equal(ended[key], start[key]) for key in start)


@pytest.mark.parametrize("name", ["digits", "digits-numpy"])
def test_a_device_trains_a_step_at_the_rate_of_that_step(name: str) -> None:
    task = load_task(name)
    start, trainer = task.initial(0), task.trainer(data=None, partition="iid:0/8")

    def change(**plan: Any) -> dict[str, np.ndarray]:
        trained = trainer.train(start, Plan(momentum=0.0, **plan), version=0, seed=1).tensors
        return {key: trained[key] - start[key] for key in start}

    half, whole = change(local_steps=1, step_schedule="cosine", warmup_steps=2), change(local_steps=1)
    assert all(np.allclose(2 * half[key], whole[key], atol=1e-6) for key in start)
    clipped = change(local_steps=1, learning_rate=1.0, grad_clip=0.01)
    assert math.sqrt(sum(float((each**2).sum()) for each in clipped.values())) == pytest.approx(0.01, rel=1e-3)


def test_seconds_end_a_training_early_and_a_slow_device_does_less() -> None:
    def steps(plan: Plan, seconds_a_step: float) -> int:
        now = count()
        return len(list(plan.batches(100, np.random.default_rng(0), lambda: next(now) * seconds_a_step)))

    assert steps(Plan(local_epochs=10, batch_size=10), 1.0) == 100
    limited = Plan(local_epochs=10, batch_size=10, local_seconds=30.0)
    assert steps(limited, 0.1) == 100  # fast enough for all of it
    assert steps(limited, 1.0) == 30
    assert steps(limited, 2.0) == 15
    assert steps(limited, 1000.0) == 1  # one at least
    assert steps(Plan(local_steps=7, batch_size=10, local_seconds=30.0), 1.0) == 7
    assert len(list(limited.batches(100, np.random.default_rng(0)))) == 100  # nobody's clock


@pytest.mark.parametrize("name", ["digits", "digits-numpy"])
def test_every_trainer_looks_at_the_clock_and_says_how_far_it_came(name: str) -> None:
    task = load_task(name)
    plan = Plan(local_steps=100_000, local_seconds=0.2)
    trained = task.trainer(data=None, partition="iid:0/8").train(task.initial(0), plan, version=0, seed=0)
    assert 1 <= trained.metrics["steps"] < 100_000
    assert trained.metrics["seconds"] < 20
    assert 0 <= trained.metrics["accuracy"] <= 1


def test_bfloat16_and_channels_last_train_the_same_model_only_rougher() -> None:
    trainer = TASK.trainer(data=None, partition="all")
    start = TASK.initial(0)
    steps = {"local_steps": 8, "batch_size": 16, "learning_rate": 0.02}
    exact = trainer.train(start, Plan.from_meta(steps), version=0, seed=0)
    last = trainer.train(start, Plan.from_meta({**steps, "memory_format": "channels-last"}), version=0, seed=0)
    half = trainer.train(start, Plan.from_meta({**steps, "precision": "bfloat16"}), version=0, seed=0)
    assert "bfloat16" not in exact.metrics
    assert (half.metrics["bfloat16"], last.metrics["channels_last"]) == (1.0, 1.0)
    moved = max(float(np.abs(exact.tensors[name] - start[name]).max()) for name in start)
    for name in start:
        np.testing.assert_allclose(last.tensors[name], exact.tensors[name], atol=1e-5)
        np.testing.assert_allclose(half.tensors[name], exact.tensors[name], atol=0.05 * moved)
        assert half.tensors[name].dtype == np.float32
    assert any(not np.array_equal(half.tensors[name], exact.tensors[name]) for name in start)  # it is bfloat16


def test_auto_measures_once_and_leaves_no_trace_of_it() -> None:
    start = TASK.initial(0)
    auto = Plan(local_steps=4, batch_size=16, precision="auto", memory_format="auto")
    one, other = TASK.trainers(data=None, partitions=["iid:0/2", "iid:1/2"])
    first = one.train(start, auto, version=0, seed=0)
    (way,) = one._shared.ways.values()
    assert list(other._shared.ways.values()) == [way]  # of the same process and model: not measured again
    named = Plan(
        local_steps=4,
        batch_size=16,
        precision="bfloat16" if way.bfloat16 else "float32",
        memory_format="channels-last" if way.channels_last else "contiguous",
    )
    fresh = TASK.trainer(data=None, partition="iid:0/2").train(start, named, version=0, seed=0)
    assert all(np.array_equal(first.tensors[name], fresh.tensors[name]) for name in start)


def test_what_a_plan_allows_depends_on_model_and_inputs() -> None:
    images, windows = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8)
    auto = Plan(precision="auto", memory_format="auto")
    assert ways(Plan(), images, torch.float32) == [Way()]
    assert len(ways(auto, images, torch.float32)) == 4
    assert ways(auto, images, torch.float32)[0] == Way()
    assert ways(auto, windows, torch.float32) == [Way(), Way(bfloat16=True)]
    assert ways(auto, windows, torch.float64) == ways(auto, windows, None) == [Way()]
    forced = Plan(precision="bfloat16", memory_format="channels-last")
    assert ways(forced, images, torch.float32) == [Way(bfloat16=True, channels_last=True)]


@pytest.mark.parametrize(("half_s", "wins"), [(0.5, True), (0.94, True), (0.96, False), (1.0, False), (2.0, False)])
def test_the_fastest_is_taken_if_it_is_clearly_faster(half_s: float, wins: bool) -> None:
    now = 0.0

    def step(way: Way) -> None:
        nonlocal now
        now += (half_s if way.bfloat16 else 1.0) + (
            0.3 if runs[way] == 1 else 0.0
        )  # its second run meets a disturbance
        runs[way] += 1

    half, plainly = Way(bfloat16=True), Way()
    runs = {half: 0, plainly: 0}
    assert fastest([plainly, half], step, lambda: now) == (half if wins else plainly)
    assert set(runs.values()) == {1 + autotune.ROUNDS}


def test_the_proximal_gradient_is_that_of_the_papers_function() -> None:
    """h(w) = F(w) + mu/2·|w - w0|² (Li et al. 2020, eq. 2) by central differences, F being sum(w³)."""
    mu, w0 = 0.7, np.array([0.5, -1.0, 2.0])
    w = w0.copy()
    optimizer = local_optimizer.begin(Plan(momentum=0.0, proximal_mu=mu), [w])
    w += np.array([0.3, 0.1, -0.2])
    at = w.copy()
    optimizer.step([3 * at**2], 1.0)

    def h(point: np.ndarray) -> float:
        return float((point**3).sum() + mu / 2 * ((point - w0) ** 2).sum())

    for place in range(3):
        step = np.zeros(3)
        step[place] = 1e-5
        slope = (h(at + step) - h(at - step)) / 2e-5
        assert at[place] - w[place] == pytest.approx(slope, rel=1e-6)
        assert math.isfinite(slope)
