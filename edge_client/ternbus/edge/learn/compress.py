"""Compression of a local change into a block to send and a residual to keep: TernGrad or float32, by the plan."""

from dataclasses import dataclass

import numpy as np

from ternbus.broker.protocol.schema import Schema, Vector
from ternbus.broker.protocol.ternary import FLOAT32, Block, dense_elements, nearest_block, no_trits
from ternbus.edge.learn.local_change import LocalChange, diverged
from ternbus.edge.learn.terngrad import draw_packed, random_states, scale_of_change, ternarize
from ternbus.edge.plan.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Compressed:
    """A block, and the residual that it does not carry (None is zero)."""

    block: Block
    residual: Vector | None


def compress(
    schema: Schema, plan: Plan, change: Vector | LocalChange, residual: Vector | None, seed: int
) -> Compressed:
    """Block and new residual of ``change + residual``, both float32 vectors of the schema's length.

    Without error feedback the ternary block is random and unbiased (Wen et al. 2017), and there is no residual. With
    error feedback the block is the nearest one, and the residual is added to the next change (Karimireddy et al. 2019,
    algorithm 1). Raises `TrainingError` as `LocalChange.vector`.
    """
    if plan.codec != FLOAT32 and not plan.error_feedback and residual is None:
        whole = change if isinstance(change, LocalChange) else LocalChange.of_vector(schema, change)
        return Compressed(block=_terngrad(whole, plan.clip_sigma, seed), residual=None)
    vector = change.vector() if isinstance(change, LocalChange) else change
    total = vector if residual is None else vector + residual
    if plan.codec == FLOAT32:
        block = Block.of_float32(schema, total)
    elif plan.error_feedback:
        block = nearest_block(schema, total)
    else:
        block = _terngrad(LocalChange.of_vector(schema, total), plan.clip_sigma, seed)
    return Compressed(block=block, residual=total - block.value() if plan.error_feedback else None)


def _terngrad(change: LocalChange, clip_sigma: float, seed: int) -> Block:
    schema, states, scales = change.schema, random_states(seed), []
    if change.is_compiled:
        packed = no_trits(schema)
        for segment in schema.ternary:
            values, start = change.pair(segment)
            scale, is_bounded = scale_of_change(values, start, clip_sigma=clip_sigma)
            if not is_bounded:
                raise diverged()
            draw_packed(packed, segment.offset, values, start, s=scale, states=states)
            scales.append(float(scale))
        return Block.of_packed(schema, scales, packed.data, change.dense_elements())
    total, trits = change.vector(), np.empty(schema.ternary_elements, dtype=np.int8)
    for segment in schema.ternary:
        place = trits[segment.offset : segment.offset + segment.tensor.elements]
        scale, _ = ternarize(total[segment.start : segment.stop], clip_sigma=clip_sigma, states=states, out=place)
        scales.append(float(scale))
    return Block.of_trits(schema, scales, trits, dense_elements(schema, total))
