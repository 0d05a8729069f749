"""A simulation compared with real processes: 50 devices, the same scenario, `lab run` and `lab simulate`.

    python -m benchmarks.agreement [--devices 50] [--versions 60] [--out FOLDER] [--json]

digits-numpy, lognormal speeds. A real device begins when its process has started, so the versions of the first third
are left out on both sides. `TOLERANCES` says how far the two may be apart; the exit code is 1 if a figure is beyond.
Accuracy is no part of it: which updates are in which version differs, so the models do.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.program import options, print_result
from ternbus.broker import toml

BUFFER: Final = 10
BOUND: Final = 12
WARM_UP: Final = 1 / 3  # of the versions
# As a share of the real figure; of staleness and the accepted share, the difference itself.
TOLERANCES: Final = {
    "versions_per_min": 0.15,
    "update_bytes": 0.05,
    "staleness": 0.5,
    "staleness_p95": 2.0,
    "accepted": 0.05,
}
RELATIVE: Final = ("versions_per_min", "update_bytes")


def table(arguments: argparse.Namespace) -> dict[str, Any]:
    """The scenario of both."""
    return {
        "task": "digits-numpy",
        "devices": arguments.devices,
        "partition": "iid",
        "speeds": {"sigma": 0.7, "median_s": arguments.median_s},
        "aggregator": {"merge": {"buffer_size": BUFFER, "max_wait_s": 1e4}, "staleness": {"max": BOUND}},
        "end": {"versions": arguments.versions},
    }


def figures(report: Mapping[str, Any]) -> dict[str, float]:
    """The compared figures. The staleness of a version is the mean of its updates."""
    rows = report["versions"]
    first = int(WARM_UP * len(rows))
    late = rows[first:]
    staleness = [row["staleness"] for row in late[1:]]
    counts = report["counts"]
    sent = counts["accepted"] + counts["stale"]
    return {
        "versions_per_min": 60 * (len(late) - 1) / (late[-1]["seconds"] - late[0]["seconds"]),
        "staleness": statistics.mean(staleness),
        "staleness_p95": statistics.quantiles([row["staleness_max"] for row in late[1:]], n=20)[-1],
        "accepted": counts["accepted"] / sent,
        "update_bytes": report["bytes_up"] / sent,
    }


def apart(real: Mapping[str, float], simulated: Mapping[str, float]) -> dict[str, float]:
    """How far each figure of the simulation is from the real one, as `TOLERANCES` says."""
    return {name: abs(simulated[name] - real[name]) / (real[name] if name in RELATIVE else 1.0) for name in TOLERANCES}


def run(command: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The report of `lab run` or `lab simulate`."""
    folder, path = arguments.out / command, arguments.out / "scenario.toml"
    path.write_text(toml.dumps(table(arguments)), encoding="utf-8")
    made = [sys.executable, "-m", "ternbus", "lab", command, str(path), "--out", str(folder)]
    subprocess.run(made, check=True, stdout=sys.stderr)
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table."""
    print("| figure | real processes | simulation | apart | allowed |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['figure']} | {row['real']:.3g} | {row['simulated']:.3g} | {row['apart']:.3g} | {row['allowed']} |"
        )


def main() -> None:
    """Run both and print the table."""
    parser = options(__doc__)
    parser.add_argument("--devices", type=int, default=50)
    parser.add_argument("--versions", type=int, default=60)
    parser.add_argument("--median-s", type=float, default=10.0, help="median duration of a local training")
    parser.add_argument("--out", type=Path, help="folder for both runs; by default a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        arguments.out = arguments.out or Path(temporary)
        arguments.out.mkdir(parents=True, exist_ok=True)
        real, simulated = (figures(run(command, arguments)) for command in ("run", "simulate"))
    found = apart(real, simulated)
    rows = [
        {
            "figure": name,
            "real": real[name],
            "simulated": simulated[name],
            "apart": found[name],
            "allowed": allowed,
            "relative": name in RELATIVE,
        }
        for name, allowed in TOLERANCES.items()
    ]
    result = {"devices": arguments.devices, "versions": arguments.versions, "rows": rows}
    print_result(result, as_json=arguments.json, show=lambda: show(rows))
    if any(found[name] > allowed for name, allowed in TOLERANCES.items()):
        sys.exit("the simulation does not agree with the real processes")


if __name__ == "__main__":
    main()
