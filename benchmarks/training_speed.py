"""How long a simulation takes beside the training in it, and beside Flower's simulation engine.

    python -m benchmarks.training_speed [--data DIR] [--flower PYTHON] [--repeat 1] [--json]

Rounds of 20 devices. With ``--data``: ten versions of fashion-mnist by `lab simulate --jobs 2`. Always: fifty versions
of digits-mlp, a small model, by `--vectorise 20 --jobs 2`, for devices with equal and with unequal data. ``bare`` is
`benchmarks.bare_training`: the same batches in a plain loop, in two processes that wait for nobody. ``flower`` is
`benchmarks.flower_peer`, by a Python that has `flwr[simulation]`, by default the one that FLOWER_PYTHON names. All of
these are whole commands, with their imports, one after the other, and again with ``--repeat``. Times are medians, and
so are ratios, each of times of one round: ``to_bare`` and ``to_flower`` of the whole commands, ``cpu_to_training`` of
the processor's, all that the simulation and its processes spent, by what the bare loops spent in training alone.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.program import environment, options, print_result

DEVICES: Final = 20
PROCESSES: Final = 2
MLP: Final = "benchmarks.digits_mlp:TASK"
ENVIRONMENT: Final = environment() | {"PYTHONPATH": str(Path(__file__).parents[1])}  # a library too is named benchmarks


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One federation, and what `lab simulate` is given beside it."""

    task: str
    versions: int
    options: tuple[str, ...]
    partition: str = "dirichlet:0.5"
    data: Path | None = None

    def commands(self, flower: str | None) -> dict[str, list[str]]:
        """The command of each way to train it, by name."""
        data = [] if self.data is None else ["--data", str(self.data)]
        same = ["--devices", str(DEVICES), "--versions", str(self.versions), "--partition", self.partition]
        same += [*data, "--json"]
        peers = [self.task, "--processes", str(PROCESSES), *same]
        ours = [sys.executable, "-m", "ternbus", "lab", "simulate", "--task", self.task, "--sync"]
        found = {
            "ternbus": [*ours, *self.options, *same, "--out"],
            "bare": [sys.executable, "-m", "benchmarks.bare_training", *peers],
        }
        return found if flower is None else {**found, "flower": [flower, "-m", "benchmarks.flower_peer", *peers]}


def timed(command: Sequence[str]) -> dict[str, Any]:
    """Run a command: its seconds, those of the processor of it and its children, and what it printed."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        full = [*command, folder + "/out"] if command[-1] == "--out" else command
        printed = subprocess.run(
            full, check=True, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ).stdout
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, "printed": json.loads(printed.splitlines()[-1])}


def measured(case: Case, flower: str | None, repeat: int) -> dict[str, Any]:
    """Each way's median, and the ratios."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(repeat):
        for name, command in case.commands(flower).items():
            found = timed(command)
            runs.setdefault(name, []).append(found)
            print(f"{case.task}, {name}: {found['wall_s']:.1f} s, {found['cpu_s']:.1f} s of processor", file=sys.stderr)
    wall = {name: [run["wall_s"] for run in each] for name, each in runs.items()}
    spent = [run["cpu_s"] for run in runs["ternbus"]]
    row: dict[str, Any] = {"task": case.task.partition(":")[0].rpartition(".")[2], "partition": case.partition}
    row |= {"versions": case.versions, "options": " ".join(case.options)}
    row |= {f"{name}_s": statistics.median(each) for name, each in wall.items()}
    row["ternbus_cpu_s"] = statistics.median(spent)  # of Flower there is none: its processes outlive its command
    row["accuracy"] = runs["ternbus"][0]["printed"]["metrics"]["accuracy"]  # the same in each run
    row["to_bare"] = _ratio(wall["ternbus"], wall["bare"])
    row["cpu_to_training"] = _ratio(spent, [run["printed"]["training_cpu_s"] for run in runs["bare"]])
    if flower is not None:
        row["flower_accuracy"] = statistics.median(run["printed"]["accuracy"] for run in runs["flower"])
        row["to_flower"] = _ratio(wall["flower"], wall["ternbus"])
    return row


def _ratio(some: Sequence[float], others: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(one / other for one, other in zip(some, others, strict=True))


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each figure."""
    for row in rows:
        print(f"{row['task']}, {DEVICES} devices, {row['partition']}, {row['versions']} versions, {row['options']}:")
        print(f"  ternbus {row['ternbus_s']:.1f} s, bare training {row['bare_s']:.1f} s: {row['to_bare']:.2f} times")
        print(f"  {row['ternbus_cpu_s']:.1f} s of processor: {row['cpu_to_training']:.2f} times that of the bare loops")
        if "to_flower" in row:
            print(f"  flower {row['flower_s']:.1f} s: {row['to_flower']:.1f} times as long as ternbus")


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--data", type=Path, help="folder with fashion-mnist")
    parser.add_argument(
        "--flower",
        metavar="PYTHON",
        default=os.environ.get("FLOWER_PYTHON"),
        help="a Python with flwr[simulation]; without it no peer is run",
    )
    parser.add_argument("--repeat", type=int, default=1, help="runs of each")
    given = parser.parse_args()
    warm = "import ternbus.lab.cli, ternbus.lab.virtual.simulate, ternbus.edge.torch.trainer"
    subprocess.run([sys.executable, "-c", warm], env=ENVIRONMENT, check=True)  # what starts later finds it compiled
    at_once = ("--vectorise", str(DEVICES), "--jobs", str(PROCESSES))
    cases = [Case(task=MLP, versions=50, options=at_once, partition=each) for each in ("iid", "dirichlet:0.5")]
    if given.data is not None:
        images = Case(task="fashion-mnist", versions=10, options=("--jobs", str(PROCESSES)), data=given.data)
        cases.insert(0, images)
    rows = [measured(case, given.flower, given.repeat) for case in cases]
    print_result(rows, as_json=given.json, show=lambda: show(rows))


if __name__ == "__main__":
    main()
