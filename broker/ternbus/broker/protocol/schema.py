"""The schema of a model: its tensors with order, shape and role, and conversions to one float32 vector."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from hashlib import blake2b
from typing import Any, Final

import msgpack
import numpy as np
import numpy.typing as npt
import xxhash

from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.broker.protocol.packed import NO_EXTENSIONS, check_whole

type_f32 = np.dtype("<f4")
Vector = npt.NDArray[np.float32]  # shape (elements,), little-endian float32, every element finite

TERNARY: Final = "ternary"
DENSE: Final = "dense"
DENSE_BELOW: Final = 256  # a tensor with fewer elements is dense: the ternary codec would save too little
DENSE_NAMES: Final = ("*running_mean", "*running_var")  # batch norm: ternary changes could make a variance negative
TENSORS_MAX: Final = 100_000
ELEMENTS_MAX: Final = 2**31
MSGPACK_BYTES: Final = 9  # the maximum size of a number, or of the prefix of a text or an array
ROLE_BYTES: Final = len(TERNARY)
SMALLEST_NORMAL: Final = np.float32(2.0**-126)
DOUBLED_NORMAL: Final = 2 * 0x00800000 - 1  # its bits doubled, less 1
PIECE: Final = 2**16  # elements at a time: a quarter MiB stays in the processor's cache from one step to the next
# The largest magnitude of an element of a model. Squares of such elements, and sums of 2^31 of them, are finite in
# float32. No block exceeds it: 65,504 is less than half of the distance to the next float32, so v + d is rounded to
# 2^40 again.
WEIGHT_MAX: Final = 2.0**40


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of a schema."""

    name: str
    shape: tuple[int, ...]
    role: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Segment:
    """The position of one tensor in the vector, and among the elements of its role in a block."""

    tensor: Tensor
    start: int  # in the vector
    stop: int
    offset: int  # of its first element among all elements of its role


@dataclass(frozen=True)
class Schema:
    """The tensors of a model in their fixed order, and their encoding by the aggregator."""

    tensors: tuple[Tensor, ...]
    encoded: bytes = field(repr=False)

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]], dense: Iterable[str] = ()) -> "Schema":
        """A schema of named shapes. Dense: tensors below 256 elements, statistics, and names that match ``dense``."""
        patterns = (*DENSE_NAMES, *dense)
        tensors = []
        for name, shape in shapes.items():
            small = math.prod(shape) < DENSE_BELOW
            role = DENSE if small or any(fnmatchcase(name, pattern) for pattern in patterns) else TERNARY
            tensors.append(Tensor(name, tuple(int(size) for size in shape), role))
        return cls.write(tensors)

    @classmethod
    def write(cls, tensors: Iterable[Tensor]) -> "Schema":
        """A schema of these tensors with a new encoding; only the aggregator calls this, once for a federation."""
        return cls.parse(msgpack.packb([[tensor.name, list(tensor.shape), tensor.role] for tensor in tensors]))

    @classmethod
    def parse(cls, encoded: bytes) -> "Schema":
        """Decode the msgpack array of ``[name, shape, role]``; ProtocolError for anything else."""
        try:
            check_whole(encoded)
            rows = msgpack.unpackb(encoded, strict_map_key=True, **NO_EXTENSIONS)
        except (msgpack.UnpackException, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ProtocolError("bad-schema", "the schema is not msgpack") from error
        if not isinstance(rows, list) or not 1 <= len(rows) <= TENSORS_MAX:
            raise ProtocolError("bad-schema", f"the schema is not an array of 1 to {TENSORS_MAX} tensors")
        tensors = tuple(_tensor(row) for row in rows)
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise ProtocolError("bad-schema", "a name is repeated")
        if not 0 < sum(tensor.elements for tensor in tensors) <= ELEMENTS_MAX:
            raise ProtocolError("bad-schema", f"the model does not have 1 to {ELEMENTS_MAX} elements")
        return cls(tensors, encoded)

    @staticmethod
    def bytes_max(shapes: Mapping[str, Sequence[int]]) -> int:
        """The maximum length in bytes of a schema with these tensors, in any valid msgpack encoding."""
        rows = (len(name.encode()) + MSGPACK_BYTES * (4 + len(shape)) for name, shape in shapes.items())
        return MSGPACK_BYTES + ROLE_BYTES * len(shapes) + sum(rows)

    @cached_property
    def digest(self) -> bytes:
        """BLAKE2b-256 over the schema's bytes."""
        return blake2b(self.encoded, digest_size=32).digest()

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The position of every tensor, in schema order."""
        start, offsets, segments = 0, {TERNARY: 0, DENSE: 0}, []
        for tensor in self.tensors:
            stop = start + tensor.elements
            segments.append(Segment(tensor, start, stop, offsets[tensor.role]))
            offsets[tensor.role] += tensor.elements
            start = stop
        return tuple(segments)

    @cached_property
    def ternary(self) -> tuple[Segment, ...]:
        return tuple(segment for segment in self.segments if segment.tensor.role == TERNARY)

    @cached_property
    def dense(self) -> tuple[Segment, ...]:
        return tuple(segment for segment in self.segments if segment.tensor.role == DENSE)

    @cached_property
    def ternary_elements(self) -> int:
        return sum(segment.tensor.elements for segment in self.ternary)

    @cached_property
    def dense_elements(self) -> int:
        return sum(segment.tensor.elements for segment in self.dense)

    @property
    def elements(self) -> int:
        return self.ternary_elements + self.dense_elements


def _tensor(row: Any) -> Tensor:
    match row:
        case [str() as name, list() as shape, ("ternary" | "dense") as role] if (
            0 < len(name) <= 1024
            and len(shape) <= 32
            and all(isinstance(size, int) and not isinstance(size, bool) and 0 < size <= ELEMENTS_MAX for size in shape)
        ):
            return Tensor(name, tuple(shape), role)
    raise ProtocolError("bad-schema", "an entry is not [name, shape, role]")


def flush_tiny(values: npt.NDArray[np.float32]) -> None:
    """Set every magnitude below 2^-126, and -0, to +0 in place: some processors do, and all must have the same bits."""
    for first in range(0, len(values), PIECE):
        piece = values[first : first + PIECE]
        piece += np.float32(0.0)  # -0 + 0 is +0
        bits = piece.view(np.uint32)
        doubled = bits + bits  # without the sign
        doubled -= np.uint32(1)  # 0 becomes the largest number, so that the smallest one is of no 0
        if doubled.min() < DOUBLED_NORMAL:
            piece[np.abs(piece) < SMALLEST_NORMAL] = 0.0


def is_bounded(vector: Vector) -> bool:
    """Whether every element is finite and at most ``WEIGHT_MAX`` in magnitude."""
    # NaN passes through min and max and fails both comparisons
    return not vector.size or bool(vector.min() >= -WEIGHT_MAX and vector.max() <= WEIGHT_MAX)


def vector_digest(vector: Vector) -> bytes:
    """BLAKE2b-256 over the vector's little-endian bytes."""
    return blake2b(np.ascontiguousarray(vector, dtype=type_f32).data, digest_size=32).digest()


def vector_xxh3(vector: Vector) -> bytes:
    """XXH3-128 over the same bytes, canonical (Collet, xxHash specification 0.2.0): finds errors, and stops nobody."""
    return xxhash.xxh3_128_digest(np.ascontiguousarray(vector, dtype=type_f32).data)


def vector_of(content: bytes, schema: Schema) -> Vector:
    """Decode a vector; ProtocolError for a wrong length or an element not finite or beyond ``WEIGHT_MAX``."""
    if len(content) != 4 * schema.elements:
        raise ProtocolError("bad-vector", f"{len(content)} bytes instead of {4 * schema.elements}")
    vector = np.frombuffer(content, dtype=type_f32).astype(np.float32)
    if not is_bounded(vector):
        raise ProtocolError("bad-vector", f"an element is not finite, or beyond {WEIGHT_MAX:.0f}")
    flush_tiny(vector)
    return vector


def to_vector(schema: Schema, tensors: Mapping[str, npt.NDArray[Any]]) -> Vector:
    """Flatten a model's tensors and set tiny numbers to +0.

    ConfigError if the tensors do not match the schema, or an element is not finite or beyond ``WEIGHT_MAX``.
    """
    vector = flatten(schema, tensors)
    if not is_bounded(vector):
        name = next(name for name, array in to_tensors(schema, vector).items() if not is_bounded(array.reshape(-1)))
        # of a number beyond float32's range, flatten makes an infinity
        what = f"a value beyond 2^40 ({WEIGHT_MAX:.0f}), the largest that can be published"
        if not np.isfinite(tensors[name]).all():
            what = "values that are not finite"
        raise ConfigError(
            f"the model's {name!r} has {what}; try a lower learning rate, or, where it is a buffer such as a mask, "
            "register it with persistent=False"
        )
    flush_tiny(vector)
    return vector


def flatten(schema: Schema, tensors: Mapping[str, npt.NDArray[Any]]) -> Vector:
    """Flatten named tensors of any values, row-major, in schema order; ConfigError if names or shapes are invalid.

    Numbers beyond float32's range become infinite.
    """
    vector = np.empty(schema.elements, dtype=np.float32)
    check_shapes(schema, tensors)
    for segment in schema.segments:
        vector[segment.start : segment.stop] = flat(tensors[segment.tensor.name])
    return vector


def check_shapes(schema: Schema, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
    """ConfigError if names or shapes are not those of the schema."""
    missing = [tensor.name for tensor in schema.tensors if tensor.name not in tensors]
    if missing:
        raise ConfigError(
            f"the model lacks tensor {missing[0]!r} of the federation's schema ({len(missing)} missing in total); "
            "use the federation's model"
        )
    for tensor in schema.tensors:
        if (shape := tuple(tensors[tensor.name].shape)) != tensor.shape:
            raise ConfigError(
                f"tensor {tensor.name!r} has shape {shape} instead of the federation's {tensor.shape}; use the "
                "federation's model"
            )


def flat(tensor: npt.NDArray[Any]) -> Vector:
    """A tensor as a float32 array of one dimension, which may be the tensor's own memory."""
    values = np.asarray(tensor)
    if values.dtype != type_f32:
        with np.errstate(over="ignore", invalid="ignore"):
            values = values.astype(np.float32)
    return values.reshape(-1)


def to_tensors(schema: Schema, vector: Vector) -> dict[str, npt.NDArray[np.float32]]:
    """Named views of the vector in the tensors' shapes, in schema order."""
    return {
        segment.tensor.name: vector[segment.start : segment.stop].reshape(segment.tensor.shape)
        for segment in schema.segments
    }
