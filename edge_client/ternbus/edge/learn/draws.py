"""The random draws of partitions: the part of each row, the same on every machine."""

import numpy as np
import numpy.typing as npt

from ternbus.edge.learn.labels import Indices

SAMPLES_MIN = 8
"""The smallest part of a device, unless an equal split would give less."""


def generator(seed: int) -> np.random.RandomState:
    # The parts are disjoint only if all devices draw the same numbers, with any version of numpy: the stream of this
    # generator is frozen (NEP 19), those of the newer generators are not.
    return np.random.RandomState(seed)


def copies(rows: int, parts: int, each: int) -> int:
    """The number of copies of the rows to divide: 1, unless they are fewer than the parts' shards, `each` to a part."""
    return 1 if parts * each <= rows else -(-parts * max(SAMPLES_MIN, each) // rows)


def equal(random: np.random.RandomState, rows: int, parts: int) -> Indices:
    """Random parts whose sizes differ by at most one."""
    return _placed(random.permutation(rows), _sizes(rows, parts))


def shards(random: np.random.RandomState, labels: Indices, parts: int, each: int) -> Indices:
    """Shards of equal size of the rows in the order of their labels, at random within a label; `each` to a part."""
    order = np.lexsort((random.permutation(len(labels)), labels))
    owner = np.empty(parts * each, np.int64)
    owner[random.permutation(parts * each)] = np.arange(parts * each) // each
    return owner[_placed(order, _sizes(len(labels), parts * each))]


def unequal(random: np.random.RandomState, labels: Indices, parts: int, alpha: float) -> Indices:
    """For each label, shares of the parts from a symmetric Dirichlet distribution."""
    part_of = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        cuts = np.round(np.cumsum(_shares(random, parts, alpha))[:-1] * len(members)).astype(np.int64)
        part_of[members] = np.repeat(np.arange(parts), np.diff(cuts, prepend=0, append=len(members)))
    return part_of


def fill_up(random: np.random.RandomState, part_of: Indices, parts: int) -> int:
    """Move random rows from the largest part to each part that is too small. Returns the number of those parts."""
    counts = np.bincount(part_of, minlength=parts)
    minimum = min(SAMPLES_MIN, len(part_of) // parts)
    small = np.flatnonzero(counts < minimum)
    for smallest in small:
        while counts[smallest] < minimum:
            largest = int(counts.argmax())
            moved = random.choice(np.flatnonzero(part_of == largest))
            part_of[moved] = smallest
            counts[largest] -= 1
            counts[smallest] += 1
    return len(small)


def _placed(order: Indices, sizes: Indices) -> Indices:
    """The part of each row, where the parts of these sizes follow each other in this order of the rows."""
    part_of = np.empty(len(order), np.int64)
    part_of[order] = np.repeat(np.arange(len(sizes)), sizes)
    return part_of


def _sizes(rows: int, parts: int) -> Indices:
    """Sizes of parts that differ by at most one, the larger ones first."""
    sizes = np.full(parts, rows // parts, np.int64)
    sizes[: rows % parts] += 1
    return sizes


def _shares(random: np.random.RandomState, parts: int, alpha: float) -> npt.NDArray[np.float64]:
    shares: npt.NDArray[np.float64] = random.dirichlet(np.full(parts, alpha))
    if np.isfinite(shares).all():
        return shares
    # With a tiny alpha every gamma draw underflows; the limit is one device that has everything.
    shares[:] = 0
    shares[random.randint(parts)] = 1
    return shares
