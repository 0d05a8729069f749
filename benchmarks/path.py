"""The whole path of an update: real devices whose task trains nothing, a real broker, an aggregator that merges.

    python -m benchmarks.path [--json] [--parameters 1200000] [--frame-kib 120 256] [--devices 8]
        [--engine mosquitto nats] [--seconds 20]

With a barrier, a version takes an update of every device; asynchronously, of half of them. Processor time is that of
whole processes, from the kernel, for each accepted update; the bare parts are measured in the same run, on one thread.
Durable writes are calls of fsync and fdatasync, counted by strace, where it is installed, after the other figures.
"""

import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import path_task
from benchmarks.aggregating import run_aggregator
from benchmarks.ingest import FEDERATION, shapes
from benchmarks.program import ONE_THREAD, cpu_ms, cpu_s, environment, options, wait_until
from ternbus.aggregator.merge.exact import ExactSum
from ternbus.aggregator.shell import administration
from ternbus.aggregator.store.ledger import reading
from ternbus.broker.files import write_secret
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.messages import Update
from ternbus.broker.protocol.parts import cut
from ternbus.broker.protocol.schema import Schema, to_tensors, vector_digest, vector_xxh3
from ternbus.broker.protocol.ternary import ZSTD, Block, encode, nearest_block
from ternbus.broker.server.running import Engine, choose, start
from ternbus.edge.learn.compress import compress
from ternbus.edge.learn.local_change import LocalChange
from ternbus.edge.plan.plan import Plan

WITHIN_S: Final = 300.0
WARM_UP: Final = 3  # versions that are left out
TASK: Final = "benchmarks.path_task:TASK"
DURABLE: Final = re.compile(rb"\b(?:fsync|fdatasync)\(")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One federation to measure."""

    parameters: int
    devices: int
    engine: Engine
    barrier: bool
    seconds: float
    frame_bytes: int

    @property
    def buffer(self) -> int:
        return self.devices if self.barrier else max(1, self.devices // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """The processes of a federation, by role."""

    directory: Path  # of the aggregator
    roles: Mapping[str, Sequence[int]]

    def cpu_s(self) -> dict[str, float]:
        return {role: sum(map(cpu_s, pids)) for role, pids in self.roles.items()}

    def count(self) -> tuple[int, int]:
        """Accepted updates, and versions."""
        with reading(self.directory) as ledger:
            return ledger.accepted(), ledger.version

    def await_count(self, updates: int, versions: int) -> None:
        def are_there() -> bool:
            for log in self.directory.parent.glob("d*.log"):
                assert b"error" not in log.read_bytes(), log.read_text()
            found = self.count()
            return found[0] >= updates and found[1] >= versions

        wait_until(are_there, f"{updates} updates and {versions} versions", WITHIN_S)

    def broker_bytes(self) -> tuple[int, int]:
        """Bytes that the broker has read and written, on sockets and disk."""
        found = [0, 0]
        for pid in self.roles["broker"]:
            lines = Path(f"/proc/{pid}/io").read_text().split()
            found[0] += int(lines[1])
            found[1] += int(lines[3])
        return found[0], found[1]


@contextmanager
def federation(case: Case, folder: Path) -> Iterator[Running]:
    """Run a federation until the block ends."""
    directory = folder / "aggregator"
    variables = {**environment(), **ONE_THREAD, path_task.PARAMETERS: str(case.parameters)}
    root = str(Path(__file__).parent.parent)
    variables["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    model = path_task.NothingTask(parameters=case.parameters).initial(0)
    settings = {"merge.buffer_size": case.buffer, "merge.max_wait_s": WITHIN_S, "staleness.max": 1000}
    settings["limits.frame_bytes"] = case.frame_bytes
    names = [f"d{number}" for number in range(case.devices)]
    processes: list[subprocess.Popen[bytes]] = []
    with start(choose(case.engine), host="127.0.0.1", port=0, directory=folder / "broker") as broker:
        administration.create(directory, federation=FEDERATION, broker=broker.url, model=model, settings=settings)
        aggregator = run_aggregator(directory, folder / "aggregator.log")
        try:
            for name in names:
                write_secret(folder / f"{name}.toml", administration.invite(directory, name)[0].dumps().encode())
                command = [sys.executable, "-m", "ternbus.lab.processes.device", "--task", TASK]
                command += [str(folder / f"{name}.toml"), str(folder / name), "run", str(folder / name)]
                with (folder / f"{name}.log").open("wb") as log:
                    processes.append(subprocess.Popen(command, env=variables, stdout=log, stderr=log))
            roles = {
                "device": [each.pid for each in processes],
                "aggregator": [aggregator.process.pid],
                "broker": [broker.pid],
            }
            yield Running(directory=directory, roles=roles)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(60)
            aggregator.stop()


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Updates per second, and what each costs whom."""
    with federation(case, folder) as running:
        running.await_count(case.devices, 1)  # all devices have trained
        start_s = statistics.median(map(cpu_s, running.roles["device"]))
        running.await_count(0, WARM_UP)
        began, cpu, (first, version), sizes = time.monotonic(), running.cpu_s(), running.count(), running.broker_bytes()
        time.sleep(case.seconds)  # what is measured
        (last, newest), after, spent = running.count(), running.cpu_s(), time.monotonic() - began
        read, written = running.broker_bytes()
        updates = last - first
        assert updates, (folder / "d0.log").read_text() + (folder / "aggregator.log").read_text()
        return {
            "updates_per_s": updates / spent,
            "versions_per_s": (newest - version) / spent,
            "cpu_ms": {role: 1000 * (after[role] - cpu[role]) / updates for role in cpu},
            "broker_bytes": {"in": (read - sizes[0]) / updates, "out": (written - sizes[1]) / updates},
            "durable_writes": durable_writes(running, case.seconds / 2),
            "start_cpu_s": start_s,  # of a device, until all devices have trained once
        }


def durable_writes(running: Running, seconds: float) -> dict[str, float] | None:
    """Durable writes for each update, by role; None without strace, or where it may not attach."""
    if shutil.which("strace") is None:
        return None
    tracers = {}
    for role, pids in running.roles.items():
        command = ["strace", "-f", "-q", "-e", "trace=fsync,fdatasync", *(f"--attach={pid}" for pid in pids)]
        tracers[role] = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    attached = [pid for pids in running.roles.values() for pid in pids]
    wait_until(
        lambda: any(each.poll() is not None for each in tracers.values()) or all(map(is_traced, attached)),
        "strace attached to all threads",
        WITHIN_S,
    )
    first, _ = running.count()
    time.sleep(seconds)  # what is measured
    updates = running.count()[0] - first
    found = {}
    for role, tracer in tracers.items():
        tracer.send_signal(signal.SIGINT)
        output = tracer.communicate()[1]
        if tracer.returncode not in {0, -signal.SIGINT}:
            return None
        found[role] = len(DURABLE.findall(output)) / max(1, updates)
    return found


def is_traced(pid: int) -> bool:
    """Whether each thread of a process has a tracer."""
    states = [each.read_text() for each in Path(f"/proc/{pid}/task").glob("*/status")]
    return not any("TracerPid:\t0\n" in state for state in states)


def bare_parts(parameters: int, frame_bytes: int, folder: Path) -> dict[str, float]:
    """Processor milliseconds of what cannot be left out, each once."""
    schema, identity = Schema.of(shapes(parameters)), Identity(bytes(32))
    change = np.random.default_rng(0).normal(0.0, 0.001, schema.elements).astype(np.float32)
    block = compress(schema, Plan(), change, None, 0).block
    body = encode(block.content, ZSTD)
    update = Update(base=0, samples=100, codec=block.codec, encoding=ZSTD, sealed=False, metrics={"loss": 0.5})
    about: dict[str, Any] = {
        "federation": FEDERATION, "sender": "d0", "kind": update.KIND, "seq": 1, "meta": update.meta(), "body": body,
    }  # fmt: skip
    frames = [parse(each) for each in cut(identity, frame_bytes=frame_bytes, **about)]
    vector, total = np.zeros(schema.elements, np.float32), ExactSum(schema)
    trained = to_tensors(schema, vector + change)

    def verify() -> None:
        for each in frames:
            each.check_authentic(identity.public)

    with (folder / "journal").open("wb") as journal:

        def store() -> None:
            journal.write(body)
            journal.flush()
            os.fdatasync(journal.fileno())

        return {
            "compress_ms": cpu_ms(lambda: compress(schema, Plan(), LocalChange.of(schema, vector, trained), None, 0)),
            "zstd_ms": cpu_ms(lambda: encode(block.content, ZSTD)),
            "sign_ms": cpu_ms(lambda: cut(identity, frame_bytes=frame_bytes, **about)),
            "verify_ms": cpu_ms(verify),
            "hash_ms": cpu_ms(lambda: blake2b(body).digest()),
            "read_ms": cpu_ms(lambda: Block.read(schema, block.codec, ZSTD, body)),
            "add_ms": cpu_ms(lambda: total.add(block, 1.0)),
            "total_ms": cpu_ms(total.total),
            "nearest_ms": cpu_ms(lambda: nearest_block(schema, change)),
            "apply_ms": cpu_ms(lambda: block.apply(vector)),
            "vector_digest_ms": cpu_ms(lambda: vector_digest(vector)),
            "vector_xxh3_ms": cpu_ms(lambda: vector_xxh3(vector)),
            "store_ms": cpu_ms(store),
        }


def bare_sums(parts: Mapping[str, float], buffer: int) -> dict[str, float]:
    """The bare parts of an update by role; what an aggregator does once a version is shared by its updates."""
    device = ("read_ms", "verify_ms", "apply_ms", "vector_xxh3_ms", "compress_ms", "zstd_ms", "sign_ms", "store_ms")
    update = ("verify_ms", "read_ms", "add_ms", "store_ms")
    version = ("total_ms", "nearest_ms", "zstd_ms", "sign_ms", "apply_ms", "vector_digest_ms", "vector_xxh3_ms")
    return {
        "device": sum(parts[each] for each in device),
        "aggregator": sum(parts[each] for each in update) + sum(parts[each] for each in version) / buffer,
    }


def show(row: Mapping[str, Any]) -> None:
    cpu, bare, writes = row["cpu_ms"], row["bare_ms"], row["durable_writes"] or {}
    what = f"{row['devices']} devices, buffer {row['buffer']} ({'barrier' if row['barrier'] else 'asynchronous'})"
    rates = f"{row['updates_per_s']:.0f} updates/s, {row['versions_per_s']:.1f} versions/s"
    frames = f"frames of {row['frame_bytes'] // 1024} KiB"
    print(f"{row['parameters']:,} parameters, {what}, {row['engine']}, {frames}: {rates}")
    for role in cpu:
        beside = f", bare parts {bare[role]:.1f}" if role in bare else ""
        durable = f", {writes[role]:.2f} durable writes" if role in writes else ""
        print(f"  {role:11} {cpu[role]:6.2f} ms of processor an update{beside}{durable}")
    sizes = row["broker_bytes"]
    print(f"  broker reads {sizes['in']:,.0f} B and writes {sizes['out']:,.0f} B an update")
    print(f"  start of a device to its first update: {row['start_cpu_s']:.2f} s of processor")


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--parameters", type=int, nargs="+", default=[1_200_000], help="sizes of the model")
    parser.add_argument("--devices", type=int, default=8, help="number of devices")
    parser.add_argument("--engine", type=Engine, nargs="+", default=[Engine.AUTO], help="auto, mosquitto or nats")
    parser.add_argument("--frame-kib", type=int, nargs="+", default=[120], help="maximum sizes of a frame")
    parser.add_argument("--merge", nargs="+", choices=("barrier", "async"), default=["barrier", "async"])
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a measurement")
    given = parser.parse_args()
    # what starts later finds it compiled, as where it is installed
    subprocess.run([sys.executable, "-c", "import ternbus.lab.processes.device"], env=environment(), check=True)
    rows = []
    for parameters, frame_kib in itertools.product(given.parameters, given.frame_kib):
        with tempfile.TemporaryDirectory() as folder:
            parts = bare_parts(parameters, 1024 * frame_kib, Path(folder))
        for engine, merge in itertools.product(given.engine, given.merge):
            case = Case(
                parameters=parameters, devices=given.devices, engine=engine, barrier=merge == "barrier",
                seconds=given.seconds, frame_bytes=1024 * frame_kib,
            )  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                found = measure(case, Path(folder))
            about = {"parameters": parameters, "devices": case.devices, "engine": str(engine.value)}
            about |= {"barrier": case.barrier, "buffer": case.buffer, "frame_bytes": case.frame_bytes}
            rows.append({**about, **found, "bare_ms": bare_sums(parts, case.buffer), "parts": parts})
            if not given.json:
                show(rows[-1])
    if given.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
