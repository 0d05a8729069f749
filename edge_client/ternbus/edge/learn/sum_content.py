"""What a device adds to a private sum, as values; `private_sum.py` draws it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ternbus.broker.protocol.schema import TERNARY, Schema, Vector
from ternbus.broker.sums.terms import Terms
from ternbus.broker.sums.words import DENSE_STEPS


@dataclass(frozen=True, slots=True, kw_only=True)
class SumJob:
    """The terms that an update is made by, and the context that binds it to version, model, plan and terms."""

    terms: Terms = field(repr=False)
    context: bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SumContent:
    """What one device adds to a sum: its words, not masked, and a seed for the mask of each helper of the terms."""

    words: bytes = field(repr=False)
    seeds: tuple[bytes, ...] = field(repr=False)


def value(schema: Schema, terms: Terms, words: bytes) -> Vector:
    """What the words of one device carry, a float32 vector in units of ω·change."""
    ternary, plain = terms.layout.unpack(terms.layout.read(words))
    total = np.empty(schema.elements, np.float32)
    for segment, reference in zip(schema.segments, terms.scales, strict=True):
        is_ternary = segment.tensor.role == TERNARY
        values = (ternary if is_ternary else plain)[segment.offset : segment.offset + segment.tensor.elements]
        total[segment.start : segment.stop] = level_value(
            values, reference, terms.levels if is_ternary else DENSE_STEPS
        )
    return total


def level_value(drawn: npt.NDArray[np.signedinteger[Any]], reference: float, steps: int) -> Vector:
    """What integers from -steps to steps stand for, in float32, where ``steps`` stand for the reference."""
    return (drawn * (reference / steps)).astype(np.float32)
