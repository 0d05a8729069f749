"""A correction of the gradient of each local step, as a term of the loss whose gradient it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ternbus.broker.errors import ConfigError
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.torch.autotune import Way
from ternbus.edge.torch.objective import Objective, trainable
from ternbus.edge.torch.torch_task import TorchTask
from ternbus.edge.torch.tree import Tree


@dataclass(slots=True, eq=False)
class Correction:
    """The correction of the training that is going on, by the name of the parameter."""

    tensors: Tensors | None = None
    possible: bool = False  # for the task

    @contextmanager
    def set(self, tensors: Tensors | None) -> Iterator[None]:
        if tensors is not None and not self.possible:
            raise ConfigError("correction: the task must be a TorchTask without a train_step of its own")
        self.tensors = tensors
        try:
            yield
        finally:
            self.tensors = None


def corrected(task: TorchTask, correction: Correction) -> TorchTask:
    """The task whose loss has the term sum(g * w) beside it, for the corrections g of the parameters w."""
    if task.has_own("train_step"):
        return task
    correction.possible = True
    objective = Objective(task)

    def loss(net: nn.Module, batch: Tree, plan: Plan) -> Any:
        found = objective.of(net, batch, plan, Way())
        outputs = objective.outputs(net, batch, found)
        return _with_term(found.value, net, correction.tensors), outputs

    return task.replaced(loss=loss)


def _with_term(value: Any, net: nn.Module, tensors: Tensors | None) -> Any:
    if tensors is None:
        return value
    value = trainable(value)
    for name, parameter in net.named_parameters():
        if name in tensors:
            value = value + (torch.as_tensor(tensors[name]).to(parameter) * parameter).sum()
    return value
