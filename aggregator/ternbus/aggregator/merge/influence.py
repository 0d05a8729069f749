"""How much one update may weigh, by what is usual among the updates that were merged before it.

A bound on norms (Sun et al. 2019, section 4) that follows the norms of late (as Andrew et al. 2021 do it by a quantile
for differential privacy), and the same for the number of samples that a device claims. What is usual is the lower
median over devices, each with its newest merged update, so that fewer than half of them cannot move it beyond what
the others send; it is a multiple of this that an update may have, since honest devices are unequal.

The bound changes with a merge and at no other time. What it does to an update becomes part of the update's ``discount``
and ``samples``, so a merge that is done again from the ledger gives the same bits.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median_low
from typing import Final

import numpy as np
import numpy.typing as npt

from ternbus.aggregator.merge.accepted import AcceptedUpdate
from ternbus.broker.protocol.ternary import TERNARY, Block

RECENT: Final = 100  # merged updates that are looked at
UPDATES_MIN: Final = 20  # of them there must be so many before anything is bounded,
DEVICES_MIN: Final = 4  # of so many devices: of fewer nobody can tell what is usual
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


@dataclass(slots=True)
class Influence:
    """The updates merged of late, as (device, norm, samples), and the ``bound`` that follows from them."""

    bound: Bound | None = None  # None: too little was merged to know what is usual
    _recent: deque[tuple[str, float, int]] = field(default_factory=lambda: deque(maxlen=RECENT))

    def merged(self, updates: Iterable[AcceptedUpdate]) -> None:
        """Take in what a merge was made of, in its order."""
        self.recall((update.device, update.norm, update.stated) for update in updates)

    def recall(self, recent: Iterable[tuple[str, float | None, int | None]]) -> None:
        """Take in (device, norm, samples) of merged updates, oldest first; None: not known, and left out."""
        self._recent.extend(
            (device, norm, samples) for device, norm, samples in recent if norm is not None and samples is not None
        )
        newest = {device: (norm, samples) for device, norm, samples in self._recent}
        if len(self._recent) < UPDATES_MIN or len(newest) < DEVICES_MIN:
            self.bound = None
            return
        norms, samples = zip(*newest.values(), strict=True)
        norm = NORM_FACTOR * median_low(norms)
        self.bound = Bound(norm=norm, samples=SAMPLES_FACTOR * median_low(samples)) if norm > 0 else None


@dataclass(frozen=True, slots=True)
class Measured:
    """The content of an update, and its norm where updates are bounded by it."""

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
            filled = packed[first // 5 : -(-(first + elements) // 5)] != NO_TRITS
            squares += scale**2 * min(elements, 5 * int(np.count_nonzero(filled)))
    return float(squares**0.5)


def _square(values: npt.NDArray[np.float32]) -> float:
    """The squared L2 norm; not by BLAS, which adds up in another order with another number of threads."""
    return float(np.add.reduce(values * values))
