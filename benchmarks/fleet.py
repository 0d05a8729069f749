"""10,000 devices with one aggregator: duration of enrolment, delay of a new version, and memory for each device.

    python -m benchmarks.fleet [--json] [--devices 10000] [--engine auto]

Other processes emulate the devices, each with its connection, session and last will. First all devices
enroll at once. Then each device sends an update at a random time within half a minute. Then single updates make
versions without other load, to measure the delay of a new version: from its commit to the aggregator's disk until a
device has read its head. The model is small, since the number of devices is the load. Aggregator, broker and
these processes share the machine.
"""

import multiprocessing
import os
import resource
import sqlite3
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.aggregating import Aggregator, run_aggregator
from benchmarks.clients import Answers, Task, serve, shares
from benchmarks.ingest import FEDERATION, prepared_body, shapes
from benchmarks.program import cpu_s, one_thread, options, print_result
from benchmarks.sender import device, identity
from ternbus.aggregator.core import records
from ternbus.aggregator.shell import administration
from ternbus.aggregator.store import status as statuses
from ternbus.aggregator.store.ledger import LEDGER, Ledger
from ternbus.broker.protocol.identity import enroll_proof
from ternbus.broker.protocol.ternary import ZSTD
from ternbus.broker.server.running import Engine, RunningBroker, choose, start

PROCESSES: Final = 2
PARAMETERS: Final = 10_000
FEW: Final = 10  # devices of the aggregator in the reference measurement
BUFFER: Final = 1000
SPAN_S: Final = 30.0  # in which each device sends one update
QUIET: Final = 4  # versions made while all is quiet
MERGE_S: Final = 4.0  # after the first update of a smaller buffer
HEARD_S: Final = 3.0  # after this time a version has reached all devices
RESERVED_FILES: Final = 300  # open files of a broker in addition to its clients
GOAL_BYTES: Final = 2048  # of the aggregator's memory for each device


def possible(wanted: int) -> tuple[int, str]:
    """(number of devices that this machine allows, reason for fewer than wanted); raises the limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED_FILES
    if 0 <= hard < needed:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, needed))
        except (ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    elif 0 <= soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    bounds = {
        f"a process may open {files} files": files - RESERVED_FILES if files >= 0 else wanted,
        f"{last - first} local ports": last - first - 1000,
    }
    why = min(bounds, key=lambda each: bounds[each])
    return (wanted, "") if bounds[why] >= wanted else (bounds[why], why)


def prepare(directory: Path, url: str) -> None:
    """Make an aggregator with a few devices."""
    model = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes(PARAMETERS).items()}
    settings = {
        "merge.buffer_size": BUFFER,
        "merge.max_wait_s": MERGE_S,
        "staleness.max": 1_000_000,
    }
    administration.create(directory, federation=FEDERATION, broker=url, model=model, settings=settings)
    names = {f"few-{number}": identity(10**6 + number).public for number in range(FEW)}
    with closing(Ledger(directory / LEDGER)) as ledger:
        ledger.write(
            records.DeviceEnrolled(device=name, public=public, proof=enroll_proof("bench", FEDERATION, name, public))
            for name, public in names.items()
        )


def start_clients(broker: RunningBroker, codes: dict[str, str]) -> tuple[list[Any], list[Connection]]:
    """Start the processes that emulate devices, which are ready to join."""
    codec, body = prepared_body(PARAMETERS)
    context, processes, pipes = multiprocessing.get_context("spawn"), [], []
    for names in shares(list(codes), PROCESSES):
        task = Task(
            host=broker.endpoint.host,
            port=broker.endpoint.port,
            federation=FEDERATION,
            codes={name: codes[name] for name in names},
            seeds={name: identity(int(name[1:])).seed for name in names},
            codec=codec,
            encoding=ZSTD,
            body=body,
        )
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(task, theirs))
        process.start()
        processes.append(process)
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    return processes, pipes


def tell(pipes: Sequence[Connection], what: str, argument: float = 0.0) -> list[Any]:
    """Send a command to all processes of clients; return their answers."""
    for pipe in pipes:
        pipe.send((what, argument))
    return [pipe.recv() for pipe in pipes]


def gathered(found: Sequence[Answers], devices: int, parts: dict[str, float]) -> dict[str, Any]:
    """The figures of one phase. ``parts`` has the CPU time of each process."""
    times = [pair for each in found for pair in each.times]
    waits = sorted(1000 * (answered - asked) for asked, answered in times)
    seconds = max(answered for _, answered in times) - min(asked for asked, _ in times)
    return {
        "answered": len(times),
        "outcomes": {name: sum(each.outcomes[name] for each in found) for each in found for name in each.outcomes},
        "seconds": seconds,
        "per_s": len(times) / seconds,
        "p50_ms": percentile(waits, 0.5),
        "p99_ms": percentile(waits, 0.99),
        "resent": sum(each.resent for each in found),
        "lost": sum(each.lost for each in found),
        "cpu_ms_per_device": {name: 1000 * spent / devices for name, spent in parts.items()},
    }


def percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def fan_outs(pipes: Sequence[Connection], directory: Path, devices: int) -> list[dict[str, float]]:
    """For every version after the first, the time in ms until 50 %, 99 % and all devices had its head."""
    arrivals: dict[int, list[float]] = {}
    for found in tell(pipes, "heads"):
        for version, times in found.items():
            arrivals.setdefault(version, []).extend(times)
    with closing(sqlite3.connect(directory / LEDGER)) as db:
        made = dict(db.execute("SELECT version, made_at FROM versions"))
    rows = []
    for version, times in sorted(arrivals.items()):
        if version:
            waits = sorted(1000 * (arrived - made[version]) for arrived in times)
            # a device that missed a head gets the next one; missing devices count as infinitely late
            waits += [float("inf")] * (devices - len(waits))
            row = {"version": version, "first_ms": waits[0], "p50_ms": percentile(waits, 0.5)}
            rows.append(row | {"p99_ms": percentile(waits, 0.99), "all_ms": waits[-1], "heard": len(times)})
    return rows


@dataclass(slots=True, kw_only=True)
class Fleet:
    """The running broker, aggregator and clients."""

    devices: int
    broker: RunningBroker
    aggregator: Aggregator
    pipes: Sequence[Connection]

    def phase(self, what: str, span_s: float = 0.0) -> dict[str, Any]:
        """Run a phase in which every device sends a message and waits for its receipt."""
        before = self.aggregator.cpu_s, cpu_s(self.broker.pid)
        found = tell(self.pipes, what, span_s)
        spent = {"aggregator": self.aggregator.cpu_s - before[0], "broker": cpu_s(self.broker.pid) - before[1]}
        return gathered(found, self.devices, spent)


def measure(devices: int, engine: Engine, folder: Path) -> dict[str, Any]:
    """Measure all phases, from the reference with few devices to the restart."""
    directory, log, software = folder / "aggregator", folder / "aggregator.log", choose(engine)
    with start(software, host="127.0.0.1", port=0, directory=folder / "broker") as broker:
        prepare(directory, broker.url)
        aggregator = run_aggregator(directory, log)
        try:
            few_kb = aggregator.settled_kb()
        finally:
            aggregator.stop()
        began = time.monotonic()
        codes = {each.device: each.code for each in administration.invite(directory, *map(device, range(devices)))}
        invited_s = time.monotonic() - began
        processes, pipes = start_clients(broker, codes)
        try:
            found = live(broker, pipes, directory, log, devices)
        finally:
            for process in processes:
                process.terminate()
    return {
        "devices": devices,
        "broker": str(software),
        "cores": os.cpu_count(),
        "invited_s": invited_s,
        **found,
        "few_kb": few_kb,
        "bytes_per_device": {name: 1024 * (kb - few_kb) / (devices - FEW) for name, kb in found["resident_kb"].items()},
        "ledger_mb": sum(path.stat().st_size for path in directory.iterdir()) / 2**20,
        "counts": statuses.read(directory)["counts"],
    }


def live(
    broker: RunningBroker, pipes: Sequence[Connection], directory: Path, log: Path, devices: int
) -> dict[str, Any]:
    """Measure an aggregator with all invited devices: join, send, single versions, restart."""
    aggregator = run_aggregator(directory, log)
    try:
        fleet = Fleet(devices=devices, broker=broker, aggregator=aggregator, pipes=pipes)
        found: dict[str, Any] = {"join": fleet.phase("join")}
        resident_kb = {"joined": aggregator.settled_kb()}
        found["idle_share_of_a_core"] = aggregator.idle_share()
        found["send"] = fleet.phase("send", SPAN_S)
        time.sleep(MERGE_S + HEARD_S)  # the last version is made, and heard or not: that is measured
        busy = fan_outs(pipes, directory, devices)
        resident_kb["sent"] = aggregator.settled_kb()
        for number in range(QUIET):
            tell(pipes[:1], "one", number)
            time.sleep(MERGE_S + HEARD_S)  # likewise
        quiet = fan_outs(pipes, directory, devices)[len(busy) :]
        aggregator.stop()
        aggregator = run_aggregator(directory, log)
        resident_kb["started_again"] = aggregator.settled_kb()
        tell(pipes[:1], "one", QUIET)
    finally:
        aggregator.stop()
    found |= {"fan_out_while_sending": busy, "fan_out_quiet": quiet, "resident_kb": resident_kb}
    return {**found, "started_again_s": aggregator.began_s}


def show(row: dict[str, Any]) -> None:
    """Print tables."""
    print(
        f"{row['devices']:,} devices in {PROCESSES} processes, {row['broker']}, {row['cores']} cores for all processes"
    )
    print(f"invitations: {row['invited_s']:.1f} s\n")
    print(f"{'':10} {'answered':>9} {'in s':>6} {'a second':>9} {'p50 ms':>8} {'p99 ms':>8} {'sent again':>10}", end="")
    print(f" {'CPU ms a device: aggregator':>28} {'broker':>7}")
    for name in ("join", "send"):
        one, spent = row[name], row[name]["cpu_ms_per_device"]
        print(
            f"{name:10} {one['answered']:>9,} {one['seconds']:>6.1f} {one['per_s']:>9.0f} {one['p50_ms']:>8.0f}", end=""
        )
        print(f" {one['p99_ms']:>8.0f} {one['resent']:>10} {spent['aggregator']:>28.2f} {spent['broker']:>7.2f}")
    print("\ndelay of a new version, from the aggregator's disk to the devices, ms (median over versions)")
    print(f"{'':10} {'versions':>9} {'first':>7} {'50 %':>7} {'99 %':>7} {'all':>7} {'missed':>10}")
    for name, rows in (("sending", row["fan_out_while_sending"]), ("quiet", row["fan_out_quiet"])):
        middle = {
            key: float(np.median([one[key] for one in rows])) for key in ("first_ms", "p50_ms", "p99_ms", "all_ms")
        }
        missed = sum(row["devices"] - one["heard"] for one in rows)
        print(f"{name:10} {len(rows):>9}" + "".join(f" {each:>7.0f}" for each in middle.values()) + f" {missed:>10}")
    print(f"\naggregator's memory per device (goal {GOAL_BYTES:,} B), above {row['few_kb'] / 1024:.0f} MB with {FEW}")
    for name, size in row["bytes_per_device"].items():
        print(f"{name.replace('_', ' '):16} {size:>7,.0f} B")
    print(f"\nidle with all devices connected: {row['idle_share_of_a_core']:.1%} of a core", end="; ")
    print(f"restart in {row['started_again_s']:.1f} s; ledger {row['ledger_mb']:.1f} MB")


def main() -> None:
    """Measure and print."""
    parser = options(__doc__, Engine)
    parser.add_argument("--devices", type=int, default=10_000, help="number of devices")
    arguments = parser.parse_args()
    one_thread()
    devices, why = possible(arguments.devices)
    if why:
        print(f"{devices:,} devices instead of {arguments.devices:,}: {why}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        row = measure(devices, arguments.engine, Path(folder))
    print_result(row, as_json=arguments.json, show=lambda: show(row))


if __name__ == "__main__":
    main()
