"""Optimizers for a task's own training step: each follows the plan, for some of the model's parameters."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn import local_optimizer
from ternbus.edge.plan.plan import Plan
from ternbus.edge.torch.objective import number, trainable


class PlanOptimizer:
    """The plan's optimizer, at its learning rate, for some parameters; frozen ones are left out.

    `minimize(loss)` is one step. So are `zero_grad()`, `loss.backward()` and `step()`.
    """

    def __init__(self, plan: Plan, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.rate = plan.learning_rate
        self._inner = local_optimizer.begin(plan, [parameter.detach() for parameter in self.parameters])

    def minimize(self, loss: Tensor, *, retain_graph: bool = False) -> None:
        """One step down the gradient of `loss`, by these parameters alone. Others get no gradient."""
        self._move(torch.autograd.grad(trainable(loss), self.parameters, retain_graph=retain_graph,
                                       materialize_grads=True))  # fmt: skip

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def step(self) -> None:
        """One step down the gradients that `backward()` has left."""
        self._move([torch.zeros_like(each) if each.grad is None else each.grad for each in self.parameters])

    def _move(self, gradients: Iterable[Tensor]) -> None:
        with torch.no_grad():
            self._inner.step(list(gradients), self.rate)


def optimizers_of(given: Any, net: nn.Module, plan: Plan) -> Any:
    """What `optimizers()` gave, with the plan's optimizer in place of each module or list of parameters."""
    if given is None:
        return PlanOptimizer(plan, net.parameters())
    if isinstance(given, Mapping):
        return {name: optimizers_of(each, net, plan) for name, each in given.items()}
    if isinstance(given, nn.Module):
        return PlanOptimizer(plan, given.parameters())
    if hasattr(given, "step"):
        return given
    try:
        found = list(given)
    except TypeError:
        raise ConfigError(
            f"optimizers() returned {type(given).__name__}: return modules, lists of parameters or optimizers"
        ) from None
    if found and all(isinstance(each, Tensor) for each in found):
        return PlanOptimizer(plan, found)
    return [optimizers_of(each, net, plan) for each in found]


def plan_optimizers(given: Any) -> list[PlanOptimizer]:
    """All that follow the plan's rate."""
    if isinstance(given, PlanOptimizer):
        return [given]
    inner = given.values() if isinstance(given, Mapping) else given if isinstance(given, list) else ()
    return [each for one in inner for each in plan_optimizers(one)]


def reported(returned: Any) -> dict[str, float]:
    """The numbers of a step: of a dict by name, else the loss."""
    given = returned if isinstance(returned, Mapping) else {} if returned is None else {"loss": returned}
    return {str(name): number(value, f"train_step()'s {name}") for name, value in given.items()}
