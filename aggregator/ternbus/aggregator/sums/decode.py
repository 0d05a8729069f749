"""Decoding of a set's sum: from words to integers, which are checked, and then to a block with a weight.

With one level of draws and no differential privacy: block = S T / k / (Omega / 255), T the sum of the set's integers,
Omega that of its devices' weights in steps of 1/255. With `dp` = "sum" an integer is a draw of the Poisson binomial
mechanism (Chen, Ozgur & Kairouz 2022, algorithm 2), and the block is S T / (2 k theta) / n.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.plan_keys import SUM
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import Block
from ternbus.broker.sums.terms import Terms
from ternbus.broker.sums.words import BUCKETS, DENSE_STEPS, WEIGHT_MIN, WEIGHT_STEPS, Integers, Words

_LANE: Final = np.arange(256).astype(np.uint8).view(np.int8).astype(np.int64)  # signed, in the order of its bits
RANGE: Final = "sum-out-of-range"  # why a set is dropped: a device or a helper did not keep to the protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class SetSum:
    """What a set comes to: its mean change as a block, which weighs ``weight`` / 255 devices.

    ``buckets`` has shape (tensors, 7): how many devices' own scales were in which octave of the terms'.
    """

    block: Block
    weight: int
    buckets: Integers


def decode(terms: Terms, schema: Schema, total: Words, devices: int) -> SetSum:
    """Read the sum of the words of so many devices, without masks; ProtocolError where it cannot be one.

    No honest set fails. A sum that passes may still be another than the devices' updates: each device, and each
    helper, can move it to whatever as many devices could have sent.
    """
    ternary, plain = terms.layout.unpack(total)
    dense, weight, buckets = np.split(plain, [terms.dense, terms.dense + 1])
    private = terms.dp == SUM
    steps = terms.levels if private else DENSE_STEPS
    _check(ternary, devices * terms.levels, "a ternary element")
    _check(dense, devices * steps, "a dense element")
    omega, counts = int(weight[0]), buckets.reshape(-1, BUCKETS)
    lowest = WEIGHT_STEPS if private or terms.samples == 0 else WEIGHT_MIN
    if not devices * lowest <= omega <= devices * WEIGHT_STEPS:
        raise ProtocolError(RANGE, f"the weight of {devices} devices is {omega}")
    if (counts < 0).any() or (counts.sum(axis=1) != (0 if private else devices)).any():
        raise ProtocolError(RANGE, f"the buckets of a tensor do not count {devices} devices")
    factor = WEIGHT_STEPS / omega
    change = np.empty(schema.elements, np.float32)
    scales = dict(zip(schema.segments, terms.scales, strict=True))
    for segment in schema.ternary:  # each is one of the 256 values that a lane has
        own = ternary[segment.offset :][: segment.tensor.elements]
        values = (scales[segment] * _LANE / terms.ternary_steps * factor).astype(np.float32)
        np.take(values, own.view(np.uint8), out=change[segment.start : segment.stop], mode="clip")  # without a buffer
    for segment in schema.dense:
        numbers = dense[segment.offset :][: segment.tensor.elements]
        change[segment.start : segment.stop] = scales[segment] * numbers / terms.dense_steps * factor
    return SetSum(block=Block.of_float32(schema, change), weight=omega, buckets=counts)


def _check(values: npt.NDArray[np.signedinteger[Any]], most: int, what: str) -> None:
    if values.size and max(int(values.max()), -int(values.min())) > most:
        raise ProtocolError(RANGE, f"the sum of {what} is beyond {most}")
