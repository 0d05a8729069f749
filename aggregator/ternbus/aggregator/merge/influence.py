"""The bound on an update's norm and samples, by the usual values of the updates that were merged before it.

A bound on norms (Sun et al. 2019, section 4) that follows recent norms, as Andrew et al. 2021 do it by a quantile for
differential privacy; and a bound on the number of samples that a device claims. Each bound is a multiple of the usual
value, since honest devices differ. The usual value is the lower median over devices, of each the newest merged update,
which is the one on the highest version. Fewer than half of the devices cannot raise it above what the others send.

One value is kept for each device and none is dropped, so a few devices that send very often do not displace the others.
The value is the one after the bound was applied, so a bound that follows its own updates grows at most by its factor a
merge.

The bound changes only with a merge. Its effect on an update becomes part of the update's ``discount`` and ``samples``,
so a merge that is computed again from the ledger gives the same bits.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median_low
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ternbus.aggregator.merge.accepted import AcceptedUpdate
from ternbus.aggregator.merge.accumulator import count_other
from ternbus.broker.protocol.messages import Update
from ternbus.broker.protocol.ternary import TERNARY, Block

DEVICES_MIN: Final = 4  # of fewer nobody can tell what is usual
UPDATES_MIN: Final = 20  # there must have been so many before anything is bounded
NORM_FACTOR: Final = 3.0
SAMPLES_FACTOR: Final = 4
NO_TRITS: Final = 121  # a byte of five zeros: 1 + 3 + 9 + 27 + 81


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What an update may have at most; more is scaled down to it."""

    norm: float  # as ``norm_at_most`` measures it
    samples: int

    def factor(self, norm: float) -> float:
        """By what an update of this norm is multiplied."""
        return 1.0 if norm <= self.norm else self.norm / norm


class Usual(NamedTuple):
    """A device's newest merged update, as it was bounded."""

    base: int
    norm: float
    samples: int


@dataclass(slots=True)
class Influence:
    """Each device's newest merged update, and the ``bound`` that follows from them.

    Updates without a norm, or of norm 0, are left out: they weigh nothing.
    """

    bound: Bound | None = None  # None: too little was merged to know what is usual
    _newest: dict[str, Usual] = field(default_factory=dict)  # by device
    _updates: int = 0  # merged ones, at most UPDATES_MIN

    def merged(self, updates: Iterable[AcceptedUpdate]) -> None:
        """Take in what a version was made of, in its order."""
        measured = [(each.device, Usual(each.base, each.norm, each.samples)) for each in updates if each.norm]
        if measured:
            self.recall(measured, len(measured))

    def recall(self, found: Iterable[tuple[str, Usual]], updates: int) -> None:
        """Take in merged updates, at least the newest of each device, and the number of all.

        The same follows from each merge in turn, and from all of them at once.
        """
        for device, usual in found:
            self._newest[device] = max(usual, self._newest.get(device, usual))
        self._updates = min(self._updates + updates, UPDATES_MIN)
        if self._updates == UPDATES_MIN and len(self._newest) >= DEVICES_MIN:
            norm = median_low(usual.norm for usual in self._newest.values())
            samples = median_low(usual.samples for usual in self._newest.values())
            self.bound = Bound(norm=NORM_FACTOR * norm, samples=SAMPLES_FACTOR * samples)


@dataclass(frozen=True, slots=True)
class Measured:
    """An update as its header states it, its content, and its norm where updates are bounded by it."""

    update: Update
    block: Block
    norm: float | None = None  # by ``norm_at_most``


def norm_at_most(block: Block) -> float:
    """An upper bound of the update's L2 norm; the norm itself but for ternary tensors.

    Of these it counts the bytes that hold anything but zeros, as if all five trits in them were set: exact in what an
    attacker would gain by, at most sqrt(5) and usually 1.6 times too long, and a hundredth of the time of an exact one.
    """
    squares = _square(block.elements)
    if block.codec == TERNARY:
        packed = block.packed
        for segment, scale in zip(block.schema.ternary, block.scales.tolist(), strict=True):
            first, elements = segment.offset, segment.tensor.elements
            filled = count_other(packed[first // 5 : -(-(first + elements) // 5)], NO_TRITS)
            squares += scale**2 * min(elements, 5 * filled)
    return float(squares**0.5)


def _square(values: npt.NDArray[np.float32]) -> float:
    """The squared L2 norm; not by BLAS, which adds up in another order with another number of threads."""
    return float(np.add.reduce(values * values))
