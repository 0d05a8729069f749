"""What a training has changed: the difference of two models as a vector."""

import numpy as np

from ternbus.broker.protocol import compiled
from ternbus.broker.protocol.schema import PIECE, Schema, Vector, flat_tensors, flush_tiny, is_bounded
from ternbus.edge.learn.task import TrainingError
from ternbus.edge.plan.tensors import Tensors


def change(schema: Schema, start: Vector, trained: Tensors) -> Vector:
    """``trained - start``, float32 of the schema's length, in one pass over the memory.

    Raises `TrainingError` if an element is beyond 2^40 or no number, and `ConfigError` for tensors of another schema.
    """
    result = np.empty_like(start)
    for segment, after in flat_tensors(schema, trained):
        place = slice(segment.start, segment.stop)
        if not _subtract(result[place], after, start[place]):
            raise TrainingError("training diverged (a value is beyond 2^40): lower the plan's learning_rate")
    return result


def _subtract(to: Vector, after: Vector, before: Vector) -> bool:
    """Write ``after - before``, with tiny numbers of the first as +0; whether all of the first are bounded."""
    if compiled.takes(to, after, before):
        return bool(compiled.vectors.change(to, after, before))
    for first in range(0, len(to), PIECE):
        piece = slice(first, first + PIECE)
        if not is_bounded(after[piece]):
            return False
        to[piece] = after[piece]
        flush_tiny(to[piece])
        to[piece] -= before[piece]
    return True
