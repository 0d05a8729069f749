"""What a device adds to a private sum, as values; `private_sum.py` draws it."""

from dataclasses import dataclass, field

import numpy as np

from ternbus.broker.protocol.schema import TERNARY, Schema, Vector
from ternbus.broker.sums.terms import Terms


@dataclass(frozen=True, slots=True, kw_only=True)
class SumJob:
    """The terms that an update is made by, and the context that binds it to version, model, plan and terms.

    With `dp` the draws of ``honest`` devices of each sum, this one included, count as noise.
    """

    terms: Terms = field(repr=False)
    context: bytes
    honest: int = 1


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
        steps = terms.ternary_steps if is_ternary else terms.dense_steps
        total[segment.start : segment.stop] = values * (reference / steps)
    return total
