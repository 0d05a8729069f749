"""How many updates a second an aggregator merges, through a real broker and onto a disk, beside a bare skeleton.

    python -m benchmarks.ingest [--json] [--parameters 100000 1200000 10000000] [--engine auto]

Senders in two other processes hold signed updates ready and keep a window of them on the way; an update counts when its
receipt has come. The skeleton does what no aggregator can do without: verify, hash, append, one fsync for many,
decompress, add, sign a receipt. Both run on the same broker, with the same senders, in this run, so their ratio
holds on any machine.
"""

import argparse
import json
import multiprocessing
import os
import queue
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from aggregator import home, records
from aggregator import status as statuses
from aggregator.ledger import Ledger
from broker import topics
from broker.frame import FRAME_BYTES
from broker.identity import Identity, enroll_proof
from broker.link import Arrived, Link
from broker.messages import Receipt, Update
from broker.parts import cut
from broker.running import Engine, choose, start
from broker.schema import Schema
from broker.ternary import ZSTD, encode
from edge_client.compress import compress
from edge_client.trainer import Plan

SENDERS: Final = 2
BUFFER: Final = 64
FEDERATION: Final = "bench"
WARM_UP: Final = 0.1  # of the updates, sent before the clock starts
RECEIPT_WITHIN_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Load:
    """What the senders send: ``updates`` devices, one update each, at most ``window`` unanswered in each process."""

    parameters: int
    updates: int
    window: int
    per_s: float = 0.0  # of all senders together; 0 = as fast as receipts come


@dataclass(frozen=True, slots=True)
class Answered:
    """What one sender saw: (sent at, receipt at) of each update, on the machine's monotonic clock."""

    times: list[tuple[float, float]]
    outcomes: dict[str, int]


def shapes(parameters: int) -> dict[str, tuple[int, ...]]:
    """A model of about so many parameters: three matrices and their biases."""
    side = int((parameters / 3) ** 0.5)
    return {f"{name}.{kind}": shape for name in "abc" for kind, shape in (("weight", (side, side)), ("bias", (side,)))}


def identity(number: int) -> Identity:
    """The key of device ``number``; only a benchmark makes keys so."""
    return Identity(number.to_bytes(32, "big"))


def device(number: int) -> str:
    return f"d{number}"


def prepared_body(parameters: int) -> tuple[str, bytes]:
    """(codec, encoded block) that all senders share: its cost to the receiver does not depend on its numbers."""
    schema = Schema.of(shapes(parameters))
    change = np.random.default_rng(0).normal(0.0, 0.001, schema.elements).astype(np.float32)
    block = compress(schema, Plan(), change, None, 0).block
    return block.codec, encode(block.content, ZSTD)


def frames_of(number: int, codec: str, body: bytes) -> list[bytes]:
    """One device's only update, on version 0, signed and cut."""
    update = Update(base=0, samples=100, codec=codec, encoding=ZSTD, sealed=False, metrics={"loss": 0.5})
    return cut(
        identity(number),
        federation=FEDERATION,
        sender=device(number),
        kind=update.KIND,
        seq=1,
        meta=update.meta(),
        body=body,
        frame_bytes=FRAME_BYTES,
    )


def send(url: str, load: Load, first: int, go: Any, results: Any) -> None:
    """One sender process: devices first, first + SENDERS, …"""
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    link = Link(url, client_id=f"sender-{first}", deliver=inbox.put, receive_maximum=1000)
    codec, body = prepared_body(load.parameters)
    numbers = list(range(first, load.updates, SENDERS))
    ready = [(number, frames_of(number, codec, body)) for number in numbers]
    link.connect(f"ternbus/1/{FEDERATION}/up/sender-{first}/status", b"")
    link.subscribe([f"ternbus/1/{FEDERATION}/down/+/receipt"])
    go.wait()
    sent: dict[str, float] = {}
    times, outcomes, waiting = [], dict[str, int](), 0
    mine = {device(number) for number in numbers}
    begun, position = time.monotonic(), 0
    while len(times) < len(ready):
        while position < len(ready) and waiting < load.window:
            due = begun + position * SENDERS / load.per_s if load.per_s else 0.0
            if due > time.monotonic():
                break
            number, frames = ready[position]
            for frame in frames:
                link.publish(topics.up(FEDERATION, device(number), "update"), frame)
            sent[device(number)] = max(due, begun) if load.per_s else time.monotonic()
            ready[position] = (number, [])  # each update is large
            position, waiting = position + 1, waiting + 1
        try:
            event = inbox.get(timeout=0.001 if load.per_s and position < len(ready) else RECEIPT_WITHIN_S)
        except queue.Empty:
            if load.per_s and position < len(ready):
                continue
            break
        if isinstance(event, Arrived):
            link.acknowledge(event.token)
            name = event.topic.split("/")[4]
            if name in mine:
                times.append((sent[name], time.monotonic()))
                outcome = _outcome(event.payload)
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
                waiting -= 1
    results.put(Answered(times, outcomes))
    link.disconnect()


def _outcome(payload: bytes) -> str:
    from broker.frame import parse  # noqa: PLC0415 - in the sender's process only

    return Receipt.from_meta(parse(payload).meta).outcome


def run_load(url: str, load: Load) -> list[Answered]:
    """Start the senders, let them go together, gather what they saw."""
    context = multiprocessing.get_context("spawn")
    go, results = context.Event(), context.Queue()
    processes = [context.Process(target=send, args=(url, load, first, go, results)) for first in range(SENDERS)]
    for process in processes:
        process.start()
    go.set()
    answered = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return answered


def rate(answered: list[Answered]) -> float:
    """Receipts a second, without the first tenth."""
    arrivals = sorted(arrived for one in answered for _, arrived in one.times)
    skipped = int(len(arrivals) * WARM_UP)
    return (len(arrivals) - skipped - 1) / (arrivals[-1] - arrivals[skipped])


def percentile(answered: list[Answered], share: float) -> float:
    """Publish-to-receipt in milliseconds."""
    waits = sorted(arrived - sent for one in answered for sent, arrived in one.times)
    return 1000 * waits[min(len(waits) - 1, int(share * len(waits)))]


def prepare(directory: Path, url: str, load: Load) -> None:
    """An aggregator whose devices are enrolled already."""
    model = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes(load.parameters).items()}
    settings = {
        "merge.buffer_size": BUFFER,
        "merge.max_wait_s": 5,
        "staleness.max": 1_000_000,
        "staleness.discount": "constant",
    }
    home.create(directory, federation=FEDERATION, broker=url, model=model, settings=settings)
    ledger = Ledger(directory / home.LEDGER)
    ledger.write(
        records.DeviceEnrolled(
            device=device(number),
            public=identity(number).public,
            proof=enroll_proof("bench", FEDERATION, device(number), identity(number).public),
        )
        for number in range(load.updates)
    )
    ledger.close()


def resident_mb(pid: int, field: str = "VmHWM") -> float:
    """Of a process, in MB: VmHWM is its peak, VmRSS what it has now."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return 0.0


def measure_aggregator(url: str, load: Load, folder: Path) -> dict[str, Any]:
    """Merged updates a second, the wait for a receipt, memory and ledger."""
    directory = folder / f"aggregator-{load.parameters}-{load.per_s:.0f}"
    prepare(directory, url, load)
    command = [sys.executable, "-m", "ternbus", "aggregator", "run", str(directory)]
    process = subprocess.Popen(command, stderr=(folder / "aggregator.log").open("ab"))
    try:
        answered = run_load(url, load)
        peak = resident_mb(process.pid)
    finally:
        process.terminate()
        process.wait(60)
    found = statuses.read(directory)
    size = sum(path.stat().st_size for path in directory.iterdir())
    return {
        "updates_per_s": rate(answered),
        "p50_ms": percentile(answered, 0.5),
        "p99_ms": percentile(answered, 0.99),
        "accepted": found["counts"]["accepted"],
        "merged": found["counts"]["merged"],
        "versions": found["version"],
        "peak_mb": peak,
        "ledger_mb": size / 2**20,
    }


def measure_skeleton(url: str, load: Load, folder: Path) -> float:
    """The same load against the parts alone."""
    command = [sys.executable, "-m", "benchmarks.skeleton", url, str(load.parameters), str(folder / "skeleton.journal")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # it is subscribed
        return rate(run_load(url, load))
    finally:
        process.terminate()
        process.wait(60)


def measure(parameters: int, engine: Engine, folder: Path) -> dict[str, Any]:
    """Skeleton, aggregator at full load, aggregator at half of it."""
    updates = {100_000: 6000, 1_200_000: 2400, 10_000_000: 320}.get(parameters, 1000)
    load = Load(parameters, updates, window=32 if parameters < 5_000_000 else 8)
    with start(choose(engine), host="127.0.0.1", port=0, directory=folder / f"broker-{parameters}") as broker:
        bare = measure_skeleton(broker.url, load, folder)
        full = measure_aggregator(broker.url, load, folder)
        half_load = Load(parameters, updates // 2, load.window, per_s=full["updates_per_s"] / 2)
        half = measure_aggregator(broker.url, half_load, folder)
    return {
        "parameters": Schema.of(shapes(parameters)).elements,
        **asdict(load),
        "skeleton_per_s": bare,
        "ratio": full["updates_per_s"] / bare,
        "full": full,
        "half": half,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--parameters", type=int, nargs="+", default=[100_000, 1_200_000, 10_000_000])
    parser.add_argument("--engine", type=Engine, default=Engine.AUTO)
    arguments = parser.parse_args()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(parameters, arguments.engine, Path(folder)) for parameters in arguments.parameters]
    if arguments.json:
        print(json.dumps(rows))
        return
    print(f"buffer {BUFFER}, {SENDERS} sender processes, {os.cpu_count()} cores carry everything")
    print(
        f"{'parameters':>11} {'skeleton/s':>11} {'merged/s':>9} {'ratio':>6} {'half load p50':>14} {'p99, ms':>8}"
        f" {'peak MB':>8} {'ledger MB':>10}"
    )
    for row in rows:
        full, half = row["full"], row["half"]
        print(
            f"{row['parameters']:>11,} {row['skeleton_per_s']:>11.0f}"
            f" {full['updates_per_s']:>9.0f} {row['ratio']:>6.2f}"
            f" {half['p50_ms']:>14.1f} {half['p99_ms']:>8.1f} {full['peak_mb']:>8.0f} {full['ledger_mb']:>10.1f}"
        )


if __name__ == "__main__":
    main()
