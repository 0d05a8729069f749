"""The merge of statistics and of tensors without negative elements, the same for every server optimizer."""

from collections.abc import Iterator

from ternbus.aggregator.merge.optimizer import ServerState
from ternbus.broker.protocol.schema import Schema, Vector
from ternbus.broker.protocol.tensor_kinds import TensorKinds


def average(schema: Schema, kinds: TensorKinds, before: Vector, delta: Vector, after: ServerState) -> None:
    """Correct in place what a step of the optimizer from ``before`` with the mean update ``delta`` made of ``after``.

    Statistics:    w <- w + Delta    (as TensorFlow Federated does with variables that are not trained)
    Non-negative:  w <- max(w, 0)

    Momentum and squares of statistics are not read. A dense element v of the published vector then stays at 0 or above:
    its delta is d = fl(w - v) >= -v, since rounding is monotone and -v is a float32, so fl(v + d) >= 0.
    """
    target = after.target
    for part in _parts(schema, kinds.statistics):
        target[part] = before[part] + delta[part]
    for part in _parts(schema, kinds.nonnegative):
        values = target[part]
        values[values < 0] = 0


def _parts(schema: Schema, names: frozenset[str]) -> Iterator[slice]:
    return (slice(segment.start, segment.stop) for segment in schema.segments if segment.tensor.name in names)
