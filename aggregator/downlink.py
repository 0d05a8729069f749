"""What devices are sent: the block that brings the published vector towards the server's own, and the snapshot."""

from broker.schema import Schema, Vector, vector_digest
from broker.ternary import TERNARY, ZSTD, Block, encode, nearest_block


def next_block(schema: Schema, codec: str, published: Vector, target: Vector) -> Block:
    """A block from ``published`` towards ``target``; what it does not carry stays in their difference, for the next.

    That difference is the downlink's residual: error feedback (Seide et al. 2014; Karimireddy et al. 2019,
    algorithm 1), for which the ternary form must be a contraction, see ``broker.ternary.nearest``.
    """
    change = target - published
    return nearest_block(schema, change) if codec == TERNARY else Block.of_float32(schema, change)


def encoded_block(block: Block) -> tuple[str, bytes]:
    """(encoding, body) of a block as it travels."""
    return ZSTD, encode(block.content, ZSTD)


def snapshot_body(schema: Schema, vector: Vector) -> tuple[str, bytes, int]:
    """(encoding, body, content length) of a snapshot: schema bytes, then the vector.

    Float32 weights hardly compress, so zstd would cost every device time for a few percent: raw.
    """
    content = schema.encoded + vector.tobytes()
    return "raw", content, len(content)


__all__ = ["encoded_block", "next_block", "snapshot_body", "vector_digest"]
