"""The time and memory of a simulation, by the number of its devices.

    python -m benchmarks.simulator [--devices 100 1000 10000] [--json]

digits-numpy, Dirichlet 0.5, three versions of updates of a tenth of the devices, in a process of its own for each size.
`seconds` are those of the processor: the simulation has one thread. Peak memory is that of the whole process.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from benchmarks.program import options, print_result
from ternbus.edge.tasks import digits_numpy
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario.scenario import End, Scenario
from ternbus.lab.virtual.simulate import Simulation

VERSIONS: Final = 3
SHARE: Final = 10  # of the devices, in a version: one of so many
DEVICES: Final = (100, 1000, 10_000)
MB: Final = 1e6
PEAK_UNIT: Final = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss


def measured(devices: int) -> dict[str, Any]:
    """One simulation, in this process."""
    wanted = Scenario(
        task="digits-numpy",
        devices=devices,
        partition="dirichlet:0.5",
        aggregator={"merge.buffer_size": max(1, devices // SHARE), "merge.max_wait_s": 1e6},
        end=End(versions=VERSIONS),
    )
    began, began_cpu = time.perf_counter(), time.process_time()
    simulation = Simulation(wanted, digits_numpy.TASK, Lines(sys.stderr))
    set_up = time.process_time()
    simulation.run()
    report = simulation.report(time.perf_counter() - began)
    return {
        "devices": devices,
        "versions": report["versions"][-1]["version"],
        "updates": report["updates"],
        "setup_s": set_up - began_cpu,
        "seconds": time.process_time() - began_cpu,
        "wall_s": time.perf_counter() - began,
        "peak_mb": PEAK_UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MB,
    }


def apart(devices: int) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.simulator", "--one", str(devices)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table."""
    print("| devices | versions | updates | setup, s of CPU | in all | peak memory |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        counts = f"{row['devices']:,} | {row['versions']} | {row['updates']:,}"
        print(f"| {counts} | {row['setup_s']:.1f} | {row['seconds']:.1f} | {row['peak_mb']:.0f} MB |")


def main() -> None:
    """Simulate each number of devices and print the table."""
    parser = options(__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=DEVICES, help="numbers of devices")
    parser.add_argument("--one", type=int, help="measure this number in this process, and print JSON")
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measured(arguments.one)))
        return
    rows = [apart(devices) for devices in arguments.devices]
    print_result(rows, as_json=arguments.json, show=lambda: show(rows))


if __name__ == "__main__":
    main()
