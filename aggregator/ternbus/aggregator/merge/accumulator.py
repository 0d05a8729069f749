"""A weighted sum of blocks in the order in which they come, for rules that weigh them at a merge, and for old ledgers.

It is laid out so that a ternary block is added at the speed of memory, as in ``exact.py``, which most sums are made by.

Five trits are one byte and one look-up. numpy copies rows of 8 floats at twice the speed of rows of 5, so the sum of
the ternary tensors has a row of 8 for each byte, three of them always 0; ``total`` takes them out once a merge. Where
`aggregator/native` is installed, look-up and addition are one pass, in C: the same additions, the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from ternbus.broker.protocol.schema import Schema, Vector
from ternbus.broker.protocol.ternary import TERNARY, TRITS, Block, trit_bytes

try:
    import ternbus_rows
except ModuleNotFoundError:  # pragma: no cover - the compiled loop is installed here, or it is not
    ternbus_rows = None

Bytes = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]
COMPILED: Final = ternbus_rows is not None
_count_other: Final = getattr(ternbus_rows, "count_other", None)  # not in its first version
_add_four: Final[Any] = getattr(ternbus_rows, "add_four", None)  # nor in its second
ROW: Final = 8
CHUNK_ROWS: Final = 2**13  # 256 KiB of looked-up rows: they stay in the processor's cache, and are few calls
# a row for every byte there is
ROWS_OF_TRITS: Final = np.pad(TRITS, ((0, 256 - len(TRITS)), (0, ROW - 5))).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Layout:
    """Which bytes hold the trits of one tensor only, and who owns each trit of those that do not."""

    inner: tuple[tuple[int, int], ...]  # for each ternary tensor its own bytes, [first, last)
    shared: npt.NDArray[np.intp]  # bytes with trits of several tensors, or with fill
    owners: npt.NDArray[np.intp]  # (shared, 5): index of the tensor, or len(tensors) for fill

    @classmethod
    def of(cls, schema: Schema) -> Self:
        ends = [(segment.offset, segment.offset + segment.tensor.elements) for segment in schema.ternary]
        inner = tuple((first, max(first, end // 5)) for first, end in ((-(-start // 5), end) for start, end in ends))
        own = np.zeros(trit_bytes(schema), dtype=bool)
        for first, last in inner:
            own[first:last] = True
        shared = np.flatnonzero(~own)
        trits = 5 * shared[:, None] + np.arange(5)
        owners = np.searchsorted([end for _, end in ends], trits, side="right") if ends else trits
        return cls(inner, shared, owners)


@dataclass(slots=True)
class RowAdder:
    """Adds rows that are looked up: rows[i] += sum_k tables[k][packed[k][i]], in any order where there are several."""

    compiled: bool = COMPILED
    _looked_up: FloatArray | None = field(default=None)  # (CHUNK_ROWS, 8), of the block that is being added

    def add(self, rows: FloatArray, tables: Sequence[FloatArray], packed: Sequence[Bytes]) -> None:
        """``rows`` of shape (bytes, 8), each of ``tables`` of (256, 8), each of ``packed`` of (bytes,)."""
        if self.compiled:  # pragma: no cover - likewise; tests/test_native.py compares both
            _add_in_c(rows, tables, packed)
            return
        if self._looked_up is None:
            self._looked_up = np.empty((CHUNK_ROWS, ROW), dtype=np.float32)
        for start in range(0, len(rows), CHUNK_ROWS):
            target = rows[start : start + CHUNK_ROWS]
            looked_up = self._looked_up[: len(target)]
            for table, trits in zip(tables, packed, strict=True):
                # no byte is beyond the table: "clip" has numpy write straight to ``out``
                table.take(trits[start : start + CHUNK_ROWS], axis=0, out=looked_up, mode="clip")
                target += looked_up


@dataclass(slots=True)
class Accumulator:
    """sum_i w_i block_i over one schema; nothing is allocated before the first block."""

    schema: Schema
    compiled: bool = COMPILED
    _layout: Layout = field(init=False)
    _rows: FloatArray | None = field(default=None)  # (bytes, 8), of ternary blocks
    _plain: FloatArray | None = field(default=None)  # (ternary elements,), of float32 blocks
    _dense: FloatArray = field(init=False)  # (dense elements,)
    _adder: RowAdder = field(init=False)

    def __post_init__(self) -> None:
        self._adder = RowAdder(compiled=self.compiled)
        self._layout = Layout.of(self.schema)
        self._dense = np.zeros(self.schema.dense_elements, dtype=np.float32)

    def add(self, block: Block, weight: float) -> None:
        """Add ``weight`` times a block."""
        factor, elements = np.float32(weight), block.elements
        if block.codec == TERNARY:
            self._add_trits(block.packed, block.scales * factor)
        else:
            if self._plain is None:
                self._plain = np.zeros(self.schema.ternary_elements, dtype=np.float32)
            own, elements = np.split(elements, [self.schema.ternary_elements])
            _add(self._plain, own, factor)
        _add(self._dense, elements, factor)

    def total(self) -> Vector:
        """The sum as a vector, shape (elements,)."""
        vector = np.zeros(self.schema.elements, dtype=np.float32)
        for segment in self.schema.dense:
            vector[segment.start : segment.stop] = self._dense[segment.offset :][: segment.tensor.elements]
        flat = None if self._rows is None else self._rows[:, :5].reshape(-1)
        for segment in self.schema.ternary:
            target = vector[segment.start : segment.stop]
            for part in (flat, self._plain):
                if part is not None:
                    target += part[segment.offset :][: segment.tensor.elements]
        return vector

    def _add_trits(self, packed: Bytes, scales: FloatArray) -> None:
        if self._rows is None:
            self._rows = np.zeros((len(packed), ROW), dtype=np.float32)
        for (first, last), scale in zip(self._layout.inner, scales, strict=True):
            self._adder.add(self._rows[first:last], [ROWS_OF_TRITS * scale], [packed[first:last]])
        shared = self._layout.shared
        if len(shared):
            self._rows[shared, :5] += TRITS[packed[shared]] * np.append(scales, np.float32(0))[self._layout.owners]


def _add_in_c(rows: FloatArray, tables: Sequence[FloatArray], packed: Sequence[Bytes]) -> None:  # pragma: no cover
    fours = 0 if _add_four is None else len(tables) // 4 * 4
    for first in range(0, fours, 4):
        _add_four(rows, np.stack(tables[first : first + 4]), *packed[first : first + 4])
    for table, trits in zip(tables[fours:], packed[fours:], strict=True):
        ternbus_rows.add(rows, table, trits)


def count_other(values: Bytes, value: int) -> int:
    """How many bytes are not ``value``."""
    if _count_other is not None:  # pragma: no cover - likewise
        return int(_count_other(values, value))
    return int(np.count_nonzero(values != value))


def _add(total: FloatArray, values: FloatArray, factor: np.float32) -> None:
    for first in range(0, len(total), CHUNK_ROWS * ROW):
        piece = total[first : first + CHUNK_ROWS * ROW]
        piece += values[first : first + CHUNK_ROWS * ROW] * factor
