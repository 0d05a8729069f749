"""Partitions of the training samples among devices; each device computes its own part from the labels.

`all` is everything; `iid:i/n` is the i-th (from 0) of n equal random parts; `dirichlet:alpha:i/n:seed` is the i-th of n
parts of unequal size and mix of classes: the devices' shares of each class are drawn from a symmetric Dirichlet
distribution (Hsu et al. 2019; small alpha = very unequal; the per-class draw of Yurochkin et al. 2019). The n parts are
disjoint and cover everything. `natural:i` is the data of the i-th owner in the data, for example a writer.

A suffix splits the part further: `;test:s` is the share s that the device holds out for evaluation, `;train:s` the
rest; they are disjoint. The end of each class is held out, in the order of the data: the end of a recording, and not
windows between two on which the model is trained.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from ternbus.broker.errors import ConfigError

SAMPLES_MIN = 8
"""The smallest part of a device, unless an equal split would give less."""

FORMS = "all, iid:I/N, dirichlet:ALPHA:I/N:SEED or natural:I"
HOLD_OUT_SAMPLES_MIN = 3
ROUNDING = 1e-9  # 0.3 · 10 is a little less than 3 in binary
LARGEST_SHARE = 0.4  # the held-out part must be smaller than the rest
LARGEST_ALPHA = 1e6  # parts are equal long before; much larger values overflow

Indices = npt.NDArray[np.int64]

_HALVES = re.compile(r"([^;]+);(train|test):([0-9.eE+-]{1,20})")
_NATURAL = re.compile(r"natural:(\d{1,9})")
_IID = re.compile(r"iid:(\d{1,9})/(\d{1,9})")
_DIRICHLET = re.compile(r"dirichlet:([0-9.eE+-]{1,20}):(\d{1,9})/(\d{1,9}):(\d{1,9})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A parsed specification: part `index` of `parts`; `alpha` is infinite for equal random parts.

    The number of `natural` parts depends on the data. `share` of the part is held out; `half` is "test" for the
    held-out samples, "train" for the others, and "" for all.
    """

    index: int = 0
    parts: int = 1
    alpha: float = math.inf
    seed: int = 0
    natural: bool = False
    half: Literal["", "train", "test"] = ""
    share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.parts and not self.natural:
            raise ConfigError(
                f"partition {self.index}/{self.parts}: the parts are numbered 0 to {self.parts - 1}; choose one of them"
            )
        if not (0 < self.alpha <= LARGEST_ALPHA or math.isinf(self.alpha)):
            raise ConfigError(f"partition: alpha is {self.alpha:g}: it must be above 0 and at most {LARGEST_ALPHA:g}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"partition: the seed is {self.seed}: it must be from 0 to {2**32 - 1}")
        if self.half and not 0 < self.share <= LARGEST_SHARE:
            raise ConfigError(
                f"the held-out share of the data is {self.share:g}: it must be above 0 and at most {LARGEST_SHARE}"
            )

    @property
    def whole(self) -> bool:
        """Whether the specification needs no classes: all data, or the data of one owner."""
        return self.natural or self.parts == 1

    @classmethod
    def parse(cls, spec: str) -> "Partition":
        """Parse a specification. Raises `ConfigError`, with the valid forms."""
        if found := _HALVES.fullmatch(spec):
            half: Literal["train", "test"] = "test" if found[2] == "test" else "train"
            return replace(cls.parse(found[1]), half=half, share=_number(found[3], spec))
        if spec == "all":
            return cls()
        if found := _NATURAL.fullmatch(spec):
            return cls(index=int(found[1]), natural=True)
        if found := _IID.fullmatch(spec):
            return cls(index=int(found[1]), parts=int(found[2]))
        if found := _DIRICHLET.fullmatch(spec):
            alpha = _number(found[1], spec)
            return cls(index=int(found[2]), parts=int(found[3]), alpha=alpha, seed=int(found[4]))
        raise ConfigError(f"invalid partition {spec!r}: write {FORMS}, I from 0")


def _number(text: str, spec: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"partition {spec!r}: {text!r} is not a number: write for example 0.5") from None


def select(spec: str, labels: npt.NDArray[np.integer], owners: Indices | None = None) -> Indices:
    """The sorted indices of the samples of the part `spec`.

    `labels` has the class of each sample, `owners` the number of its owner, if the data have owners. Raises
    `ConfigError` if there is no such part.
    """
    partition = Partition.parse(spec)
    rows = _part(partition, spec, labels, owners)
    return _half(partition, rows, labels[rows]) if partition.half else rows


def _part(partition: Partition, spec: str, labels: npt.NDArray[np.integer], owners: Indices | None) -> Indices:
    if partition.natural:
        return _natural(partition, owners)
    if partition.parts > len(labels):
        raise ConfigError(
            f"partition {spec!r}: {len(labels)} samples are too few for {partition.parts} devices: use fewer"
        )
    if math.isinf(partition.alpha):
        return np.sort(_equal(partition, len(labels)))
    return np.sort(_unequal(partition, labels))


def _half(partition: Partition, rows: Indices, labels: npt.NDArray[np.integer]) -> Indices:
    """The held-out end of each class, or the rest. At least one row is held out, and fewer than remain."""
    if len(rows) < HOLD_OUT_SAMPLES_MIN:
        raise ConfigError(f"this device has {len(rows)} samples: too few to hold some out; leave out --hold-out")
    order = np.argsort(labels, kind="stable")  # class by class, each in the order of the data
    _, counts = np.unique(labels, return_counts=True)
    ends = np.cumsum(counts)
    # Cumulative over the classes, so that rounding errors do not add up.
    upto = np.floor(partition.share * ends + ROUNDING).astype(np.int64)
    upto[-1] = max(upto[-1], 1)
    held = np.zeros(len(rows), bool)
    for end, count in zip(ends, np.diff(upto, prepend=0), strict=True):
        held[order[end - count : end]] = True
    return rows[held if partition.half == "test" else ~held]


def _natural(partition: Partition, owners: Indices | None) -> Indices:
    where = f"partition natural:{partition.index}"
    if owners is None:
        raise ConfigError(f"{where}: these data have no owners, so no natural devices: write all, iid:… or dirichlet:…")
    chosen = np.flatnonzero(owners == partition.index)
    if not len(chosen):
        raise ConfigError(
            f"{where}: the natural devices of these data are numbered 0 to {owners.max()}: choose another"
        )
    return chosen


def _generator(partition: Partition) -> np.random.RandomState:
    # The parts are disjoint only if all devices draw the same numbers, with any version of numpy: the stream of this
    # generator is frozen (NEP 19), those of the newer generators are not.
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
    # With a tiny alpha every gamma draw underflows; the limit is one device that has everything.
    shares[:] = 0
    shares[generator.randint(partition.parts)] = 1
    return shares


def _fill_up(owner: Indices, parts: int, generator: np.random.RandomState) -> None:
    """Move random samples from the largest part to each part that is too small."""
    counts = np.bincount(owner, minlength=parts)
    minimum = min(SAMPLES_MIN, len(owner) // parts)
    for smallest in np.flatnonzero(counts < minimum):
        while counts[smallest] < minimum:
            largest = int(counts.argmax())
            moved = generator.choice(np.flatnonzero(owner == largest))
            owner[moved] = smallest
            counts[largest] -= 1
            counts[smallest] += 1
