"""The size on the wire of a signed TernGrad update of 1.2 million parameters, raw and with zstd.

    python -m benchmarks.uplink [--json]

The update is Gaussian, like typical changes of weights, and clipped at 2.5 sigma, the default of every task.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.program import options, print_result
from ternbus.broker.link.link import packet_bytes
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import FRAME_BYTES
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.messages import Update
from ternbus.broker.protocol.parts import cut
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import RAW, ZSTD, encode
from ternbus.edge.learn.compress import compress
from ternbus.edge.plan.plan import Plan

SHAPES = {"conv.weight": (64, 32, 3, 3), "conv.bias": (64,), "fc.weight": (1024, 1152), "fc.bias": (1024,)}
ENVELOPE_BYTES = 500  # bound on the size of a part without its body


@dataclass(frozen=True, slots=True)
class Size:
    """The size of the update with one encoding."""

    encoding: str
    parts: int
    frame_bytes: int
    packet_bytes: int
    bits_per_parameter: float
    bound_bytes: float


def measure(encoding: str, seed: int = 0) -> Size:
    """Build the frames of one update and count their bytes."""
    schema = Schema.of(SHAPES, dense=["*.bias"])
    rng = np.random.default_rng(seed)
    change = rng.normal(0.0, 0.01, schema.elements).astype(np.float32)
    block = compress(schema, Plan(clip_sigma=2.5), change, None, seed).block
    update = Update(
        base=41, samples=600, codec=block.codec, encoding=encoding, sealed=False, metrics={"loss": 0.5, "seconds": 9.5}
    )
    frames = cut(
        Identity(bytes(32)),
        federation="lab",
        sender="pi-01",
        kind=update.KIND,
        seq=7,
        meta=update.meta(),
        body=encode(block.content, encoding),
        frame_bytes=FRAME_BYTES,
    )
    total = sum(map(len, frames))
    topic = topics.up("lab", "pi-01", "update")
    return Size(
        encoding=encoding,
        parts=len(frames),
        frame_bytes=total,
        packet_bytes=sum(packet_bytes(topic, len(frame), 5) for frame in frames),
        bits_per_parameter=8 * total / schema.elements,
        bound_bytes=1.6 * schema.ternary_elements / 8 + 4 * schema.dense_elements + ENVELOPE_BYTES * len(frames),
    )


def show(schema: Schema, sizes: Sequence[Size]) -> None:
    """Print a table."""
    print(f"{schema.elements:,} parameters, {schema.dense_elements:,} dense; as float32 {4 * schema.elements:,} bytes")
    print(
        f"{'encoding':<9} {'parts':>5} {'in frames':>14} {'in PUBLISH':>15} {'bits/parameter':>15} {'of float32':>11}"
    )
    for size in sizes:
        share = size.frame_bytes / (4 * schema.elements)
        print(
            f"{size.encoding:<9} {size.parts:>5} {size.frame_bytes:>14,} {size.packet_bytes:>15,}"
            f" {size.bits_per_parameter:>15.3f} {share:>11.2%}"
        )


def main() -> None:
    """Measure and print both encodings."""
    parser = options(__doc__)
    as_json = parser.parse_args().json
    schema = Schema.of(SHAPES, dense=["*.bias"])
    sizes = [measure(encoding) for encoding in (RAW, ZSTD)]
    result = {"parameters": schema.elements, "sizes": [asdict(size) for size in sizes]}
    print_result(result, as_json=as_json, show=lambda: show(schema, sizes))


if __name__ == "__main__":
    main()
