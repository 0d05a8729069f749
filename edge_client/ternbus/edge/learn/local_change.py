"""What a training has changed: the difference of two models."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ternbus.broker.protocol import compiled
from ternbus.broker.protocol.schema import PIECE, Schema, Segment, Vector, check_shapes, flat, flush_tiny, is_bounded
from ternbus.edge.learn.task import TrainingError
from ternbus.edge.plan.tensors import Tensors


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LocalChange:
    """``trained - start`` by tensor, computed where it is read: a copy of it takes longer than reading both again.

    Where ``start`` is None, the change is ``trained``.
    """

    schema: Schema
    trained: Tensors  # converted one at a time: of another type, they would take a copy of the model
    start: Vector | None = None

    @classmethod
    def of(cls, schema: Schema, start: Vector, trained: Tensors) -> "LocalChange":
        """Raises `ConfigError` for tensors of another schema."""
        check_shapes(schema, trained)
        return cls(schema=schema, trained=trained, start=start)

    @classmethod
    def of_vector(cls, schema: Schema, change: Vector) -> "LocalChange":
        parts = {segment.tensor.name: change[segment.start : segment.stop] for segment in schema.segments}
        return cls(schema=schema, trained=parts)

    @property
    def is_compiled(self) -> bool:
        """Whether the compiled loops read all pairs."""
        return compiled.takes(*(() if self.start is None else (self.start,)))

    def pair(self, segment: Segment) -> tuple[Vector, Vector | None]:
        """A tensor after the training, and before."""
        before = None if self.start is None else self.start[segment.start : segment.stop]
        after = flat(self.trained[segment.tensor.name])
        return after if after.flags.c_contiguous and after.flags.aligned else after.copy(), before

    def vector(self) -> Vector:
        """Float32 of the schema's length, tiny numbers of ``trained`` as +0, in one pass over the memory.

        Raises `TrainingError` if an element of ``trained`` is beyond 2^40 or no number.
        """
        result = np.empty(self.schema.elements, np.float32)
        for segment in self.schema.segments:
            self._write(segment, result[segment.start : segment.stop])
        return result

    def dense_elements(self) -> npt.NDArray[np.float32]:
        """Those of the dense tensors, in schema order; raises as `vector`."""
        result = np.empty(self.schema.dense_elements, np.float32)
        for segment in self.schema.dense:
            self._write(segment, result[segment.offset : segment.offset + segment.tensor.elements])
        return result

    def _write(self, segment: Segment, to: Vector) -> None:
        after, before = self.pair(segment)
        if before is None:
            to[:] = after
        elif not _subtract(to, after, before):
            raise diverged()


def diverged() -> TrainingError:
    return TrainingError("training diverged (a value is beyond 2^40): lower the plan's learning_rate")


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
