"""Augmentation: the inputs of a batch are changed, each sample's by itself, before a step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ternbus.edge.torch.batches import with_inputs, without_targets
from ternbus.edge.torch.tree import Tree, mapped, row_count, stacked

if TYPE_CHECKING:
    from ternbus.edge.torch.torch_task import TorchTask

DRAWS_ONCE: Final = "torchvision.transforms"
"""The package whose transforms draw once for whatever they are given, also if it is a batch."""


@dataclass(frozen=True, slots=True)
class per_sample:  # noqa: N801 - it is used as a function
    """A function of one sample's inputs, as `TorchTask(augment=per_sample(function))`.

    It takes a batch's inputs, calls `function` for each sample, and stacks what it returns.
    """

    function: Callable[[Any], Any]

    def __call__(self, inputs: Tree) -> Tree:
        return stacked([self.function(_sample(inputs, number)) for number in range(row_count(inputs) or 0)])


def _sample(inputs: Tree, number: int) -> Tree:
    return mapped(lambda tensor: tensor[number], inputs)


def augmentation(task: "TorchTask") -> Callable[[Tree], Tree] | None:
    """What changes a batch before a step of the task; None if nothing does."""
    change: Callable[[Tree], Tree]
    if task.has_own("augment_batch"):
        change = task.augment_batch
    elif not task.has_own("augment"):
        return None
    elif "augment" in vars(task) and not type(task.augment).__module__.startswith(DRAWS_ONCE):
        change = task.augment  # of a batch
    else:
        change = per_sample(task.augment)
    return lambda batch: with_inputs(batch, change(without_targets(batch)))
