"""The time and bytes to an accuracy: an asynchronous federation compared with two synchronous ways.

    python -m benchmarks.time_to_accuracy --data DIR [--seeds 1] [--out FOLDER] [--json] [--real]

Fashion-MNIST, 20 devices, Dirichlet 0.5, lognormal speeds, in virtual time with real training (`ternbus lab
simulate`). A run that is already in --out is not repeated. DIR contains FashionMNIST/raw/*-ubyte, as torchvision
writes it.

- asynchronous: a version from each --buffer updates, at most --bound versions stale; both are what `benchmarks.race`
  found on digits-numpy.
- over-selection: a version from the first --first updates on the newest version, of all devices that train on it
  (Bonawitz et al. 2019, section 4.2). An update that is later is not merged. Its device adds the change to its next
  update, which is kinder than that paper, whose server drops it.
- barrier: a version from the updates of all devices (McMahan et al. 2017).

An accuracy is reached at the first version that has it, if the mean of that version and those of the next 20 updates,
at least two, has it too. A single outlier therefore does not count, and neither side is delayed by a moving average.
Bytes are those of PUBLISH packets until that version was made: updates up, deltas and snapshots down.

With --real, each run is `ternbus lab run`: 23 processes, a broker and real time, without emulated network lines. The
run ends at the first version for which the evaluator measures the accuracy.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

from benchmarks.program import options, print_result
from ternbus.aggregator.merge.model import Model
from ternbus.broker import toml
from ternbus.edge.learn.task_loader import load_task
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario.scenario import End, Scenario, Speeds
from ternbus.lab.scenario.simulated import Simulated
from ternbus.lab.virtual.simulate import Simulation

ASYNCHRONOUS: Final = "asynchronous, ternary"
FIRST_TERNARY: Final = "over-selection, ternary"
FIRST_FLOAT32: Final = "over-selection, float32"
BARRIER: Final = "barrier, float32"
WAYS: Final = (ASYNCHRONOUS, FIRST_TERNARY, FIRST_FLOAT32, BARRIER)
LONGEST_WAIT_S: Final = 1e6  # so that only a full buffer makes a version
WINDOW: Final = 3  # versions, at least; and as many as WINDOW_UPDATES more updates make, so that it is
WINDOW_UPDATES: Final = 20  # equally long for small and for large buffers
DEVICES: Final = 20
GOALS: Final = {"sooner": 3.0, "up": 0.05, "both": 0.10}


def scenario(way: str, seed: int, arguments: argparse.Namespace) -> Scenario:
    """The scenario of one way. All have the same model, data, speeds, lines and local plan."""
    codec = way.partition(", ")[2]
    merging: dict[str, object] = {"downlink.codec": codec}
    if way != BARRIER:
        # The staleness bound must allow for the slowest device, which misses about 60 versions during a training.
        size, bound = (arguments.buffer, arguments.bound) if way == ASYNCHRONOUS else (arguments.first, 0)
        merging |= {"merge.buffer_size": size, "merge.max_wait_s": LONGEST_WAIT_S, "staleness.max": bound}
    end = End(versions=arguments.versions)
    made = unequal_devices("fashion-mnist", seed, arguments, codec=codec, merging=merging, end=end)
    return replace(made, sync=way == BARRIER)


def unequal_devices(
    task: str, seed: int, arguments: argparse.Namespace, *, codec: str, merging: Mapping[str, object], end: End
) -> Scenario:
    """What all ways have in common: the devices, their data, speeds and lines."""
    return Scenario(
        task=task,
        devices=DEVICES,
        seed=seed,
        data=arguments.data,
        partition="dirichlet:0.5",
        speeds=Speeds(sigma=1.0, median_s=arguments.median_s),
        plan={"codec": codec},
        aggregator=merging,
        end=end,
        simulate=Simulated(up_mbit_s=arguments.up_mbit_s, down_mbit_s=arguments.down_mbit_s, latency_s=0.05),
    )


def run(name: str, wanted: Scenario, accuracy: float, out: Path, model: Callable[..., Model] = Model) -> Any:
    """The report of one run, which ends when the accuracy is reached; of a kept run if there is one in ``out``.

    A kept run is known by its name and scenario.
    """
    digest = blake2b(f"{wanted} {accuracy}".encode(), digest_size=4).hexdigest()
    path = out / f"{file_name(name)}-{wanted.seed}-{digest}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    began = time.monotonic()
    simulation = Simulation(wanted, load_task(wanted.task), Lines(sys.stderr), model=model)
    seen = 0

    def look() -> None:
        nonlocal seen
        if len(simulation.carried) > seen:
            seen = len(simulation.carried)
            versions = simulation.moment().versions
            rows = [{"accuracy": version.accuracy, "updates": version.updates} for version in versions]
            if reached(rows, accuracy) is not None:
                simulation.stop()

    simulation.run(look)
    report = simulation.report(time.monotonic() - began)
    path.write_text(json.dumps(report) + "\n", encoding="utf-8")
    return report


def file_name(way: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", way)


def _nested(dotted: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """{"merge.buffer_size": 4} -> {"merge": {"buffer_size": 4}}, as in a scenario file."""
    sections: dict[str, dict[str, object]] = {}
    for name, value in dotted.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    return sections


def run_real(way: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run real processes: seconds, versions and bytes until the evaluator first measures the accuracy."""
    name = f"real-{file_name(way)}-{seed}"
    folder, path = arguments.out / name, arguments.out / f"{name}.toml"
    wanted = scenario(way, seed, arguments)
    if not (folder / "report.json").exists():
        table = {
            "task": wanted.task,
            "devices": wanted.devices,
            "seed": seed,
            "data": str(arguments.data.absolute()),
            "partition": wanted.partition,
            "sync": wanted.sync,
            "speeds": {"sigma": wanted.speeds.sigma, "median_s": wanted.speeds.median_s},
            "plan": wanted.plan,
            "end": {"versions": arguments.versions, "accuracy": arguments.accuracy},
            "aggregator": _nested(wanted.aggregator),
        }
        path.write_text(toml.dumps(table), encoding="utf-8")
        command = [sys.executable, "-m", "ternbus", "lab", "run", str(path), "--out", str(folder)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    has = [row for row in report["versions"] if (row["accuracy"] or 0.0) >= arguments.accuracy]
    first = has[0] if has else {"seconds": None, "version": None}
    return {
        "seconds": first["seconds"],
        "version": first["version"],
        "up": report["bytes_up"],
        "down": report["bytes_down"],
    }


def show_real(rows: Sequence[tuple[int, str, Mapping[str, Any]]], accuracy: float) -> None:
    """Print a table."""
    print(f"| seed | until {accuracy:.0%}, real processes | s | version | MB up | MB down, deltas |")
    print("|---|---|---|---|---|---|")
    for seed, way, row in rows:
        seconds = "never" if row["seconds"] is None else f"{row['seconds']:.0f}"
        print(f"| {seed} | {way} | {seconds} | {row['version']} | {row['up'] / 1e6:.1f} | {row['down'] / 1e6:.1f} |")


def reached(versions: Sequence[Mapping[str, Any]], accuracy: float) -> int | None:
    """The first version with the accuracy, if the mean over the window that begins with it has it too."""
    for first in range(len(versions)):
        window = _window(versions, first)
        if window and None not in window and min(window[0], statistics.mean(window)) >= accuracy:
            return first
    return None


def _window(versions: Sequence[Mapping[str, Any]], first: int) -> list[Any]:
    """The accuracies of the versions from this one on, until the window is full; none if it is not yet."""
    updates = 0
    for last in range(first, len(versions)):
        updates += versions[last]["updates"] if last > first else 0
        if last - first + 1 >= WINDOW and updates >= WINDOW_UPDATES:
            return [row["accuracy"] for row in versions[first : last + 1]]
    return []


def figures(report: Mapping[str, Any], accuracy: float) -> dict[str, Any]:
    """The values for one row of the table."""
    version = reached(report["versions"], accuracy)
    best = max(row["accuracy"] for row in report["versions"])
    if version is None:
        return {"version": None, "best": best}
    row = report["versions"][version]
    first = next(row for row in report["versions"] if row["accuracy"] >= accuracy)
    return {
        "version": version,
        "best": best,
        "accuracy": row["accuracy"],
        "seconds": row["seconds"],
        "updates": sum(each["updates"] for each in report["versions"][: version + 1]),
        "up": row["update_bytes"],
        "delta": row["delta_bytes"],
        "snapshot": row["snapshot_bytes"],
        "both": row["update_bytes"] + row["delta_bytes"] + row["snapshot_bytes"],
        "first_seconds": first["seconds"],
        "bits_up": report["bits_per_parameter_up"],
        "bits_down": report["bits_per_parameter_down"],
        "wall_seconds": report["wall_seconds"],
    }


def against(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float] | None]:
    """The asynchronous way compared with each other way, over all ``runs``, which have the figures of each way."""
    return {
        way: compared([run[ASYNCHRONOUS] for run in runs], [run[way] for run in runs])
        for way in WAYS
        if way != ASYNCHRONOUS
    }


def compared(quick: Sequence[Mapping[str, Any]], slow: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """The speed-up and the shares of bytes over all runs; None if a run did not reach the accuracy."""
    if any(row["version"] is None for row in (*quick, *slow)):
        return None

    def share(*names: str) -> float:
        quicks, slows = (sum(row[name] for row in rows for name in names) for rows in (quick, slow))
        return float(quicks / slows)

    return {
        "sooner": 1 / share("seconds"),
        "up": share("up"),
        "both": share("up", "delta", "snapshot"),
    }


def show(result: Mapping[str, Any]) -> None:
    """Print a table."""
    heading = f"until {result['accuracy']:.0%}"
    print(f"| seed | {heading} | virtual s | versions | updates | MB up | MB down | of it snapshots |")
    print("|---|---|---|---|---|---|---|---|")
    for each in result["seeds"]:
        for way in WAYS:
            row = each[way]
            if row["version"] is None:
                print(f"| {each['seed']} | {way} | never: best {row['best']:.2%} | | | | | |")
                continue
            up, delta, snapshot = (row[name] / 1e6 for name in ("up", "delta", "snapshot"))
            counts = f"{row['seconds']:.0f} | {row['version']} | {row['updates']}"
            print(f"| {each['seed']} | {way} | {counts} | {up:.1f} | {delta + snapshot:.1f} | {snapshot:.1f} |")
    for each in result["seeds"]:
        _print_ratios(f"seed {each['seed']}", each["compared"])
    _print_ratios("all seeds", result["compared"])
    sooner, up, both = (GOALS[name] for name in ("sooner", "up", "both"))
    print(f"\nGoals, against the barrier: {sooner:.0f} times sooner, {up:.0%} of the bytes up, {both:.0%} both ways")


def _print_ratios(name: str, found: Mapping[str, Mapping[str, float] | None]) -> None:
    for way, ratios in found.items():
        if ratios is not None:
            print(
                f"\n{name}: {ratios['sooner']:.2f} times sooner than {way}, {ratios['up']:.1%} of its bytes up, "
                f"{ratios['both']:.1%} of its bytes both ways"
            )


def main() -> None:
    """Run missing runs and print the table."""
    parser = options(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with FashionMNIST/raw/*-ubyte")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--accuracy", type=float, default=0.85, help="accuracy to reach")
    parser.add_argument("--median-s", type=float, default=10.0, help="median duration of a local training")
    parser.add_argument("--up-mbit-s", type=float, default=1.0, help="uplink of each device; 0 means unlimited")
    parser.add_argument("--down-mbit-s", type=float, default=4.0, help="downlink of each device; 0 means unlimited")
    parser.add_argument("--buffer", type=int, default=5, help="updates of a version, asynchronous")
    parser.add_argument("--bound", type=int, default=10_000, help="staleness bound, asynchronous")
    parser.add_argument("--first", type=int, default=10, help="updates of a version, over-selection")
    parser.add_argument("--versions", type=int, default=150, help="maximum number of versions")
    parser.add_argument("--out", type=Path, default=Path("benchmark-time-to-accuracy"), help="folder for the runs")
    parser.add_argument("--real", action="store_true", help="real processes and real time instead of virtual time")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.real:
        rows = [(seed, way, run_real(way, seed, arguments)) for seed in range(arguments.seeds) for way in WAYS]
        print_result(rows, as_json=arguments.json, show=lambda: show_real(rows, arguments.accuracy))
        return
    accuracy, seeds = arguments.accuracy, list[dict[str, Any]]()
    for seed in range(arguments.seeds):
        reports = {way: run(way, scenario(way, seed, arguments), accuracy, arguments.out) for way in WAYS}
        found = {way: figures(report, accuracy) for way, report in reports.items()}
        seeds.append({"seed": seed, **found, "compared": against([found])})
    result = {
        "accuracy": arguments.accuracy,
        "seeds": seeds,
        "compared": against(seeds),
        "goals": GOALS,
        "asked": {
            name: value for name, value in vars(arguments).items() if name not in {"data", "out", "json", "real"}
        },
        "machine": {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()},
    }
    print_result(result, as_json=arguments.json, show=lambda: show(result))


if __name__ == "__main__":
    main()
