"""A model may assign a buffer anew in forward(), as a single-machine script does: its value travels all the same."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.plan.plan import Plan
from ternbus.edge.torch.torch_task import TorchTask
from ternbus.edge.torch.travelling_state import TravellingState

INPUTS = torch.full((3, 2), 4.0)


class Centred(nn.Module):
    def __init__(self, *, persistent: bool = True, in_place: bool = False) -> None:
        super().__init__()
        self.last = nn.Linear(2, 2)
        self.in_place = in_place
        self.center: Tensor
        self.steps: Tensor
        self.register_buffer("center", torch.zeros(2), persistent=persistent)
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, inputs: Tensor) -> Tensor:
        new = 0.5 * self.center + 0.5 * inputs.mean(0)
        if self.in_place:
            self.center.copy_(new)
        else:
            self.center = new
        self.steps = self.steps + 1
        outputs: Tensor = self.last(inputs - self.center)
        return outputs


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(2, 2)
        self.center: Tensor
        self.register_buffer("center", torch.zeros(2))

    def forward(self, inputs: Tensor) -> Tensor:
        self.center = self.center + inputs.mean(0)
        outputs: Tensor = self.last(inputs - self.center)
        return outputs


class Caching(nn.Module):
    """It keeps its inputs, as many as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(7))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(inputs)
        self.seen = inputs.sum(1).detach()
        return outputs


class Holder(nn.Module):
    """A layer that is trained, and buffers that a test changes itself."""

    def __init__(self, **buffers: Tensor | None) -> None:
        super().__init__()
        self.last = nn.Linear(2, 2)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


def data(folder: Path | None, split: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(split))
    return torch.randn(20, 2, generator=generator) + 3, torch.arange(20) % 2


@pytest.mark.parametrize("compiled", [False, True])
def test_its_new_value_is_sent(compiled: bool) -> None:
    net = Centred()
    state = TravellingState(net)
    start = state.arrays()
    run = torch.compile(net, backend="eager") if compiled else net
    for _ in range(2):  # the second training begins with the version, and not with what the first assigned
        state.load(start)
        run(INPUTS)
        assert net.steps == 1
        np.testing.assert_array_equal(state.arrays_since(start, 1.0)["center"], [2.0, 2.0])
        np.testing.assert_array_equal(state.arrays_since(start, 0.25)["center"], [0.5, 0.5])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_model_is_no_other() -> None:
    net = torch.jit.script(Scripted())
    state = TravellingState(net)
    start = state.arrays()
    for _ in range(2):
        state.load(start)
        net(INPUTS)
        np.testing.assert_array_equal(state.arrays_since(start, 1.0)["center"], [4.0, 4.0])


def test_a_task_trains_and_evaluates_as_one_that_copies() -> None:
    found: list[tuple[Any, Any, Any]] = []
    for in_place in (False, True):
        task = TorchTask(name="own", model=partial(Centred, in_place=in_place), data=data)
        trainer = task.trainer(data=None, partition="all")
        start = task.initial(0)
        plan = Plan(local_steps=3, batch_size=4)
        first = trainer.train(start, plan, version=0, seed=1).tensors
        measured = trainer.evaluate(first)
        again = trainer.train(first, plan, version=1, seed=2).tensors
        found.append((first, measured.values, again))
    (first, measures, again), (copied, expected, copied_again) = found
    assert measures == expected
    for one, other in ((first, copied), (again, copied_again)):
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert again["center"].any()


def test_a_table_that_is_filled_at_first_use_stays_filled() -> None:
    """The model remembers elsewhere that it has filled it, as one of rotary position embeddings does."""
    nets = [Holder(filled=None), Centred(persistent=False), Centred(persistent=False)]
    tables = [torch.ones(2), torch.ones(2), torch.ones(3)]
    for net, name, table in zip(nets, ("filled", "center", "center"), tables, strict=True):
        state = TravellingState(net)
        setattr(net, name, table)
        state.load(state.arrays())
        assert getattr(net, name) is table
        assert table.all()


def test_two_may_change_places() -> None:
    net = Holder(before=torch.zeros(2), now=torch.ones(2))
    state = TravellingState(net)
    start = state.arrays()
    state.load(start)
    net.before, net.now = net.now, net.before
    found = state.arrays_since(start, 1.0)
    assert (found["before"].tolist(), found["now"].tolist()) == ([1.0, 1.0], [0.0, 0.0])
    state.load(start)
    assert state.arrays_since(start, 1.0)["before"].tolist() == [0.0, 0.0]


def test_a_tied_one_travels_once_and_must_stay_one() -> None:
    shared = torch.zeros(2)
    net = Holder(one=shared, other=shared)
    state = TravellingState(net)
    start = state.arrays()
    assert "other" not in start
    net.one = net.other = torch.ones(2)
    assert state.arrays_since(start, 1.0)["one"].tolist() == [1.0, 1.0]
    state.load(start)
    net.one = torch.ones(2)
    with pytest.raises(ConfigError, match=r"different tensors in the 2 places of the buffer one, .*copy_"):
        state.arrays_since(start, 1.0)


@pytest.mark.parametrize("changed", [torch.zeros(3), None])
def test_another_shape_is_refused_by_name(changed: Any) -> None:
    net = Holder(center=torch.zeros(2))
    state = TravellingState(net, stays_local=["center"] if changed is None else [])
    start = state.arrays()
    net.center = changed
    with pytest.raises(ConfigError, match=r"the buffer center the shape .*model\(\) \(2,\): .*persistent=False"):
        state.local_arrays() if changed is None else state.arrays_since(start, 1.0)
    state.arrays_since(start, 0.0)  # of what does not travel, nothing is known


def test_a_frozen_part_gets_its_own_back() -> None:
    net = nn.Sequential(Centred().requires_grad_(requires_grad=False), nn.Linear(2, 2))
    state = TravellingState(net)
    made = net[0].center
    net(INPUTS)
    state.load(state.arrays())
    assert net[0].center is made


def test_one_that_cannot_be_written_needs_no_reset() -> None:
    net = Holder(table=torch.arange(4).expand(2, 4))
    state = TravellingState(net)
    state.load(state.arrays())
    assert net.get_buffer("table").tolist() == [[0, 1, 2, 3]] * 2


def test_dp_sgd_undoes_an_assignment() -> None:
    task = TorchTask(name="own", model=Caching, data=data)
    plan = Plan(local_steps=3, batch_size=4, dp="sample", dp_clip=1.0, dp_noise=1.0, dp_epsilon=9.0)
    trainer = task.trainer(data=None, partition="all")
    found = trainer.train_privately(task.initial(0), plan, version=0, seed=0, random_source=RandomSource())
    assert found.metrics["steps"] == 3
    assert "failed_samples" not in found.metrics
    assert not found.tensors["seen"].any()
