"""The compiled loops over vectors: bit for bit what numpy computes, and no read or write out of bounds."""

import importlib
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ternbus.aggregator.merge.exact import ExactSum
from ternbus.broker.protocol import compiled, ternary
from ternbus.broker.protocol.schema import Schema, Tensor, Vector, to_tensors
from ternbus.broker.protocol.ternary import Block
from ternbus.edge.learn import terngrad
from ternbus.edge.learn.compress import compress
from ternbus.edge.learn.local_change import LocalChange
from ternbus.edge.learn.task import TrainingError
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import Tensors

pytestmark = pytest.mark.skipif(compiled.vectors is None, reason="pip install ./aggregator/native")
TINY = np.float32(2.0**-126)
ODD = np.array([0, -0.0, TINY, -TINY, TINY / 2, -TINY / 4, 0.25, -0.25, 1e-45, 2.0**40, -(2.0**40)], np.float32)
SCALES = np.array([0, TINY, 2 * TINY, 0.25, 1e-30, 65_504], np.float32)
LENGTHS = [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 64, 1023, 1024, 1025, 65_535, 65_536, 65_537, 200_003]


def both(work: Callable[[], Any]) -> tuple[Any, Any]:
    """What numpy computes, and what the loops do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "vectors", None)
        plain = work()
    assert compiled.vectors is not None
    return plain, work()


def random_vector(size: int, generator: np.random.Generator) -> Vector:
    vector = generator.normal(0, 1e-3, size).astype(np.float32)
    some = generator.random(size) < 0.3
    vector[some] = generator.choice(ODD, some.sum())
    return vector


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=6), st.integers(0, 10_000))
def test_a_version_has_the_same_bits(sizes: list[tuple[int, bool]], seed: int) -> None:
    """Trits of a tensor begin and end within bytes."""
    rows = [Tensor(f"t{place}", (size,), "ternary" if of else "dense") for place, (size, of) in enumerate(sizes)]
    schema, generator = Schema.write(rows), np.random.default_rng(seed)
    trits = generator.integers(-1, 2, schema.ternary_elements).astype(np.int8)
    scales = generator.choice(SCALES, len(schema.ternary)).tolist()
    block = Block.of_trits(schema, scales, trits, random_vector(schema.dense_elements, generator).clip(-9, 9))
    vector = random_vector(schema.elements, generator)
    vector.flags.writeable = False  # as what the simulator shares
    plain, looped = both(lambda: block.apply(vector))
    assert looped.tobytes() == plain.tobytes()


@pytest.mark.parametrize("size", [size for size in LENGTHS if size])
def test_a_version_of_any_length_has_the_same_bits(size: int) -> None:
    generator = np.random.default_rng(size)
    schema = Schema.write([Tensor("a", (3,), "ternary"), Tensor("b", (size,), "ternary")])
    trits = generator.integers(-1, 2, schema.ternary_elements).astype(np.int8)
    block = Block.of_trits(schema, [0.5, 0.25], trits, np.zeros(0, np.float32))
    vector = random_vector(schema.elements, generator)
    vector[3:][trits[3:] != 0] = 0.25 * generator.choice([-1, 1], (trits[3:] != 0).sum())  # so that many sums are 0
    plain, looped = both(lambda: block.apply(vector))
    assert looped.tobytes() == plain.tobytes()
    assert not np.signbit(looped[looped == 0]).any()


def test_an_array_that_the_loops_do_not_read_is_left_to_numpy() -> None:
    schema = Schema.of({"w": (30, 20)})
    block = ternary.nearest_block(schema, random_vector(600, np.random.default_rng(0)))
    vector = random_vector(1200, np.random.default_rng(1))
    assert block.apply(vector[::2]).tobytes() == block.apply(vector[::2].copy()).tobytes()
    assert not compiled.takes(vector[::2])
    assert not compiled.takes(vector.astype(">f4"))
    assert not compiled.takes(np.frombuffer(bytes(9), np.float32, offset=1))


@pytest.mark.parametrize("size", LENGTHS)
def test_trits_are_packed_to_the_same_bytes(size: int) -> None:
    trits = np.random.default_rng(size).integers(-1, 2, size).astype(np.int8)
    plain, looped = both(lambda: ternary.pack(trits))
    assert looped == plain
    assert ternary.unpack(looped, size).tolist() == trits.tolist()


@pytest.mark.parametrize("size", [size for size in LENGTHS if size])
def test_a_change_has_the_same_bits(size: int) -> None:
    generator = np.random.default_rng(size)
    schema = Schema.of({"a": (3,), "b": (size,)})
    start, after = random_vector(schema.elements, generator), random_vector(schema.elements, generator)
    trained, kept = to_tensors(schema, after), after.copy()
    plain, looped = both(lambda: LocalChange.of(schema, start, trained).vector())
    assert looped.tobytes() == plain.tobytes()
    assert after.tobytes() == kept.tobytes()  # the task's own tensors stay as they were


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, np.nextafter(np.float32(2.0**40), np.float32(np.inf))])
def test_a_training_that_diverged_has_no_change(wrong: float) -> None:
    schema = Schema.of({"a": (3,), "b": (70_000,)})
    after = np.ones(schema.elements, np.float32)
    after[-2] = wrong

    def diverged() -> str:
        with pytest.raises(TrainingError, match="lower the plan's learning_rate") as found:
            LocalChange.of(schema, np.zeros_like(after), to_tensors(schema, after)).vector()
        return str(found.value)

    plain, looped = both(diverged)
    assert looped == plain


@pytest.mark.parametrize("clip", [0.0, 2.5])
@pytest.mark.parametrize("size", [size for size in LENGTHS if size])
def test_a_scale_has_the_same_bits_far_from_zero_too(size: int, clip: float) -> None:
    generator = np.random.default_rng(size)
    values = (generator.choice([0, 1, 1000]) + generator.normal(0, 1e-3, size)).astype(np.float32)
    plain, looped = both(lambda: terngrad.scale(values, clip_sigma=clip))
    assert looped.tobytes() == plain.tobytes()


@pytest.mark.parametrize("wrong", [np.nan, -np.nan, np.inf, -np.inf])
def test_the_spread_of_what_is_no_number_is_refused(wrong: float) -> None:
    values = np.ones(70_000, np.float32)
    values[-1] = wrong

    def refused() -> None:
        with pytest.raises(ValueError, match="NaN or an infinity"):
            terngrad.scale(values, clip_sigma=2.5)

    both(refused)


@pytest.mark.parametrize("size", [size for size in LENGTHS if size])
def test_the_nearest_block_has_the_same_bits(size: int) -> None:
    """Also of equal magnitudes, of zeros and of what is smaller than a number of the protocol."""
    generator = np.random.default_rng(size)
    kinds = (random_vector(size, generator), generator.choice([-0.25, 0.25], size), generator.choice(ODD[:6], size))
    for values in kinds:
        plain, looped = both(partial(nearest, values.astype(np.float32)))
        assert looped == plain


def nearest(values: Vector) -> tuple[bytes, bytes]:
    trits = np.full(len(values), 9, np.int8)
    return ternary.nearest(values, trits).tobytes(), trits.tobytes()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 10_000))
def test_a_sum_of_rows_has_the_same_bits(sizes: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = [Tensor(f"t{place}", (size,), "ternary") for place, size in enumerate((*sizes, 5003))]
    schema = Schema.write(rows)
    added = ExactSum(schema)
    for weight in (1.0, 300.0, 1e-9):
        block = ternary.nearest_block(schema, random_vector(schema.elements, generator).clip(-9, 9))
        added.add(block, weight)
    plain, looped = both(added.total)
    assert looped.tobytes() == plain.tobytes()


def test_loops_of_an_earlier_version_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ternbus_vectors", SimpleNamespace(apply=None, draw=None, pack=None))
    monkeypatch.delitem(sys.modules, compiled.__name__)
    monkeypatch.setattr("ternbus.broker.protocol.compiled", compiled)  # an import sets it, which is then undone
    assert importlib.import_module(compiled.__name__).vectors is None


@pytest.mark.parametrize("clip", [0.0, 0.5, 2.5])
@pytest.mark.parametrize("size", [size for size in LENGTHS if size])
def test_terngrad_has_the_same_bits(size: int, clip: float) -> None:
    """Of tensors that begin and end within a byte, and after one that is all zeros and one that is dense."""
    generator = np.random.default_rng(size)
    lengths = {"a": 3, "zeros": 7, "b": size, "c": 5000, "dense": 11}
    schema = Schema.of({name: (1, length) for name, length in lengths.items()}, dense=["dense"])
    start = random_vector(schema.elements, generator)
    change = generator.normal(0, 1e-3, schema.elements).astype(np.float32)
    change[3:10] = 0
    trained = to_tensors(schema, start + change)
    plan = Plan(clip_sigma=clip)
    for each in (LocalChange.of(schema, start, trained), change):
        plain, looped = both(partial(content, schema, plan, each, size))
        assert looped == plain
    assert plain == compress(schema, plan, change * 0, change, size).block.content  # what is left of another plan


def content(schema: Schema, plan: Plan, change: Vector | LocalChange, seed: int) -> bytes:
    return compress(schema, plan, change, None, seed).block.content


def test_terngrad_of_what_the_loops_do_not_read_has_the_same_bits() -> None:
    schema, generator = Schema.of({"w": (30, 20), "v": (7,)}), np.random.default_rng(0)
    start, after = random_vector(607, generator), random_vector(607, generator).clip(-1, 1)
    tensors = to_tensors(schema, after)
    others: dict[str, npt.NDArray[Any]] = {"w": np.asfortranarray(tensors["w"]), "v": tensors["v"].astype(np.float64)}
    strange: dict[str, npt.NDArray[Any]] = {"w": tensors["w"].astype(">f4"), "v": tensors["v"]}
    usual = content(schema, Plan(), LocalChange.of(schema, start, tensors), 0)
    assert content(schema, Plan(), LocalChange.of(schema, start, others), 0) == usual
    assert content(schema, Plan(), LocalChange.of(schema, start, strange), 0) == usual


def test_tensors_of_another_type_are_converted_one_at_a_time() -> None:
    """Else a device would need memory for one more copy of the model."""
    schema = Schema.of({f"{place}": (100, 1000) for place in range(10)})
    start = np.zeros(schema.elements, np.float32)
    trained: Tensors = {name: tensor.astype(np.float64) for name, tensor in to_tensors(schema, start + 1).items()}

    def peak() -> int:
        tracemalloc.start()
        try:
            content(schema, Plan(), LocalChange.of(schema, start, trained), 0)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    plain, looped = both(peak)
    assert plain < 1.5 * start.nbytes  # the change and its trits
    assert looped < 0.5 * start.nbytes


@pytest.mark.parametrize("wrong", [np.nan, np.inf, np.nextafter(np.float32(2.0**40), np.float32(np.inf))])
@pytest.mark.parametrize("place", [1, 70_000, 70_005], ids=["first", "last", "dense"])
def test_a_training_that_diverged_has_no_block(place: int, wrong: float) -> None:
    schema = Schema.of({"a": (3,), "b": (70_000,), "c": (3,)}, dense=["c"])
    after = np.ones(schema.elements, np.float32)
    after[place] = wrong

    def diverged() -> None:
        with pytest.raises(TrainingError, match=r"beyond 2\^40\): lower the plan's learning_rate"):
            compress(schema, Plan(), LocalChange.of(schema, np.zeros_like(after), to_tensors(schema, after)), None, 0)

    both(diverged)


FLOATS, BYTES, TRITS = np.zeros(12, np.float32), np.zeros(3, np.uint8), np.zeros(12, np.int8)
ROWS = np.zeros((3, 8), np.float32)
STATES = np.arange(16, dtype=np.uint64).reshape(4, 4)
READ_ONLY = np.zeros(12, np.float32)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    "wrong",
    [
        ("apply", FLOATS.copy(), FLOATS[:11], BYTES, 0, 0.5),
        ("apply", FLOATS.copy(), FLOATS, BYTES[:2], 0, 0.5),
        ("apply", FLOATS.copy(), FLOATS, BYTES, 4, 0.5),
        ("apply", FLOATS.copy(), FLOATS, BYTES, -1, 0.5),
        ("apply", FLOATS.copy(), FLOATS, BYTES, 2**62, 0.5),
        ("apply", FLOATS[:0], FLOATS[:0], BYTES, 16, 0.5),
        ("apply", FLOATS, FLOATS, BYTES, 0, 0.5),
        ("apply", READ_ONLY, FLOATS, BYTES, 0, 0.5),
        ("apply", np.zeros(24, np.float32)[::2], FLOATS, BYTES, 0, 0.5),
        ("apply", BYTES.copy(), BYTES, BYTES, 0, 0.5),
        ("change", FLOATS.copy(), FLOATS[:11], FLOATS),
        ("change", FLOATS.copy(), FLOATS, FLOATS[:11]),
        ("change", FLOATS, FLOATS, FLOATS.copy()),
        ("change", FLOATS, FLOATS.copy(), FLOATS),
        ("change", READ_ONLY, FLOATS, FLOATS),
        ("change", BYTES.copy(), BYTES, BYTES),
        ("moments", BYTES, None),
        ("moments", FLOATS[:0], None),
        ("moments", FLOATS, FLOATS[:11]),
        ("moments", FLOATS, FLOATS.astype(np.float64)),
        ("moments", FLOATS, np.zeros(24, np.float32)[::2]),
        ("moments", FLOATS, 0.5),
        ("mean", FLOATS[:0]),
        ("mean", BYTES),
        ("keep", TRITS, FLOATS[:11], 0.5),
        ("keep", TRITS[:11], FLOATS, 0.5),
        ("add_rows", FLOATS.copy(), ROWS[:2], 0),
        ("add_rows", FLOATS.copy(), ROWS, 4),
        ("add_rows", FLOATS.copy(), ROWS, -1),
        ("add_rows", FLOATS[:1].copy(), ROWS, 5),
        ("add_rows", FLOATS.copy(), FLOATS, 0),
        ("add_rows", ROWS[0], ROWS, 0),
        ("add_rows", READ_ONLY, ROWS, 0),
        ("moments", np.zeros(24, np.float32)[::2], None),
        ("draw_packed", BYTES.copy(), 4, FLOATS, None, STATES, 0.5),
        ("draw_packed", BYTES.copy(), -1, FLOATS, None, STATES, 0.5),
        ("draw_packed", BYTES.copy(), 2**62, FLOATS, None, STATES, 0.5),
        ("draw_packed", BYTES.copy(), 0, FLOATS, FLOATS[:11], STATES, 0.5),
        ("draw_packed", BYTES.copy(), 0, FLOATS, 0.5, STATES, 0.5),
        ("draw_packed", BYTES.copy(), 0, BYTES, None, STATES, 0.5),
        ("draw_packed", BYTES.copy(), 0, FLOATS, None, STATES[:3], 0.5),
        ("draw_packed", BYTES.copy(), 0, FLOATS, None, STATES, 0.0),
        ("draw_packed", BYTES.copy(), 0, FLOATS, None, STATES, float("nan")),
        ("draw_packed", bytes(3), 0, FLOATS, None, STATES, 0.5),
        ("pack", BYTES, TRITS[:10]),
        ("pack", BYTES[:2], TRITS),
    ],
    ids=lambda wrong: f"{wrong[0]}-{[getattr(each, 'shape', each) for each in wrong[1:]]}",
)
def test_what_does_not_fit_is_refused(wrong: tuple[Any, ...]) -> None:
    with pytest.raises((ValueError, TypeError, BufferError)):
        getattr(compiled.vectors, wrong[0])(*wrong[1:])


def test_any_bytes_and_any_numbers_are_read_within_bounds() -> None:
    """A byte above 242 has five trits of 0, NaN is drawn as a number; no block has any."""
    to, packed = np.full(12, np.nan, np.float32), np.array([243, 255, 250], np.uint8)
    compiled.vectors.apply(to, np.ones(12, np.float32), packed, 0, np.float32(0.5))
    assert to.tolist() == [1.0] * 12
    zeros = np.full(3, 121, np.uint8)
    compiled.vectors.draw_packed(zeros, 0, np.full(12, np.nan, np.float32), None, STATES.copy(), np.float32(0.5))
    assert zeros.tolist() == [121, 121, 121]
