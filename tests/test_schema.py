"""The model as bytes: schemas, vectors and their digests."""

from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.broker.protocol.schema import Schema, Tensor, flush_tiny, to_tensors, to_vector, vector_digest, vector_of

SHAPES = {"conv.weight": (8, 3, 3, 4), "conv.bias": (8,), "fc.weight": (10, 32), "scale": ()}
SCHEMA = Schema.of(SHAPES)

plain = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
anything = st.recursive(plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(plain, inner), max_leaves=9)


def model(seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def test_small_tensors_and_named_ones_are_dense() -> None:
    roles = {tensor.name: tensor.role for tensor in SCHEMA.tensors}
    assert roles == {"conv.weight": "ternary", "conv.bias": "dense", "fc.weight": "ternary", "scale": "dense"}
    assert (SCHEMA.elements, SCHEMA.ternary_elements, SCHEMA.dense_elements) == (617, 608, 9)
    assert Schema.of({"a": (255,), "b": (256,)}).ternary_elements == 256
    chosen = Schema.of(SHAPES, dense=["fc.*"])
    assert {tensor.name for tensor in chosen.tensors if tensor.role == "dense"} == {"conv.bias", "fc.weight", "scale"}
    assert Schema.of(SHAPES, dense=["*"]).ternary == ()


def test_a_schema_is_its_bytes() -> None:
    again = Schema.parse(SCHEMA.encoded)
    assert again == SCHEMA
    assert again.digest == SCHEMA.digest
    # other bytes for the same thing are another schema: the digest is over what the aggregator first wrote
    other = Schema.parse(b"\xdc\x00\x04" + SCHEMA.encoded[1:])
    assert other.tensors == SCHEMA.tensors
    assert other.digest != SCHEMA.digest


def test_segments_lie_one_after_another() -> None:
    places = [(segment.start, segment.stop, segment.offset) for segment in SCHEMA.segments]
    assert places == [(0, 288, 0), (288, 296, 0), (296, 616, 288), (616, 617, 8)]
    assert SCHEMA.ternary + SCHEMA.dense == (
        SCHEMA.segments[0],
        SCHEMA.segments[2],
        SCHEMA.segments[1],
        SCHEMA.segments[3],
    )


@pytest.mark.parametrize(
    "rows",
    [
        [],
        {},
        "w",
        [["w", [3], "dense", 1]],
        [["w", [3]]],
        [["w", [3], "sparse"]],
        [["w", [3], b"dense"]],
        [[b"w", [3], "dense"]],
        [["", [3], "dense"]],
        [["w" * 1025, [3], "dense"]],
        [["w", 3, "dense"]],
        [["w", [0], "dense"]],
        [["w", [-1], "dense"]],
        [["w", [True], "dense"]],
        [["w", [3.0], "dense"]],
        [["w", [1] * 33, "dense"]],
        [["w", [2**31, 2], "dense"]],
        [["w", [2**32], "dense"]],
        [["w", [2**31], "dense"], ["x", [1], "dense"]],
        [["w", [3], "dense"], ["w", [4], "dense"]],
        [["w", [3], "dense"], None],
    ],
    ids=lambda rows: str(rows)[:50],
)
def test_other_arrays_are_no_schema(rows: object) -> None:
    with pytest.raises(ProtocolError, match="bad-schema"):
        Schema.parse(msgpack.packb(rows))


@given(st.binary(max_size=100) | anything.map(msgpack.packb) | st.lists(anything).map(msgpack.packb))
@settings(max_examples=200)
def test_any_bytes_are_a_schema_or_refused(encoded: bytes) -> None:
    try:
        schema = Schema.parse(encoded)
    except ProtocolError as error:
        assert error.reason == "bad-schema"
    else:
        assert 0 < schema.elements <= 2**31


@given(st.sampled_from([0, 1, 2]), anything)
@settings(max_examples=100)
def test_any_value_in_a_schema_is_read_or_refused(place: int, value: object) -> None:
    row: list[Any] = ["w", [3], "dense"]
    row[place] = value
    try:
        Schema.parse(msgpack.packb([row]))
    except ProtocolError as error:
        assert error.reason == "bad-schema"


def test_deep_nesting_and_long_lists_are_refused() -> None:
    for encoded in (b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xdd\x00\x01\x86\xa1" + b"\xc0" * 100_001):
        with pytest.raises(ProtocolError, match="bad-schema"):
            Schema.parse(encoded)


def test_a_vector_is_all_tensors_in_order_row_major() -> None:
    tensors = model()
    vector = to_vector(SCHEMA, tensors)
    plainly = b"".join(
        np.float32(value).astype("<f4").tobytes() for name in SHAPES for value in tensors[name].flatten(order="C")
    )
    assert vector.tobytes() == plainly
    back = to_tensors(SCHEMA, vector)
    assert list(back) == list(SHAPES)
    assert all(np.array_equal(back[name], tensors[name]) and back[name].shape == SHAPES[name] for name in SHAPES)
    assert vector_of(plainly, SCHEMA).tobytes() == plainly
    # from other orders, strides and float types too
    odd = {name: np.asarray(array, dtype=np.float64, order="F") for name, array in reversed(tensors.items())}
    assert vector_digest(to_vector(SCHEMA, odd)) == vector_digest(vector)


def test_views_share_the_vector() -> None:
    vector = to_vector(SCHEMA, model())
    to_tensors(SCHEMA, vector)["conv.bias"][:] = 5
    assert (vector[288:296] == 5).all()


def test_a_model_that_does_not_fit_is_refused() -> None:
    tensors = model()
    with pytest.raises(ConfigError, match=r"lacks tensor 'fc\.weight'"):
        to_vector(SCHEMA, {name: array for name, array in tensors.items() if name != "fc.weight"})
    with pytest.raises(ConfigError, match="shape"):
        to_vector(SCHEMA, tensors | {"conv.bias": np.zeros((2, 4), dtype=np.float32)})
    with pytest.raises(ConfigError, match="not finite"):
        to_vector(SCHEMA, tensors | {"scale": np.array(np.nan, dtype=np.float32)})


@pytest.mark.parametrize("content", [b"", bytes(4 * 616), bytes(4 * 617 + 1)])
def test_a_vector_of_another_length_is_refused(content: bytes) -> None:
    with pytest.raises(ProtocolError, match="bad-vector"):
        vector_of(content, SCHEMA)


ABOVE = np.nextafter(np.float32(2.0**40), np.float32(np.inf))


@pytest.mark.parametrize("wrong", [ABOVE, -ABOVE, 3e38])
def test_a_model_beyond_the_bound_is_no_first_version(wrong: float) -> None:
    with pytest.raises(ConfigError, match="2\\^40"):
        to_vector(SCHEMA, model() | {"scale": np.array(wrong, dtype=np.float32)})


@pytest.mark.parametrize("right", [2.0**40, -(2.0**40)])
def test_an_element_may_be_as_large_as_the_bound(right: float) -> None:
    vector = to_vector(SCHEMA, model() | {"scale": np.array(right, dtype=np.float32)})
    assert np.array_equal(vector_of(vector.tobytes(), SCHEMA), vector)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, ABOVE, -ABOVE])
def test_a_vector_with_an_element_beyond_the_bound_is_refused(wrong: float) -> None:
    vector = np.zeros(617, dtype="<f4")
    vector[600] = wrong
    with pytest.raises(ProtocolError, match="bad-vector"):
        vector_of(vector.tobytes(), SCHEMA)


def test_tiny_numbers_count_as_zero() -> None:
    smallest = np.float32(2.0**-126)
    below = np.nextafter(smallest, np.float32(0), dtype=np.float32)
    values = np.array([smallest, -smallest, below, -below, -0.0, 1e-45, 1.0], dtype=np.float32)
    flush_tiny(values)
    assert values.tobytes() == np.array([smallest, -smallest, 0, 0, 0, 0, 1], dtype=np.float32).tobytes()


def plainly_flushed(values: npt.NDArray[np.float32]) -> bytes:
    """One element after the other, by its bits: an exponent of 0 is +0."""
    return b"".join(
        bytes(4) if int.from_bytes(each.tobytes(), "little") & 0x7F800000 == 0 else each.tobytes() for each in values
    )


EVERY_KIND = np.array(
    [
        0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x807FFFFF, 0x00800000, 0x80800000, 0x00800001,
        0x3F800000, 0xBF800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7FC00001,
    ],
    np.uint32,
).view(np.float32)  # fmt: skip


@pytest.mark.parametrize("size", [0, 1, 2**16 - 1, 2**16, 2**16 + 1, 3 * 2**16 + 5])
@pytest.mark.parametrize("kind", range(len(EVERY_KIND)))
def test_every_kind_of_number_is_flushed_or_kept_in_the_middle_of_others_and_at_the_ends(kind: int, size: int) -> None:
    """NaN stays one."""
    for place in {0, size // 2, size - 1} if size else {0}:
        values = np.full(size, 0.5, np.float32)
        values[place : place + 1] = EVERY_KIND[kind]
        want = np.frombuffer(plainly_flushed(EVERY_KIND[kind : kind + 1]), "<f4")
        flush_tiny(values)
        rest = np.delete(values, place) if size else values
        assert (rest == 0.5).all()
        if size and np.isnan(want[0]):
            assert np.isnan(values[place])
        elif size:
            assert values[place].tobytes() == want.tobytes()


@given(st.lists(st.integers(0, 2**32 - 1), max_size=200))
def test_any_bits_are_flushed_as_element_by_element(bits: list[int]) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    values = values[~np.isnan(values)]
    want = plainly_flushed(values)
    flush_tiny(values)
    assert values.tobytes() == want


def test_a_strided_array_is_flushed_in_place() -> None:
    values = np.tile(EVERY_KIND, 3)
    before = values.copy()
    flush_tiny(values[::2])
    assert values[1::2].tobytes() == before[1::2].tobytes()
    assert not np.signbit(values[2])


def test_a_schema_may_be_written_from_tensors() -> None:
    tensors = (Tensor("a", (2,), "ternary"), Tensor("b", (), "dense"))
    assert Schema.write(tensors).tensors == tensors


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (np.finfo(np.float32).min, r"'fc.weight' has a value beyond 2\^40 "),
        (1e300, r"'fc.weight' has a value beyond 2\^40 "),
        (np.nan, "'fc.weight' has values that are not finite; "),
        (-np.inf, "'fc.weight' has values that are not finite; "),
    ],
)
def test_what_cannot_be_published_is_named(value: float, says: str) -> None:
    tensors = dict(model())
    tensors["fc.weight"] = tensors["fc.weight"].astype(np.float64)
    tensors["fc.weight"].flat[-1] = value
    with pytest.raises(ConfigError, match=f"the model's {says}.*persistent=False"):
        to_vector(SCHEMA, tensors)
