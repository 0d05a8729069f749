"""A small task of one linear layer, made up, and what the tests of tasks in PyTorch do with one."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ternbus.edge import Evaluation, Plan, TorchTask, Trained
from ternbus.edge.plan.tensors import Tensors

DRAW = torch.Generator().manual_seed(0)
INPUTS = torch.randn(120, 8, generator=DRAW)
TARGETS = (INPUTS @ torch.randn(8, 3, generator=DRAW)).argmax(1)
PLAN = Plan(local_epochs=3, batch_size=10, learning_rate=0.1)


def data(folder: Path | None, split: str) -> tuple[Tensor, Tensor]:
    chosen = slice(0, 90) if split == "train" else slice(90, None)
    return INPUTS[chosen], TARGETS[chosen]


def linear() -> nn.Module:
    return nn.Linear(8, 3)


def trained(task: TorchTask, plan: Plan = PLAN, seed: int = 1) -> Trained:
    return task.trainer(data=None, partition="all").train(task.initial(0), plan, version=0, seed=seed)


def evaluated(task: TorchTask, tensors: Tensors | None = None) -> Evaluation:
    return task.evaluator(data=None).evaluate(task.initial(0) if tensors is None else tensors)


def same(one: Tensors, other: Tensors) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


class Subclass(TorchTask):
    def model(self) -> nn.Module:
        return linear()

    def dataset(self, folder: Path | None, split: str) -> Any:
        return data(folder, split)
