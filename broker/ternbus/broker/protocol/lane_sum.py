"""Sums of float32 in one order, whatever computes them: numpy, or the loops in C."""

from typing import Final

import numpy as np
import numpy.typing as npt

LANES: Final = 256  # which numpy adds up as fast as its own sums, and a compiler keeps in the processor's cache
BLOCK: Final = 65_536  # elements at most in one sum; a float32 lane has 256 of them, and loses about 2^-20 of itself


def lane_sum(values: npt.NDArray[np.float32]) -> float:
    """The sum of a block: LANES sums in float32, which float64 then adds one after the other."""
    whole = values.size // LANES * LANES
    lanes = values[:whole].reshape(-1, LANES).sum(axis=0)
    rest = values[whole:]
    lanes[: rest.size] += rest
    return float(np.cumsum(lanes, dtype=np.float64)[-1])
