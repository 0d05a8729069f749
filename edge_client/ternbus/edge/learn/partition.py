"""Which of the training samples are a device's own, computed by each device alone from the labels.

`all` is everything; `iid:i/n` the i-th (from 0) of n equal random parts; `dirichlet:alpha:i/n:seed` the i-th of n
parts of unequal size and mix of classes: of every class, the devices hold shares drawn from a symmetric
Dirichlet distribution (Hsu et al. 2019; small alpha = very unequal; the per-class draw of Yurochkin et al. 2019).
The n parts are disjoint and cover everything. `natural:i` is what the i-th owner in the data has, such as a writer.

Behind any of them `;test:s` is the share s of it that the device holds out, to try models on, and `;train:s` the
rest, of which no row is in the other. Held out is the end of each class, in the order of the data: of a recording
the end, and not every fifth window between two on which the model was trained.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from ternbus.broker.errors import ConfigError

LEAST_SAMPLES = 8
"""A device gets at least so many samples, or as many as an equal split would give, if that is less."""

FORMS = "all, iid:I/N, dirichlet:ALPHA:I/N:SEED or natural:I"
LEAST_TO_HOLD_OUT = 3
ROUNDING = 1e-9  # 0.3 · 10 is a little less than 3 in binary
LARGEST_SHARE = 0.4  # what is held out is less than what is trained on
LARGEST_ALPHA = 1e6  # far beyond what is still unequal; much larger ones overflow

Indices = npt.NDArray[np.int64]

_HALVES = re.compile(r"([^;]+);(train|test):([0-9.eE+-]{1,20})")
_NATURAL = re.compile(r"natural:(\d{1,9})")
_IID = re.compile(r"iid:(\d{1,9})/(\d{1,9})")
_DIRICHLET = re.compile(r"dirichlet:([0-9.eE+-]{1,20}):(\d{1,9})/(\d{1,9}):(\d{1,9})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A parsed specification: part `index` of `parts`; `alpha` is infinite for equal random parts.

    Of a `natural` one the data decide how many parts there are. Of the part itself, `share` is held out, and `half` is
    "train" without that, "test" for nothing else, and "" for all of it.
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
            raise ConfigError(f"partition {self.index}/{self.parts}: the parts are numbered 0 to {self.parts - 1}")
        if not (0 < self.alpha <= LARGEST_ALPHA or math.isinf(self.alpha)):
            raise ConfigError(f"partition: alpha is {self.alpha:g}, but must be above 0 and at most {LARGEST_ALPHA:g}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"partition: the seed is {self.seed}, but must be within 0 and {2**32 - 1}")
        if self.half and not 0 < self.share <= LARGEST_SHARE:
            raise ConfigError(
                f"held out is {self.share:g} of the data, but must be above 0 and at most {LARGEST_SHARE}"
            )

    @property
    def whole(self) -> bool:
        """Whether all of the data are split into no parts, so that no classes are needed."""
        return self.natural or self.parts == 1

    @classmethod
    def parse(cls, spec: str) -> "Partition":
        """Raises `ConfigError`, which says the forms."""
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
        raise ConfigError(f"partition {spec!r}: write {FORMS}, I from 0")


def _number(text: str, spec: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"partition {spec!r}: {text!r} is not a number") from None


def select(spec: str, labels: npt.NDArray[np.integer], owners: Indices | None = None) -> Indices:
    """The sorted indices of the samples that `spec` gives to its device.

    `labels` has a class for each sample, `owners` the number of whom it belongs to, where the data know. Raises
    `ConfigError` where there is no such device.
    """
    partition = Partition.parse(spec)
    rows = _part(partition, spec, labels, owners)
    return _half(partition, rows, labels[rows]) if partition.half else rows


def _part(partition: Partition, spec: str, labels: npt.NDArray[np.integer], owners: Indices | None) -> Indices:
    if partition.natural:
        return _natural(partition, owners)
    if partition.parts > len(labels):
        raise ConfigError(f"partition {spec!r}: {len(labels)} samples are too few for {partition.parts} devices")
    if math.isinf(partition.alpha):
        return np.sort(_equal(partition, len(labels)))
    return np.sort(_unequal(partition, labels))


def _half(partition: Partition, rows: Indices, labels: npt.NDArray[np.integer]) -> Indices:
    """The held-out end of each class, or what is before it; at least one row, and always fewer than the others."""
    if len(rows) < LEAST_TO_HOLD_OUT:
        raise ConfigError(f"this device has {len(rows)} samples: too few to hold some out")
    order = np.argsort(labels, kind="stable")  # class by class, each in the order of the data
    _, counts = np.unique(labels, return_counts=True)
    ends = np.cumsum(counts)
    # Shares of the classes so far, so that what rounding takes from one class the next one gives.
    upto = np.floor(partition.share * ends + ROUNDING).astype(np.int64)
    upto[-1] = max(upto[-1], 1)
    held = np.zeros(len(rows), bool)
    for end, count in zip(ends, np.diff(upto, prepend=0), strict=True):
        held[order[end - count : end]] = True
    return rows[held if partition.half == "test" else ~held]


def _natural(partition: Partition, owners: Indices | None) -> Indices:
    where = f"partition natural:{partition.index}"
    if owners is None:
        raise ConfigError(f"{where}: these data have no natural devices; write all, iid:… or dirichlet:…")
    chosen = np.flatnonzero(owners == partition.index)
    if not len(chosen):
        raise ConfigError(f"{where}: the natural devices of these data are numbered 0 to {owners.max()}")
    return chosen


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
