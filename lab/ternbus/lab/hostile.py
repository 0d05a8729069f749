"""Devices that mean harm: what they do with what they should have learned, as trainers like any other.

Everything else about them is honest, keys and protocol included: what is tried is what an invited device can do to
the model. Its task is called ``ternbus.lab.hostile:KIND/STRENGTH/SAMPLES/TASK``, so a process can play one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.loader import load_task
from ternbus.edge.learn.task import Evaluation, Task, Trained, Trainer
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import FloatArray, Tensors

SIGN_FLIP: Final = "sign-flip"
SCALED_NOISE: Final = "scaled-noise"
LABEL_FLIP: Final = "label-flip"
FREE_RIDER: Final = "free-rider"
KINDS: Final = (SIGN_FLIP, SCALED_NOISE, LABEL_FLIP, FREE_RIDER)
STRENGTHS: Final[Mapping[str, float]] = {SIGN_FLIP: 5.0, SCALED_NOISE: 30.0}  # by default; the others have none


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """What a hostile device does.

    sign-flip:    sends -strength times what it learned
    scaled-noise: sends Gaussian noise, in each tensor strength times as large as what it learned
    label-flip:   learns that class c is class C - 1 - c
    free-rider:   learns nothing and sends no change

    ``samples`` is how many it claims to have; 0 is the truth.
    """

    kind: str
    strength: float = 1.0
    samples: int = 0

    def spec(self, task: str) -> str:
        """The name of a task that a device of this kind has, as `--task` takes it."""
        return f"{__name__}:{self.kind}/{self.strength!r}/{self.samples}/{task}"


@dataclass(frozen=True, slots=True)
class HostileTrainer:
    """Trains as ``honest`` does, and then not. ``model`` names the model's tensors in the model's own order."""

    honest: Trainer
    behaviour: Behaviour
    model: tuple[str, ...]

    @property
    def samples(self) -> int:
        return self.behaviour.samples or self.honest.samples

    def evaluate(self, tensors: Tensors) -> Evaluation:
        return self.honest.evaluate(tensors)

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:
        """ConfigError where a task has no classes to flip."""

        def learn(tensors: Tensors) -> Trained:
            return self.honest.train(tensors, plan, version=version, seed=seed)

        strength = np.float32(self.behaviour.strength)
        match self.behaviour.kind:
            case "sign-flip":
                return self._send(learn(start), lambda name, new: start[name] - strength * (new - start[name]))
            case "scaled-noise":
                rng = np.random.default_rng([seed, version])

                def noise(name: str, new: FloatArray) -> FloatArray:
                    size = float(strength * np.sqrt(np.mean(np.square(new - start[name]))))
                    return start[name] + np.float32(size) * rng.standard_normal(new.shape, dtype=np.float32)

                return self._send(learn(start), noise)
            case "label-flip":
                return self._send(
                    replace(trained := learn(self._flipped(start)), tensors=self._flipped(trained.tensors)),
                    lambda _, new: new,
                )
            case _:
                return Trained(tensors=dict(start), samples=self.samples, metrics={})

    def _send(self, learned: Trained, change: Callable[[str, FloatArray], FloatArray]) -> Trained:
        with np.errstate(over="ignore", invalid="ignore"):  # `Trained` refuses what is not finite
            tensors = {name: change(name, new) for name, new in learned.tensors.items()}
        return Trained(tensors=tensors, samples=self.samples, metrics=learned.metrics)

    def _flipped(self, tensors: Tensors) -> dict[str, FloatArray]:
        """The model whose output c is this one's output C - 1 - c.

        To train it on the true labels is to train this one on flipped ones, whatever task, data and framework are.
        The outputs are what the model's last two tensors make: a weight of C rows and a bias of C elements.
        """
        last = self.model[-2:]
        shapes = [tensors[name].shape for name in last]
        if [len(shape) for shape in shapes[1:]] != [1] or shapes[0][:1] != shapes[1]:
            raise ConfigError("label-flip needs a model whose last two tensors are the weight and bias of its classes")
        return {
            name: np.ascontiguousarray(tensor[::-1]) if name in last else tensor for name, tensor in tensors.items()
        }


@dataclass(frozen=True, slots=True)
class HostileTask:
    """A task whose trainers are hostile; its evaluator is honest."""

    honest: Task
    behaviour: Behaviour

    @property
    def name(self) -> str:
        return self.honest.name

    @property
    def default_plan(self) -> Mapping[str, object]:
        return self.honest.default_plan

    def initial(self, seed: int) -> dict[str, FloatArray]:
        return self.honest.initial(seed)

    def trainer(self, *, data: Path | None, partition: str) -> Trainer:
        honest = self.honest.trainer(data=data, partition=partition)
        return HostileTrainer(honest, self.behaviour, tuple(self.honest.initial(0)))

    def evaluator(self, *, data: Path | None) -> Trainer:
        return self.honest.evaluator(data=data)


def __getattr__(name: str) -> HostileTask:
    """The task of a spec, as if it stood here under that name. ConfigError for the honest part, see ``load_task``."""
    kind, _, rest = name.partition("/")
    if kind not in KINDS:
        raise AttributeError(name)
    strength, samples, task = rest.split("/", 2)
    return HostileTask(load_task(task), Behaviour(kind=kind, strength=float(strength), samples=int(samples)))
