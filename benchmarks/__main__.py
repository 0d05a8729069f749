"""Run benchmarks one after the other and keep their results, as ``make bench`` does.

    python -m benchmarks [NAME …] [--data DIR] [--out benchmarks/results] [--runs FOLDER]

Each result is a JSON file, NAME.json, with the command, the machine and the packages. `python -m benchmarks.figures`
makes the figures in README.md and docs/figures.md from these files. Run nothing else at the same time; ``load_before``
is the machine's load average at the start. Benchmarks of many runs go on where they were interrupted if --runs names
the same folder.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from ternbus.lab.report import machine

RESULTS: Final = Path(__file__).parent / "results"
WHOLE_PATH: Final = (
    "--parameters", "100000", "1200000", "10000000", "--frame-kib", "120", "256", "--engine", "mosquitto", "nats",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One module of this package: its arguments, and whether it needs a dataset or a folder for its files."""

    arguments: tuple[str, ...] = ()
    data: bool = False
    more_with_data: bool = False  # runs without a dataset, too, and then does less
    folder: bool = False
    long: bool = False  # runs only if it is named


BENCHMARKS: Final[Mapping[str, Benchmark]] = {
    "uplink": Benchmark(),
    "codec": Benchmark(),
    "ingest": Benchmark(),
    "exact_sums": Benchmark(),
    "dashboard": Benchmark(),
    "private_sums": Benchmark(),
    "encrypted_sums": Benchmark(),
    "merge_costs": Benchmark(),
    "fleet": Benchmark(),
    "edge": Benchmark(data=True),
    "path": Benchmark(WHOLE_PATH, long=True),
    "time_to_accuracy": Benchmark(("--seeds", "3"), data=True, folder=True, long=True),
    "race": Benchmark(more_with_data=True, folder=True, long=True),
    "slow_classes": Benchmark(),
    "simulator": Benchmark(),
    "training_speed": Benchmark(("--repeat", "3"), more_with_data=True, long=True),
    "agreement": Benchmark(),
    "attacks": Benchmark(),
    "hostile": Benchmark(long=True),
    "fashion": Benchmark(("--seeds", "6"), data=True, folder=True, long=True),
}


@dataclass(slots=True)
class Runner:
    """Runs benchmarks and prints their durations."""

    data: Path | None
    out: Path
    runs: Path | None = None
    failed: list[str] = field(default_factory=list)

    def run(self, name: str, about: Benchmark) -> None:
        if about.data and self.data is None:
            print(f"{name}: skipped, needs fashion-mnist: give --data DIR (make bench DATA=DIR)", flush=True)
            return
        print(f"{name} …", end=" ", flush=True)
        began, load = time.time(), os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as folder:
            arguments = [*about.arguments]
            takes_data = about.data or (about.more_with_data and self.data is not None)
            arguments += ["--data", str(self.data)] if takes_data else []
            arguments += ["--out", str((self.runs or Path(folder)) / name)] if about.folder else []
            command = [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--json"]
            log = self.out / f"{name}.log"
            with log.open("wb") as errors:
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, check=False)
        seconds = time.time() - began
        if done.returncode:
            self.failed.append(name)
            print(f"failed with exit code {done.returncode} after {seconds:.0f} s; see {log}", flush=True)
            return
        log.unlink()
        shown = " ".join(["python -m", f"benchmarks.{name}", *about.arguments, *(["--data DIR"] if takes_data else [])])
        kept = {
            "command": shown,
            "began": datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            "load_before": round(load, 2),
            "machine": machine.describe() | {"mosquitto": _mosquitto()},
            "result": json.loads(done.stdout),
        }
        (self.out / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        print(f"{seconds:.0f} s", flush=True)


def _mosquitto() -> str:
    found = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        return ""
    output = subprocess.run([found, "-h"], capture_output=True, text=True, check=False)
    return output.stdout.partition("\n")[0].strip()


def main() -> None:
    """Run the benchmarks; exit code 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    everything = [name for name, about in BENCHMARKS.items() if not about.long]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"benchmark: {', '.join(BENCHMARKS)}")
    parser.add_argument("--data", type=Path, help="folder with FashionMNIST/raw/*-ubyte")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--runs",
        type=Path,
        help="folder that keeps single runs, so that an interrupted benchmark goes on; without it they are deleted",
    )
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in BENCHMARKS:
            parser.error(f"unknown benchmark {name!r}: choose one of {', '.join(BENCHMARKS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(data=arguments.data, out=arguments.out, runs=arguments.runs)
    began = time.monotonic()
    for name in arguments.names or everything:
        runner.run(name, BENCHMARKS[name])
    print(f"{time.monotonic() - began:.0f} s in total; results in {arguments.out}")
    sys.exit(1 if runner.failed else 0)


if __name__ == "__main__":
    main()
