"""The updates per second that an aggregator merges with a real broker and disk, compared with a minimal skeleton.

    python -m benchmarks.ingest [--json] [--parameters 100000 1200000 10000000] [--frame-kib 120 256] [--engine auto]

Senders in two other processes prepare signed updates and keep a window of unanswered ones; an update counts when its
receipt has arrived. The skeleton does only what every aggregator must do: verify, hash, append, one fsync for many
updates, decompress, add, sign a receipt. Both run with the same broker and the same senders in the same run, so their
ratio is comparable between machines.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.program import cpu_s, one_thread, options, print_result, resident_mb
from benchmarks.sender import SENDERS, Answered, Load, Target, await_retained, device, identity, run_load
from ternbus.aggregator.core import records
from ternbus.aggregator.merge.accumulator import COMPILED
from ternbus.aggregator.shell import administration
from ternbus.aggregator.store import status as statuses
from ternbus.aggregator.store.ledger import LEDGER, Ledger
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.identity import enroll_proof
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import ZSTD, encode
from ternbus.broker.server.running import Engine, choose, start
from ternbus.edge.learn.compress import compress
from ternbus.edge.plan.plan import Plan

BUFFER: Final = 64
FEDERATION: Final = "bench"
WARM_UP: Final = 0.1  # share of the updates that are left out
RECEIPT_WITHIN_S: Final = 60.0


def shapes(parameters: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a model of about ``parameters`` parameters: three matrices with biases."""
    side = int((parameters / 3) ** 0.5)
    return {f"{name}.{kind}": shape for name in "abc" for kind, shape in (("weight", (side, side)), ("bias", (side,)))}


def prepared_body(parameters: int) -> tuple[str, bytes]:
    """(codec, encoded block) for all senders; the receiver's cost does not depend on its values."""
    schema = Schema.of(shapes(parameters))
    change = np.random.default_rng(0).normal(0.0, 0.001, schema.elements).astype(np.float32)
    block = compress(schema, Plan(), change, None, 0).block
    return block.codec, encode(block.content, ZSTD)


def rate(answered: Sequence[Answered]) -> float:
    """The receipts per second, without the first tenth."""
    arrivals = sorted(arrived for one in answered for _, arrived in one.times)
    skipped = int(len(arrivals) * WARM_UP)
    return (len(arrivals) - skipped - 1) / (arrivals[-1] - arrivals[skipped])


def percentile(answered: Sequence[Answered], share: float) -> float:
    """A percentile of the time from publishing an update to its receipt, in milliseconds."""
    waits = sorted(arrived - sent for one in answered for sent, arrived in one.times)
    return 1000 * waits[min(len(waits) - 1, int(share * len(waits)))]


def prepare(directory: Path, url: str, load: Load) -> None:
    """Make an aggregator with enrolled devices."""
    model = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes(load.parameters).items()}
    settings = {
        "merge.buffer_size": BUFFER,
        "merge.max_wait_s": 5,
        "staleness.max": 1_000_000,
        "staleness.discount": "constant",
    }
    administration.create(directory, federation=FEDERATION, broker=url, model=model, settings=settings)
    ledger = Ledger(directory / LEDGER)
    ledger.write(
        records.DeviceEnrolled(
            device=device(number),
            public=identity(number).public,
            proof=enroll_proof("bench", FEDERATION, device(number), identity(number).public),
        )
        for number in range(load.updates)
    )
    ledger.close()


def measure_aggregator(url: str, about: Target, load: Load, folder: Path) -> dict[str, Any]:
    """Measure updates per second, delay of receipts, memory and size of the ledger."""
    directory = folder / f"aggregator-{load.parameters}-{load.frame_bytes}-{load.per_s:.0f}"
    prepare(directory, url, load)
    command = [sys.executable, "-m", "ternbus", "aggregator", "run", str(directory)]
    process = subprocess.Popen(command, stderr=(folder / "aggregator.log").open("ab"))
    try:
        await_retained(about, topics.status(FEDERATION))  # the aggregator is connected
        before = cpu_s(process.pid)
        answered = run_load(about, load)
        spent, peak = cpu_s(process.pid) - before, resident_mb(process.pid)
    finally:
        process.terminate()
        process.wait(60)
    found = statuses.read(directory)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return {
        "updates_per_s": rate(answered),
        "p50_ms": percentile(answered, 0.5),
        "p99_ms": percentile(answered, 0.99),
        "accepted": found["counts"]["accepted"],
        "merged": found["counts"]["merged"],
        "versions": found["version"],
        "cpu_ms": 1000 * spent / load.updates,
        "peak_mb": peak,
        "ledger_mb": size / 2**20,
    }


def measure_skeleton(url: str, about: Target, load: Load, folder: Path) -> float:
    """The updates per second of the skeleton with the same load."""
    command = [sys.executable, "-m", "benchmarks.skeleton", url, str(load.parameters), str(folder / "skeleton.journal")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # printed after it has subscribed
        return rate(run_load(about, load))
    finally:
        process.terminate()
        process.wait(60)


def measure(parameters: int, frame_bytes: int, engine: Engine, folder: Path) -> dict[str, Any]:
    """Measure the skeleton, the aggregator at full load, and the aggregator at half of that load."""
    updates = {100_000: 6000, 1_200_000: 2400, 10_000_000: 320}.get(parameters, 1000)
    window = 32 if parameters < 5_000_000 else 8
    load = Load(parameters=parameters, updates=updates, window=window, frame_bytes=frame_bytes)
    place = folder / f"broker-{parameters}-{frame_bytes}"
    with start(choose(engine), host="127.0.0.1", port=0, directory=place) as broker:
        about = Target(broker.endpoint.host, broker.endpoint.port, FEDERATION, *prepared_body(parameters))
        bare = measure_skeleton(broker.url, about, load, folder)
        full = measure_aggregator(broker.url, about, load, folder)
        half_load = replace(load, updates=updates // 2, per_s=full["updates_per_s"] / 2)
        half = measure_aggregator(broker.url, about, half_load, folder)
        broker_mb = resident_mb(broker.pid)
    return {
        "parameters": Schema.of(shapes(parameters)).elements,
        **asdict(load),
        "compiled": COMPILED,  # whether aggregator/native is installed
        "broker_peak_mb": broker_mb,
        "skeleton_per_s": bare,
        "ratio": full["updates_per_s"] / bare,
        "full": full,
        "half": half,
    }


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table."""
    print(f"buffer {BUFFER}, {SENDERS} sender processes, {os.cpu_count()} cores for all processes")
    print(
        f"{'parameters':>11} {'frames':>8} {'skeleton/s':>11} {'merged/s':>9} {'ratio':>6}"
        f" {'CPU ms':>7} {'half load p50':>14} {'p99, ms':>8} {'peak MB':>8} {'broker MB':>10} {'ledger MB':>10}"
    )
    for row in rows:
        full, half = row["full"], row["half"]
        print(
            f"{row['parameters']:>11,} {row['frame_bytes'] // 1024:>4} KiB {row['skeleton_per_s']:>11.0f}"
            f" {full['updates_per_s']:>9.0f} {row['ratio']:>6.2f}"
            f" {full['cpu_ms']:>7.2f} {half['p50_ms']:>14.1f} {half['p99_ms']:>8.1f} {full['peak_mb']:>8.0f}"
            f" {row['broker_peak_mb']:>10.0f} {full['ledger_mb']:>10.1f}"
        )


def main() -> None:
    """Measure and print."""
    parser = options(__doc__, Engine)
    parser.add_argument(
        "--parameters", type=int, nargs="+", default=[100_000, 1_200_000, 10_000_000], help="sizes of the model"
    )
    parser.add_argument("--frame-kib", type=int, nargs="+", default=[120, 256], help="maximum sizes of a frame")
    arguments = parser.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            measure(parameters, 1024 * kib, arguments.engine, Path(folder))
            for parameters in arguments.parameters
            for kib in arguments.frame_kib
        ]
    print_result(rows, as_json=arguments.json, show=lambda: show(rows))


if __name__ == "__main__":
    main()
