"""TernGrad: unbiased quantization of a tensor to one scale and one trit per element (Wen et al. 2017).

It works in blocks, so that a device needs memory for one more copy of the model, not for four, and a block stays in
the processor's cache: the largest temporary array is one of float32 or random bits, 256 KiB.
"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ternbus.broker.protocol import compiled
from ternbus.broker.protocol.lane_sum import BLOCK, lane_sum

LARGEST_SCALE = 65_504.0  # the protocol's bound
SMALLEST_SCALE = 2.0**-126  # below it a float32 counts as zero everywhere in the protocol
EPSILON = 2.0**-20
ONE_TO_TWO = np.uint64(0x3F800000_3F800000)  # the exponent of two float32 in [1, 2)
# 22 random bits each: with 23 the sum below could round up to 3
MANTISSAS = np.uint64(0x007FFFFE_007FFFFE)

FloatArray = npt.NDArray[np.float32]
Trits = npt.NDArray[np.int8]


def ternarize(
    values: FloatArray, *, clip_sigma: float, bits: np.random.SFC64, out: Trits | None = None
) -> tuple[np.float32, Trits]:
    """(s, t) of one tensor, t in {-1, 0, 1} element by element: E[s·t] is the clipped tensor.

    t = sign(g)·b with P(b = 1) = |g| / s, where g is the tensor clipped to ±c·sigma and s its largest magnitude (the
    `ternarize` and the gradient clipping of Wen et al. 2017). `clip_sigma` is c; 0 turns clipping off. The tensor can
    have any shape, and the trits have the same. If `out`, a flat int8 array, is given, the trits are written to it.
    Raises `ValueError` for a NaN or an infinity.
    """
    flat = values.reshape(-1)
    trits = np.empty(flat.shape, np.int8) if out is None else out
    s = scale(flat, clip_sigma=clip_sigma)
    if s > 0 and compiled.takes(flat):
        state = bits.state
        compiled.vectors.draw(trits, flat, state["state"]["state"], s)
        bits.state = state
    elif s > 0:
        for block in _blocks(flat.size):
            _draw(flat[block], s, bits, trits[block])
    else:
        trits[:] = 0
    return s, trits.reshape(values.shape)


def scale(values: FloatArray, *, clip_sigma: float) -> np.float32:
    """The scale s = min(max|g|, c·sigma), sigma being the standard deviation of the tensor's elements.

    At most 65,504, and 0 if it would be too small for the protocol. A tensor of equal elements has sigma 0 and is not
    clipped: its s is max|g|. Raises `ValueError` for a NaN or an infinity.
    """
    flat = values.reshape(-1)
    if not flat.size:
        return np.float32(0)
    largest, sigma = _spread(flat, clips=clip_sigma > 0)
    if not math.isfinite(largest):
        raise ValueError("cannot ternarize: the tensor has a NaN or an infinity")
    clips = clip_sigma > 0 and sigma > largest * EPSILON  # a smaller sigma is float32's rounding, and nothing to clip
    bounded = min(largest, LARGEST_SCALE, clip_sigma * sigma if clips else math.inf)
    return np.float32(bounded) if bounded >= SMALLEST_SCALE else np.float32(0)


def _draw(values: FloatArray, s: np.float32, bits: np.random.SFC64, out: Trits) -> None:
    """Write t = floor(g/s + u) with u uniform in [0, 1): 1 with probability g/s, or -1 with probability -g/s.

    The values are shifted by one, so that the conversion to an integer, which truncates, is the floor.
    """
    raw = bits.random_raw(-(-values.size // 2))
    raw &= MANTISSAS
    raw |= ONE_TO_TWO
    shares = values / s
    np.clip(shares, -1, 1, out=shares)
    shares += raw.view(np.float32)[: values.size]  # 1 + u
    np.subtract(shares.astype(np.uint8), 1, out=out.view(np.uint8))


def _spread(flat: FloatArray, *, clips: bool) -> tuple[float, float]:
    """The largest magnitude, which is NaN if there is a NaN, and the standard deviation; one pass over the memory.

    The second is 0 unless the caller ``clips``, which alone needs it.

    sigma^2 = E[(x - p)^2] - (E[x] - p)^2 with the mean p of the first block. As that block is a share f of the tensor,
    (E[x] - p)^2 is at most (1 - f) / f · sigma^2: a mean far from zero does not cancel what is left.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow is bounded by LARGEST_SCALE later
        pilot = flat[:BLOCK].sum() / np.float32(min(BLOCK, flat.size))
        if compiled.takes(flat):
            largest, total, squares = compiled.vectors.spread(flat, pilot)
        else:
            largest, total, squares = _moments(flat, pilot, sums=clips)
    if not clips or math.isnan(largest):
        return largest, 0.0
    mean = total / flat.size
    return largest, math.sqrt(max(0.0, squares / flat.size - mean * mean))


def _moments(flat: FloatArray, pilot: np.float32, *, sums: bool) -> tuple[float, float, float]:
    """The largest magnitude, and the sums of x - p and of its square, which are 0 without ``sums``."""
    largest = total = squares = 0.0
    for block in _blocks(flat.size):
        piece = flat[block]
        largest = max(float(piece.max()), -float(piece.min()), largest)
        if math.isnan(largest):
            break
        if sums:
            off = piece - pilot
            total += lane_sum(off)
            np.square(off, out=off)
            squares += lane_sum(off)
    return largest, total, squares


def _blocks(size: int) -> Iterator[slice]:
    for first in range(0, size, BLOCK):
        yield slice(first, first + BLOCK)
