"""The buffered weighted mean of updates, added up as they come so that a buffer costs one vector."""

import math
from dataclasses import dataclass, field

import numpy as np

from aggregator.accumulator import Accumulator
from broker.schema import Schema, Vector
from broker.ternary import Block


@dataclass(slots=True)
class Mean:
    """Delta = sum_i n_i s(tau_i) Delta_i / sum_i n_i (FedBuff, Nguyen et al. 2022, algorithm 1, with FedAvg's n_i).

    The discount s is not in the denominator: a buffer of stale updates moves the model less, not equally far.
    """

    schema: Schema
    samples: int = 0
    _sum: Accumulator = field(init=False)

    def __post_init__(self) -> None:
        self._sum = Accumulator(self.schema)

    def add(self, block: Block, samples: int, discount: float) -> None:
        """Take in one update of ``samples`` examples, worth ``discount`` of a fresh one."""
        self._sum.add(block, samples * discount)
        self.samples += samples

    def result(self) -> Vector:
        """The mean, shape (elements,), float32. There must have been an update."""
        total = self._sum.total()
        total /= np.float32(self.samples)
        return total


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
