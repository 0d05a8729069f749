"""A task that trains nothing: a training adds the same prepared change to the model that it starts from.

`benchmarks.path_task:TASK` has as many parameters as PATH_PARAMETERS says. All else that a device does is as ever.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.ingest import shapes
from ternbus.edge.learn.task import Evaluation, Trained
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import FloatArray, Tensors

PARAMETERS: Final = "PATH_PARAMETERS"  # of the environment
SAMPLES: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class NothingTask:
    """A model of zeros at first."""

    parameters: int
    name: str = "nothing"

    @property
    def default_plan(self) -> Mapping[str, object]:
        return {}

    def initial(self, seed: int) -> dict[str, FloatArray]:  # noqa: ARG002 - as of any task
        return {name: np.zeros(shape, np.float32) for name, shape in shapes(self.parameters).items()}

    def trainer(self, *, data: Path | None, partition: str) -> "NothingTrainer":  # noqa: ARG002 - as of any task
        return NothingTrainer(self.initial(0))

    def evaluator(self, *, data: Path | None) -> "NothingTrainer":  # noqa: ARG002 - as of any task
        return NothingTrainer(self.initial(0))


class NothingTrainer:
    """Adds a Gaussian change that is drawn once."""

    def __init__(self, model: Tensors) -> None:
        random = np.random.default_rng(0)
        self._change = {name: random.normal(0, 1e-3, each.shape).astype(np.float32) for name, each in model.items()}

    @property
    def samples(self) -> int:
        return SAMPLES

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:  # noqa: ARG002 - as of any trainer
        tensors = {name: start[name] + change for name, change in self._change.items()}
        return Trained(tensors=tensors, samples=SAMPLES, metrics={"loss": 0.5, "seconds": 0.0, "steps": 1.0})

    def evaluate(self, tensors: Tensors) -> Evaluation:  # noqa: ARG002 - likewise
        return Evaluation(samples=SAMPLES, values={"loss": 0.5})


if PARAMETERS in os.environ:
    TASK = NothingTask(parameters=int(os.environ[PARAMETERS]))
