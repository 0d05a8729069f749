"""The runs of an experiment: several simulations in parallel; finished runs are kept over an interruption."""

import gc
import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from ternbus.broker.errors import ConfigError, FederationError
from ternbus.broker.files import write_text
from ternbus.broker.protocol.direction import ACCURACY
from ternbus.broker.server import parent_death
from ternbus.edge.learn.task_loader import load_task
from ternbus.lab.experiment.grid import Combination, Grid, ScenarioTable
from ternbus.lab.experiment.provenance import Provenance
from ternbus.lab.interrupts import without_interrupts
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario import scenario
from ternbus.lab.virtual.computation import Computation
from ternbus.lab.virtual.simulate import Simulation

LOOK_S: Final = 0.2  # between two checks for an interruption


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One simulation, and the folder of its report, model and log."""

    combination: Combination
    seed: int
    data: Path | None
    folder: Path
    made_by: Mapping[str, str] = field(default_factory=dict)  # see `provenance`

    @property
    def table(self) -> ScenarioTable:
        return {**self.combination.scenario, "seed": self.seed}

    @property
    def path(self) -> Path:
        return self.folder / "report.json"

    def report(self) -> dict[str, Any] | None:
        """The report of an earlier run of the same scenario by the same code on the same data.

        None if there is none, or it cannot be read.
        """
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            report: dict[str, Any] = kept["report"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        same = kept["table"] == self.table and kept.get("made_by") == self.made_by
        return report if same and "metric" in report else None


def plan(grid: Grid, *, seeds: int, data: Path | None, folder: Path) -> list[Run]:
    """All runs, ordered by seed, then by combination. The folder gets a note of what the data are.

    Raises `ConfigError` if two runs would share a folder.
    """
    runs = [
        Run(combination=combination, seed=seed, data=data, folder=folder / _folder_name(combination, seed))
        for seed in range(seeds)
        for combination in grid.combinations()
    ]
    first: dict[Path, Run] = {}
    for run in runs:
        if (other := first.setdefault(run.folder, run)) is not run:
            titles = f"{other.combination.title!r} and {run.combination.title!r}"
            raise ConfigError(f"the runs {titles} would use the same folder {run.folder}: rename a label")
    made_of = Provenance(folder)
    return [replace(run, made_by=_made_by(run, made_of)) for run in runs]


def _made_by(run: Run, made_of: Provenance) -> dict[str, str]:
    wanted = scenario.parse(run.table)
    return made_of.of(wanted.task, run.data or wanted.data)


def run_all(
    runs: Sequence[Run], *, jobs: int, check: Callable[[], None], say: Callable[[str], None], fresh: bool = False
) -> list[dict[str, Any]]:
    """The reports of all runs, in their order. Missing reports are computed, ``jobs`` at a time; if ``fresh``, all.

    ``check`` is called several times a second and may raise. Then unfinished runs are ended and lost.
    """
    reports = [None if fresh else run.report() for run in runs]
    missing = [index for index, report in enumerate(reports) if report is None]
    if old := 0 if fresh else sum(runs[index].path.exists() for index in missing):
        say(f"{old} finished runs have another scenario, code of the task, data or version of Ternbus, and run anew")
    if missing:
        say(f"{len(missing)} of {len(runs)} runs to do, {min(jobs, len(missing))} at a time")
        say(f"progress of each run: {runs[0].folder.parent}/*/log")
        began = time.monotonic()
        with closing(_simulate_all({index: runs[index] for index in missing}, jobs, check)) as made:
            for count, (index, report) in enumerate(made, 1):
                reports[index] = report
                left_s = (time.monotonic() - began) / count * (len(missing) - count)
                metric = report["metric"] or ACCURACY
                say(
                    f"{count} of {len(missing)}: {runs[index].combination.title}, seed {runs[index].seed}: {metric} "
                    f"{report['metrics'].get(metric)}, {report['wall_seconds']:.0f} s; about {left_s / 60:.0f} min left"
                )
    return [report for report in reports if report is not None]


def _simulate_all(
    runs: Mapping[int, Run], jobs: int, check: Callable[[], None]
) -> Generator[tuple[int, dict[str, Any]]]:
    """The number and the report of each run, in order of completion."""
    threads = max(1, jobs // len(runs))  # worker processes in each run, if there are more processors than runs
    with _processes(min(jobs, len(runs))) as pool:
        with without_interrupts():
            numbers = {pool.submit(_simulate, run, threads): number for number, run in runs.items()}
        pending: set[Future[dict[str, Any]]] = set(numbers)
        while pending:
            check()
            done, pending = wait(pending, LOOK_S, FIRST_COMPLETED)
            for future in done:
                try:
                    report = future.result()
                except BrokenProcessPool:
                    check()  # the cause may be a signal to the whole process group
                    raise FederationError(
                        "a simulation process has ended unexpectedly, perhaps out of memory: try fewer --jobs"
                    ) from None
                yield numbers[future], report


@contextmanager
def _processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of ``count`` single-threaded processes. They end with this process, and at once if the block raises."""
    os.environ["OMP_NUM_THREADS"] = "1"  # several threads in each process would compete for the processors
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        count,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=parent_death.tie,
        initargs=(os.getpid(),),
    )
    try:
        yield pool
    except BaseException:
        mine = set(multiprocessing.active_children()) - others
        pool.shutdown(wait=False, cancel_futures=True)
        for process in mine:
            process.terminate()
        raise
    pool.shutdown()


def _simulate(run: Run, jobs: int) -> dict[str, Any]:
    """Simulate a run with ``jobs`` worker processes; write report, model and log to its folder; return the report."""
    run.folder.mkdir(parents=True, exist_ok=True)
    wanted = scenario.parse(run.table)
    if run.data is not None:
        wanted = replace(wanted, data=run.data)
    began, how = time.monotonic(), Computation(jobs=jobs)
    with (run.folder / "log").open("w", encoding="utf-8") as log:
        lines = Lines(log)
        with how.place(wanted, lines.say) as place:
            simulation = Simulation(wanted, load_task(wanted.task), lines, place=place, later=how.elsewhere)
            simulation.run()
    report = simulation.report(time.monotonic() - began)
    report["scenario"]["data"] = None  # the path of the data is private
    simulation.export(run.folder / "model.safetensors")
    part = run.path.with_suffix(".part")
    write_text(part, json.dumps({"table": run.table, "made_by": run.made_by, "report": report}))
    part.replace(run.path)
    del simulation
    gc.collect()  # a simulation has reference cycles of few large objects, which seldom trigger a collection
    return report


def _folder_name(combination: Combination, seed: int) -> str:
    return re.sub(r"[^\w.]+", "-", f"{' '.join(combination.labels.values())} {seed}".lower()).strip("-.")
