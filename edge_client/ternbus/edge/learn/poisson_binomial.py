"""The Poisson binomial mechanism: the draws of a private sum are its noise (Chen, Ozgur & Kairouz 2022, algorithm 1).

Each element y of a device's change, from -1 to 1, becomes q = Binomial(2k, 1/2 + θy) - k. The sum of n devices' q over
2kθn is an unbiased mean of their y with a variance below 1 / (8kθ²n). Integers from -k to k need no more room than
values without privacy, and no sum wraps. What a sum costs is in `sum_divergence.py`.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from ternbus.broker.protocol.schema import DENSE, Schema, Vector
from ternbus.broker.sums.masks import SEED_BYTES, seed_of
from ternbus.broker.sums.terms import Terms
from ternbus.broker.sums.words import BUCKETS, WEIGHT_STEPS
from ternbus.edge.learn.noise import BLOCK, ROUNDING, Floats, RandomSource, differences
from ternbus.edge.learn.sum_content import SumContent

HALF: Final = 2**31  # the probability 1/2, in 2^-32

Levels = npt.NDArray[np.int8]


def draw(shares: Floats, levels: int, theta: float, random_source: RandomSource) -> Levels:
    """Binomial(2k, 1/2 + θy) - k for each y of ``shares``, shape (n,), from -1 to 1; k is ``levels``.

    Each of the 2k draws compares 32 random bits with a threshold, rounded towards 1/2, so its probability is an exact
    multiple of 2^-32 and no farther from 1/2 than θy: rounding lowers epsilon only.
    """
    drawn = np.empty(shares.size, np.int8)
    for first in range(0, shares.size, BLOCK):
        part = slice(first, first + BLOCK)
        thresholds = (HALF + np.trunc(2.0**32 * theta * shares[part])).astype(np.uint32)
        drawn[part] = -levels
        for _ in range(2 * levels):
            drawn[part] += random_source.bits(thresholds.size) < thresholds
    return drawn


def release(
    schema: Schema,
    terms: Terms,
    start: Vector,
    trained: Vector,
    *,
    random_source: RandomSource,
    silent: Collection[str] = (),
) -> tuple[Levels, Levels]:
    """The draws for the change d = trained - start: of the ternary elements, and of the dense ones.

    In units of the terms' scales, y = d / scale is scaled to an L2 norm of at most ``terms.norm`` over all tensors
    together, then cut to ±1. An element of d that is not finite is 0, and so is y where the scale is 0. The tensors
    ``silent``, a choice that must not depend on the data, send 0 without noise.
    """
    change = _Change(schema, terms, start, trained, silent)
    factor = change.factor()
    drawn = np.zeros(terms.ternary, np.int8), np.zeros(terms.dense, np.int8)
    for is_dense, place, shares in change.shares():
        cut = np.clip(shares * factor, -1.0, 1.0)
        drawn[is_dense][place] = draw(cut, terms.levels, terms.theta, random_source)
    return drawn


def content(terms: Terms, drawn: tuple[Levels, Levels], random_source: RandomSource) -> SumContent:
    """The words of a release, and a seed for each helper.

    The weight is 1, and all buckets are 0: nothing beside the draws depends on the data.
    """
    ternary, dense = drawn
    buckets = np.zeros(BUCKETS * len(terms.scales), np.int64)
    words = terms.layout.pack(ternary, np.concatenate([dense.astype(np.int64), [WEIGHT_STEPS], buckets]))
    seeds = tuple(seed_of(words, random_source.fresh(SEED_BYTES)) for _ in terms.helpers)
    return SumContent(words=words.tobytes(), seeds=seeds)


def deviation(levels: int, theta: float, devices: int) -> float:
    """The standard deviation of the noise in each element of the mean of so many devices, in scales: an upper bound."""
    return 1 / (theta * math.sqrt(8 * levels * devices))


@dataclass(frozen=True, slots=True, eq=False)
class _Change:
    schema: Schema
    terms: Terms
    start: Vector
    trained: Vector
    silent: Collection[str]

    def factor(self) -> float:
        length = math.sqrt(sum(float(np.square(shares).sum()) for *_, shares in self.shares()))
        return ROUNDING * min(1.0, self.terms.norm / length) if length else 0.0

    def shares(self) -> Iterator[tuple[bool, slice, Floats]]:
        """In parts: whether it is dense, its place among the elements of its role, and d / scale.

        The squares of the largest change over the smallest scale, a float32, have a sum in float64.
        """
        for segment, scale in zip(self.schema.segments, self.terms.scales, strict=True):
            if segment.tensor.name in self.silent:
                continue
            place, inverse = segment.offset, 1 / scale if scale else 0.0
            whole = slice(segment.start, segment.stop)
            for _, change in differences(self.start[whole], self.trained[whole]):
                yield segment.tensor.role == DENSE, slice(place, place + change.size), change * inverse
                place += change.size
