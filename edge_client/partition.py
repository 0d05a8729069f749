"""Which of the training samples are a device's own, computed by each device alone from the labels.

`all` is everything; `iid:i/n` the i-th (from 0) of n equal random parts; `dirichlet:alpha:i/n:seed` the i-th of n
parts of unequal size and mix of classes: of every class, the devices hold shares drawn from a symmetric
Dirichlet distribution (Hsu et al. 2019; small alpha = very unequal; the per-class draw of Yurochkin et al. 2019).
The n parts are disjoint and cover everything.
"""

import math
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from broker.errors import ConfigError

LEAST_SAMPLES = 8
"""A device gets at least so many samples, or as many as an equal split would give, if that is less."""

LARGEST_ALPHA = 1e6  # far beyond what is still unequal; much larger ones overflow

Indices = npt.NDArray[np.int64]

_IID = re.compile(r"iid:(\d{1,9})/(\d{1,9})")
_DIRICHLET = re.compile(r"dirichlet:([0-9.eE+-]{1,20}):(\d{1,9})/(\d{1,9}):(\d{1,9})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A parsed specification: part `index` of `parts`; `alpha` is infinite for equal random parts."""

    index: int = 0
    parts: int = 1
    alpha: float = math.inf
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.parts:
            raise ConfigError(f"partition {self.index}/{self.parts}: the parts are numbered 0 to {self.parts - 1}")
        if not (0 < self.alpha <= LARGEST_ALPHA or math.isinf(self.alpha)):
            raise ConfigError(f"partition: alpha is {self.alpha:g}, but must be above 0 and at most {LARGEST_ALPHA:g}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"partition: the seed is {self.seed}, but must be within 0 and {2**32 - 1}")

    @classmethod
    def parse(cls, spec: str) -> "Partition":
        """Raises `ConfigError`, which says the forms."""
        if spec == "all":
            return cls()
        if found := _IID.fullmatch(spec):
            return cls(index=int(found[1]), parts=int(found[2]))
        if found := _DIRICHLET.fullmatch(spec):
            try:
                alpha = float(found[1])
            except ValueError:
                raise ConfigError(f"partition {spec!r}: {found[1]!r} is not a number") from None
            return cls(index=int(found[2]), parts=int(found[3]), alpha=alpha, seed=int(found[4]))
        raise ConfigError(f"partition {spec!r}: write all, iid:I/N or dirichlet:ALPHA:I/N:SEED, I from 0")


def select(spec: str, labels: npt.NDArray[np.integer]) -> Indices:
    """The sorted indices of the samples that `spec` gives to its device; `labels` has one class for each sample."""
    partition = Partition.parse(spec)
    if partition.parts > len(labels):
        raise ConfigError(f"partition {spec!r}: {len(labels)} samples are too few for {partition.parts} devices")
    if math.isinf(partition.alpha):
        return np.sort(_equal(partition, len(labels)))
    return np.sort(_unequal(partition, labels))


def _generator(partition: Partition) -> np.random.RandomState:
    # The parts are disjoint only if all devices draw the same numbers, whatever numpy each of them has: the stream
    # of this generator is frozen for good (NEP 19), that of the newer ones is not.
    return np.random.RandomState(partition.seed)


def _equal(partition: Partition, samples: int) -> Indices:
    order = _generator(partition).permutation(samples)
    return np.array_split(order, partition.parts)[partition.index]


def _unequal(partition: Partition, labels: npt.NDArray[np.integer]) -> Indices:
    generator = _generator(partition)
    owner = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        shares = _shares(generator, partition)
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for device, part in enumerate(np.split(members, cuts)):
            owner[part] = device
    _fill_up(owner, partition.parts, generator)
    return np.flatnonzero(owner == partition.index)


def _shares(generator: np.random.RandomState, partition: Partition) -> npt.NDArray[np.float64]:
    shares: npt.NDArray[np.float64] = generator.dirichlet(np.full(partition.parts, partition.alpha))
    if np.isfinite(shares).all():
        return shares
    # With a minute alpha every gamma draw behind it underflows; the limit is one device that has all.
    shares[:] = 0
    shares[generator.randint(partition.parts)] = 1
    return shares


def _fill_up(owner: Indices, parts: int, generator: np.random.RandomState) -> None:
    """Give each device that came off too badly random samples of whoever has most at that moment."""
    counts = np.bincount(owner, minlength=parts)
    least = min(LEAST_SAMPLES, len(owner) // parts)
    for poor in np.flatnonzero(counts < least):
        while counts[poor] < least:
            rich = int(counts.argmax())
            moved = generator.choice(np.flatnonzero(owner == rich))
            owner[moved] = poor
            counts[rich] -= 1
            counts[poor] += 1
