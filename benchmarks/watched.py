"""A task like another, which notes at the start and the end of each training what its process has used until then.

The task `benchmarks.watched:TASK` is the one that WATCHED_TASK names, its notes go to the file WATCHED_NOTES. As a
program it trains without Ternbus, so that what it uses can be held against what a device uses:

    python -m benchmarks.watched ROUNDS PARTITION [DATA]
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ternbus.edge.learn.loader import load_task
from ternbus.edge.learn.task import Evaluation, Task, Trained, Trainer
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import FloatArray, Tensors

OURSELVES = Path("/proc/self")


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """The task, with trainers that take notes."""

    task: Task
    notes: Path

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def default_plan(self) -> Mapping[str, object]:
        return self.task.default_plan

    def initial(self, seed: int) -> dict[str, FloatArray]:
        return self.task.initial(seed)

    def trainer(self, *, data: Path | None, partition: str) -> "WatchedTrainer":
        return WatchedTrainer(self.task.trainer(data=data, partition=partition), self.notes)

    def evaluator(self, *, data: Path | None) -> Trainer:
        return self.task.evaluator(data=data)


class WatchedTrainer:
    """Adds two notes to each training, and nothing to its result."""

    def __init__(self, trainer: Trainer, notes: Path) -> None:
        self._trainer = trainer
        self._notes = notes
        self._is_new = True

    @property
    def samples(self) -> int:
        return self._trainer.samples

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:
        self._note("start")
        try:
            return self._trainer.train(start, plan, version=version, seed=seed)
        finally:
            self._note("end")

    def evaluate(self, tensors: Tensors) -> Evaluation:
        return self._trainer.evaluate(tensors)

    def _note(self, moment: str) -> None:
        """The clocks first and last: what lies between is the note's own work."""
        came = clocks()
        note = {"moment": moment, "samples": self.samples, "came": came, **used()}
        if self._is_new:  # the peak from here on is training's, not that of reading the data
            self._is_new = False
            with suppress(OSError):
                (OURSELVES / "clear_refs").write_text("5")
        with self._notes.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**note, "went": clocks()}) + "\n")


def clocks() -> dict[str, float]:
    """Wall, this process's CPU, and this thread's."""
    return {"wall": time.monotonic(), "process": time.process_time(), "thread": time.thread_time()}


def used(process: Path = OURSELVES) -> dict[str, float]:
    """Peak and present memory, how often a thread woke from waiting, and what was written to a disk."""
    found = table(process / "status")
    wakeups = sum(table(each)["voluntary_ctxt_switches"] for each in process.glob("task/*/status"))
    written = table(process / "io").get("write_bytes", 0)
    return {"peak_kb": found["VmHWM"], "resident_kb": found["VmRSS"], "wakeups": wakeups, "written_bytes": written}


def table(path: Path) -> dict[str, int]:
    """The numbers of one of the kernel's tables of ``name: number``."""
    rows = (line.partition(":") for line in path.read_text().splitlines())
    return {name: int(value.split()[0]) for name, _, value in rows if value.split() and value.split()[0].isdigit()}


def main() -> None:
    """Train so many times, each time from where the last one came to."""
    rounds, partition, data = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]) if sys.argv[3:] else None
    trainer, tensors, plan = (
        TASK.trainer(data=data, partition=partition),
        TASK.initial(0),
        dict[str, Any](TASK.default_plan),
    )
    for version in range(rounds):
        tensors = dict(trainer.train(tensors, Plan.from_meta(plan), version=version, seed=version).tensors)


if "WATCHED_TASK" in os.environ:
    TASK = Watched(task=load_task(os.environ["WATCHED_TASK"]), notes=Path(os.environ["WATCHED_NOTES"]))

if __name__ == "__main__":
    main()
