"""Noise for differential privacy, from the operating system's random source, never from the plan's seed.

With a seed that others know or guess they can subtract the noise. The choice of samples must be as random: DP-SGD's
accounting assumes that it is secret.
"""

import math
import os
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from ternbus.broker.protocol.schema import Vector

Floats = npt.NDArray[np.float64]
Source = Callable[[int], bytes]  # returns this many random bytes

BLOCK: Final = 65_536  # numbers at a time, so that noise for a large model needs little memory
SUMMED: Final = 4
ROUNDING: Final = 1 - 2.0**-20  # factor of a clipped vector: rounding must not exceed the clipping norm


class RandomSource:
    """Random numbers from `os.urandom`; a test or a simulation without real data may use another source."""

    def __init__(self, source: Source = os.urandom) -> None:
        self._source = source

    def uniform(self, count: int) -> Floats:
        """Uniform numbers in (0, 1], multiples of 2^-53."""
        bits = np.frombuffer(self._source(8 * count), dtype="<u8") >> np.uint64(11)
        return (bits + np.uint64(1)).astype(np.float64) * 2.0**-53

    def fresh(self, count: int) -> bytes:
        """So many random bytes."""
        return self._source(count)

    def bits(self, count: int) -> npt.NDArray[np.uint32]:
        """Uniform numbers of 32 bits."""
        return np.frombuffer(self._source(4 * count), dtype="<u4")

    def normal(self, count: int) -> Floats:
        """Normal numbers of mean 0 and variance 1. Each is half the sum of four, so that its lowest bits leak nothing.

        A single one, computed in floating point, has gaps that reveal the value it was added to (Mironov 2012); the
        summands of a sum of 2n cannot be recovered (Holohan & Braghin 2021, section 5, here with n = 2).
        """
        total = np.zeros(count)
        for _ in range(SUMMED):
            total += self._box_muller(count)
        return total / math.sqrt(SUMMED)

    def sampled(self, count: int, rate: float) -> npt.NDArray[np.int64]:
        """Poisson sampling: each number below `count` with probability `rate`, independently."""
        return np.flatnonzero(self.uniform(count) <= rate)

    def seed(self) -> int:
        """A seed for another generator, whose numbers only have to be unknown, from 0 to 2^63 - 1."""
        return int.from_bytes(self._source(8), "little") >> 1

    def _box_muller(self, count: int) -> Floats:
        half = -(-count // 2)
        radius = np.sqrt(-2 * np.log(self.uniform(half)))
        angle = 2 * math.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def noisy_change(start: Vector, trained: Vector, *, clip: float, noise: float, random_source: RandomSource) -> Vector:
    """The Gaussian mechanism on a whole update: d·min(1, C/|d|) + N(0, (z·C)²) in each element, d = trained - start.

    C is `clip`, an L2 norm over all tensors together; z is `noise`. McMahan et al. 2018, algorithm 1, with the noise
    on the device. Whatever values `trained` has, and for every finite `start`, the result is finite.
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
