"""The weighted mean of a buffer, added up as updates arrive, so that a buffer takes the memory of one vector."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from ternbus.aggregator.merge.accepted import AcceptedUpdate, BufferedUpdate
from ternbus.broker.protocol.schema import Vector
from ternbus.broker.protocol.ternary import Block


@dataclass(frozen=True, slots=True)
class Change:
    """What a buffer comes to: Delta, of shape (elements,), float32, and what each update in it was given.

    ``weights`` are in the order in which updates came: Delta = sum_i weights_i Delta_i. Where a rule looks at each
    coordinate by itself, it is an update's mean weight over them. An update that a rule has left out has 0.
    """

    delta: Vector
    weights: tuple[float, ...]


class Sum(Protocol):
    """sum_i w_i block_i: an `ExactSum`, or something that adds up elsewhere or otherwise."""

    def add(self, block: Block, weight: float) -> None: ...
    def total(self) -> Vector: ...


@runtime_checkable
class Reversible(Sum, Protocol):
    """A sum from which what was added can be taken out, if ``subtracts`` says so."""

    def subtract(self, block: Block, weight: float) -> None: ...
    @property
    def subtracts(self) -> bool: ...


@dataclass(slots=True)
class Mean:
    """Delta = sum_i n_i s(tau_i) Delta_i / sum_i n_i (FedBuff, Nguyen et al. 2022, algorithm 1, with FedAvg's n_i).

    The discount s is not in the denominator: a buffer of stale updates moves the model less, not equally far.
    """

    sum: Sum
    samples: int = 0
    updates: list[AcceptedUpdate] = field(default_factory=list)

    def add(self, update: AcceptedUpdate, block: Block) -> None:
        """Add one update."""
        self.sum.add(block, _factor(update))
        self.samples += update.samples
        self.updates.append(update)

    @property
    def subtracts(self) -> bool:
        """Whether ``remove`` can be used; else what is left has to be added anew."""
        return isinstance(self.sum, Reversible) and self.sum.subtracts

    def remove(self, gone: Iterable[BufferedUpdate]) -> None:
        """Take out updates that were added; what is left has the bits that it has without them."""
        assert isinstance(self.sum, Reversible)  # noqa: S101 - as ``subtracts`` has said
        for update, block in gone:
            self.sum.subtract(block, _factor(update))
            self.samples -= update.samples
            place = next(at for at, each in enumerate(self.updates) if _name(each) == _name(update))
            del self.updates[place]

    def result(self) -> Change:
        """There must have been an update."""
        total = self.sum.total()
        total /= np.float32(self.samples)
        return Change(total, tuple(_factor(update) / self.samples for update in self.updates))


def _name(update: AcceptedUpdate) -> tuple[str, int]:
    """No two accepted updates have the same; other fields may have been forgotten by now."""
    return update.device, update.base


def _factor(update: AcceptedUpdate) -> float:
    return update.samples * update.discount


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
