"""Run an experiment: every combination of its axes, with several seeds, in virtual time; then a table, a plot and JSON.

    python -m benchmarks.experiment [NAME … | FILE.toml …] [--data DIR] [--out FOLDER] [--jobs N] [--keep] [--json]

Without a NAME it lists them: ``benchmarks/experiments/*.toml``. Each run is a federation of `ternbus lab simulate`: the
very cores that run on devices and aggregator, real training, seconds that are drawn. A run whose report is in --out is
not made again unless its scenario has changed, so what was interrupted goes on where it stopped. --keep puts the result
into ``benchmarks/results/experiments``, of which README's figures are made.
"""

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

from benchmarks import experiment_shown as shown
from benchmarks.__main__ import machine
from benchmarks.figures import KEPT
from ternbus.broker.errors import ConfigError
from ternbus.broker.files import load_toml
from ternbus.broker.server import parent_death
from ternbus.edge.learn.loader import load_task
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario import scenario
from ternbus.lab.scenario.toml_table import Table
from ternbus.lab.virtual.simulate import Simulation
from ternbus.lab.virtual.training import Workers

FOLDER: Final = Path(__file__).parent / "experiments"
BESIDE: Final = "beside"  # the axis of runs that stand outside the grid

Changes = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What a measure should come to, in all combinations with the labels ``of``, less that in ``than`` if any."""

    measure: str
    least: float | None
    most: float | None
    of: Mapping[str, str] = field(default_factory=dict)
    than: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """One file of ``benchmarks/experiments``.

    An accuracy is the mean over a run's ``last`` versions. ``updates`` is the number of merged updates at which
    ``accuracy_at_updates`` is read; without it there is no such measure.
    """

    name: str
    title: str
    about: str
    seeds: int
    last: int
    updates: int | None
    base: Changes
    axes: Mapping[str, Mapping[str, Changes]]
    beside: Mapping[str, Changes]
    x: str
    y: tuple[str, ...]
    goals: tuple[Goal, ...]

    @classmethod
    def load(cls, name: str) -> Self:
        """Of ours by its name, or in a file of one's own. Raises `ConfigError`, which names the file and the key."""
        path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
        if not path.exists():
            raise ConfigError(f"no experiment {name!r}; there are {', '.join(names())}")
        table = load_toml(path)
        try:
            return cls._parse(path.stem, Table(table, ""))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def _parse(cls, name: str, top: Table) -> Self:
        axes, plot = top.table("axes").rest(), top.table("plot")
        y = (plot.text("y") or "accuracy").split()
        found = cls(
            name=name,
            title=top.text("title") or name,
            about=(top.text("about") or "").strip(),
            seeds=top.whole("seeds") or 1,
            last=top.whole("last") or 1,
            updates=top.whole("updates"),
            base=top.table("scenario").rest(),
            axes=axes,  # type: ignore[arg-type]  # `combinations` parses each as a scenario
            beside=top.table(BESIDE).rest(),  # type: ignore[arg-type]  # likewise
            x=plot.text("x") or next(iter(axes)),
            y=tuple(y),
            goals=tuple(_goal(row) for row in top.rows("goal")),
        )
        plot.refuse_unknown()
        top.refuse_unknown()
        for _, table in found.combinations():
            scenario.parse(table)
        return found

    def combinations(self) -> Iterator[tuple[Mapping[str, str], Changes]]:
        """Each with its label on every axis, and the scenario as a file would have it, but for seed and data."""
        for labels in itertools.product(*self.axes.values()):
            table = dict(self.base)
            for axis, label in zip(self.axes, labels, strict=True):
                table = _merged(table, self.axes[axis][label])
            yield dict(zip(self.axes, labels, strict=True)), table
        for label, changes in self.beside.items():
            yield {BESIDE: label}, _merged(self.base, changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One federation to simulate."""

    labels: Mapping[str, str]
    seed: int
    table: Changes
    data: Path | None
    folder: Path

    @property
    def known(self) -> dict[str, Any] | None:
        """Its report, if it was made from the same scenario."""
        try:
            kept = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return kept["report"] if kept["table"] == self.table else None


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def runs(experiment: Experiment, seeds: int, data: Path | None, out: Path) -> list[Run]:
    """All of them, the first seed of every combination before the second of any."""
    return [
        Run(labels=labels, seed=seed, table={**table, "seed": seed}, data=data, folder=out / _slug(labels, seed))
        for seed in range(seeds)
        for labels, table in experiment.combinations()
    ]


def simulate(run: Run, jobs: int) -> dict[str, Any]:
    """Run it, with so many trainings at a time, and leave its report in its folder; the report."""
    run.folder.mkdir(parents=True, exist_ok=True)
    wanted = replace(scenario.parse(run.table), data=run.data)
    began = time.monotonic()
    with (
        (run.folder / "log").open("w", encoding="utf-8") as log,
        Workers(wanted, jobs) if jobs > 1 else nullcontext() as workers,
    ):
        simulation = Simulation(wanted, load_task(wanted.task), Lines(log), place=workers)
        simulation.run()
    found = simulation.report(time.monotonic() - began)
    found["scenario"]["data"] = None  # where it lay is nobody's business
    simulation.export(run.folder / "model.safetensors")
    path = run.folder / "report.json"
    path.with_suffix(".part").write_text(json.dumps({"table": run.table, "report": found}), encoding="utf-8")
    path.with_suffix(".part").replace(path)
    del simulation
    gc.collect()  # a federation is full of cycles, which are few objects and much memory: of those gc knows nothing
    return found


def reports(wanted: Sequence[Run], jobs: int) -> list[dict[str, Any]]:
    """Of all runs, in their order; makes what is missing, and says how far it is."""
    found = [run.known for run in wanted]
    missing = [index for index, report in enumerate(found) if report is None]
    if missing:
        _say(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them known; {min(jobs, len(missing))} at a time")
        _say(f"how far each is, its log says: {wanted[0].folder.parent}/*/log")
    os.environ["OMP_NUM_THREADS"] = "1"  # a run is one process and one core; the threads of two would only spin
    began = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=parent_death.tie, initargs=(os.getpid(),)) as pool:
        each = max(1, jobs // max(1, len(missing)))  # what no other run needs
        futures = {pool.submit(simulate, wanted[index], each): index for index in missing}
        try:
            for count, future in enumerate(as_completed(futures), 1):
                index = futures[future]
                report = found[index] = future.result()
                seconds = time.monotonic() - began
                left = seconds / count * (len(missing) - count)
                run = wanted[index]
                _say(
                    f"{count} of {len(missing)}  {', '.join(run.labels.values())}, seed {run.seed}: accuracy "
                    f"{report['accuracy']}, {report['wall_seconds']:.0f} s; {left / 60:.0f} min left"
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [report for report in found if report is not None]


def measures(found: Mapping[str, Any], last: int, updates: int | None) -> dict[str, float | None]:
    """What the table and the plot may show of one run's report.

    Shares of bytes are of what synchronous float32 averaging moves for as many updates: 4 B a parameter down and up.
    ``stale`` is the share of updates that came too late to be merged; their devices send it with a later one.
    ``most_updates`` and ``epsilon`` are those of the device that has sent, or spent, most.
    """
    devices = found["devices"].values()
    rows, accepted, stale = found["versions"], found["updates"], found["counts"]["stale"]
    plain = 4 * found["parameters"] * accepted
    merged = list(itertools.accumulate(row["updates"] for row in rows))
    until = [row for row, count in zip(rows, merged, strict=True) if updates is not None and count <= updates]
    enough = updates is not None and merged[-1] >= updates
    return {
        "accuracy": _mean(rows[-last:]),
        "accuracy_at_updates": _mean(until[-last:]) if enough else None,
        "stale": stale / (accepted + stale) if accepted + stale else None,
        "versions": rows[-1]["version"],
        "updates": accepted,
        "most_updates": max(device["updates"] for device in devices),
        "epsilon": max(device["epsilon"] for device in devices) or None,
        "up_share": found["bytes_up"] / plain if plain else None,
        "both_share": (found["bytes_up"] + _down(found)) / (2 * plain) if plain else None,
        "megabytes": (found["bytes_up"] + _down(found)) / 1e6,
        "seconds": found["wall_seconds"],
    }


def result(experiment: Experiment, wanted: Sequence[Run], found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is kept: of each combination its labels, and each measure of every seed."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for run, report in zip(wanted, found, strict=True):
        row = rows.setdefault(tuple(run.labels.values()), {"labels": dict(run.labels), "measures": {}})
        for name, value in measures(report, experiment.last, experiment.updates).items():
            row["measures"].setdefault(name, []).append(value)
    return {
        "title": experiment.title,
        "about": experiment.about,
        "seeds": len({run.seed for run in wanted}),
        "last": experiment.last,
        "updates": experiment.updates,
        "x": experiment.x,
        "y": list(experiment.y),
        "rows": list(rows.values()),
        "goals": [judged(goal, rows.values()) for goal in experiment.goals],
    }


def judged(goal: Goal, rows: Any) -> dict[str, Any]:
    """The goal, what was found (the worst of the combinations it is about), and whether that is enough."""

    def found(labels: Mapping[str, str]) -> list[float]:
        chosen = [row for row in rows if labels.items() <= row["labels"].items()]
        return [value for row in chosen for value in [shown.mean(row["measures"][goal.measure])] if value is not None]

    compared = found(goal.than) if goal.than else [0.0]
    values = [value - other for value in found(goal.of) for other in compared]
    worst = (min if goal.least is not None else max)(values, default=None)
    met = (
        worst is not None and (goal.least is None or worst >= goal.least) and (goal.most is None or worst <= goal.most)
    )
    bound = f"≥ {goal.least:g}" if goal.least is not None else f"≤ {goal.most:g}"
    about = {"measure": goal.measure, "of": dict(goal.of), "than": dict(goal.than)}
    return about | {"goal": bound, "found": worst, "met": met}


def _goal(table: Table) -> Goal:
    measure, least, most = table.text("measure"), table.number("least"), table.number("most")
    of, than = ({axis: str(label) for axis, label in table.table(key).rest().items()} for key in ("of", "than"))
    table.refuse_unknown()
    if measure is None or (least is None) == (most is None):
        raise ConfigError("[[goal]] needs measure, and either least or most")
    return Goal(measure=measure, least=least, most=most, of=of, than=than)


def _merged(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The table with the changes, each table in it likewise."""
    made = dict(table)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(made.get(key), Mapping)
        made[key] = _merged(made[key], value) if both else value
    return made


def _slug(labels: Mapping[str, str], seed: int) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", f"{' '.join(labels.values())} {seed}".lower()).strip("-")


def _mean(rows: Sequence[Mapping[str, Any]]) -> float | None:
    known = [row["accuracy"] for row in rows if row["accuracy"] is not None]
    return statistics.mean(known) if known else None


def _down(found: Mapping[str, Any]) -> int:
    """Deltas and snapshots, the first one too."""
    last = found["versions"][-1]
    return int(last["delta_bytes"] + last["snapshot_bytes"])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run_one(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The experiment's result, written into its folder as JSON, table and plot."""
    experiment = Experiment.load(name)
    out = arguments.out / experiment.name
    wanted = runs(experiment, arguments.seeds or experiment.seeds, arguments.data, out)
    found = reports(wanted, arguments.jobs)
    data = " --data DIR" if arguments.data else ""
    kept = {
        "command": f"python -m benchmarks.experiment {name}{data}",
        "seconds": round(sum(report["wall_seconds"] for report in found)),
        "machine": machine(),
        "result": result(experiment, wanted, found),
    }
    for folder in (out, KEPT) if arguments.keep else (out,):
        folder.mkdir(parents=True, exist_ok=True)
        stem = "result" if folder == out else experiment.name
        (folder / f"{stem}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        shown.plot(kept["result"], folder / f"{stem}.png")
    (out / "table.md").write_text(shown.table(kept["result"]) + "\n", encoding="utf-8")
    return kept


def main() -> None:
    """Run them, or list them; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiment", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="or a file of your own; without one they are listed")
    parser.add_argument("--data", type=Path, help="a folder with the datasets that the tasks ask for")
    parser.add_argument("--out", type=Path, default=Path("ternbus-experiments"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--seeds", type=int, help="instead of the experiment's own number")
    parser.add_argument("--keep", action="store_true", help="put the result into benchmarks/results/experiments")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()
    met = True
    try:
        for name in arguments.names:
            kept = run_one(name, arguments)
            print(json.dumps(kept) if arguments.json else shown.table(kept["result"]))
            _say(f"table.md, result.json and result.png are in {arguments.out / Path(name).stem}")
            met = met and all(goal["met"] for goal in kept["result"]["goals"])
        for name in names() if not arguments.names else ():
            print(f"{name:20} {Experiment.load(name).title}")
    except ConfigError as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
