"""A task that costs next to nothing, for simulations of a federation, and their ledger."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ternbus.edge.learn.task import Evaluation, Trained
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import FloatArray, Tensors
from ternbus.lab.virtual.memory_ledger import MemoryLedger
from ternbus.lab.virtual.simulate import Simulation


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """A task that costs next to nothing: training adds noise, and the accuracy is how often it did."""

    name: str = "noise"
    default_plan: Mapping[str, object] = field(default_factory=dict)

    def initial(self, seed: int) -> dict[str, FloatArray]:
        rng = np.random.default_rng(seed)
        return {"w": rng.normal(size=(16, 40)).astype(np.float32), "b": np.zeros(3, np.float32)}

    def trainer(self, *, data: Path | None, partition: str) -> "NoiseTrainer":
        return NoiseTrainer()

    def evaluator(self, *, data: Path | None) -> "NoiseTrainer":
        return NoiseTrainer()


class NoiseTrainer:
    samples = 10

    def __init__(self) -> None:
        self.evaluations = 0

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:
        rng = np.random.default_rng(seed)
        changed = {name: tensor + rng.normal(0, 0.1, tensor.shape).astype(np.float32) for name, tensor in start.items()}
        return Trained(tensors=changed, samples=self.samples, metrics={"loss": 1.0, "seconds": 1e-6})

    def evaluate(self, tensors: Tensors) -> Evaluation:
        self.evaluations += 1
        return Evaluation(samples=10, values={"accuracy": min(1.0, self.evaluations / 100), "loss": 0.0})


def memory(simulation: Simulation) -> MemoryLedger:
    assert isinstance(simulation.ledger, MemoryLedger)
    return simulation.ledger
