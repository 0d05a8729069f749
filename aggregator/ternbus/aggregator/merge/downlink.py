"""The content of deltas and snapshots: the block that moves the published vector towards the server's vector."""

from ternbus.broker.protocol.schema import Schema, Vector
from ternbus.broker.protocol.ternary import RAW, TERNARY, ZSTD, Block, encode, nearest_block


def next_block(schema: Schema, codec: str, published: Vector, target: Vector) -> Block:
    """A block from ``published`` towards ``target``; what it does not carry stays in their difference, for the next.

    That difference is the downlink's residual: error feedback (Seide et al. 2014; Karimireddy et al. 2019,
    algorithm 1), for which the ternary form must be a contraction, see ``ternbus.broker.protocol.ternary.nearest``.
    """
    change = target - published
    return nearest_block(schema, change) if codec == TERNARY else Block.of_float32(schema, change)


def encoded_block(block: Block) -> tuple[str, bytes]:
    """(encoding, body) of a block as it travels."""
    return ZSTD, encode(block.content, ZSTD)


def snapshot_body(schema: Schema, vector: Vector) -> tuple[str, bytes, int]:
    """(encoding, body, content length) of a snapshot: schema bytes, then the vector.

    zstd finds a sixth of float32 weights, in their exponents; where it finds less than a twentieth they travel raw.
    """
    content = schema.encoded + vector.tobytes()
    body = encode(content, ZSTD)
    return (ZSTD, body, len(content)) if len(body) < 0.95 * len(content) else (RAW, content, len(content))
