"""The fastest precision and memory format to train a model on this machine, by measurement."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from ternbus.edge.plan.plan import Plan
from ternbus.edge.torch.tree import Tree, leaves, mapped

IMAGES = 4  # dimensions of a batch of them
ROUNDS = 3
GAIN = 0.95
"""Another way than the plain one must take at most this share of its time: a smaller gain may be chance."""

_CHOICES = {"auto": (False, True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A way to train: bfloat16 autocast or float32; images in channels-last format or contiguous."""

    bfloat16: bool = False
    channels_last: bool = False
    processor: str = "cpu"  # its kind

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.processor, dtype=torch.bfloat16) if self.bfloat16 else nullcontext()

    def laid_out(self, batch: Tree) -> Tree:
        """The batch with its images in the memory format. Convolutions keep the format of their input."""
        return mapped(_channels_last, batch) if self.channels_last else batch

    def metrics(self) -> dict[str, float]:
        """The metrics of an update that report this way; empty for the plain one."""
        return {name: 1.0 for name in ("bfloat16", "channels_last") if getattr(self, name)}


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == IMAGES else tensor


def ways(plan: Plan, inputs: Tree, dtype: torch.dtype | None, processor: str = "cpu") -> list[Way]:
    """The ways that the plan allows for a model of this dtype and inputs of these shapes, the plain one first."""
    images = any(leaf.dim() == IMAGES for leaf in leaves(inputs))
    halves = _CHOICES.get(plan.precision, (plan.precision == "bfloat16",)) if dtype == torch.float32 else (False,)
    lasts = _CHOICES.get(plan.memory_format, (plan.memory_format == "channels-last",)) if images else (False,)
    return [Way(bfloat16=half, channels_last=last, processor=processor) for half, last in product(halves, lasts)]


def duration(step: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """The time of one call, in seconds."""
    began = clock()
    step()
    return max(clock() - began, 1e-6)


def fastest(
    candidates: Sequence[Way], step: Callable[[Way], object], clock: Callable[[], float] = time.perf_counter
) -> Way:
    """The way whose `step` takes the least time; the first, unless another is clearly faster."""
    best = dict.fromkeys(candidates, float("inf"))
    for way in candidates:
        step(way)  # warms up
    for _ in range(ROUNDS):  # alternating, so that other load on the machine affects all alike
        for way in candidates:
            best[way] = min(best[way], duration(partial(step, way), clock))
    winner = min(candidates, key=lambda way: best[way])
    return winner if best[winner] <= GAIN * best[candidates[0]] else candidates[0]
