"""TernGrad: an update becomes one scale and one trit an element, right on average (Wen et al. 2017).

Knows flat float32 arrays; needs nothing but numpy, and works in blocks, so that a device's memory holds the
model once more, not four times more.
"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

BLOCK = 65_536  # elements at a time; the largest temporary is a block in float64, 512 KiB
LARGEST_SCALE = 65_504.0  # the protocol's bound
SMALLEST_SCALE = 2.0**-126  # below it a float32 counts as zero everywhere in the protocol

FloatArray = npt.NDArray[np.float32]
Trits = npt.NDArray[np.int8]


def ternarize(values: FloatArray, *, clip_sigma: float, rng: np.random.Generator) -> tuple[np.float32, Trits]:
    """(s, t) of one tensor, t in {-1, 0, 1} element by element: E[s·t] is the clipped tensor.

    t = sign(g)·b with P(b = 1) = |g| / s, where g is the tensor clipped to ±c·sigma and s its largest magnitude (the
    `ternarize` and the gradient clipping of Wen et al. 2017). `clip_sigma` is c; 0 turns clipping off. Any shape is
    taken, and the trits have the same. Raises `ValueError` for a NaN or an infinity.
    """
    flat = values.reshape(-1)
    trits = np.zeros(flat.shape, np.int8)
    s = scale(flat, clip_sigma=clip_sigma)
    if s > 0:
        for block in _blocks(flat.size):
            trits[block] = _draw(flat[block], s, rng)
    return s, trits.reshape(values.shape)


def scale(values: FloatArray, *, clip_sigma: float) -> np.float32:
    """The scale s = min(max|g|, c·sigma), sigma being the standard deviation of the tensor's elements.

    At most 65,504, and 0 where it would be too small for the protocol. A tensor whose elements are all the same has
    sigma 0 and nothing to clip: its s is max|g|. Raises `ValueError` for a NaN or an infinity.
    """
    flat = values.reshape(-1)
    if not flat.size:
        return np.float32(0)
    largest = max(float(flat.max()), -float(flat.min()))
    if not math.isfinite(largest):
        raise ValueError("cannot ternarize: the tensor has a NaN or an infinity")
    sigma = _standard_deviation(flat) if clip_sigma > 0 else 0.0
    bounded = min(largest, LARGEST_SCALE, clip_sigma * sigma if sigma > 0 else math.inf)
    return np.float32(bounded) if bounded >= SMALLEST_SCALE else np.float32(0)


def _draw(values: FloatArray, s: np.float32, rng: np.random.Generator) -> Trits:
    probability = np.abs(values)
    probability /= s  # above 1 for what is clipped: drawn for certain
    drawn = rng.random(values.shape, dtype=np.float32) < probability
    trits = np.sign(values).astype(np.int8)
    trits *= drawn
    return trits


def _standard_deviation(flat: FloatArray) -> float:
    # Two passes in float64: the sum of a block never cancels, and a constant tensor has exactly 0.
    mean = sum(float(flat[block].sum(dtype=np.float64)) for block in _blocks(flat.size)) / flat.size
    squares = 0.0
    for block in _blocks(flat.size):
        off = flat[block].astype(np.float64)
        off -= mean
        squares += float(off @ off)
    return math.sqrt(squares / flat.size)


def _blocks(size: int) -> Iterator[slice]:
    for first in range(0, size, BLOCK):
        yield slice(first, first + BLOCK)
