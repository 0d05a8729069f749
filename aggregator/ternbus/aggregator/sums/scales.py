"""The range of each tensor in private updates: where it begins, and how it follows what devices have.

A device states for each tensor how many octaves its own scale lies from the reference, cut to ±3, as one of seven
buckets. Sums of them are all that the aggregator sees; the reference moves to the median.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ternbus.broker.protocol.schema import DENSE, Schema, Vector
from ternbus.broker.sums.words import BUCKETS

DENSE_FACTOR: Final = 8.0  # the range of a dense tensor, by its reference
SCALE_MIN, SCALE_MAX = 2.0**-40, 2.0**40  # 0 would stay 0, whatever devices state
_MIDDLE: Final = BUCKETS // 2


def first(schema: Schema, model: Vector, learning_rate: float) -> tuple[float, ...]:
    """One scale for each tensor in schema order: S of a ternary one, D of a dense one.

    The reference is the learning rate times the root mean square of the tensor, of all tensors where that is 0.
    """
    whole = _rms(model) or 1.0
    return tuple(
        _scale(
            learning_rate
            * (_rms(model[segment.start : segment.stop]) or whole)
            * (DENSE_FACTOR if segment.tensor.role == DENSE else 1.0)
        )
        for segment in schema.segments
    )


def moved(scales: tuple[float, ...], buckets: npt.NDArray[Any]) -> tuple[float, ...]:
    """The scales after a merge; ``buckets`` are sums of one-hots, shape (tensors, 7).

    A tensor's scale moves by the median bucket, a power of 2; by the one nearer to 0 where there are two.
    """
    total = buckets.sum(1, keepdims=True)
    below = 2 * np.cumsum(buckets, 1)
    lower, upper = np.argmax(below >= total, 1) - _MIDDLE, np.argmax(below > total, 1) - _MIDDLE
    octaves = np.where(total[:, 0] > 0, np.maximum(lower, 0) + np.minimum(upper, 0), 0)
    return tuple(_scale(scale * 2.0**step) for scale, step in zip(scales, octaves.tolist(), strict=True))


def _rms(values: Vector) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _scale(value: float) -> float:
    """A float32 number that terms may have."""
    return float(np.float32(min(max(value, SCALE_MIN), SCALE_MAX)))
