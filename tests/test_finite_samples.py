"""Of a training whose model is not finite, the samples that are not are named, whatever form they have."""

from collections.abc import Iterator, MutableMapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from ternbus.edge.learn.task import TrainingError
from ternbus.edge.plan.plan import Plan
from ternbus.edge.shell.preflight import check
from ternbus.edge.torch import finite
from ternbus.edge.torch.torch_task import TorchTask

INPUTS = np.ones((40, 3), np.float32)
TARGETS = np.arange(40) % 2
NAN = INPUTS.copy()
NAN[30:, 1] = np.nan
PLAN = Plan(local_epochs=1)


class Stream(IterableDataset[Any]):
    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs

    def __iter__(self) -> Iterator[Any]:
        return zip(self.inputs, TARGETS, strict=True)


def pairs(inputs: Any) -> list[Any]:
    return [(row, int(target)) for row, target in zip(inputs, TARGETS, strict=True)]


def task_of(data: Any, test: Any = None, **about: Any) -> TorchTask:
    given = data if test is None else test
    return TorchTask(
        name="own",
        model=lambda: nn.Linear(3, 2),
        data=lambda _, split: data if split == "train" else given,
        default_plan={"local_epochs": 1},
        **about,
    )


def refusal(task: TorchTask, plan: Plan = PLAN) -> str:
    with pytest.raises(TrainingError) as raised:
        task.trainer(data=None, partition="all").train(task.initial(0), plan, version=0, seed=0)
    return str(raised.value)


@pytest.mark.parametrize("data", [(NAN, TARGETS), pairs(NAN), Stream(NAN), Stream(torch.from_numpy(NAN))])
def test_inputs_that_are_not_finite_are_counted(data: Any) -> None:
    assert refusal(task_of(data)).startswith("10 of 40 samples have inputs that are not finite (NaN or infinity): ")


def test_so_are_targets_and_values() -> None:
    bad = [(row, np.float32(np.nan)) for row in INPUTS]
    task = task_of(bad, loss=lambda outputs, targets: nn.functional.mse_loss(outputs[:, 0], targets))
    assert refusal(task).startswith("40 of 40 samples have targets ")
    entries = [{"x": row, "y": 1} for row in NAN]
    task = task_of(entries, predict=lambda net, batch: net(batch["x"]))
    assert refusal(task).startswith("10 of 40 samples have values ")


def test_of_many_samples_the_first_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "READ_MAX", 35)
    assert refusal(task_of(pairs(NAN))).startswith("5 of the first 35 samples have inputs ")
    monkeypatch.setattr(finite, "READ_MAX", 20)
    assert refusal(task_of(pairs(NAN))) == (
        "training diverged (the model is not finite): lower the plan's learning_rate, or remove NaN from the data"
    )


def test_nothing_is_read_where_nobody_may_see_the_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(pairs(NAN))
    trainer = task.trainer(data=None, partition="all")
    monkeypatch.setattr(type(trainer.data), "faults", lambda _: pytest.fail("it was read"))
    with pytest.raises(TrainingError, match="the model is not finite"):
        trainer.train(task.initial(0), replace(PLAN, codec="private"), version=0, seed=0)


def test_a_sample_that_cannot_be_read_ends_the_search() -> None:
    def samples() -> Iterator[Any]:
        yield NAN[39], 1
        raise ValueError("corrupt")

    assert (
        finite.faults_of(samples(), 40) == "1 of the first 1 samples have inputs that are not finite (NaN or infinity)"
    )
    assert not finite.faults_of(iter([("a text", 1), (None, 2)]), 2)


@pytest.mark.parametrize("test", [(NAN, TARGETS), pairs(NAN)])
def test_the_check_says_so_of_the_test_data(test: Any) -> None:
    (problem,) = check(task_of((INPUTS, TARGETS), test)).problems
    assert problem == (
        "evaluate() returned no finite 'loss' in its values; of its data, 10 of 40 samples have inputs that are not "
        "finite (NaN or infinity): correct or remove them"
    )


class Record(MutableMapping[str, Any]):
    """A copy of it has the same content, not a copy of that."""

    def __init__(self, **content: Any) -> None:
        self._content = content

    def __getitem__(self, name: str) -> Any:
        return self._content[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._content[name] = value

    def __delitem__(self, name: str) -> None:
        del self._content[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)


def test_looking_at_a_sample_changes_nothing_in_it() -> None:
    good, bad = Record(x=torch.ones(2), y=1), MappingProxyType({"x": torch.tensor([np.nan]), "y": 1})
    assert finite.faults_of([good, bad], 2) == "1 of 2 samples have values that are not finite (NaN or infinity)"
    assert good["y"] == 1
    assert good["x"].tolist() == [1, 1]
