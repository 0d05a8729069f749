"""Blocks: changes to the model vector as trits and scales, or as float32; encoding, checks and exact application.

As in TernGrad (Wen et al. 2017, eq. 1-3), each element is -1, 0 or +1 times one scale for each tensor. Five trits are
packed into one byte.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import zstandard

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import compiled
from ternbus.broker.protocol.lane_sum import BLOCK, lane_sum
from ternbus.broker.protocol.schema import SMALLEST_NORMAL, Schema, Segment, Vector, flush_tiny, type_f32

TERNARY: Final = "ternary"
FLOAT32: Final = "float32"
CODECS: Final = (TERNARY, FLOAT32)
RAW: Final = "raw"
ZSTD: Final = "zstd"
ENCODINGS: Final = (RAW, ZSTD)
VALUE_MAX: Final = 65_504.0  # the largest float16: no honest change to one weight is larger
WINDOW_BYTES_MAX: Final = 8 * 2**20
TRIT_BYTE_MAX: Final = 242
CHUNK_BYTES: Final = 2**15  # of packed trits at a time: their 640 KiB of float32 fit into the processor's cache
CHUNK: Final = 5 * CHUNK_BYTES

Trits = npt.NDArray[np.int8]
_decompressors: "deque[zstandard.ZstdDecompressor]" = deque(maxlen=4)
_POWERS: Final = np.array([1, 3, 9, 27, 81], dtype=np.uint8)
# TRITS[b] has the five trits of byte b, t0 first
TRITS: Final = ((np.arange(243)[:, None] // _POWERS) % 3 - 1).astype(np.int8)


@dataclass(frozen=True, slots=True)
class Block:
    """A change to a vector, valid for its schema. Make one with ``Block.read`` or ``Block.of_…``."""

    schema: Schema
    codec: str
    content: bytes

    @classmethod
    def read(cls, schema: Schema, codec: str, encoding: str, encoded: bytes) -> "Block":
        """Decode and check a block from a peer; ProtocolError for anything malformed."""
        content = decode(encoded, encoding, content_bytes(schema, codec))
        if codec == TERNARY:
            _check_ternary(schema, content)
        else:
            _check_elements(np.frombuffer(content, dtype=type_f32))
        return cls(schema, codec, content)

    @classmethod
    def of_trits(cls, schema: Schema, scales: Sequence[float], trits: Trits, dense: npt.NDArray[np.float32]) -> "Block":
        """A ternary block of T scales, the ternary tensors' N trits in schema order, and the dense elements."""
        return cls.of_packed(schema, scales, pack(trits), dense)

    @classmethod
    def of_packed(
        cls,
        schema: Schema,
        scales: Sequence[float],
        packed: bytes | memoryview,
        dense: npt.NDArray[np.float32],
    ) -> "Block":
        """As `of_trits`, of trits that `pack` has packed."""
        parts = (np.asarray(scales, dtype=type_f32).data, packed, _clip(dense).data)
        return cls(schema, TERNARY, b"".join(parts))

    @classmethod
    def of_float32(cls, schema: Schema, change: Vector) -> "Block":
        """A float32 block of the change to a whole vector; magnitudes above 65,504 are clipped."""
        runs = [change[segment.start : segment.stop] for segment in (*schema.ternary, *schema.dense)]
        return cls(schema, FLOAT32, _clip(np.concatenate(runs)).tobytes())

    def apply(self, vector: Vector) -> Vector:
        """The next version: v + s*t and v + d in float32, tiny numbers as +0; the same bits on every machine."""
        result = np.empty_like(vector)
        is_compiled = self.codec == TERNARY and compiled.takes(vector)
        if is_compiled:
            packed = self.packed
            for segment, scale in zip(self.schema.ternary, self.scales, strict=True):
                tensor = slice(segment.start, segment.stop)
                compiled.vectors.apply(result[tensor], vector[tensor], packed, segment.offset, scale)
        for start, values in self._plain_pieces() if is_compiled else self._pieces():
            piece = slice(start, start + len(values))
            flush_tiny(np.add(vector[piece], values, out=result[piece]))
        return result

    def piece(self, segment: Segment, first: int, last: int) -> npt.NDArray[np.float32]:
        """Elements [first, last) of one tensor of the change; only these are unpacked."""
        low, high = segment.offset + first, segment.offset + last
        if self.codec == TERNARY and segment.tensor.role == TERNARY:
            rows = (TRITS * self.scales[self.schema.ternary.index(segment)]).take(
                self.packed[low // 5 : -(-high // 5)], axis=0
            )
            unpacked: npt.NDArray[np.float32] = rows.reshape(-1)[low % 5 :][: high - low]
            return unpacked
        after = self.schema.ternary_elements if self.codec == FLOAT32 and segment.tensor.role != TERNARY else 0
        values = self.elements[after + low : after + high].astype(np.float32)
        flush_tiny(values)
        return values

    def value(self) -> Vector:
        """The change as a vector."""
        return self.apply(np.zeros(self.schema.elements, dtype=np.float32))

    @property
    def scales(self) -> npt.NDArray[np.float32]:
        """The scales of a ternary block, one for each ternary tensor, with tiny scales as 0."""
        scales = np.frombuffer(self.content, dtype=type_f32, count=len(self.schema.ternary)).astype(np.float32)
        flush_tiny(scales)
        return scales

    @property
    def packed(self) -> npt.NDArray[np.uint8]:
        """The packed trits of a ternary block, five in each byte."""
        first = 4 * len(self.schema.ternary)
        return np.frombuffer(self.content, dtype=np.uint8)[first : first + trit_bytes(self.schema)]

    @property
    def elements(self) -> npt.NDArray[np.float32]:
        """The float32 elements: those of the dense tensors; in a float32 block, after those of the ternary tensors."""
        first = 4 * len(self.schema.ternary) + trit_bytes(self.schema) if self.codec == TERNARY else 0
        return np.frombuffer(self.content, dtype=type_f32, offset=first)

    def _pieces(self) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """(position in the vector, values), in pieces of at most CHUNK elements."""
        if self.codec == TERNARY:
            yield from self._ternary_pieces()
        yield from self._plain_pieces()

    def _plain_pieces(self) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Those that are float32 in the block."""
        elements = self.elements
        runs = [(segment.start, segment.stop, segment.offset) for segment in self.schema.dense]
        if self.codec == FLOAT32:
            after = self.schema.ternary_elements
            runs = [(start, stop, offset + after) for start, stop, offset in runs]
            runs += [(segment.start, segment.stop, segment.offset) for segment in self.schema.ternary]
        for start, stop, offset in runs:
            for place in range(start, stop, CHUNK):
                first = offset + place - start
                values = elements[first : first + min(CHUNK, stop - place)].astype(np.float32)
                flush_tiny(values)
                yield place, values

    def _ternary_pieces(self) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        packed = self.packed
        for segment, scale in zip(self.schema.ternary, self.scales, strict=True):
            table = TRITS * scale  # (243, 5) float32: one look-up turns a byte into five scaled values
            end = segment.offset + segment.tensor.elements
            for first in range(segment.offset // 5, -(-end // 5), CHUNK_BYTES):
                last = min(first + CHUNK_BYTES, -(-end // 5))
                values = table.take(packed[first:last], axis=0).reshape(-1)
                low, high = max(segment.offset, 5 * first), min(end, 5 * last)
                yield segment.start + low - segment.offset, values[low - 5 * first : high - 5 * first]


def trit_bytes(schema: Schema) -> int:
    return -(-schema.ternary_elements // 5)


def no_trits(schema: Schema) -> npt.NDArray[np.uint8]:
    """Packed trits of which all are 0."""
    return np.full(trit_bytes(schema), TRIT_BYTE_MAX // 2, np.uint8)


def content_bytes(schema: Schema, codec: str) -> int:
    """The length of a block's content before encoding; ProtocolError for an unknown codec."""
    if codec == TERNARY:
        return 4 * len(schema.ternary) + trit_bytes(schema) + 4 * schema.dense_elements
    if codec == FLOAT32:
        return 4 * schema.elements
    raise ProtocolError("bad-codec", f"unknown codec {codec[:20]!r}")


def pack(trits: Trits) -> bytes:
    """Pack N trits in -1, 0, +1 into ceil(N/5) bytes, t0 as the lowest power of three; 0 fills the last byte."""
    packed = np.empty(-(-len(trits) // 5), dtype=np.uint8)
    if compiled.vectors is not None and trits.flags.c_contiguous:
        compiled.vectors.pack(packed, trits)
        return packed.tobytes()
    for first in range(0, len(packed), CHUNK_BYTES):
        piece = trits[5 * first : 5 * (first + CHUNK_BYTES)]
        digits = np.ones(-(-len(piece) // 5) * 5, dtype=np.uint8)
        np.add(piece, 1, out=digits[: len(piece)], casting="unsafe")
        columns = digits.reshape(-1, 5).T
        total = columns[4].copy()
        for column in (columns[3], columns[2], columns[1], columns[0]):  # Horner's rule, within one byte
            total *= 3
            total += column
        packed[first : first + len(total)] = total
    return packed.tobytes()


def unpack(packed: bytes, count: int) -> Trits:
    """The first ``count`` trits in the bytes of ``pack``."""
    return TRITS.take(np.frombuffer(packed, dtype=np.uint8), axis=0).reshape(-1)[:count]


def encode(content: bytes, encoding: str = ZSTD) -> bytes:
    """Encode the content for the wire: raw, or as one zstd frame with its content size."""
    return content if encoding == RAW else zstandard.ZstdCompressor(level=1).compress(content)


def decode(encoded: bytes, encoding: str, size: int) -> bytes:
    """Undo ``encode``; ProtocolError unless the result has ``size`` bytes, for zstd checked before decompression."""
    if encoding == RAW:
        content = encoded
    elif encoding == ZSTD:
        content = _decompress(encoded, size)
    else:
        raise ProtocolError("bad-encoding", f"unknown encoding {encoding[:20]!r}")
    if len(content) != size:
        raise ProtocolError("bad-length", f"{len(content)} bytes instead of {size}")
    return content


def _decompress(encoded: bytes, size: int) -> bytes:
    try:
        frame = zstandard.get_frame_parameters(encoded)
        # zstandard reports a missing content size as 2**64-1, and 0 for a skippable frame: neither equals ``size``.
        if frame.content_size != size:
            raise ProtocolError("bad-zstd", f"the content size in the frame is missing or not {size}")
        if frame.dict_id != 0:
            raise ProtocolError("bad-zstd", "the frame needs a dictionary")
        if frame.window_size > WINDOW_BYTES_MAX:
            raise ProtocolError("bad-zstd", f"the window of {frame.window_size} bytes is too large")
        return _decompress_frame(encoded)
    except zstandard.ZstdError as error:
        raise ProtocolError("bad-zstd", "the content is not exactly one zstd frame") from error


def _decompress_frame(encoded: bytes) -> bytes:
    """Decompress with an unused decompressor: each serves one thread at a time, and making one is slow."""
    try:
        decompressor = _decompressors.pop()
    except IndexError:
        decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX)
    try:
        return decompressor.decompress(encoded, allow_extra_data=False)
    finally:
        _decompressors.append(decompressor)


def _check_ternary(schema: Schema, content: bytes) -> None:
    scales = np.frombuffer(content, dtype=type_f32, count=len(schema.ternary)).copy()
    if not np.isfinite(scales).all():  # before any arithmetic: a signalling NaN makes numpy warn
        raise ProtocolError("bad-scale", "a scale is not finite")
    flush_tiny(scales)  # a tiny negative scale is 0, and valid
    if not ((scales >= 0) & (scales <= VALUE_MAX)).all():
        raise ProtocolError("bad-scale", f"a scale is outside 0 to {VALUE_MAX:.0f}")
    packed = np.frombuffer(content, dtype=np.uint8, count=trit_bytes(schema), offset=4 * len(scales))
    if packed.size and int(packed.max()) > TRIT_BYTE_MAX:
        raise ProtocolError("bad-trits", f"a byte is above {TRIT_BYTE_MAX}")
    used = schema.ternary_elements % 5
    if used and TRITS[packed[-1], used:].any():
        raise ProtocolError("bad-trits", "the last byte is not filled with 0")
    _check_elements(np.frombuffer(content, dtype=type_f32, offset=4 * len(scales) + len(packed)))


def _check_elements(elements: npt.NDArray[np.float32]) -> None:
    # min and max return NaN if there is one, and both comparisons with NaN are false
    if elements.size and not (elements.min() >= -VALUE_MAX and elements.max() <= VALUE_MAX):
        raise ProtocolError("bad-element", f"an element is not finite or beyond {VALUE_MAX:.0f}")


def _clip(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.clip(values, -VALUE_MAX, VALUE_MAX).astype(type_f32, copy=False)


def nearest(values: npt.NDArray[np.float32], out: Trits) -> np.float32:
    """Ternarize deterministically, for senders with error feedback: write trits to ``out``, return the scale.

    Elements below the mean magnitude become zero; the scale is the mean magnitude of the others. This is the form of
    Ternary Weight Networks (Li & Liu 2016, eq. 4-6) with a threshold of 1.0 instead of 0.7 means: it keeps 79 % instead
    of 81 % of a Gaussian's energy in 1.40 instead of 1.56 bits an element. Unlike stochastic rounding, it is a
    contraction, which error feedback needs to converge (Karimireddy et al. 2019, assumption A).
    """
    if compiled.takes(values) and out.flags.c_contiguous:
        total, count = compiled.vectors.keep(out, values, np.float32(compiled.vectors.mean(values)))
    else:
        total, count = _keep(values, out)
    scale = np.float32(min(total / count, VALUE_MAX)) if count else np.float32(0)
    if scale < SMALLEST_NORMAL:
        out[:] = 0
        return np.float32(0)
    return scale


def _keep(values: npt.NDArray[np.float32], out: Trits) -> tuple[float, int]:
    """Write the trits; the sum of the magnitudes that are kept, and their number."""
    blocks = [slice(first, first + BLOCK) for first in range(0, len(values), BLOCK)]
    total, count = 0.0, 0
    for block in blocks:
        total += lane_sum(np.abs(values[block]))
    threshold = np.float32(total / len(values))
    total = 0.0
    for block in blocks:
        piece, kept = values[block], out[block]
        # >=, because no element is above the threshold if all magnitudes are equal
        np.subtract((piece >= threshold).view(np.int8), (piece <= -threshold).view(np.int8), out=kept)
        total += lane_sum(piece * kept)
        count += int(np.count_nonzero(kept))
    return total, count


def nearest_block(schema: Schema, change: Vector) -> Block:
    """The deterministic ternary block of a change; dense tensors stay float32."""
    trits = np.empty(schema.ternary_elements, dtype=np.int8)
    scales = []
    for segment in schema.ternary:
        end = segment.offset + segment.tensor.elements
        scales.append(float(nearest(change[segment.start : segment.stop], trits[segment.offset : end])))
    return Block.of_trits(schema, scales, trits, dense_elements(schema, change))


def dense_elements(schema: Schema, change: Vector) -> npt.NDArray[np.float32]:
    """The elements of the dense tensors, in schema order."""
    runs = [change[segment.start : segment.stop] for segment in schema.dense]
    return np.concatenate(runs) if runs else np.empty(0, dtype=np.float32)
