"""Noise for differential privacy: from the operating system's source of secrets, never from a plan's seed.

A seed that others know or may guess would take the noise away again; so would one for the choice of samples, of which
DP-SGD's accounting assumes that nobody knows it.
"""

import math
import os
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from ternbus.broker.protocol.schema import Vector

Floats = npt.NDArray[np.float64]
Source = Callable[[int], bytes]  # as many random bytes

BLOCK: Final = 65_536  # numbers at a time, so that noise for a large model needs no large memory
SUMMED: Final = 4
ROUNDING: Final = 1 - 2.0**-20  # of a clipped vector's length: rounding must not make it longer again


class RandomSource:
    """Random numbers. Its source is `os.urandom` wherever data are real; a test or a simulation may bring another."""

    def __init__(self, source: Source = os.urandom) -> None:
        self._source = source

    def uniform(self, count: int) -> Floats:
        """In (0, 1], multiples of 2^-53."""
        bits = np.frombuffer(self._source(8 * count), dtype="<u8") >> np.uint64(11)
        return (bits + np.uint64(1)).astype(np.float64) * 2.0**-53

    def normal(self, count: int) -> Floats:
        """Of mean 0 and variance 1: each the sum of four, halved, so that the floats' lowest bits tell nothing.

        One alone, as computed in floating point, leaves gaps by which the true value can be told (Mironov 2012); of the
        sum of 2n nobody can find the summands (Holohan & Braghin 2021, section 5, here with n = 2).
        """
        total = np.zeros(count)
        for _ in range(SUMMED):
            total += self._box_muller(count)
        return total / math.sqrt(SUMMED)

    def sampled(self, count: int, rate: float) -> npt.NDArray[np.int64]:
        """Poisson sampling: the numbers below `count`, each with this probability, independently."""
        return np.flatnonzero(self.uniform(count) <= rate)

    def _box_muller(self, count: int) -> Floats:
        half = -(-count // 2)
        radius = np.sqrt(-2 * np.log(self.uniform(half)))
        angle = 2 * math.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def noisy_change(start: Vector, trained: Vector, *, clip: float, noise: float, random_source: RandomSource) -> Vector:
    """The Gaussian mechanism on a whole update: d·min(1, C/|d|) + N(0, (z·C)²) in each element, d = trained - start.

    C is `clip`, an L2 norm over all tensors together; z is `noise`. McMahan et al. 2018, algorithm 1, with the noise
    on the device. Whatever `trained` holds, and for every finite `start`, the result is finite.
    """
    change = np.empty_like(start)
    for part, clipped in clipped_change(start, trained, clip):
        change[part] = clipped + noise * clip * random_source.normal(clipped.size)
    return change


def clipped_change(start: Vector, trained: Vector, clip: float) -> Iterator[tuple[slice, Floats]]:
    """What the noise is added to, in parts: its L2 norm, in float64, is at most `clip`.

    An element of the change that is not finite is 0 before anything is computed from it. The squares of all others have
    a sum in float64, so the factor is never 0·inf.
    """
    length = math.sqrt(sum(float(np.square(change).sum()) for _, change in differences(start, trained)))
    factor = ROUNDING * min(1.0, clip / length) if length else 0.0
    for part, change in differences(start, trained):
        yield part, change * factor


def differences(start: Vector, trained: Vector) -> Iterator[tuple[slice, Floats]]:
    """Trained - start in float64, in parts, with 0 where that is not finite."""
    for first in range(0, start.size, BLOCK):
        part = slice(first, min(first + BLOCK, start.size))
        with np.errstate(invalid="ignore"):  # of a signalling NaN
            change = trained[part].astype(np.float64) - start[part]
        change[~np.isfinite(change)] = 0.0
        yield part, change
