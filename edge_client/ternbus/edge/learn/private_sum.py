"""A change of the model as the values of a private sum: random, unbiased draws in the scales of the terms.

The draws come from the operating system. Numbers that follow from the plan's seed, which the aggregator knows, would
show it a quarter of a device's values in a sum of ten.

There is no residual, with error feedback neither: an update has nothing but what the device learned on its version. The
aggregator could have one device train on a version alone, by terms with a scale of 0, and at learning rate 0 all others
would add nothing to what it has kept until then.
"""

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ternbus.broker.protocol.schema import TERNARY, Schema, Vector
from ternbus.broker.sums.masks import SEED_BYTES, seed_of
from ternbus.broker.sums.terms import Terms
from ternbus.broker.sums.words import BUCKETS, DENSE_FACTOR, DENSE_STEPS, WEIGHT_MIN, WEIGHT_STEPS
from ternbus.edge.learn import terngrad
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.sum_content import SumContent
from ternbus.edge.plan.plan import NO_DP, Plan

BLOCK: Final = 65_536  # elements at a time
OCTAVES: Final = BUCKETS // 2  # the highest bucket

Levels = npt.NDArray[np.int32]


def weight(terms: Terms, plan: Plan, samples: int) -> int:
    """255·ω of a device with so many samples, 64 … 255: ω = n / n_ref, within ¼ and 1, and 1 under privacy."""
    if terms.samples == 0 or plan.dp != NO_DP:
        return WEIGHT_STEPS
    return round(min(max(WEIGHT_STEPS * samples / terms.samples, WEIGHT_MIN), WEIGHT_STEPS))


def encode(
    schema: Schema,
    terms: Terms,
    plan: Plan,
    change: Vector,
    *,
    samples: int,
    random_source: RandomSource,
) -> SumContent:
    """The content for a change of the vector, a float32 array of the schema's length.

    With u = ω·change, a ternary element is q from -k to k with E[S·q/k] = u cut to ±S, a dense one is q with
    E[D·q/2²⁰] = u cut to ±D.
    """
    omega = weight(terms, plan, samples)
    total = change * np.float32(omega / WEIGHT_STEPS)
    ternary = np.empty(terms.ternary, np.int8)
    dense = np.empty(terms.dense, np.int64)
    buckets = np.zeros((len(terms.scales), BUCKETS), np.int64)
    for row, segment, reference in zip(buckets, schema.segments, terms.scales, strict=True):
        values, is_ternary = total[segment.start : segment.stop], segment.tensor.role == TERNARY
        steps = terms.levels if is_ternary else DENSE_STEPS
        out: npt.NDArray[np.signedinteger[Any]] = ternary if is_ternary else dense
        place = out[segment.offset : segment.offset + values.size]
        row[OCTAVES + _bucket(values, reference, plan, is_ternary=is_ternary)] = 1
        for first in range(0, values.size, BLOCK):
            block = slice(first, first + BLOCK)
            place[block] = _drawn(values[block], reference, steps, random_source)
    words = terms.layout.pack(ternary, np.concatenate([dense, [omega], buckets.reshape(-1)]))
    seeds = tuple(seed_of(words, random_source.fresh(SEED_BYTES)) for _ in terms.helpers)
    return SumContent(words=words.tobytes(), seeds=seeds)


def _bucket(values: Vector, reference: float, plan: Plan, *, is_ternary: bool) -> int:
    """log2 of the tensor's own scale relative to the terms', rounded and cut to ±3.

    The own scale is TernGrad's of a ternary tensor, and max|u| of a dense one, whose reference is an eighth of its D.
    """
    own = float(terngrad.scale(values, clip_sigma=plan.clip_sigma) if is_ternary else np.abs(values).max())
    shared = reference if is_ternary else reference / DENSE_FACTOR
    if own == 0:
        return -OCTAVES
    if shared == 0:
        return OCTAVES
    return min(max(round(math.log2(own / shared)), -OCTAVES), OCTAVES)


def _drawn(values: Vector, reference: float, steps: int, random_source: RandomSource) -> Levels:
    """Integers of which E[reference·q/steps] is each value, cut to ±reference. A reference of 0 gives zeros.

    q is the floor of x = steps·value/reference, and one more with the probability of its fraction, in 2^-32.
    """
    if reference == 0:
        return np.zeros(values.size, np.int32)
    shares = values.astype(np.float64)
    shares *= steps / reference
    np.clip(shares, -steps, steps, out=shares)
    low = np.floor(shares)
    shares -= low
    drawn: Levels = low.astype(np.int32)
    drawn += random_source.bits(values.size) < shares * 2.0**32
    return drawn
