"""The accuracy of ternary and float32 federations: fashion-mnist, 20 devices, Dirichlet 0.5, 60 versions of 5 updates.

    python -m benchmarks.fashion --data DIR [--seeds 3] [--out FOLDER] [--json]

Each run is `ternbus lab simulate`: the real aggregator and device code, real training, virtual time, and an evaluation
of every version on the test data. With --real it is `ternbus lab run`: 23 processes, of which the evaluator may skip
versions. A run that is already in --out is not repeated. DIR contains FashionMNIST/raw/*-ubyte, as torchvision writes
it.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.program import options, print_result
from ternbus.broker import toml

CODECS: Final = ("ternary", "float32")
LAST: Final = (
    20  # the accuracy of a run is the mean over its last versions, since single versions vary by a point or two
)


def run(codec: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The report of one run."""
    folder = arguments.out / f"{codec}-{seed}"
    report = folder / "report.json"
    if not report.exists():
        scenario = arguments.out / f"{codec}-{seed}.toml"
        table = {
            "task": "fashion-mnist",
            "devices": 20,
            "seed": seed,
            "data": str(arguments.data.absolute()),
            "partition": "dirichlet:0.5",
            "speeds": {"sigma": 0.7, "median_s": 10.0},
            "plan": {"codec": codec},
            "aggregator": {"merge": {"buffer_size": 5}, "downlink": {"codec": codec}},
            "end": {"versions": arguments.versions},
        }
        scenario.write_text(toml.dumps(table), encoding="utf-8")
        way = "run" if arguments.real else "simulate"
        command = [sys.executable, "-m", "ternbus", "lab", way, str(scenario), "--out", str(folder)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def summary(report: dict[str, Any], versions: int) -> dict[str, float]:
    """The values for one row of the table."""
    last = [row["accuracy"] for row in report["versions"] if versions - LAST < row["version"] <= versions]
    measured = [accuracy for accuracy in last if accuracy is not None]
    return {
        "mean_of_last": statistics.mean(measured),
        "measured": len(measured),
        "bits_up": report["bits_per_parameter_up"],
        "bits_down": report["bits_per_parameter_down"],
        "megabytes": (report["bytes_up"] + report["bytes_down"]) / 1e6,
        "seconds": report["seconds"],
    }


def show(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Print a table, and the difference."""
    print(
        f"| both ways | accuracy, mean of the last {LAST} versions | of seeds | bits/parameter up | down | MB in all |"
    )
    print("|---|---|---|---|---|---|")
    for codec, found in rows.items():
        accuracies = [row["mean_of_last"] for row in found]
        seeds = ", ".join(f"{accuracy:.2%}" for accuracy in accuracies)
        up, down, megabytes = (
            statistics.mean(row[key] for row in found) for key in ("bits_up", "bits_down", "megabytes")
        )
        print(f"| {codec} | {statistics.mean(accuracies):.2%} | {seeds} | {up:.2f} | {down:.2f} | {megabytes:.0f} |")
    ternary, plain = ([row["mean_of_last"] for row in rows[codec]] for codec in CODECS)
    fewest = min(int(row["measured"]) for found in rows.values() for row in found)
    print(f"\nEvaluated: {fewest} or more of the last {LAST} versions of each run.")
    print(f"ternary - float32: {100 * (statistics.mean(ternary) - statistics.mean(plain)):+.2f} points")


def main() -> None:
    """Run missing runs and print the table."""
    parser = options(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with FashionMNIST/raw/*-ubyte")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--versions", type=int, default=60, help="versions of each run")
    parser.add_argument("--out", type=Path, default=Path("benchmark-fashion"), help="folder for the runs")
    parser.add_argument("--real", action="store_true", help="real processes and a broker instead of virtual time")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, float]]] = {codec: [] for codec in CODECS}
    for seed in range(arguments.seeds):
        for codec in CODECS:
            rows[codec].append(summary(run(codec, seed, arguments), arguments.versions))
    print_result(rows, as_json=arguments.json, show=lambda: show(rows))


if __name__ == "__main__":
    main()
