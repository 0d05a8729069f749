"""Exact sums: the same bits in any order, by any number of adders, with and without what is taken out again."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from support.small_world import float32_block, ternary_block
from ternbus.aggregator.merge.accumulator import Accumulator
from ternbus.aggregator.merge.background import Background
from ternbus.aggregator.merge.exact import (
    COEFFICIENT_BITS,
    ELEMENT_BITS,
    KEPT,
    LOWEST,
    OCTAVES,
    ExactSum,
    Level,
)
from ternbus.broker.protocol.schema import Schema, Tensor, Vector
from ternbus.broker.protocol.ternary import FLOAT32, TERNARY, VALUE_MAX, Block

# bytes of trits with parts of two tensors, of three, and with fill; two dense tensors
SCHEMA = Schema.write(
    [
        Tensor("a", (7,), "ternary"),
        Tensor("x", (3,), "dense"),
        Tensor("b", (1,), "ternary"),
        Tensor("c", (14,), "ternary"),
        Tensor("y", (2,), "dense"),
    ]
)
Weighted = tuple[Block, float]


def block_of(seed: int, codec: str, octave: int) -> Block:
    """A block whose tensors have sizes of their own, about 2^octave."""
    generator = np.random.default_rng(seed)
    size = min(2.0**octave, VALUE_MAX / 64)
    sizes = (size * 2.0 ** generator.integers(-6, 6, len(SCHEMA.tensors))).astype(np.float32)
    if codec == TERNARY:
        trits = generator.integers(-1, 2, SCHEMA.ternary_elements).astype(np.int8)
        dense = generator.normal(scale=size, size=SCHEMA.dense_elements).astype(np.float32)
        return Block.of_trits(SCHEMA, sizes[: len(SCHEMA.ternary)].tolist(), trits, dense)
    change = generator.normal(size=SCHEMA.elements).astype(np.float32)
    for tensor, segment in zip(sizes, SCHEMA.segments, strict=True):
        change[segment.start : segment.stop] *= tensor
    return Block.of_float32(SCHEMA, change)


blocks = st.builds(block_of, st.integers(0, 999), st.sampled_from([TERNARY, FLOAT32]), st.integers(-40, 12))
near = st.builds(block_of, st.integers(0, 999), st.sampled_from([TERNARY, FLOAT32]), st.integers(-9, -5))
weights = st.one_of(st.integers(1, 10**6).map(float), st.floats(1e-6, 1e6))
buffers = st.lists(st.tuples(st.one_of(blocks, near), weights), min_size=1, max_size=12)
near_buffers = st.lists(st.tuples(near, st.floats(1, 64)), min_size=1, max_size=12)


def summed(chosen: Sequence[Weighted]) -> ExactSum:
    total = ExactSum(SCHEMA)
    for block, weight in chosen:
        total.add(block, weight)
    return total


@given(buffers, st.randoms(use_true_random=False))
def test_any_order_has_the_same_bits(chosen: list[Weighted], random: Random) -> None:
    shuffled = list(chosen)
    random.shuffle(shuffled)
    assert summed(shuffled).total().tobytes() == summed(chosen).total().tobytes()


@given(buffers, st.data())
def test_any_partition_among_adders_has_the_same_bits(chosen: list[Weighted], data: st.DataObject) -> None:
    adders = data.draw(st.integers(1, 5))
    shares: list[list[Weighted]] = [[] for _ in range(adders)]
    for each in chosen:
        shares[data.draw(st.integers(0, adders - 1))].append(each)
    order = data.draw(st.permutations(range(adders)))
    first, *others = (summed(shares[place]) for place in order)
    for total in others:
        first.join(total)
    assert first.total().tobytes() == summed(chosen).total().tobytes()


@pytest.mark.parametrize("adders", [1, 2, 4])
@given(chosen=buffers)
@settings(max_examples=20)
def test_threads_side_by_side_have_the_same_bits(adders: int, chosen: list[Weighted]) -> None:
    with ThreadPoolExecutor(adders) as threads:
        background = Background(SCHEMA, threads, adders)
        for block, weight in chosen:
            background.add(block, weight)
        whole = summed(chosen)
        assert background.total().tobytes() == whole.total().tobytes()
        assert background.subtracts == whole.subtracts
        if whole.subtracts:
            background.subtract(*chosen[0])
            assert background.total().tobytes() == summed(chosen[1:]).total().tobytes()


@given(near_buffers, st.data())
def test_what_is_taken_out_leaves_the_bits_of_the_others(chosen: list[Weighted], data: st.DataObject) -> None:
    """Also where it alone had its level, and where something is added later."""
    other = data.draw(near_buffers)
    total = summed([*chosen, *other])
    assume(total.subtracts)
    for block, weight in data.draw(st.permutations(other)):
        total.subtract(block, weight)
    assert total.total().tobytes() == summed(chosen).total().tobytes()
    later = data.draw(buffers)
    for block, weight in later:
        total.add(block, weight)
    assert total.total().tobytes() == summed([*chosen, *later]).total().tobytes()


def rounded(value: Fraction, level: int, bits: int) -> Fraction:
    """The nearest multiple of the level's quantum, the even one of two."""
    quantum = Fraction(2) ** (OCTAVES * (level + 1) - bits)
    return round(value / quantum) * quantum


def level_of(value: Fraction) -> int:
    """L with 2^(6 L) <= value < 2^(6 L + 6), by fractions alone."""
    level = LOWEST
    while value >= Fraction(2) ** (OCTAVES * (level + 1)):
        level += 1
    return level


def float32(value: Fraction) -> np.float32:
    """The nearest float32: no float64 is between where sums of so few bits lie."""
    return np.float32(float(value))


def plain_sum(chosen: Sequence[Weighted]) -> Vector:
    """As the docstring of ``exact.py`` says it, one element at a time, in fractions."""
    found = np.zeros(SCHEMA.elements, np.float32)
    for segment in SCHEMA.segments:
        parts: dict[str, dict[int, list[list[Fraction]]]] = {TERNARY: {}, FLOAT32: {}}
        for block, weight in chosen:
            values = block.value()[segment.start : segment.stop]
            if block.codec == TERNARY and segment.tensor.role == TERNARY:
                scale = float(block.scales[SCHEMA.ternary.index(segment)]) * weight
                if not scale:
                    continue
                level = level_of(Fraction(scale))
                coefficient = rounded(Fraction(scale), level, COEFFICIENT_BITS)
                row = [coefficient * int(np.sign(value)) for value in values]
                parts[TERNARY].setdefault(level, []).append(row)
            else:
                weighted = [Fraction(float(value) * weight) for value in values]
                if any(weighted):
                    level = level_of(max(map(abs, weighted)))
                    row = [rounded(value, level, ELEMENT_BITS) for value in weighted]
                    parts[FLOAT32].setdefault(level, []).append(row)
        for kind in (TERNARY, FLOAT32):
            levels = parts[kind]
            for level in sorted(levels):
                if level > max(levels) - KEPT:
                    for place in range(segment.tensor.elements):
                        whole = float32(sum((row[place] for row in levels[level]), Fraction(0)))
                        found[segment.start + place] += whole
    return found


@given(buffers)
@settings(max_examples=50)
def test_a_sum_is_what_its_description_says(chosen: list[Weighted]) -> None:
    assert summed(chosen).total().tobytes() == plain_sum(chosen).tobytes()


@given(near_buffers)
def test_it_is_as_near_to_the_true_sum_as_promised(chosen: list[Weighted]) -> None:
    """Each coefficient within 2^-12 of itself, each element within 2^-40 of its tensor's largest, and float32."""
    true, allowed = np.zeros(SCHEMA.elements), np.zeros(SCHEMA.elements)
    for block, weight in chosen:
        value = block.value().astype(np.float64) * weight
        true += value
        for segment in SCHEMA.segments:
            here = slice(segment.start, segment.stop)
            is_ternary = block.codec == TERNARY and segment.tensor.role == TERNARY
            allowed[here] += np.abs(value[here]).max() * (2.0**-12 if is_ternary else 2.0**-40)
            allowed[here] += np.abs(value[here]) * 2.0**-22
    assert (np.abs(summed(chosen).total() - true) <= allowed).all()


def one(scale: float, value: float = 0.0) -> Block:
    """A block whose trits are all 1, and whose dense elements are equal."""
    trits, dense = np.ones(SCHEMA.ternary_elements, np.int8), np.full(SCHEMA.dense_elements, value, np.float32)
    return Block.of_trits(SCHEMA, [scale] * len(SCHEMA.ternary), trits, dense)


LARGEST = one(1 - 2.0**-17, 1 - 2.0**-24)  # at a level's end: 128 of them are all that a sum holds before it moves


@pytest.mark.parametrize("count", [128, 129, 1000])
def test_more_of_the_largest_coefficients_than_a_sum_holds_are_exact(count: int) -> None:
    chosen = [(LARGEST, 1.0)] * count
    whole, halves = summed(chosen), summed(chosen[: count // 2])
    halves.join(summed(chosen[count // 2 :]))
    for total in (whole.total(), halves.total()):
        for segment in SCHEMA.segments:
            size = 1 - 2.0**-17 if segment.tensor.role == TERNARY else 1 - 2.0**-24
            assert set(total[segment.start : segment.stop].tolist()) == {np.float32(count * size)}
    for block, weight in chosen[:-3]:
        whole.subtract(block, weight)
    assert whole.total().tobytes() == summed(chosen[-3:]).total().tobytes()


@given(st.lists(st.floats(2.0**-6, 1 - 2.0**-24, width=32), min_size=300, max_size=300), st.integers(0, 300))
@settings(max_examples=20)
def test_sums_that_had_to_move_have_the_bits_of_any_order(sizes: list[float], cut: int) -> None:
    chosen = [(one(size, size), 1.0) for size in sizes]
    whole = summed(chosen).total().tobytes()
    assert summed(chosen[::-1]).total().tobytes() == whole
    first, second, nothing = summed(chosen[:cut]), summed(chosen[cut:]), ExactSum(SCHEMA)
    first.join(second)
    nothing.join(first)
    assert nothing.total().tobytes() == whole


def test_a_level_counts_what_is_in_it() -> None:
    level = Level(np.full((1, 8), 2.0**23, np.float32), quantum=1.0)
    level.reserve(2**24)
    assert (level.quanta, level.moved is None) == (2**24, True)
    level.reserve(1)
    assert level.quanta == 1
    assert level.moved is not None
    assert level.rounded().tolist() == [[2.0**23] * 8]


def test_what_is_far_below_the_largest_is_left_out_whenever_it_comes() -> None:
    """2^-30 of another is; 2^-23 is not. Then nothing can be taken out: who is left may have counted."""
    large, small, tiny = (one(1.0), 1.0), (one(2.0**-20), 1.0), (one(2.0**-31), 1.0)
    for chosen in ([large, small, tiny], [tiny, small, large], [small, tiny, large]):
        total = summed(chosen)
        assert not total.subtracts
        assert total.total().tobytes() == summed([large, small]).total().tobytes()
        assert len(total._trits[0][1].sums) == 2
    assert summed([large, small]).subtracts
    joined = summed([tiny])
    joined.join(summed([small, large]))
    assert not joined.subtracts
    assert joined.total().tobytes() == summed([large, small]).total().tobytes()
    other = summed([large, small])
    other.join(summed([tiny]))
    assert not other.subtracts
    assert other.total().tobytes() == joined.total().tobytes()


def test_however_many_sizes_there_are_a_tensor_has_few_sums() -> None:
    total = ExactSum(SCHEMA)
    for octave in range(-110, 15):
        total.add(one(2.0**octave, 2.0**octave), 1.0)
    for _, levels in (*total._trits, *total._elements):
        assert len(levels.sums) <= KEPT


@pytest.mark.parametrize("weight", [0.0, 1e-300, 2.0**-120])
def test_what_weighs_nothing_is_nothing(weight: float) -> None:
    assert not summed([(one(2.0**-20, 2.0**-40), weight)]).total().any()
    half = (one(0.5, 0.5), 1.0)
    assert summed([half, (one(0.5, 0.5), weight)]).total().tobytes() == summed([half]).total().tobytes()


@pytest.mark.parametrize("weight", [2.0**53, 1e30])
def test_the_largest_are_finite(weight: float) -> None:
    assert np.isfinite(summed([(one(VALUE_MAX, -VALUE_MAX), weight)] * 3).total()).all()


def test_zeros_have_no_sum_and_no_level() -> None:
    total = summed([(one(0.0), 5.0)])
    assert not any(levels.sums for _, levels in (*total._trits, *total._elements))


def test_the_sum_in_order_is_near() -> None:
    """What replaced it differs by less than a thousandth of a ternary update's own error."""
    schema = Schema.of({"w": (40, 50), "b": (9,)})
    old, new = Accumulator(schema), ExactSum(schema)
    for seed in range(16):
        block = ternary_block(schema, seed, 0.01 * (1 + seed)) if seed % 4 else float32_block(schema, seed)
        for each in (old, new):
            each.add(block, 10.0 + seed)
    np.testing.assert_allclose(new.total(), old.total(), rtol=2e-4, atol=1e-3)
