"""The buffered weighted mean of updates, added up as they come so that a buffer costs one vector."""

import math
from dataclasses import dataclass, field

import numpy as np

from broker.schema import Vector
from broker.ternary import Block


@dataclass(slots=True)
class Mean:
    """Delta = sum_i n_i s(tau_i) Delta_i / sum_i n_i (FedBuff, Nguyen et al. 2022, algorithm 1, with FedAvg's n_i).

    The discount s is not in the denominator: a buffer of stale updates moves the model less, not equally far.
    """

    elements: int
    samples: int = 0
    _sum: Vector | None = field(default=None)

    def add(self, block: Block, samples: int, discount: float) -> None:
        """Take in one update of ``samples`` examples, worth ``discount`` of a fresh one."""
        if self._sum is None:
            self._sum = np.zeros(self.elements, dtype=np.float32)
        block.add_to(self._sum, samples * discount)
        self.samples += samples

    def result(self) -> Vector:
        """The mean, shape (elements,), float32. There must have been an update."""
        assert self._sum is not None  # noqa: S101 - a merge of nothing is our bug
        return self._sum / np.float32(self.samples)


def norm(block: Block) -> float:
    """The update's L2 norm."""
    value = block.value()
    return math.sqrt(float(np.dot(value, value)))


def clip_factor(block: Block, max_norm: float) -> float:
    """By what the update is multiplied so that its L2 norm is at most ``max_norm``; 0 switches clipping off."""
    if max_norm == 0:
        return 1.0
    length = norm(block)
    return 1.0 if length <= max_norm else max_norm / length
