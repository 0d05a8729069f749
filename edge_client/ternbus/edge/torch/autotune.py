"""In which precision and memory format a model trains fastest on this machine: measured, not assumed."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ternbus.edge.plan.plan import Plan

ROUNDS = 3
GAIN = 0.95
"""A way other than the plain one must take at most this share of its time: what is less may be chance."""

_CHOICES = {"auto": (False, True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """bfloat16 autocast or float32; images with channels last or as they are."""

    bfloat16: bool = False
    channels_last: bool = False

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.bfloat16 else nullcontext()

    def laid_out(self, inputs: Tensor) -> Tensor:
        """Convolutions go on in the format of their input, and reorder their weights by themselves."""
        return inputs.contiguous(memory_format=torch.channels_last) if self.channels_last else inputs

    def metrics(self) -> dict[str, float]:
        """What an update reports of it, where it is not the plain one."""
        return {name: 1.0 for name in ("bfloat16", "channels_last") if getattr(self, name)}


def ways(plan: Plan, inputs: Tensor, dtype: torch.dtype | None) -> list[Way]:
    """Those that the plan allows for a model of this dtype and inputs of this shape, the plain one first."""
    halves = _CHOICES.get(plan.precision, (plan.precision == "bfloat16",)) if dtype == torch.float32 else (False,)
    lasts = (
        _CHOICES.get(plan.memory_format, (plan.memory_format == "channels-last",)) if inputs.dim() == 4 else (False,)
    )
    return [Way(bfloat16=half, channels_last=last) for half, last in product(halves, lasts)]


def fastest(
    candidates: Sequence[Way], step: Callable[[Way], object], clock: Callable[[], float] = time.perf_counter
) -> Way:
    """The one whose `step` takes the least time; the first, unless another is clearly faster."""
    best = dict.fromkeys(candidates, float("inf"))
    for way in candidates:
        step(way)  # warms up
    for _ in range(ROUNDS):  # in turn, so that what else the machine does meets all alike
        for way in candidates:
            began = clock()
            step(way)
            best[way] = min(best[way], clock() - began)
    winner = min(candidates, key=lambda way: best[way])
    return winner if best[winner] <= GAIN * best[candidates[0]] else candidates[0]
