"""A task that records the resource use of its process at the start and the end of each training.

`benchmarks.instrumented_task:TASK` wraps the task named by INSTRUMENTED_TASK, and appends its records to the file
INSTRUMENTED_NOTES. As a program, this module trains without Ternbus, for comparison with a device:

    python -m benchmarks.instrumented_task ROUNDS PARTITION [DATA]
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

from benchmarks.program import used
from ternbus.edge.learn.task import Evaluation, Task, Trained, Trainer
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import FloatArray, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class InstrumentedTask:
    """The wrapped task, with trainers that record resource use."""

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

    def trainer(self, *, data: Path | None, partition: str) -> "InstrumentedTrainer":
        return InstrumentedTrainer(self.task.trainer(data=data, partition=partition), self.notes)

    def evaluator(self, *, data: Path | None) -> Trainer:
        return self.task.evaluator(data=data)


class InstrumentedTrainer:
    """Records resource use before and after each training; the result is unchanged."""

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
        """Write a record. It has the clocks before and after the work for the record itself."""
        came = clocks()
        note = {"moment": moment, "samples": self.samples, "came": came, **used()}
        if self._is_new:  # reset the peak of memory, so that it does not include reading the data
            self._is_new = False
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        with self._notes.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**note, "went": clocks()}) + "\n")


def clocks() -> dict[str, float]:
    """The wall clock, the CPU time of this process, and the CPU time of this thread."""
    return {"wall": time.monotonic(), "process": time.process_time(), "thread": time.thread_time()}


def main() -> None:
    """Train ROUNDS times, each time from the result of the last training."""
    rounds, partition, data = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]) if sys.argv[3:] else None
    trainer, tensors, plan = (
        TASK.trainer(data=data, partition=partition),
        TASK.initial(0),
        dict[str, Any](TASK.default_plan),
    )
    for version in range(rounds):
        tensors = dict(trainer.train(tensors, Plan.from_meta(plan), version=version, seed=version).tensors)


if "INSTRUMENTED_TASK" in os.environ:
    TASK = InstrumentedTask(
        task=load_task(os.environ["INSTRUMENTED_TASK"]), notes=Path(os.environ["INSTRUMENTED_NOTES"])
    )

if __name__ == "__main__":
    main()
