"""The ways of `time_to_accuracy` where slow devices have classes that fast ones lack.

    python -m benchmarks.slow_classes [--seeds 3] [--plot FILE.png] [--json]

digits-numpy, 20 devices, speeds lognormal 1.0. The five slowest devices have the three classes of `SLOW_CLASSES`
between them, equal shares; the others divide the other seven classes by Dirichlet 0.5. Whoever takes only the first
updates on a version seldom hears of the slow devices. Beside the ways of `time_to_accuracy` there is the asynchronous
one with CA2FL, which keeps what each device sent last. All ways run for the same virtual time. Accuracy is measured on
all test data, and on those of the slow classes alone; a final one is the mean of the last versions of that time.
"""

import argparse
import bisect
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.program import options, print_result
from benchmarks.time_to_accuracy import ASYNCHRONOUS, BARRIER, DEVICES, LONGEST_WAIT_S, WAYS
from ternbus.edge import select
from ternbus.edge.learn.task import Evaluation
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.tasks import digits_data
from ternbus.edge.tasks.digits_numpy import DigitsNumpy, NumpyTrainer
from ternbus.lab.notebook.algorithms import Hooks
from ternbus.lab.notebook.asynchronous import ca2fl
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario.scenario import End, Scenario, Speeds
from ternbus.lab.virtual.simulate import Simulation

SLOW_CLASSES: Final = (7, 8, 9)
SLOW_DEVICES: Final = 5
ALPHA: Final = 0.5
RATE: Final = 0.5  # of the server, with CA2FL: each version moves by what all devices sent last
METRIC: Final = "slow_classes"
NAMES: Final = ("accuracy", METRIC)
STAYS: Final = 0.75  # an accuracy above the 70 % that the other seven classes come to
LAST_SHARE: Final = 0.1  # of the time: the mean of the accuracies then is the final one
POINTS: Final = 60  # of the plot's time axis
CALIBRATED: Final = "asynchronous with CA2FL, ternary"
ALL_WAYS: Final = (ASYNCHRONOUS, CALIBRATED, *WAYS[1:])
COLORS: Final = ("tab:blue", "tab:green", "tab:orange", "tab:red", "tab:gray")


def owners(labels: npt.NDArray[np.int64], paces: Sequence[float], seed: int) -> npt.NDArray[np.int64]:
    """The device of each training sample; ``paces`` are the seconds of a training of each device."""
    random = np.random.default_rng(seed)
    order = np.argsort(paces)
    fast, slow = order[:-SLOW_DEVICES], order[-SLOW_DEVICES:]
    found = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if label in SLOW_CLASSES:
            found[rows] = random.choice(slow, len(rows))
        else:
            found[rows] = random.choice(fast, len(rows), p=random.dirichlet(np.full(len(fast), ALPHA)))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnedDigits(DigitsNumpy):
    """The digits, whose training samples are owned by the devices with these paces."""

    paces: Sequence[float]
    seed: int

    def trainer(self, *, data: Path | None, partition: str) -> NumpyTrainer:  # noqa: ARG002 - it is in the package
        images, labels = digits_data.load("train")
        chosen = select(partition, labels, owners(labels, self.paces, self.seed))
        return NumpyTrainer(images[chosen], labels[chosen])

    def evaluator(self, *, data: Path | None) -> NumpyTrainer:  # noqa: ARG002 - likewise
        return _Evaluator(*digits_data.load("test"))


class _Evaluator(NumpyTrainer):
    """Measures the test data, and those of the slow classes alone."""

    def __init__(self, images: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> None:
        super().__init__(images, labels)
        chosen = np.isin(labels, SLOW_CLASSES)
        self._slow = NumpyTrainer(images[chosen], labels[chosen])

    def evaluate(self, tensors: Tensors) -> Evaluation:
        whole, slow = super().evaluate(tensors), self._slow.evaluate(tensors)
        return Evaluation(samples=whole.samples, values={**whole.values, METRIC: slow.values["accuracy"]})


def scenario(way: str, seed: int, arguments: argparse.Namespace) -> Scenario:
    """The scenario of one way. All have the same model, data, speeds and local plan."""
    codec = way.partition(", ")[2]
    merging: dict[str, object] = {"downlink.codec": codec}
    if way != BARRIER:
        bound = arguments.bound if way in (ASYNCHRONOUS, CALIBRATED) else 0
        merging |= {"merge.buffer_size": arguments.buffer, "merge.max_wait_s": LONGEST_WAIT_S, "staleness.max": bound}
    if way == CALIBRATED:
        merging["optimizer.learning_rate"] = RATE
    return Scenario(
        task="digits-numpy",
        devices=DEVICES,
        seed=seed,
        partition="natural",
        sync=way == BARRIER,
        speeds=Speeds(sigma=1.0, median_s=arguments.median_s),
        plan={"codec": codec},
        aggregator=merging,
        end=End(seconds=arguments.seconds),
    )


def run(way: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The seconds and both accuracies of each version of one run, and what became of its updates."""
    began, wanted = time.monotonic(), scenario(way, seed, arguments)
    task = OwnedDigits(paces=wanted.speeds.draw(DEVICES, seed), seed=seed)
    hooks = Hooks(merge_rule=ca2fl(DEVICES) if way == CALIBRATED else None)
    simulation = Simulation(wanted, task, Lines(sys.stderr), model=hooks.model)
    simulation.run()
    report = simulation.report(time.monotonic() - began)
    rows = report["versions"]
    measured = [next(iter(row["evaluations"].values())) for row in rows]
    return {
        "seconds": [row["seconds"] for row in rows],
        **{name: [values[name] for values in measured] for name in NAMES},
        "updates": report["updates"],
        "stale": report["counts"]["stale"],
    }


def final(runs: Sequence[Mapping[str, Any]], name: str, seconds: float) -> tuple[float, float]:
    """(mean, standard deviation) over the seeds of an accuracy at the end of the time."""
    times = np.linspace((1 - LAST_SHARE) * seconds, seconds, POINTS).tolist()
    values = course(runs, name, times).mean(1)
    return float(values.mean()), float(values.std())


def course(runs: Sequence[Mapping[str, Any]], name: str, times: Sequence[float]) -> npt.NDArray[np.float64]:
    """An accuracy over time, [seeds, times]: at each time that of the newest version."""
    return np.array(
        [[each[name][bisect.bisect_right(each["seconds"], moment) - 1] for moment in times] for each in runs]
    )


def until(runs: Sequence[Mapping[str, Any]], accuracy: float = STAYS) -> float | None:
    """The time from which on no version has less than this accuracy, mean over the seeds; None if one never has it."""
    found: list[float] = []
    for each in runs:
        below = [index for index, value in enumerate(each["accuracy"]) if value < accuracy]
        first = below[-1] + 1 if below else 0
        if first == len(each["seconds"]):
            return None
        found.append(each["seconds"][first])
    return statistics.mean(found)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Both accuracies over time: the mean over the seeds, and the range as a band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - an extra
    from matplotlib.figure import Figure  # noqa: PLC0415 - likewise

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    times = np.linspace(0, result["asked"]["seconds"], POINTS).tolist()
    panels = {"accuracy": "test accuracy, all classes", METRIC: "test accuracy, the slow devices' classes"}
    for axes, (name, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for (way, runs), color in zip(result["ways"].items(), COLORS, strict=True):
            found = 100 * course(runs, name, times)
            axes.plot(times, found.mean(0), color=color, label=way)
            axes.fill_between(times, found.min(0), found.max(0), color=color, alpha=0.15, linewidth=0)
        axes.set(title=title, xlabel="virtual seconds", ylabel="%")
        axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    figure.savefig(path, dpi=90)


def show(result: Mapping[str, Any]) -> None:
    """Print a table."""
    head = f"after {result['asked']['seconds']:.0f} virtual s | versions | accuracy | on the slow classes | stale"
    print(f"| {head} | {STAYS:.0%} from s on |")
    print("|---|---|---|---|---|---|")
    for way, runs in result["ways"].items():
        (mean, spread), (slow, slow_spread) = (final(runs, name, result["asked"]["seconds"]) for name in NAMES)
        versions = statistics.mean(len(each["seconds"]) - 1 for each in runs)
        stale = sum(each["stale"] for each in runs) / sum(each["stale"] + each["updates"] for each in runs)
        shown = f"{mean:.1%} ± {spread:.1%} | {slow:.1%} ± {slow_spread:.1%}"
        reached = until(runs)
        print(
            f"| {way} | {versions:.0f} | {shown} | {stale:.0%} | {'never' if reached is None else f'{reached:.0f}'} |"
        )


def main() -> None:
    """Run missing runs and print the table."""
    parser = options(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--seconds", type=float, default=300.0, help="virtual time of each run")
    parser.add_argument("--median-s", type=float, default=10.0, help="median duration of a local training")
    parser.add_argument("--buffer", type=int, default=10, help="updates of a version, barrier excepted")
    parser.add_argument("--bound", type=int, default=50, help="staleness bound, asynchronous only")
    parser.add_argument("--plot", type=Path, help="picture to write")
    arguments = parser.parse_args()
    ways = {way: [run(way, seed, arguments) for seed in range(arguments.seeds)] for way in ALL_WAYS}
    asked = {name: getattr(arguments, name) for name in ("seeds", "seconds", "median_s", "buffer", "bound")}
    result = {"asked": asked, "ways": ways}
    if arguments.plot is not None:
        plot(result, arguments.plot)
    print_result(result, as_json=arguments.json, show=lambda: show(result))


if __name__ == "__main__":
    main()
