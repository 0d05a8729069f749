"""The part of `ternbus edge check` that is about private sums: what an update would be by terms of its own."""

import time
from dataclasses import dataclass

import numpy as np

from ternbus.broker.protocol.schema import Schema, Vector
from ternbus.broker.sums.terms import MASK, Terms
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.private_sum import encode
from ternbus.edge.learn.sum_content import value
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.sum_policy import MIN

BITS = 6
NOTE = (
    f'the plan has codec = "private": devices join with --private --helper KEY; this length is that of {BITS} bits for '
    "a value, and the federation's terms decide"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateTrial:
    """The words of an update by scales that fit its change, the time to draw and read them, and whether they agree."""

    words: int  # bytes
    seconds: float
    agrees: bool


def trial(schema: Schema, plan: Plan, change: Vector, samples: int) -> PrivateTrial:
    """Draw and read a private update of this change, as a device and a sum of one would."""
    scales = [float(np.abs(change[each.start : each.stop]).max()) for each in schema.segments]
    terms = Terms(
        kind=MASK,
        bits=BITS,
        levels=1,
        helpers=(),
        min=MIN,
        ternary=schema.ternary_elements,
        dense=schema.dense_elements,
        scales=tuple(scales),
        samples=0.0,
    )
    began = time.perf_counter()
    content = encode(schema, terms, plan, change, samples=samples, random_source=RandomSource())
    read = value(schema, terms, content.words)
    bounds = np.repeat(scales, [each.tensor.elements for each in schema.segments])
    agrees = bool((np.abs(read - change) <= bounds * (1 + 1e-6)).all())  # a draw lies beside what it stands for
    return PrivateTrial(words=len(content.words), seconds=time.perf_counter() - began, agrees=agrees)
