"""The cost of a sealed update for device and aggregator, compared with the same update unsealed.

    python -m benchmarks.seal [--json] [--parameters 1200000 …]

The device makes frames of a change: clip, ternarize, pack, zstd, seal, split, sign. The aggregator reads them:
signatures, digests, unseal, decompress, check, add. Runs with and without sealing alternate. The figures are medians
of CPU time in one thread, without network and disk, which are the same for both.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np

from benchmarks.program import options, print_result
from ternbus.aggregator.merge.accumulator import Accumulator
from ternbus.broker.protocol.frame import FRAME_BYTES, parse
from ternbus.broker.protocol.identity import Identity, seal
from ternbus.broker.protocol.messages import Update
from ternbus.broker.protocol.parts import cut
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import Block
from ternbus.edge.core.state import prepare, sealed
from ternbus.edge.learn.compress import compress
from ternbus.edge.plan.plan import Plan

BUDGET_S: Final = 10.0  # for each size
RUNS_MAX: Final = 200
SEQ: Final = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The results for one size: medians of CPU time in milliseconds, and bytes of all frames of an update."""

    parameters: int
    device_plain_ms: float
    device_sealed_ms: float
    aggregator_plain_ms: float
    aggregator_sealed_ms: float
    plain_bytes: int
    sealed_bytes: int


@dataclass(frozen=True, slots=True)
class Rig:
    """A device and an aggregator with the same schema."""

    schema: Schema
    device: Identity
    aggregator: Identity
    accumulator: Accumulator

    def frames(self, change: np.ndarray[tuple[int], np.dtype[np.float32]], *, boxed: bool) -> list[bytes]:
        """The frames that the device sends."""
        block = compress(self.schema, Plan(), change, None, 7).block
        update = prepare(block, seq=SEQ, base=41, samples=600, metrics={}, frame_bytes=FRAME_BYTES)
        if boxed:
            update = sealed(update, self.device.key_id, lambda plain: seal(self.aggregator.public, plain))
        return cut(
            self.device,
            federation="lab",
            sender="pi",
            kind=Update.KIND,
            seq=SEQ,
            meta=update.message.meta(),
            body=update.body,
            frame_bytes=FRAME_BYTES,
        )

    def read(self, frames: list[bytes]) -> None:
        """Verify, decode and add the update as the aggregator does."""
        parts = [parse(frame) for frame in frames]
        for part in parts:
            part.check_authentic(self.device.public)
        update = Update.from_meta(parts[0].meta)
        body = b"".join(part.body for part in parts)
        if update.sealed:
            plain = self.aggregator.unseal(body)
            assert plain[:16] == self.device.key_id + SEQ.to_bytes(8, "little")
            body = plain[16:]
        self.accumulator.add(Block.read(self.schema, update.codec, update.encoding, body), 600.0)


def measure(parameters: int) -> Row:
    """Measure one size, with a Gaussian change of one tensor."""
    schema = Schema.of({"weight": (parameters,)})
    rig = Rig(schema, Identity.generate(), Identity.generate(), Accumulator(schema))
    change = np.random.default_rng(0).normal(0.0, 0.01, parameters).astype(np.float32)
    times: dict[tuple[str, bool], list[float]] = {
        (who, boxed): [] for who in ("device", "aggregator") for boxed in (False, True)
    }
    sizes: dict[bool, int] = {}
    end = time.perf_counter() + BUDGET_S
    for run in range(RUNS_MAX):
        for boxed in (False, True):
            begun = time.thread_time()
            frames = rig.frames(change, boxed=boxed)
            made = time.thread_time()
            rig.read(frames)
            done = time.thread_time()
            sizes[boxed] = sum(map(len, frames))
            if run:  # the first run is a warm-up
                times["device", boxed].append(made - begun)
                times["aggregator", boxed].append(done - made)
        if run >= 3 and time.perf_counter() > end:
            break
    median = {name: 1000 * statistics.median(each) for name, each in times.items()}
    return Row(
        parameters=parameters,
        device_plain_ms=median["device", False],
        device_sealed_ms=median["device", True],
        aggregator_plain_ms=median["aggregator", False],
        aggregator_sealed_ms=median["aggregator", True],
        plain_bytes=sizes[False],
        sealed_bytes=sizes[True],
    )


def show(rows: Sequence[Row]) -> None:
    """Print a table."""
    print(f"{'':>11} {'device, ms':^24} {'aggregator, ms':^24} {'bytes':^24}")
    print(f"{'parameters':>11}" + f" {'plain':>8} {'sealed':>8} {'':>6}" * 3)
    for row in rows:
        pairs = [
            (f"{row.device_plain_ms:.2f}", f"{row.device_sealed_ms:.2f}", row.device_sealed_ms / row.device_plain_ms),
            (
                f"{row.aggregator_plain_ms:.2f}",
                f"{row.aggregator_sealed_ms:.2f}",
                row.aggregator_sealed_ms / row.aggregator_plain_ms,
            ),
            (f"{row.plain_bytes}", f"{row.sealed_bytes}", row.sealed_bytes / row.plain_bytes),
        ]
        print(f"{row.parameters:>11,}" + "".join(f" {a:>8} {b:>8} {100 * (r - 1):>+5.1f}%" for a, b, r in pairs))


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument(
        "--parameters", type=int, nargs="+", default=[10_000, 1_200_000, 10_000_000], help="sizes of the model"
    )
    arguments = parser.parse_args()
    rows = [measure(parameters) for parameters in arguments.parameters]
    print_result([asdict(row) for row in rows], as_json=arguments.json, show=lambda: show(rows))


if __name__ == "__main__":
    main()
