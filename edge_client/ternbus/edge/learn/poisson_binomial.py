"""The Poisson binomial mechanism: the draws of a private sum are its noise (Chen, Ozgur & Kairouz 2022, algorithm 1).

Each element y of a device's change, from -1 to 1, becomes q = Binomial(2k, 1/2 + θy) - k. The sum of n devices' q over
2kθn is an unbiased mean of their y with a variance below 1 / (8kθ²n). Integers from -k to k need no more room than
values without privacy, and no sum wraps. What a sum costs is in `sum_divergence.py`.
"""

import math
from collections.abc import Collection, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from ternbus.broker.protocol.schema import TERNARY, Schema, Vector
from ternbus.broker.sums.terms import Terms
from ternbus.edge.learn.noise import BLOCK, ROUNDING, Floats, RandomSource

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
    change: Floats,
    random_source: RandomSource,
    silent: Collection[str] = (),
) -> tuple[Levels, Levels]:
    """The draws for a change, shape (elements,): of the ternary elements, and of the dense ones.

    The change is in units of the terms' scales: y = change / scale, over all tensors together scaled to an L2 norm of
    at most ``terms.norm``, then cut to ±1. An element of it that is not finite is 0, and so is one whose scale is 0.
    The tensors ``silent``, which must not depend on the data, send 0 without noise.
    """
    factor = _factor(schema, terms, change)
    drawn = np.zeros(terms.ternary, np.int8), np.zeros(terms.dense, np.int8)
    for part, place, name, shares in _shares(schema, terms, change):
        if name not in silent:
            cut = np.clip(shares * factor, -1.0, 1.0)
            drawn[part][place] = draw(cut, terms.levels, terms.theta, random_source)
    return drawn


def deviation(levels: int, theta: float, devices: int) -> float:
    """The standard deviation of the noise in each element of the mean of so many devices, in scales: an upper bound."""
    return 1 / (theta * math.sqrt(8 * levels * devices))


def value(schema: Schema, terms: Terms, ternary: Levels, dense: Levels) -> Vector:
    """The change that the draws of one device, or the sums of a set, stand for; of a set it is n times the mean."""
    decoded = np.empty(schema.elements, np.float32)
    for segment, scale in zip(schema.segments, terms.scales, strict=True):
        drawn = ternary if segment.tensor.role == TERNARY else dense
        values = drawn[segment.offset : segment.offset + segment.tensor.elements].astype(np.float64)
        decoded[segment.start : segment.stop] = values * (scale / (2 * terms.levels * terms.theta))
    return decoded


def _factor(schema: Schema, terms: Terms, change: Floats) -> float:
    length = math.sqrt(sum(float(np.square(shares).sum()) for *_, shares in _shares(schema, terms, change)))
    return ROUNDING * min(1.0, terms.norm / length) if length else 0.0


def _shares(schema: Schema, terms: Terms, change: Floats) -> Iterator[tuple[int, slice, str, Floats]]:
    """In parts: 0 (ternary) or 1 (dense), the place among these elements, the tensor's name, and change / scale.

    Squares of the largest change over the smallest float32 scale have a sum in float64.
    """
    for segment, scale in zip(schema.segments, terms.scales, strict=True):
        for first in range(segment.start, segment.stop, BLOCK):
            stop = min(first + BLOCK, segment.stop)
            offset = segment.offset - segment.start
            shares = change[first:stop].astype(np.float64)
            shares[~np.isfinite(shares)] = 0.0
            shares *= 1 / scale if scale else 0.0
            yield int(segment.tensor.role != TERNARY), slice(first + offset, stop + offset), segment.tensor.name, shares
