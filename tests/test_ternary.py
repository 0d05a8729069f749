"""Blocks against a second implementation that does one element at a time, and against what hostile peers send."""

import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ternbus.aggregator.merge.accumulator import Accumulator
from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.schema import Schema, Tensor
from ternbus.broker.protocol.ternary import (
    CHUNK,
    Block,
    content_bytes,
    decode,
    encode,
    nearest,
    nearest_block,
    pack,
    unpack,
)

F32 = npt.NDArray[np.float32]
TINY = np.float32(2.0**-126)

# Tensors whose trits begin in the middle of a byte, of one element, of none of a role.
SCHEMAS = {
    "straddling": Schema.write(
        [
            Tensor("a", (7,), "ternary"),
            Tensor("b", (2,), "dense"),
            Tensor("c", (1,), "ternary"),
            Tensor("d", (3, 3), "ternary"),
            Tensor("e", (), "dense"),
        ]
    ),
    "whole bytes": Schema.write([Tensor("a", (5,), "ternary"), Tensor("b", (10,), "ternary")]),
    "ternary only": Schema.write([Tensor("a", (3,), "ternary")]),
    "dense only": Schema.write([Tensor("a", (3,), "dense"), Tensor("b", (2, 2), "dense")]),
}
named = st.sampled_from(sorted(SCHEMAS))


# --- the second implementation: plain Python, one element at a time


def flushed(value: np.float32) -> np.float32:
    return value if abs(value) >= TINY else np.float32(0.0)


def plain_values(schema: Schema, codec: str, content: bytes) -> list[np.float32]:
    """The change of each element of the vector, read from a block's content as the protocol says."""
    ternary = [tensor for tensor in schema.tensors if tensor.role == "ternary"]
    dense = [tensor for tensor in schema.tensors if tensor.role == "dense"]
    by_name: dict[str, list[np.float32]] = {}
    if codec == "ternary":
        scales = [np.float32(struct.unpack_from("<f", content, 4 * index)[0]) for index in range(len(ternary))]
        total = sum(tensor.elements for tensor in ternary)
        packed = content[4 * len(ternary) : 4 * len(ternary) + (total + 4) // 5]
        trits = [packed[index // 5] // 3 ** (index % 5) % 3 - 1 for index in range(total)]
        place = 0
        for tensor, scale in zip(ternary, scales, strict=True):
            run = trits[place : place + tensor.elements]
            by_name[tensor.name] = [flushed(flushed(scale) * np.float32(trit)) for trit in run]
            place += tensor.elements
        rest, order = content[4 * len(ternary) + len(packed) :], dense
    else:
        rest, order = content, ternary + dense
    place = 0
    for tensor in order:
        values = struct.unpack_from(f"<{tensor.elements}f", rest, 4 * place)
        by_name[tensor.name] = [flushed(np.float32(value)) for value in values]
        place += tensor.elements
    return [value for tensor in schema.tensors for value in by_name[tensor.name]]


def plain_pack(trits: list[int]) -> bytes:
    padded = trits + [0] * (-len(trits) % 5)
    return bytes(
        sum((padded[first + place] + 1) * 3**place for place in range(5)) for first in range(0, len(padded), 5)
    )


# --- trits


@given(st.lists(st.integers(-1, 1), max_size=200))
@settings(max_examples=100)
def test_trits_are_packed_as_a_second_implementation_packs_them(trits: list[int]) -> None:
    packed = pack(np.array(trits, dtype=np.int8))
    assert packed == plain_pack(trits)
    assert unpack(packed, len(trits)).tolist() == trits


def test_every_byte_of_trits_both_ways() -> None:
    for byte in range(243):
        trits = unpack(bytes([byte]), 5)
        assert trits.tolist() == [byte // 3**place % 3 - 1 for place in range(5)]
        assert pack(trits) == bytes([byte])


@pytest.mark.parametrize("count", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_trits_larger_than_a_chunk(count: int) -> None:
    trits = np.random.default_rng(count).integers(-1, 2, size=count).astype(np.int8)
    packed = pack(trits)
    assert len(packed) == -(-count // 5)
    assert packed[:40] == plain_pack(trits[:200].tolist())
    assert np.array_equal(unpack(packed, count), trits)
    whole = np.concatenate([trits, np.zeros(-count % 5, dtype=np.int8)]).astype(np.int64).reshape(-1, 5) + 1
    assert packed == (whole @ np.array([1, 3, 9, 27, 81])).astype(np.uint8).tobytes()


# --- applying


odd_floats = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.17549421e-38, 1.17549435e-38, -2e-38, 65504.0, -65504.0, 1.0])
small_float = odd_floats | st.floats(-65504, 65504, width=32)


@given(name=named, data=st.data())
@settings(max_examples=150)
def test_a_block_is_applied_bit_by_bit_as_a_second_implementation_does(name: str, data: st.DataObject) -> None:
    schema = SCHEMAS[name]
    count = schema.elements
    start = [flushed(np.float32(data.draw(small_float))) for _ in range(count)]
    vector = np.array(start, dtype=np.float32)
    if data.draw(st.booleans()):
        scales = [abs(data.draw(small_float)) for _ in schema.ternary]
        trits = [data.draw(st.integers(-1, 1)) for _ in range(schema.ternary_elements)]
        dense = [data.draw(small_float) for _ in range(schema.dense_elements)]
        block = Block.of_trits(schema, scales, np.array(trits, dtype=np.int8), np.array(dense, dtype=np.float32))
        plain = struct.pack(f"<{len(scales)}f", *scales) + plain_pack(trits) + struct.pack(f"<{len(dense)}f", *dense)
        assert block.content == plain
    else:
        change = np.array([data.draw(small_float) for _ in range(count)], dtype=np.float32)
        block = Block.of_float32(schema, change)
    read = Block.read(schema, block.codec, "raw", block.content)
    values = plain_values(schema, block.codec, block.content)
    expected = np.array(
        [flushed(np.float32(old + change)) for old, change in zip(start, values, strict=True)], dtype=np.float32
    )
    assert read.apply(vector).tobytes() == expected.tobytes()
    assert vector.tobytes() == np.array(start, dtype=np.float32).tobytes()
    assert np.array_equal(read.value(), np.array(values, dtype=np.float32))
    weight = np.float32(data.draw(st.floats(0, 100, width=32)))
    accumulator = Accumulator(schema)
    for factor in (1.0, float(weight)):
        accumulator.add(read, factor)
    expected_sum = (1.0 + float(weight)) * np.array(values, dtype=np.float64)
    np.testing.assert_allclose(accumulator.total(), expected_sum, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("before", [0, 1, 3])
def test_tensors_larger_than_a_chunk_are_applied_whole(before: int) -> None:
    """Also where they begin in the middle of a byte."""
    tensors = [Tensor("small", (before,), "ternary")] if before else []
    schema = Schema.write([*tensors, Tensor("large", (CHUNK + 7,), "ternary"), Tensor("dense", (CHUNK + 9,), "dense")])
    generator = np.random.default_rng(before)
    vector = generator.normal(size=schema.elements).astype(np.float32)
    trits = generator.integers(-1, 2, size=schema.ternary_elements).astype(np.int8)
    dense = generator.normal(size=schema.dense_elements).astype(np.float32)
    scales = [0.25, 0.125][: len(schema.ternary)]
    block = Block.of_trits(schema, scales, trits, dense)
    factors = np.repeat(scales, [segment.tensor.elements for segment in schema.ternary]).astype(np.float32)
    expected = vector + np.concatenate([factors * trits, dense])
    assert block.apply(vector).tobytes() == expected.astype(np.float32).tobytes()
    whole = Block.of_float32(schema, block.value())
    assert whole.apply(vector).tobytes() == expected.astype(np.float32).tobytes()


# --- reading what a peer sends


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_roles_that_a_schema_lacks_take_no_bytes(name: str) -> None:
    schema = SCHEMAS[name]
    expected = 4 * len(schema.ternary) + -(-schema.ternary_elements // 5) + 4 * schema.dense_elements
    assert content_bytes(schema, "ternary") == expected
    assert content_bytes(schema, "float32") == 4 * schema.elements
    nothing = np.zeros(schema.elements, dtype=np.float32)
    for block in (nearest_block(schema, nothing), Block.of_float32(schema, nothing)):
        again = Block.read(schema, block.codec, "zstd", encode(block.content))
        assert again == block
        assert again.apply(nothing).tobytes() == nothing.tobytes()


@given(
    name=named,
    codec=st.sampled_from(["ternary", "float32", "", "TERNARY"]),
    encoding=st.sampled_from(["raw", "zstd", "", "gzip"]),
    data=st.data(),
)
@settings(max_examples=200)
def test_any_bytes_are_a_block_or_refused(name: str, codec: str, encoding: str, data: st.DataObject) -> None:
    schema = SCHEMAS[name]
    size = content_bytes(schema, codec if codec in ("ternary", "float32") else "float32")
    content = data.draw(st.binary(min_size=size, max_size=size) | st.binary(max_size=80))
    encoded = encode(content) if encoding == "zstd" and data.draw(st.booleans()) else content
    try:
        block = Block.read(schema, codec, encoding, encoded)
    except ProtocolError as error:
        assert error.reason.startswith("bad-")
        return
    start = np.zeros(schema.elements, dtype=np.float32)
    after = block.apply(start)
    assert np.isfinite(after).all()
    assert after.tobytes() == np.array(plain_values(schema, codec, content), dtype=np.float32).tobytes()
    assert np.abs(after).max() <= 65_504


@given(name=named, codec=st.sampled_from(["ternary", "float32"]), data=st.data())
@settings(max_examples=100)
def test_damaged_zstd_is_refused_or_of_the_right_length(name: str, codec: str, data: st.DataObject) -> None:
    size = content_bytes(SCHEMAS[name], codec)
    encoded = bytearray(encode(data.draw(st.binary(min_size=size, max_size=size))))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        assert len(decode(bytes(encoded), "zstd", size)) == size
    except ProtocolError as error:
        assert error.reason in {"bad-zstd", "bad-length"}


def test_scales_and_elements_at_their_bounds() -> None:
    schema = SCHEMAS["straddling"]
    good = nearest_block(schema, np.full(schema.elements, 3.0, dtype=np.float32)).content

    def reason(place: int, value: float) -> str | None:
        content = good[:place] + struct.pack("<f", value) + good[place + 4 :]
        try:
            Block.read(schema, "ternary", "raw", content)
        except ProtocolError as error:
            return error.reason
        return None

    for value in (0.0, -0.0, 65_504.0, 1e-45, -1e-45):
        assert reason(4, value) is None
    for value in (float("nan"), float("inf"), -1e-30, 65_504.004):
        assert reason(4, value) == "bad-scale"
    for value in (0.0, -0.0, 65_504.0, -65_504.0, -1e-45):
        assert reason(len(good) - 4, value) is None
    for value in (float("nan"), float("inf"), -float("inf"), 65_504.004, -65_504.004):
        assert reason(len(good) - 4, value) == "bad-element"


def test_trit_bytes_at_their_bounds() -> None:
    schema = SCHEMAS["ternary only"]  # three trits, so two of the byte are fill
    scale = struct.pack("<f", 1.0)
    assert Block.read(schema, "ternary", "raw", scale + plain_pack([1, 1, 1])).codec == "ternary"
    for byte in (243, 255, plain_pack([1, 1, 1])[0] + 27, plain_pack([1, 1, 1])[0] - 81):
        with pytest.raises(ProtocolError, match="bad-trits"):
            Block.read(schema, "ternary", "raw", scale + bytes([byte]))


def test_what_a_sender_makes_is_within_the_bounds() -> None:
    schema = SCHEMAS["straddling"]
    huge = np.full(schema.elements, 1e30, dtype=np.float32)
    huge[0] = -1e30
    for block in (Block.of_float32(schema, huge), nearest_block(schema, huge)):
        assert Block.read(schema, block.codec, "raw", block.content) == block
        assert np.abs(block.value()).max() == np.float32(65_504)


# --- zstd


def frame(content: bytes, **about: int) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(**about)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(content)


def test_a_bomb_is_refused_before_it_is_decompressed() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(2**28))
    assert len(bomb) < 30_000
    with pytest.raises(ProtocolError, match="the content size in the frame is missing or not 100"):
        decode(bomb, "zstd", 100)
    # one that lies about its size
    small = encode(bytes(100))
    assert small[5] == 100
    with pytest.raises(ProtocolError, match="bad-zstd"):
        decode(small[:5] + bytes([50]) + small[6:], "zstd", 50)
    with pytest.raises(ProtocolError, match="bad-zstd"):
        decode(small[:5] + bytes([150]) + small[6:], "zstd", 150)


@pytest.mark.parametrize("size", [0, 3, 100])
def test_skippable_frames_are_no_content(size: int) -> None:
    skippable = struct.pack("<II", 0x184D2A50, size) + bytes(size)
    good = encode(bytes(100))
    for wrong in (skippable, skippable + good, good + skippable):
        for length in (100, size or 4):
            with pytest.raises(ProtocolError):
                decode(wrong, "zstd", length)


def test_exactly_one_frame() -> None:
    half = encode(bytes(50))
    for wrong in (half + half, encode(bytes(100)) + b"\0", encode(bytes(100))[:-1], b"", b"\x28\xb5\x2f\xfd", half[1:]):
        with pytest.raises(ProtocolError, match="bad-zstd"):
            decode(wrong, "zstd", 100)


def test_threads_that_decompress_at_once_do_not_disturb_each_other() -> None:
    contents = [np.random.default_rng(seed).integers(0, 243, 300_000, np.uint8).tobytes() for seed in range(8)]
    encoded = [encode(content) for content in contents]

    def read(number: int) -> bool:
        with pytest.raises(ProtocolError, match="bad-zstd"):
            decode(encoded[number % 8][:-1], "zstd", 300_000)
        return decode(encoded[number % 8], "zstd", 300_000) == contents[number % 8]

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(64)))


def test_a_frame_that_does_not_state_its_size_is_refused() -> None:
    writer = zstandard.ZstdCompressor().compressobj()
    streamed = writer.compress(bytes(100)) + writer.flush()
    with pytest.raises(ProtocolError, match="content size in the frame is missing"):
        decode(streamed, "zstd", 100)
    with pytest.raises(ProtocolError, match="content size in the frame is missing"):
        decode(frame(bytes(100), write_content_size=False), "zstd", 100)


def test_a_frame_with_a_dictionary_is_refused() -> None:
    dictionary = zstandard.train_dictionary(2048, [bytes([n % 7, n % 11, n % 13]) * 40 for n in range(500)])
    content = bytes([1, 2, 3]) * 40
    with pytest.raises(ProtocolError, match="dictionary"):
        decode(zstandard.ZstdCompressor(dict_data=dictionary).compress(content), "zstd", len(content))


def test_a_window_of_8_mib_and_no_more() -> None:
    content = np.random.default_rng(1).bytes(2**18) * 80  # 20 MiB
    assert decode(frame(content, window_log=23), "zstd", len(content)) == content
    with pytest.raises(ProtocolError, match="window"):
        decode(frame(content, window_log=24), "zstd", len(content))
    assert decode(encode(content), "zstd", len(content)) == content


def test_a_checksum_is_checked() -> None:
    with_checksum = frame(bytes(range(100)), write_checksum=True)
    assert decode(with_checksum, "zstd", 100) == bytes(range(100))
    with pytest.raises(ProtocolError, match="bad-zstd"):
        decode(with_checksum[:-1] + bytes([with_checksum[-1] ^ 1]), "zstd", 100)


# --- nearest


def plain_nearest(values: list[float]) -> tuple[float, list[int]]:
    """Zero below the mean magnitude; the scale is the mean of the rest."""
    threshold = float(np.float32(sum(abs(value) for value in values) / len(values)))
    kept = [abs(value) for value in values if abs(value) >= threshold]
    scale = min(sum(kept) / len(kept), 65_504.0)
    if np.float32(scale) < TINY:
        return 0.0, [0] * len(values)
    return scale, [(value > 0) - (value < 0) if abs(value) >= threshold else 0 for value in values]


@given(st.lists(small_float, min_size=1, max_size=40))
@settings(max_examples=150)
def test_nearest_is_what_a_second_implementation_finds(values: list[float]) -> None:
    array = np.array(values, dtype=np.float32)
    trits = np.full(len(values), 9, dtype=np.int8)
    scale = nearest(array, trits)
    expected_scale, expected = plain_nearest(array.tolist())
    assert trits.tolist() == expected
    assert float(scale) == pytest.approx(expected_scale, rel=1e-6)


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30))
@settings(max_examples=100)
def test_nearest_is_a_contraction(values: list[float]) -> None:
    """What is left is less than what was there, unless that was nothing: error feedback needs it."""
    array = np.array(values, dtype=np.float32)
    trits = np.zeros(len(values), dtype=np.int8)
    scale = float(nearest(array, trits))
    before = float(np.square(array.astype(np.float64)).sum())
    after = float(np.square(array.astype(np.float64) - scale * trits).sum())
    if np.abs(array).max() > 1e-30:
        assert after <= before * (1 - 0.99 / len(values))


@pytest.mark.parametrize("value", [0.1, -3.0, 1e-20, 65_504.0])
def test_where_all_are_as_large_all_are_carried(value: float) -> None:
    array = np.full(1000, value, dtype=np.float32)
    array[::3] *= -1
    trits = np.zeros(1000, dtype=np.int8)
    assert nearest(array, trits) == np.float32(abs(value))
    assert np.array_equal(trits, np.sign(array))


def test_nearest_in_pieces_is_nearest_of_the_whole() -> None:
    array = np.random.default_rng(5).normal(size=CHUNK + 1000).astype(np.float32)
    trits = np.zeros(len(array), dtype=np.int8)
    scale = nearest(array, trits)
    magnitude = np.abs(array.astype(np.float64))
    kept = magnitude >= np.float32(magnitude.mean())
    assert np.array_equal(trits, np.where(kept, np.sign(array), 0))
    assert float(scale) == pytest.approx(magnitude[kept].mean(), rel=1e-6)
    # of a Gaussian's energy so much is carried, as the docstring says
    carried = 1 - np.square(array - float(scale) * trits).sum() / np.square(array).sum()
    assert carried == pytest.approx(0.79, abs=0.01)


def test_tiny_changes_are_nothing() -> None:
    trits = np.ones(3, dtype=np.int8)
    assert nearest(np.array([1e-39, -1e-40, 0.0], dtype=np.float32), trits) == 0
    assert trits.tolist() == [0, 0, 0]
