"""Hostile devices: tasks whose trainers return harmful updates.

Hostile devices have valid keys and follow the protocol. They show the effect of an invited device on the model. A
process loads a hostile task by the name ``ternbus.lab.hostile:KIND/STRENGTH/SAMPLES/TASK``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.class_counts import class_counts_of
from ternbus.edge.learn.task import Evaluation, Task, Trained, Trainer
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import FloatArray, Tensors

SIGN_FLIP: Final = "sign-flip"
SCALED_NOISE: Final = "scaled-noise"
LABEL_FLIP: Final = "label-flip"
FREE_RIDER: Final = "free-rider"
KINDS: Final = (SIGN_FLIP, SCALED_NOISE, LABEL_FLIP, FREE_RIDER)
STRENGTHS: Final[Mapping[str, float]] = {SIGN_FLIP: 5.0, SCALED_NOISE: 30.0}  # defaults; the other kinds have none


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """The behaviour of a hostile device.

    sign-flip:    sends the learned change times -strength
    scaled-noise: sends Gaussian noise, in each tensor strength times as large as the learned change
    label-flip:   trains with label C - 1 - c instead of c, for C classes
    free-rider:   does not train and sends an update without a change

    ``samples`` is the number of samples that the device reports; 0 means the true number.
    """

    kind: str
    strength: float = 1.0
    samples: int = 0

    def spec(self, task: str) -> str:
        """The name of the hostile variant of a task, for `--task`."""
        return f"{__name__}:{self.kind}/{self.strength!r}/{self.samples}/{task}"


@dataclass(frozen=True, slots=True)
class HostileTrainer:
    """Changes the result of the trainer ``honest``. ``model`` has the names of the tensors in the model's order."""

    honest: Trainer
    behaviour: Behaviour
    model: tuple[str, ...]

    @property
    def samples(self) -> int:
        return self.behaviour.samples or self.honest.samples

    @property
    def class_counts(self) -> Mapping[str, int]:
        return class_counts_of(self.honest)

    def evaluate(self, tensors: Tensors) -> Evaluation:
        return self.honest.evaluate(tensors)

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:
        """A harmful training result; ConfigError for label-flip if the model has no output for classes."""

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
        with np.errstate(over="ignore", invalid="ignore"):  # `Trained` refuses values that are not finite
            tensors = {name: change(name, new) for name, new in learned.tensors.items()}
        return Trained(tensors=tensors, samples=self.samples, metrics=learned.metrics)

    def _flipped(self, tensors: Tensors) -> dict[str, FloatArray]:
        """The model with its outputs in reverse order: output c becomes output C - 1 - c.

        Training this model on true labels equals training the original on flipped labels, for any task and framework.
        The outputs are determined by the model's last two tensors: a weight of C rows and a bias of C elements.
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
    """A task with hostile trainers and the honest evaluator."""

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
    """The task of a spec, as an attribute of this module. ConfigError as for ``load_task`` with the honest task."""
    kind, _, rest = name.partition("/")
    if kind not in KINDS:
        raise AttributeError(name)
    strength, samples, task = rest.split("/", 2)
    return HostileTask(load_task(task), Behaviour(kind=kind, strength=float(strength), samples=int(samples)))
