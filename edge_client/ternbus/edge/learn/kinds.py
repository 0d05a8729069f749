"""Which tensors of a task's model are statistics, and which have no negative elements."""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.tensor_kinds import STATISTICS, TensorKinds, matching
from ternbus.edge.learn.task import Task, Trainer
from ternbus.edge.plan.tensors import Tensors


@runtime_checkable
class KindsTask(Protocol):
    """A task that knows the kinds from its model, not only from names."""

    def tensor_kinds(self) -> TensorKinds: ...


def tensor_kinds(task: Task, model: Tensors) -> TensorKinds:
    """The kinds of the tensors of `model`, which is the task's initial one.

    A task may state more by glob patterns of names, in its attributes `statistics` and `nonnegative`. Raises
    `ConfigError` for a pattern that matches nothing, and for a negative element where there must be none.
    """
    found = task.tensor_kinds() if isinstance(task, KindsTask) else TensorKinds.by_name(model)
    found |= TensorKinds(statistics=_stated(task, "statistics", model), nonnegative=_stated(task, "nonnegative", model))
    found.check(model)
    return found


def statistics_of(trainer: Trainer, names: Iterable[str]) -> frozenset[str]:
    """The tensors whose change is a statistic of the data: by their names, and what the trainer states beside."""
    stated: frozenset[str] = getattr(trainer, "statistics", frozenset())
    return matching(names, STATISTICS) | stated


def _stated(task: Task, kind: str, model: Tensors) -> frozenset[str]:
    patterns: Sequence[str] = getattr(task, kind, ())
    for pattern in patterns:
        if not matching(model, [pattern]):
            raise ConfigError(
                f"the task {task.name}: {kind} has {pattern!r}, which matches no tensor of its model; the first is "
                f"named {next(iter(model))!r}"
            )
    return matching(model, patterns)
