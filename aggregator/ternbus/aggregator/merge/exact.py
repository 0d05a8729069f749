"""A weighted sum of blocks whose bits depend on what is in it, and not on the order in which it came.

A coefficient c = n w s of a ternary tensor (samples, worth, scale) is rounded to a multiple of a power of two q. Sums
of multiples of q are exact in float32 as long as they stay within 2^24 q, and exact addition is associative. So updates
may be added in any order and by several adders, whose sums are joined, and one is taken out by subtraction.

**How q is chosen.** For each tensor of each update, from |c| alone: a *level* L holds 2^(6 L) <= |c| < 2^(6 L + 6), and
has q = 2^(6 L + 6 - 17). So nothing has to be known before the first update of a buffer, no update can spoil the
precision of another, and a start finds the same q from the updates in the ledger. A coefficient keeps 12 to 17 bits: it
moves by at most 2^-12 of itself. What makes it ternary (TernGrad, Wen et al. 2017) moves each element by about half of
its size. A tensor has a sum for each level that occurs, of honest updates one or two.

**Its bounds.** Each sum counts its quanta, the |c| / q of all that is in it: no partial sum, in any order, is beyond
that count. 128 of the largest coefficients come to 2^24; then the sum moves to float64, which is exact up to 2^53 q. Of
the levels of a tensor the upper ``KEPT`` count. What is below is less than 2^-24 of the tensor's largest coefficient in
the buffer, which a float32 sum would lose as well. So memory is bounded, whatever devices send.

Elements that travel as float32 are rounded likewise after they are weighted, to q = 2^(6 L + 6 - 45), where L is the
level of the tensor's largest, and added in float64: each moves by at most 2^-40 of the largest.

Sums of floats in bins by their exponents, which need no order: Demmel & Nguyen 2013, section III.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ternbus.aggregator.merge.accumulator import COMPILED, ROW, ROWS_OF_TRITS, FloatArray, RowAdder
from ternbus.broker.protocol import compiled
from ternbus.broker.protocol.schema import Schema, Segment, Vector
from ternbus.broker.protocol.ternary import TERNARY, Block

F64 = npt.NDArray[np.float64]
Weighted = tuple[Block, float]
OCTAVES: Final = 6  # of the coefficients on one level
COEFFICIENT_BITS: Final = 17  # of the largest coefficient on a level
ELEMENT_BITS: Final = 45  # likewise of elements that travel as float32
# a float32 holds each multiple of q up to so many; of a float64 it is half, which leaves room for what is not moved
EXACT_QUANTA: Final = {np.dtype(np.float32).char: 2**24, np.dtype(np.float64).char: 2**52}
KEPT: Final = 5  # levels of a tensor, from its highest on
LOWEST: Final = -19  # level: below it q would not be a normal float32
PIECE: Final = 2**15  # elements at a time: what is computed in between stays in the processor's cache


@dataclass(slots=True)
class Level:
    """The sum of what a tensor has on one level: ``values``, and what was moved out of them while they were exact."""

    values: npt.NDArray[Any]  # (bytes, 8) float32, a row for a byte of five trits; or (elements,) float64
    quantum: float  # of which all are multiples
    blocks: int = 0  # in it
    quanta: int = 0  # of ``values`` at most
    moved: F64 | None = None  # of the same shape

    def reserve(self, quanta: int) -> None:
        """Have room for so many more in ``values``."""
        if self.quanta + quanta > EXACT_QUANTA[self.values.dtype.char]:
            self._move()
        self.quanta += quanta

    def join(self, other: "Level") -> None:
        """Add another sum."""
        self.reserve(other.quanta)
        self.blocks += other.blocks
        self.values += other.values
        if other.moved is not None:
            self.moved = other.moved if self.moved is None else self.moved + other.moved

    def rounded(self) -> FloatArray:
        """As float32. A float64 between holds it whole, but for elements beyond 2^53 quanta."""
        whole = self.values if self.moved is None else self.values + self.moved
        found: FloatArray = whole.astype(np.float32, copy=False)
        return found

    def _move(self) -> None:
        moved: F64 = self.values.astype(np.float64)
        if self.values.dtype == np.float32:
            self.quanta = 0
        else:  # multiples of 2^30 quanta: there is room for 2^53 of those
            shift = _shift(2.0**30 * self.quantum)
            moved += shift
            moved -= shift
            self.quanta = 2**29
        self.values -= moved.astype(self.values.dtype, copy=False)
        self.moved = moved if self.moved is None else self.moved + moved


@dataclass(slots=True)
class Levels:
    """The sums of one tensor, by level; each is an array of this shape and type."""

    shape: tuple[int, ...]
    dtype: type[np.float32 | np.float64]
    sums: dict[int, Level] = field(default_factory=dict)
    left_out: bool = False  # whether there was anything below the levels that count

    def put(self, number: int, quantum: float, quanta: int, blocks: int) -> npt.NDArray[Any] | None:
        """Where to add a block's part on this level, of so many quanta; None where it is too low to count."""
        found = self._at(number, quantum)
        if found is None:
            return None
        found.reserve(quanta)
        found.blocks += blocks
        return found.values

    def join(self, other: "Levels") -> None:
        """Add all sums of another one."""
        self.left_out |= other.left_out
        for number, level in other.sums.items():
            if (found := self._at(number, level.quantum)) is not None:
                found.join(level)

    def forget_empty(self) -> None:
        """Have no level from which everything was taken out again."""
        self.sums = {number: level for number, level in self.sums.items() if level.blocks}

    def add_to(self, target: Vector, first: int) -> None:
        """Add the sums to a tensor's elements, the lowest level first; element 0 is at ``first`` of the sums."""
        for number in sorted(self.sums):
            values = self.sums[number].rounded()
            if values.ndim > 1 and compiled.takes(target, values):  # pragma: no cover - where the loops are installed
                compiled.vectors.add_rows(target, values, first)
                continue
            flat = values if values.ndim == 1 else values[:, :5].reshape(-1)
            target += flat[first : first + len(target)]

    def _at(self, number: int, quantum: float) -> Level | None:
        if number in self.sums:
            return self.sums[number]
        if number <= max(self.sums, default=number) - KEPT:
            self.left_out = True
            return None
        for low in [each for each in self.sums if each <= number - KEPT]:
            del self.sums[low]
            self.left_out = True
        self.sums[number] = Level(np.zeros(self.shape, self.dtype), quantum)
        return self.sums[number]


@dataclass(slots=True)
class ExactSum:
    """sum_i w_i block_i over one schema, the same bits in any order; nothing is allocated before the first block."""

    schema: Schema
    compiled: bool = COMPILED
    _trits: list[tuple[Segment, Levels]] = field(init=False)  # of each ternary tensor
    _elements: list[tuple[Segment, Levels]] = field(init=False)  # of each tensor that may travel as float32
    _adder: RowAdder = field(init=False)

    def __post_init__(self) -> None:
        schema = self.schema
        rows = ((segment, _slice(segment)) for segment in schema.ternary)
        self._trits = [(segment, Levels((used.stop - used.start, ROW), np.float32)) for segment, used in rows]
        runs = (*schema.ternary, *schema.dense)
        self._elements = [(segment, Levels((segment.tensor.elements,), np.float64)) for segment in runs]
        self._adder = RowAdder(compiled=self.compiled)

    def add(self, block: Block, weight: float) -> None:
        """Add ``weight`` times a block."""
        self._put([(block, weight)], 1)

    def add_all(self, weighted: Sequence[Weighted]) -> None:
        """Add each block times its weight; the sum is read and written less often than by ``add``."""
        self._put(weighted, 1)

    def subtract(self, block: Block, weight: float) -> None:
        """Take out ``weight`` times a block that was added; only if ``subtracts``."""
        self._put([(block, -weight)], -1)
        for _, levels in (*self._trits, *self._elements):
            levels.forget_empty()

    @property
    def subtracts(self) -> bool:
        """Whether everything that was added can be taken out; else what is left has to be added anew."""
        return not any(levels.left_out for _, levels in (*self._trits, *self._elements))

    def join(self, other: "ExactSum") -> None:
        """Add what another one has added of other blocks; it is of no use after that."""
        for mine, others in ((self._trits, other._trits), (self._elements, other._elements)):  # noqa: SLF001 - its own
            for (_, levels), (_, more) in zip(mine, others, strict=True):
                levels.join(more)

    def total(self) -> Vector:
        """The sum as a vector, shape (elements,)."""
        vector = np.zeros(self.schema.elements, dtype=np.float32)
        for segment, levels in self._trits:
            levels.add_to(vector[segment.start : segment.stop], segment.offset % 5)
        for segment, levels in self._elements:
            levels.add_to(vector[segment.start : segment.stop], 0)
        return vector

    def _put(self, weighted: Sequence[Weighted], sign: int) -> None:
        ternary = [(block, weight) for block, weight in weighted if block.codec == TERNARY]
        self._put_trits(ternary, sign)
        for block, weight in weighted:
            travelling = self._elements[len(self._trits) :] if block.codec == TERNARY else self._elements
            if travelling:
                _put_elements(travelling, block.elements, weight, sign)

    def _put_trits(self, weighted: Sequence[Weighted], sign: int) -> None:
        packed = [block.packed for block, _ in weighted]
        coefficients = [[scale * weight for scale in block.scales.tolist()] for block, weight in weighted]
        for place, (segment, levels) in enumerate(self._trits):
            by_level: dict[tuple[int, float], list[tuple[int, int]]] = {}
            for each, own in enumerate(coefficients):
                number, quantum = _level(own[place], COEFFICIENT_BITS)
                if quanta := round(own[place] / quantum):
                    by_level.setdefault((number, quantum), []).append((each, quanta))
            for (number, quantum), chosen in by_level.items():
                target = levels.put(number, quantum, sum(abs(quanta) for _, quanta in chosen), sign * len(chosen))
                if target is not None:
                    # a byte at either end may have trits of a neighbour: they are added, and ``total`` leaves them out
                    tables = [ROWS_OF_TRITS * np.float32(quanta * quantum) for _, quanta in chosen]
                    self._adder.add(target, tables, [packed[each][_slice(segment)] for each, _ in chosen])


def _put_elements(travelling: Sequence[tuple[Segment, Levels]], elements: FloatArray, weight: float, sign: int) -> None:
    """Add the weighted elements of these tensors, which lie one behind the other."""
    sizes = [segment.tensor.elements for segment, _ in travelling]
    ends = list(itertools.accumulate(sizes))
    starts = [end - size for end, size in zip(ends, sizes, strict=True)]
    highest, lowest = (each.reduceat(elements, starts).tolist() for each in (np.maximum, np.minimum))
    for (_, levels), start, end, high, low in zip(travelling, starts, ends, highest, lowest, strict=True):
        if largest := abs(weight * max(high, -low)):
            number, quantum = _level(largest, ELEMENT_BITS)
            target = levels.put(number, quantum, math.ceil(largest / quantum), sign)
            if target is not None:
                _add_rounded(target, elements[start:end], weight, quantum)


def _slice(segment: Segment) -> slice:
    """The bytes with a ternary tensor's trits."""
    return slice(segment.offset // 5, -(-(segment.offset + segment.tensor.elements) // 5))


def _level(coefficient: float, bits: int) -> tuple[int, float]:
    """The level of a coefficient other than 0, and its quantum, if the largest on a level has so many bits."""
    _, exponent = math.frexp(coefficient)  # 2^(exponent - 1) <= |c| < 2^exponent
    number = max((exponent - 1) // OCTAVES, LOWEST)
    return number, math.ldexp(1.0, OCTAVES * (number + 1) - bits)


def _add_rounded(target: F64, values: FloatArray, weight: float, quantum: float) -> None:
    """Target += weight * values, each rounded to a multiple of the quantum (half to even)."""
    shift = _shift(quantum)
    for first in range(0, len(values), PIECE):
        piece = np.multiply(values[first : first + PIECE], weight, dtype=np.float64)
        piece += shift
        piece -= shift
        target[first : first + PIECE] += piece


def _shift(quantum: float) -> float:
    """What rounds a float64 of up to 2^51 quanta to a multiple of the quantum, when it is added and taken off again."""
    return 1.5 * 2.0**52 * quantum
