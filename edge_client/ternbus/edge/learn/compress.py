"""Compression of a local change into a block to send and a residual to keep: TernGrad or float32, by the plan."""

from dataclasses import dataclass

import numpy as np

from ternbus.broker.protocol.schema import Schema, Vector
from ternbus.broker.protocol.ternary import FLOAT32, Block, dense_elements, nearest_block
from ternbus.edge.learn.terngrad import ternarize
from ternbus.edge.plan.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Compressed:
    """A block, and the residual that it does not carry (None is zero)."""

    block: Block
    residual: Vector | None


def compress(schema: Schema, plan: Plan, change: Vector, residual: Vector | None, seed: int) -> Compressed:
    """Block and new residual of ``change + residual``, both float32 vectors of the schema's length.

    Without error feedback the ternary block is random and unbiased (Wen et al. 2017), and there is no residual. With
    error feedback the block is the nearest one, and the residual is added to the next change (Karimireddy et al. 2019,
    algorithm 1).
    """
    total = change if residual is None else change + residual
    if plan.codec == FLOAT32:
        block = Block.of_float32(schema, total)
    elif plan.error_feedback:
        block = nearest_block(schema, total)
    else:
        block = _terngrad(schema, total, plan.clip_sigma, seed)
    return Compressed(block=block, residual=total - block.value() if plan.error_feedback else None)


def _terngrad(schema: Schema, total: Vector, clip_sigma: float, seed: int) -> Block:
    bits = np.random.SFC64(seed)
    trits = np.empty(schema.ternary_elements, dtype=np.int8)
    scales = []
    for segment in schema.ternary:
        place = trits[segment.offset : segment.offset + segment.tensor.elements]
        scale, _ = ternarize(total[segment.start : segment.stop], clip_sigma=clip_sigma, bits=bits, out=place)
        scales.append(float(scale))
    return Block.of_trits(schema, scales, trits, dense_elements(schema, total))
