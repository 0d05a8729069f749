"""The scale of each tensor in private updates: its first value, and how it follows the devices' scales.

A device states for each tensor how many octaves its own scale lies from the reference, cut to ±3, as one of seven
buckets. Sums of them are all that the aggregator sees; the reference moves to the median.
"""

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ternbus.broker.protocol.schema import DENSE, Schema, Vector
from ternbus.broker.sums.terms import SCALE_MAX
from ternbus.broker.sums.words import BUCKETS, DENSE_FACTOR

SCALE_MIN: Final = 1 / SCALE_MAX  # 0 would stay 0, whatever devices state
_END: Final = BUCKETS // 2  # the last bucket's octave
_REACH: Final = _END + round(math.log2(SCALE_MAX / SCALE_MIN))  # octaves between any two scales, and a bucket


def first(schema: Schema, model: Vector, learning_rate: float, dense_factor: float = DENSE_FACTOR) -> tuple[float, ...]:
    """One scale for each tensor in schema order: S of a ternary one, D of a dense one.

    The reference is the learning rate times the root mean square of the tensor, of all tensors where that is 0. D is
    that times ``dense_factor``.
    """
    whole = _rms(model) or 1.0
    return tuple(
        _scale(
            learning_rate
            * (_rms(model[segment.start : segment.stop]) or whole)
            * (dense_factor if segment.tensor.role == DENSE else 1.0)
        )
        for segment in schema.segments
    )


def aligned(buckets: npt.NDArray[Any], own: tuple[float, ...], current: tuple[float, ...]) -> npt.NDArray[np.int64]:
    """Sums of one-hots by the scales ``own`` as counts of octaves from the scales ``current``, shape (tensors, odd).

    A set may be of older terms, and what it says is relative to these. The first and the last bucket have no end: where
    the current scale is beyond their octave already, they ask for no move.
    """
    octaves = np.arange(-_END, _END + 1) + np.rint(np.log2(np.divide(own, current)))[:, None].astype(np.int64)
    octaves[:, 0] = np.minimum(octaves[:, 0], 0)
    octaves[:, -1] = np.maximum(octaves[:, -1], 0)
    counts = np.zeros((len(own), 2 * _REACH + 1), np.int64)
    np.add.at(counts, (np.arange(len(own))[:, None], octaves + _REACH), buckets)
    return counts


def moved(scales: tuple[float, ...], counts: npt.NDArray[Any]) -> tuple[float, ...]:
    """The scales after a merge; ``counts`` are devices by octaves from these scales, 0 in the middle of an odd number.

    A tensor's scale moves by the median octave; by the one nearer to 0 where there are two.
    """
    middle = counts.shape[1] // 2
    total = counts.sum(1, keepdims=True)
    below = 2 * np.cumsum(counts, 1)
    lower, upper = np.argmax(below >= total, 1) - middle, np.argmax(below > total, 1) - middle
    octaves = np.where(total[:, 0] > 0, np.maximum(lower, 0) + np.minimum(upper, 0), 0)
    return tuple(_scale(scale * 2.0**step) for scale, step in zip(scales, octaves.tolist(), strict=True))


def _rms(values: Vector) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _scale(value: float) -> float:
    """A float32 number that terms may have."""
    return float(np.float32(min(max(value, SCALE_MIN), SCALE_MAX)))
