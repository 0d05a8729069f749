"""TernGrad: unbiased quantization of a tensor to one scale and one trit per element (Wen et al. 2017).

The compiled loops need no memory beside the trits. Without them it works in blocks, so that a device needs memory for
one more copy of the model, not for four, and a block stays in the processor's cache: the largest temporary array is one
of float32 or random bits, 256 KiB.
"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ternbus.broker.protocol import compiled
from ternbus.broker.protocol.lane_sum import BLOCK, lane_sum

LARGEST_SCALE = 65_504.0  # the protocol's bound
SMALLEST_SCALE = 2.0**-100  # its product with 2^-24 is no subnormal number; a smaller one moves no weight but near 0
EPSILON = 2.0**-20
ONE_TO_TWO = np.uint64(0x3F800000_3F800000)  # the exponent of two float32 in [1, 2)
MANTISSAS = np.uint64(0x007FFFFF_007FFFFF)
BELOW_ONE = np.float32(1 - 2**-24)  # u is in the middle of its step: rounding to 23 bits has no bias
GENERATORS = 4  # side by side, each for a quarter of CHUNK elements
CHUNK = 1024  # elements; two by each number of 64 bits

FloatArray = npt.NDArray[np.float32]
Trits = npt.NDArray[np.int8]
Packed = npt.NDArray[np.uint8]
States = npt.NDArray[np.uint64]  # (4, 4): a row for each generator


def random_states(seed: int) -> States:
    """Where the random numbers of `ternarize` begin: four generators, side by side twice as fast in the compiled loop.

    They are Small Fast Chaotic 64 (C. Doty-Humphrey, PractRand, 2010), as `numpy.random.SFC64` has it: three words,
    here hashed from the seed, and a counter.
    """
    states = np.ones((GENERATORS, 4), np.uint64)
    words = np.random.SeedSequence(seed).generate_state(3 * GENERATORS, np.uint64)
    states[:, :3] = words.reshape(GENERATORS, 3)
    return states


def ternarize(
    values: FloatArray, *, clip_sigma: float, states: States, out: Trits | None = None
) -> tuple[np.float32, Trits]:
    """(s, t) of one tensor, t in {-1, 0, 1} element by element: E[s·t] is the clipped tensor.

    t = sign(g)·b with P(b = 1) = |g| / s, where g is the tensor clipped to ±c·sigma and s its largest magnitude (the
    `ternarize` and the gradient clipping of Wen et al. 2017). `clip_sigma` is c; 0 turns clipping off. `states` are
    `random_states`, which go on. The tensor can have any shape, and the trits have the same. If `out`, a flat int8
    array, is given, the trits are written to it. Raises `ValueError` for a NaN or an infinity.
    """
    flat = values.reshape(-1)
    trits = np.empty(flat.shape, np.int8) if out is None else out
    s = scale(flat, clip_sigma=clip_sigma)
    if s > 0:
        generator = np.random.SFC64(0)  # goes on from each state in turn
        for block in _blocks(flat.size):
            _draw(flat[block], s, _raw(generator, states, -(-flat[block].size // CHUNK)), trits[block])
    else:
        trits[:] = 0
    return s, trits.reshape(values.shape)


def draw_packed(
    packed: Packed,
    first: int,
    values: FloatArray,
    start: FloatArray | None,
    *,
    s: np.float32,
    states: States,
) -> None:
    """Pack the trits that `ternarize` draws of ``values - start``, or of ``values``, as the trits from ``first`` on.

    For arrays that the compiled loops take. ``packed`` has trits of 0 there.
    """
    if s > 0:
        compiled.vectors.draw_packed(packed, first, values, start, states, s)


def scale(values: FloatArray, *, clip_sigma: float) -> np.float32:
    """The scale s = min(max|g|, c·sigma), sigma being the standard deviation of the tensor's elements.

    At most 65,504, and 0 in place of one below 2^-100. A tensor of equal elements has sigma 0 and is not
    clipped: its s is max|g|. Raises `ValueError` for a NaN or an infinity.
    """
    flat = values.reshape(-1)
    if compiled.takes(flat):
        return scale_of_change(flat, None, clip_sigma=clip_sigma)[0]
    if not flat.size:
        return np.float32(0)
    return _bounded(*_moments(flat, sums=clip_sigma > 0), flat.size, clip_sigma)


def scale_of_change(values: FloatArray, start: FloatArray | None, *, clip_sigma: float) -> tuple[np.float32, bool]:
    """The `scale` of ``values - start``, or of ``values``; and whether ``values`` are what a training may come to.

    For arrays that the compiled loops take.
    """
    if not values.size:
        return np.float32(0), True
    largest, total, squares, is_bounded = compiled.vectors.moments(values, start)
    if not is_bounded:
        return np.float32(0), False
    return _bounded(largest, total, squares, values.size, clip_sigma), True


def _bounded(largest: float, total: float, squares: float, count: int, clip_sigma: float) -> np.float32:
    """The scale by `_moments`."""
    if not math.isfinite(largest):
        raise ValueError("cannot ternarize: the tensor has a NaN or an infinity")
    mean, sigma = total / count, 0.0
    if clip_sigma > 0:
        sigma = math.sqrt(max(0.0, squares / count - mean * mean))
    clips = sigma > largest * EPSILON  # a smaller sigma is float32's rounding, and nothing to clip
    bounded = min(largest, LARGEST_SCALE, clip_sigma * sigma if clips else math.inf)
    return np.float32(bounded) if bounded >= SMALLEST_SCALE else np.float32(0)


def _raw(generator: np.random.SFC64, states: States, chunks: int) -> npt.NDArray[np.uint64]:
    """The random numbers of CHUNK elements each: a quarter by each generator."""
    raw = np.empty((chunks, GENERATORS, CHUNK // 2 // GENERATORS), np.uint64)
    about = generator.state
    for place, state in enumerate(states):
        about["state"]["state"] = state
        generator.state = about
        raw[:, place] = generator.random_raw(raw[:, place].size).reshape(chunks, -1)
        state[:] = generator.state["state"]["state"]
    return raw


def _draw(values: FloatArray, s: np.float32, raw: npt.NDArray[np.uint64], out: Trits) -> None:
    """Write t: the sign of g where |g| > u·s, u = (2k + 1) / 2^24 uniform in (0, 1); else 0. Overwrites ``raw``."""
    raw &= MANTISSAS
    raw |= ONE_TO_TWO
    bounds = raw.reshape(-1).view(np.float32)[: values.size]
    bounds -= BELOW_ONE
    bounds *= s
    np.greater(values, bounds, out=out.view(np.bool_))
    np.negative(bounds, out=bounds)
    out -= (values < bounds).view(np.int8)


def _moments(flat: FloatArray, *, sums: bool) -> tuple[float, float, float]:
    """The largest magnitude, which is NaN if there is a NaN, and the sums of x - p and of its square: in one pass.

    The sums are 0 without ``sums``. p is the mean of the first block: sigma^2 = E[(x - p)^2] - (E[x] - p)^2. As that
    block is a share f of the tensor, (E[x] - p)^2 is at most (1 - f) / f · sigma^2: a mean far from zero does not
    cancel what is left.
    """
    largest = total = squares = 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow is bounded by LARGEST_SCALE later
        pilot = np.float32(lane_sum(flat[:BLOCK]) / min(BLOCK, flat.size))
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
