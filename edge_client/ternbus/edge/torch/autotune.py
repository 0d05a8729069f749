"""The fastest precision and memory format to train a model on this machine, by measurement."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median
from typing import Final

import torch
from torch import Tensor

from ternbus.edge.plan.plan import Plan
from ternbus.edge.torch.tree import Tree, leaves, mapped

IMAGES = 4  # dimensions of a batch of them
ROUNDS = 3
TYPICAL: Final = 8  # calls at most, whose median counts: the first ones are slower, while memory is allocated
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
    candidates: Sequence[Way],
    step: Callable[[Way], object],
    clock: Callable[[], float] = time.perf_counter,
    limit_s: float = math.inf,
) -> Way:
    """The way whose `step` takes the least time; the first, unless another is clearly faster.

    The first, too, if `limit_s` seconds have passed before all are measured.
    """
    best, ends = dict.fromkeys(candidates, math.inf), clock() + limit_s
    for turn in range(1 + ROUNDS):  # alternating, so that other load on the machine affects all alike
        for way in candidates:
            took = duration(partial(step, way), clock)
            if turn:  # the first one warms up
                best[way] = min(best[way], took)
            if clock() >= ends:
                return candidates[0]
    winner = min(candidates, key=lambda way: best[way])
    return winner if best[winner] <= GAIN * best[candidates[0]] else candidates[0]


def typical(step: Callable[[], object], count: int, limit_s: float, clock: Callable[[], float]) -> float:
    """The median time of at most `count` calls, in seconds; none but the first begins after `limit_s` seconds."""
    ends, times = clock() + limit_s, [duration(step, clock)]
    while len(times) < min(TYPICAL, count) and clock() < ends:
        times.append(duration(step, clock))
    return median(times)


def sleep_until(moment: float) -> None:
    """Wait for a time of `time.perf_counter`."""
    time.sleep(max(0.0, moment - time.perf_counter()))
