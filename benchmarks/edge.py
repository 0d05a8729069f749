"""The cost of Ternbus on a device in addition to training: CPU, memory, wakeups, bytes written, time to start.

    python -m benchmarks.edge [--data DIR] [--rounds 12] [--json]

The same trainer runs in a process without Ternbus, and in a real `ternbus edge run` with a real broker and an
aggregator that merges each update at once. The cost of Ternbus is the use of the device's process between trainings,
and of its other threads during trainings. Two tasks are measured: digits-numpy, and with --data fashion-mnist with
3,000 samples and one local epoch. DIR contains FashionMNIST/raw/*-ubyte, as torchvision writes it.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.program import ONE_THREAD, cpu_s, environment, options, print_result, used, wait_until
from ternbus.aggregator.shell import administration
from ternbus.aggregator.store import control
from ternbus.broker.files import write_secret
from ternbus.broker.model_files import load_safetensors
from ternbus.broker.server.running import Engine, choose, start

DEVICE: Final = "pi"
IDLE_S: Final = 10.0
SETTLE_S: Final = 2.0
WARM_UP: Final = 2  # trainings that are left out
PATIENCE_S: Final = 300.0
GOALS: Final = {"share": 0.03, "above_mb": 20.0}
PARTITIONS: Final = {"digits-numpy": "iid:0/2", "fashion-mnist": "iid:0/20"}

Note = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One task to measure."""

    task: str
    data: Path | None
    rounds: int
    folder: Path

    @property
    def partition(self) -> str:
        return PARTITIONS[self.task]

    def environment(self, notes: Path) -> dict[str, str]:
        root = str(Path(__file__).parent.parent)
        paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        instrumented = {"INSTRUMENTED_TASK": self.task, "INSTRUMENTED_NOTES": str(notes)}
        return {**environment(), **ONE_THREAD, **instrumented, "PYTHONPATH": os.pathsep.join(paths)}

    @property
    def data_arguments(self) -> list[str]:
        return [str(self.data.absolute())] if self.data is not None else []


def notes_in(path: Path) -> list[tuple[Note, Note]]:
    """(start, end) of each finished training."""
    notes = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return list(zip(notes[::2], notes[1::2], strict=False))


def alone(case: Case, name: str) -> dict[str, float]:
    """Run the trainer in a process without Ternbus."""
    path = case.folder / f"{name}.notes"
    began = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "benchmarks.instrumented_task",
        str(case.rounds),
        case.partition,
        *case.data_arguments,
    ]
    subprocess.run(command, env=case.environment(path), check=True)
    pairs = notes_in(path)
    return {**trained(pairs), "first_training_s": pairs[0][0]["came"]["wall"] - began}


def trained(pairs: list[tuple[Note, Note]]) -> dict[str, float]:
    """The median duration and CPU time of a training, without warm-up, and the process's peak memory."""
    spans = [{clock: _span(*pair, clock) for clock in ("wall", "thread")} for pair in pairs[WARM_UP:]]
    return {
        "trainings": len(spans),
        "samples": pairs[0][0]["samples"],
        "training_s": statistics.median(span["wall"] for span in spans),
        "training_cpu_s": statistics.median(span["thread"] for span in spans),
        "peak_mb": max(end["peak_kb"] for _, end in pairs) / 1024,
        "reading_peak_mb": pairs[0][0]["peak_kb"] / 1024,
    }


def _span(first: Note, end: Note, clock: str) -> float:
    """The time of one training by a clock."""
    return float(end["came"][clock] - first["went"][clock])


def own(pairs: list[tuple[Note, Note]]) -> dict[str, float]:
    """The median cost of an update without its training, from the start of one training to the start of the next."""
    rows = []
    for (first, end), (following, _) in zip(pairs[WARM_UP:-1], pairs[WARM_UP + 1 :], strict=True):
        between = following["came"]["process"] - end["went"]["process"]
        beside = _span(first, end, "process") - _span(first, end, "thread")
        rows.append(
            {
                "own_cpu_s": between + beside,
                "own_while_training_cpu_s": beside,
                "between_s": following["came"]["wall"] - end["went"]["wall"],
                "wakeups": following["wakeups"] - first["wakeups"],
                "wakeups_while_training": end["wakeups"] - first["wakeups"],
                "written_bytes": following["written_bytes"] - first["written_bytes"],
            }
        )
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


@contextmanager
def running(command: list[str], log: Path, environment: dict[str, str] | None = None) -> Any:
    """A process that is terminated at the end of the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def federated(case: Case, url: str) -> dict[str, Any]:
    """Run the trainer in a device that joins, trains for each version, and is then idle."""
    ternbus, folder = [sys.executable, "-m", "ternbus"], case.folder
    directory, model, invitation = folder / "aggregator", folder / "model.safetensors", folder / "pi.toml"
    subprocess.run([*ternbus, "edge", "init-model", case.task, str(model)], check=True, stdout=subprocess.DEVNULL)
    settings = {"merge.buffer_size": 1}
    administration.create(directory, federation="bench", broker=url, model=load_safetensors(model), settings=settings)
    write_secret(invitation, administration.invite(directory, DEVICE)[0].dumps().encode())
    notes, device = folder / "device.notes", folder / DEVICE
    environment = case.environment(notes)
    with running([*ternbus, "aggregator", "run", str(directory)], folder / "aggregator.log"):
        began = time.monotonic()
        where = ["--data", *case.data_arguments] if case.data is not None else []
        join = [*ternbus, "edge", "join", str(invitation), str(device), "--task", "benchmarks.instrumented_task:TASK"]
        subprocess.run(
            [*join, *where, "--partition", case.partition], env=environment, check=True, stdout=subprocess.DEVNULL
        )
        joined_s = time.monotonic() - began
        began = time.monotonic()
        with running([*ternbus, "edge", "run", str(device)], folder / "device.log", environment) as process:
            await_trainings(case, notes, process)
            administration.change_state(directory, control.PAUSE, "benchmark")
            idle = idling(process.pid, notes)
            peak_mb = used(process.pid)["peak_kb"] / 1024
    pairs = notes_in(notes)
    return {
        **trained(pairs),
        "peak_mb": peak_mb,  # also after the last training
        **own(pairs),
        **idle,
        "join_s": joined_s,
        "first_training_s": pairs[0][0]["came"]["wall"] - began,
        "store_bytes": sum(path.stat().st_size for path in device.iterdir()),
    }


def await_trainings(case: Case, notes: Path, process: "subprocess.Popen[bytes]") -> None:
    def are_done() -> bool:
        assert process.poll() is None, (case.folder / "device.log").read_text()
        return len(notes_in(notes)) >= case.rounds

    wait_until(are_done, f"{case.rounds} trainings", PATIENCE_S)


def idling(pid: int, notes: Path) -> dict[str, float]:
    """The resource use of an idle device after its last training."""
    lines = -1
    while lines != (lines := len(notes.read_text().splitlines())) or lines % 2:
        time.sleep(SETTLE_S)  # no event says that no other training begins
    time.sleep(SETTLE_S)  # nor that the update of the last one is off

    before = cpu_s(pid), used(pid)["wakeups"]
    time.sleep(IDLE_S)  # what is measured
    after = cpu_s(pid), used(pid)["wakeups"]
    return {
        "idle_cpu_share": (after[0] - before[0]) / IDLE_S,
        "idle_wakeups_per_s": (after[1] - before[1]) / IDLE_S,
        "idle_mb": used(pid)["resident_kb"] / 1024,
    }


def measure(case: Case, engine: Engine) -> dict[str, Any]:
    """Measure without Ternbus, in a federation, and without again; return both and their difference."""
    before = alone(case, "before")
    with start(choose(engine), host="127.0.0.1", port=0, directory=case.folder / "broker") as broker:
        device = federated(case, broker.url)
    after = alone(case, "after")  # on a shared machine the speed changes over time
    bare = {name: (before[name] + after[name]) / 2 for name in before}
    return {
        "task": case.task,
        "alone": bare,
        "device": device,
        "training_ratio": device["training_cpu_s"] / bare["training_cpu_s"],
        "share": device["own_cpu_s"] / bare["training_cpu_s"],
        "above_mb": device["peak_mb"] - bare["peak_mb"],
        "later_s": device["first_training_s"] - bare["first_training_s"],
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print tables."""
    for row in rows:
        bare, device = row["alone"], row["device"]
        print(f"\n{row['task']}, {bare['samples']:,.0f} samples, median of {device['trainings']} trainings")
        print(f"{'':28} {'alone':>9} {'as device':>10}")
        for name, key, unit in (
            ("training, CPU ms", "training_cpu_s", 1000),
            ("training, ms", "training_s", 1000),
            ("peak memory training, MB", "peak_mb", 1),
            ("peak before it, MB", "reading_peak_mb", 1),
            ("start to first training, s", "first_training_s", 1),
        ):
            print(f"{name:28} {unit * bare[key]:>9.2f} {unit * device[key]:>10.2f}")
        print(
            f"Ternbus' own CPU an update: {1000 * device['own_cpu_s']:.1f} ms, {row['share']:.2%} of the training",
            end="",
        )
        print(f" ({1000 * device['own_while_training_cpu_s']:.2f} ms of it while training)")
        print(f"Ternbus' own memory: {row['above_mb']:.1f} MB above the trainer's peak")
        print(f"from one training to the next: {1000 * device['between_s']:.0f} ms, aggregator and broker included")
        print(f"wakeups an update: {device['wakeups']:.0f}, of them {device['wakeups_while_training']:.0f} in training")
        print(
            f"written to disk an update: {device['written_bytes']:,.0f} B; the folder: {device['store_bytes']:,.0f} B"
        )
        print(f"idle: {device['idle_wakeups_per_s']:.1f} wakeups/s, {device['idle_cpu_share']:.2%} of a core", end="")
        print(f", {device['idle_mb']:.0f} MB")
        print(f"join: {device['join_s']:.1f} s")
    print(
        f"\ngoals, for fashion-mnist: at most {GOALS['share']:.0%} of the training, at most {GOALS['above_mb']:.0f} MB"
    )


def main() -> None:
    """Measure and print."""
    parser = options(__doc__, Engine)
    parser.add_argument("--data", type=Path, help="folder with FashionMNIST; without it fashion-mnist is left out")
    parser.add_argument("--rounds", type=int, default=12, help="number of trainings")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for task in PARTITIONS:
            if task == "fashion-mnist" and arguments.data is None:
                continue
            place = Path(folder) / task
            place.mkdir()
            data = arguments.data if task == "fashion-mnist" else None
            case = Case(task=task, data=data, rounds=max(arguments.rounds, WARM_UP + 3), folder=place)
            rows.append(measure(case, arguments.engine))
    print_result(rows, as_json=arguments.json, show=lambda: show(rows))


if __name__ == "__main__":
    main()
