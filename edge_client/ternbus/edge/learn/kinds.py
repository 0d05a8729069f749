"""The kinds of tensors of a task's model: statistics, those without negative elements, those that do not travel."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol, runtime_checkable

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.tensor_kinds import STATISTICS, TensorKinds, matching
from ternbus.edge.learn.task import Task, Trainer
from ternbus.edge.plan.tensors import Tensors

LOCAL: Final = "stays_local: trained and kept on each device; an evaluator measures with the initial values"
NOT_FINITE: Final = "a buffer that is not finite: stays on the device, and begins each training as model() makes it"
UNSIZED: Final = (
    "a buffer that training gives its size, as an observer's: stays on the device, and begins each training as model() "
    "makes it"
)


@runtime_checkable
class StayingTask(Protocol):
    """A task that keeps tensors of its model on the device."""

    def staying(self) -> Mapping[str, str]:
        """The name of each tensor, and why it stays."""
        ...


def staying(task: Task) -> dict[str, list[str]]:
    """The tensors that a task keeps on the device, by why they stay."""
    found: dict[str, list[str]] = {}
    for name, why in task.staying().items() if isinstance(task, StayingTask) else ():
        found.setdefault(why, []).append(name)
    return found


def local_notice(task: Task) -> str:
    """What an evaluation of the test data cannot tell of a task whose devices keep tensors; empty for other tasks."""
    patterns: Sequence[str] = getattr(task, "stays_local", ())
    if not patterns:
        return ""
    return (
        f"{', '.join(patterns)} of {task.name} stay on each device (stays_local): the test metrics are those of their "
        "initial values; metrics of the devices themselves, on held-out data, tell what the model is worth"
    )


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
