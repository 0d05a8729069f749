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
ROUNDING: Final = 1 - 2.0**-20  # factor of a clipped vector: rounding to float32 must not exceed the clipping norm


class RandomSource:
    """Random numbers from `os.urandom`; a test or a simulation without real data may use another source."""

    def __init__(self, source: Source = os.urandom) -> None:
        self._source = source

    def uniform(self, count: int) -> Floats:
        """Uniform numbers in (0, 1], multiples of 2^-53."""
        bits = np.frombuffer(self._source(8 * count), dtype="<u8") >> np.uint64(11)
        return (bits + np.uint64(1)).astype(np.float64) * 2.0**-53

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

    def _box_muller(self, count: int) -> Floats:
        half = -(-count // 2)
        radius = np.sqrt(-2 * np.log(self.uniform(half)))
        angle = 2 * math.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def clip_and_noise(change: Vector, *, clip: float, noise: float, random_source: RandomSource) -> None:
    """The Gaussian mechanism on a whole update, in place: change·min(1, C/|change|) + N(0, (z·C)²) in each element.

    C is `clip`, an L2 norm over all tensors together; z is `noise`. McMahan et al. 2018, algorithm 1, with the noise
    on the device. `change` is a finite float32 vector.
    """
    length = math.sqrt(sum(float(np.square(change[part], dtype=np.float64).sum()) for part in _parts(change.size)))
    factor = ROUNDING * min(1.0, clip / length) if length else 0.0
    for part in _parts(change.size):
        change[part] = change[part] * factor + noise * clip * random_source.normal(change[part].size)


def _parts(size: int) -> Iterator[slice]:
    for first in range(0, size, BLOCK):
        yield slice(first, min(first + BLOCK, size))
