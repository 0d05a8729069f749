"""The metrics of a task: each is computed once, of the outputs and targets of all samples."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import torch
from torch import Tensor

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.direction import Direction, direction_of
from ternbus.edge.learn.metric import Metric
from ternbus.edge.learn.task_loader import code_errors
from ternbus.edge.torch.objective import number, scores_of
from ternbus.edge.torch.tree import Tree, joined, leaves, mapped

ACCURACY: Final = "accuracy"
RESERVED: Final = {"loss", "steps", "seconds", "failed_samples", "epsilon", "delta", "bfloat16", "channels_last"}
NAME_CHARS: Final = 40
TRAINING_BYTES: Final = 2**25  # of outputs and targets that a training keeps for its metrics; the newest


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of samples whose largest output is the target."""
    return (outputs.argmax(1) == targets).float().mean()


def accuracy_of_classes(outputs: Any, targets: Any) -> Tensor | None:
    """`accuracy` of outputs, or of the `logits` in them; None where these are no scores of classes."""
    scores = scores_of(outputs)
    if not (isinstance(scores, Tensor) and isinstance(targets, Tensor)) or scores.dim() < 2:
        return None
    if targets.is_floating_point() or targets.shape != scores.shape[:1] + scores.shape[2:]:
        return None
    return accuracy(scores, targets)


def checked(given: Any, task: str) -> dict[str, Metric]:
    """The metrics by name. Raises `ConfigError` for a name that cannot be used, or what is no function."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"the task {task}: metrics is {type(given).__name__}: it must be a dict of name to function")
    found = {}
    for name, metric in given.items():
        if not isinstance(name, str) or not 0 < len(name) <= NAME_CHARS or not name.isprintable() or name in RESERVED:
            taken = ", ".join(sorted(RESERVED))
            raise ConfigError(
                f"the task {task}: {name!r} is no name for a metric: use at most {NAME_CHARS} characters, and none of "
                f"{taken}"
            )
        if not callable(metric) and not isinstance(metric, Metric):
            raise ConfigError(
                f"the task {task}: the metric {name!r} is {type(metric).__name__}: it must be a function of "
                "(outputs, targets), or higher(function) or lower(function)"
            )
        found[name] = metric if isinstance(metric, Metric) else Metric(metric)
    return found


def directions(metrics: Mapping[str, Metric]) -> dict[str, Direction]:
    """The directions that a metric's name alone does not tell."""
    return {name: metric.better for name, metric in metrics.items() if metric.better != direction_of(name, {})}


class Scores:
    """Outputs and targets of a split or of a training, kept on the CPU; nothing without metrics.

    With `limit_bytes` only the newest batches are kept, at least one.
    """

    def __init__(self, metrics: Mapping[str, Metric], limit_bytes: int | None = None) -> None:
        self._metrics = metrics
        self._limit_bytes = limit_bytes
        self._kept: list[tuple[Tree, Tree, int]] = []
        self._bytes = 0

    def keep(self, outputs: Tree, targets: Tree) -> None:
        if not self._metrics:
            return
        outputs, targets = mapped(_on_cpu, outputs), mapped(_on_cpu, targets)
        size = sum(leaf.numel() * leaf.element_size() for leaf in leaves((outputs, targets)))
        self._kept.append((outputs, targets, size))
        self._bytes += size
        while self._limit_bytes is not None and self._bytes > self._limit_bytes and len(self._kept) > 1:
            self._bytes -= self._kept.pop(0)[2]

    def values(self) -> dict[str, float]:
        """The metrics' values; raises what their functions raise."""
        return self._values(self._metrics)

    def values_if_any(self) -> dict[str, float]:
        """The values of those metrics that can be computed: of a training's outputs not every one can be."""
        found: dict[str, float] = {}
        for name, metric in self._metrics.items():
            with suppress(*code_errors()):
                found |= self._values({name: metric})
        return found

    def _values(self, metrics: Mapping[str, Metric]) -> dict[str, float]:
        if not self._kept:
            return {}
        outputs, targets = self._joined()
        with torch.no_grad():
            values = {name: metric.compute(outputs, targets) for name, metric in metrics.items()}
        return {name: number(value, f"the metric {name!r}") for name, value in values.items() if value is not None}

    def _joined(self) -> tuple[Tree, Tree]:
        if len(self._kept) > 1:
            outputs, targets = (joined([each[part] for each in self._kept]) for part in (0, 1))
            self._kept = [(outputs, targets, self._bytes)]
        return self._kept[0][:2]


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu")
