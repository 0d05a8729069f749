"""The speed of encoding and decoding an update of 10^4 to 10^8 parameters, compared with float32 addition.

    python -m benchmarks.codec [--json] [--parameters 10000 1200000 …]

Encoding is the device's work: clip, ternarize, pack, zstd. Decoding is the aggregator's: decompress, check, look up,
add to a float32 sum. If `aggregator/native` is installed, decoding is also measured with its compiled loop. The
baseline adds one float32 vector to another, which reads and writes the same memory. GB/s count the update as float32.
"""

import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Final

import numpy as np

from benchmarks.program import options, print_result
from ternbus.aggregator.merge.accumulator import COMPILED
from ternbus.aggregator.merge.exact import ExactSum
from ternbus.broker.protocol.schema import Schema, Vector
from ternbus.broker.protocol.ternary import TERNARY, ZSTD, Block, encode
from ternbus.edge.learn.compress import compress
from ternbus.edge.plan.plan import Plan

SIZES: Final = (10_000, 100_000, 1_200_000, 10_000_000, 100_000_000)
BUDGET_S: Final = 2.0  # for each figure
RUNS_MAX: Final = 200


@dataclass(frozen=True, slots=True)
class Row:
    """Medians, in milliseconds."""

    parameters: int
    add_ms: float
    encode_ms: float
    decode_ms: float
    decode_compiled_ms: float | None
    encode_temporary_mb: float
    decode_temporary_mb: float

    def gb_per_s(self, milliseconds: float) -> float:
        return 4e-6 * self.parameters / milliseconds


def median_ms(function: Callable[[], object]) -> float:
    """The median of as many runs as the budget allows, after one warm-up run."""
    function()
    times: list[float] = []
    end = time.perf_counter() + BUDGET_S
    while len(times) < 3 or (time.perf_counter() < end and len(times) < RUNS_MAX):
        begun = time.perf_counter()
        function()
        times.append(time.perf_counter() - begun)
    return 1000 * statistics.median(times)


def temporary_mb(function: Callable[[], object], result_bytes: int) -> float:
    """The peak of a call's allocations in MiB, without its result."""
    tracemalloc.start()
    try:
        kept = function()
        _, peak = tracemalloc.get_traced_memory()
        del kept
    finally:
        tracemalloc.stop()
    return (peak - result_bytes) / 2**20


def measure(parameters: int) -> Row:
    """Measure one size, with a Gaussian change of one tensor."""
    schema = Schema.of({"weight": (parameters,)})
    change = np.random.default_rng(0).normal(0.0, 0.01, parameters).astype(np.float32)
    total: Vector = np.zeros(parameters, dtype=np.float32)
    plain, compiled = ExactSum(schema, compiled=False), ExactSum(schema)

    def encode_update() -> bytes:
        return encode(compress(schema, Plan(), change, None, 7).block.content, ZSTD)

    body = encode_update()

    def decode_update(into: ExactSum = plain) -> None:
        into.add(Block.read(schema, TERNARY, ZSTD, body), 600.0)

    def add() -> None:
        np.add(total, change, out=total)

    # an update also exists as trits and as packed bytes: inputs of the next step, so not counted as temporaries
    kept = parameters + parameters // 5 + len(body)
    return Row(
        parameters=parameters,
        add_ms=median_ms(add),
        encode_ms=median_ms(encode_update),
        decode_ms=median_ms(decode_update),
        decode_compiled_ms=median_ms(partial(decode_update, compiled)) if COMPILED else None,
        encode_temporary_mb=temporary_mb(encode_update, kept),
        decode_temporary_mb=temporary_mb(decode_update, parameters // 5),
    )


def show(rows: Sequence[Row]) -> None:
    """Print a table."""
    print(
        f"{'parameters':>11} {'add, ms':>9} {'GB/s':>6} {'encode, ms':>11} {'GB/s':>6} {'decode, ms':>11} {'GB/s':>6}"
        f" {'of add':>7} {'compiled':>9} {'temporary MB':>13}"
    )
    for row in rows:
        print(
            f"{row.parameters:>11,} {row.add_ms:>9.3f} {row.gb_per_s(row.add_ms):>6.1f}"
            f" {row.encode_ms:>11.3f} {row.gb_per_s(row.encode_ms):>6.2f}"
            f" {row.decode_ms:>11.3f} {row.gb_per_s(row.decode_ms):>6.2f} {row.decode_ms / row.add_ms:>7.1f}"
            f" {'' if row.decode_compiled_ms is None else format(row.decode_compiled_ms, '.3f'):>9}"
            f" {row.encode_temporary_mb:>6.2f} {row.decode_temporary_mb:>6.2f}"
        )


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--parameters", type=int, nargs="+", default=list(SIZES), help="sizes of the model")
    arguments = parser.parse_args()
    rows = [measure(parameters) for parameters in arguments.parameters]
    print_result([asdict(row) for row in rows], as_json=arguments.json, show=lambda: show(rows))


if __name__ == "__main__":
    main()
