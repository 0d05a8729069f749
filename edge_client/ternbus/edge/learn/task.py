"""The protocols Task and Trainer, and the results of training and evaluation.

Tensors are numpy arrays by name, so a trainer can use any framework.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ternbus.broker.errors import ConfigError, FederationError
from ternbus.broker.protocol.direction import DIRECTIONS, Direction
from ternbus.broker.protocol.task_plan import TaskPlan
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import FloatArray, Tensors


class TrainingError(FederationError):
    """Local training gave no usable model, for example because it diverged. The device tries again later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """The result of local training: all tensors of the trained model (not the change), and the number of samples.

    `metrics` has `loss` (the mean over the training batches), the task's own metrics, such as `accuracy`, of the
    outputs in training, `seconds` and `steps`. `local` has trained tensors by other names that stay on the device: it
    keeps them with the update, and the next `start`, like the tensors that are evaluated, has them beside the model's.
    Raises `TrainingError` if any tensor has a NaN or an infinity, `TypeError` for what is no number: a metric, or
    samples that are not whole. Numbers of numpy become Python's, since only these can be sent.
    """

    tensors: Tensors
    samples: int
    metrics: Mapping[str, float]
    local: Tensors = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", whole_number(self.samples))
        object.__setattr__(self, "metrics", {name: _number(name, value) for name, value in self.metrics.items()})
        with np.errstate(over="ignore", invalid="ignore"):
            strange = [name for name, tensor in (*self.tensors.items(), *self.local.items()) if not _is_finite(tensor)]
        if strange:
            raise TrainingError(
                f"training diverged ({strange[0]} is not finite): lower the plan's learning_rate, or remove NaN from "
                "the data"
            )


def whole_number(samples: Any) -> int:
    """The number of samples that the code of a task gives."""
    try:
        return operator.index(samples)
    except TypeError:
        kind = type(samples).__name__
        raise TypeError(f"samples is {samples!r}, of the type {kind}: it must be a whole number") from None


def _number(name: str, value: Any) -> float:
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several numbers
        pass
    raise TypeError(f"the metric {name!r} is of the type {type(value).__name__}: it must be one number")


def _is_finite(tensor: FloatArray) -> bool:
    """Whether no element is a NaN or an infinity; unlike isfinite(), without a second array of this size."""
    is_usual = tensor.dtype == np.float32 and tensor.flags.c_contiguous
    # einsum is quicker than sum(), but does not take every type, and copies what has another layout
    total = np.einsum("i->", tensor.ravel()) if is_usual else tensor.sum()
    if math.isfinite(total):  # a NaN or an infinity makes the sum one
        return True
    return math.isfinite(tensor.min()) and math.isfinite(tensor.max())  # the sum of finite ones may have no room


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The metrics of a model on a number of samples. `better` states directions that a name does not tell.

    Without one, `loss` is better when lower, and everything else when higher.
    """

    samples: int
    values: Mapping[str, float]
    better: Mapping[str, Direction] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", whole_number(self.samples))
        object.__setattr__(self, "values", {name: _number(name, value) for name, value in self.values.items()})
        for name, direction in self.better.items():
            if direction not in DIRECTIONS:
                raise ConfigError(
                    f"the metric {name} is better when {direction!r}: write one of {', '.join(DIRECTIONS)}"
                )

    @property
    def finite(self) -> dict[str, float]:
        """The values that can be published: a diverged model can have a NaN as its loss."""
        return {name: value for name, value in self.values.items() if math.isfinite(value)}


@runtime_checkable
class Trainer(Protocol):
    """A model and one device's data. One thread uses it at a time."""

    @property
    def samples(self) -> int: ...

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:
        """Train from `start`, which is not modified. The same arguments give the same result on the same machine."""
        ...

    def evaluate(self, tensors: Tensors) -> Evaluation: ...


@runtime_checkable
class PlannedTrainer(Protocol):
    """A trainer whose evaluation follows the federation's plan too, such as its `evaluation_batch_size`."""

    def evaluate_by(self, tensors: Tensors, plan: Plan | None, *, private: bool) -> Evaluation:
        """Without a plan, the trainer chooses. If the samples are `private`, one that fails must not end it early."""
        ...


@runtime_checkable
class ExaminedTrainer(Protocol):
    """A trainer that can look at its samples, to say why a result is not finite."""

    def data_faults(self) -> str:
        """How many samples are not finite, in words; empty if none is."""
        ...


def evaluated_by(trainer: Trainer, tensors: Tensors, plan: Plan | None, *, private: bool = False) -> Evaluation:
    """The evaluation of a model by the plan, if the trainer can follow it."""
    if isinstance(trainer, PlannedTrainer):
        return trainer.evaluate_by(tensors, plan, private=private)
    return trainer.evaluate(tensors)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Start:
    """What one of several trainings at once starts from: the arguments of its `Trainer.train`, but for the plan."""

    trainer: Trainer
    tensors: Tensors
    version: int
    seed: int


@runtime_checkable
class VectorisedTrainer(Protocol):
    """A trainer that computes its training and those of others at once, vectorised over devices."""

    def alone(self, plan: Plan) -> str:
        """Why a training by the plan must be computed alone; empty if it need not be."""
        ...

    def likeness(self, plan: Plan) -> object:
        """What is equal of trainers whose trainings by the plan can be computed at once."""
        ...

    def train_at_once(self, plan: Plan, starts: Sequence[Start]) -> list[Trained | TrainingError]:
        """The result of each, or why it has none. Any other exception is raised, and concerns all of them."""
        ...


@runtime_checkable
class PrivateTrainer(Protocol):
    """A trainer with per-sample differential privacy, which `dp = "sample"` needs."""

    def train_privately(
        self, start: Tensors, plan: Plan, *, version: int, seed: int, random_source: RandomSource
    ) -> Trained:
        """Train like `train`, but with a Gaussian mechanism in each of at most `plan.steps(samples)` steps.

        Each sample is in a batch with the probability `batch_size` / samples, by `random_source.sampled`. Each sample's
        gradient is clipped to the L2 norm `dp_clip`. Their sum gets noise of standard deviation `dp_noise` · `dp_clip`
        from `random_source`.
        """
        ...


@runtime_checkable
class Task(Protocol):
    """A model and its data, as named by `--task`."""

    @property
    def name(self) -> str: ...

    @property
    def default_plan(self) -> Mapping[str, object]:
        """The task's plan, with the keys of the protocol's `plan`; the federation's plan overrides it.

        A task that reads keys of its own from `Plan.extra` names them in an attribute `plan_keys`, a list.
        """
        ...

    def initial(self, seed: int) -> dict[str, FloatArray]:
        """The initial model, version 0. The same seed gives the same model."""
        ...

    def trainer(self, *, data: Path | None, partition: str) -> Trainer:
        """A trainer with a device's part of the training data. Raises `ConfigError` if there are no data."""
        ...

    def evaluator(self, *, data: Path | None) -> Trainer:
        """A trainer with the test data."""
        ...


def initial_of(task: Task, seed: int) -> dict[str, FloatArray]:
    """The task's initial model. Raises `ConfigError` if it is none: annotations guarantee nothing."""
    made: Any = task.initial(seed)
    what = f"the task {task.name}: initial()"
    if not isinstance(made, Mapping) or not made:
        raise ConfigError(f"{what} returned no tensors: it must return a dict of name to float32 array")
    for name, tensor in made.items():
        if not isinstance(tensor, np.ndarray) or tensor.dtype != np.float32:
            kind = tensor.dtype if isinstance(tensor, np.ndarray) else type(tensor).__name__
            raise ConfigError(f"{what} returned {name!r} as {kind}: it must be a float32 numpy array")
        if not tensor.size:
            raise ConfigError(f"{what} returned {name!r} without elements, of shape {tensor.shape}: leave it out")
        if not np.isfinite(tensor).all():
            raise ConfigError(
                f"{what} returned {name!r} with a NaN or an infinity: all elements must be finite; leave out what "
                "training does not change (in PyTorch a buffer with persistent=False)"
            )
    return dict(made)


def task_plan(task: Task) -> TaskPlan:
    """The task's default plan, and its `plan_keys`, if it has this attribute: names of keys that only it knows.

    Raises `ConfigError` for a default plan that a device would refuse, and for a key in it that nobody knows.
    """
    return TaskPlan.of(getattr(task, "plan_keys", ()), task.default_plan)


@runtime_checkable
class SharingTask(Protocol):
    """A task whose trainers in one process share memory; they are used one at a time."""

    def trainers(self, *, data: Path | None, partitions: Sequence[str]) -> Sequence[Trainer]: ...


@runtime_checkable
class PlacedTask(Protocol):
    """A task that trains on a processor by name, such as "cpu" or "cuda:1"."""

    def on_device(self, name: str) -> Task:
        """The same task on this processor. Raises `ConfigError` if this machine does not have it."""
        ...


def placed(task: Task, processor: str) -> Task:
    """The task on its owner's choice of processor; `task` itself for "" or "auto".

    Raises `ConfigError` if this machine, or the task, does not have it.
    """
    if processor in ("", "auto"):
        return task
    if isinstance(task, PlacedTask):
        return task.on_device(processor)
    if processor == "cpu":
        return task
    raise ConfigError(
        f"the task {task.name} has no device {processor!r}, since it does without PyTorch: leave out --device"
    )


def trainers_of(task: Task, data: Path | None, partitions: Sequence[str]) -> list[Trainer]:
    """A trainer for each partition. Raises `ConfigError` if there are no such data."""
    if isinstance(task, SharingTask):
        return list(task.trainers(data=data, partitions=partitions))
    return [task.trainer(data=data, partition=partition) for partition in partitions]


def training_part(partition: str, share: float) -> str:
    """What a device trains on of its part, where it holds out a share of it, which may be 0."""
    return f"{partition};train:{share!r}" if share else partition


def halves_of(
    task: Task, data: Path | None, partitions: Sequence[str], share: float, evaluated_by: Task | None = None
) -> list[tuple[Trainer, Trainer]]:
    """For each partition a trainer without the held-out share, and a trainer with that share only.

    The task `evaluated_by`, if given, makes the second: a device that trains a sub-network evaluates the full model.
    Raises `ConfigError` for a task that ignores the split: it would evaluate on its training data.
    """
    train = [training_part(partition, share) for partition in partitions]
    test = [f"{partition};test:{share!r}" for partition in partitions]
    if evaluated_by is None:
        made = trainers_of(task, data, [*train, *test])
    else:
        made = [*trainers_of(task, data, train), *trainers_of(evaluated_by, data, test)]
    pairs = list(zip(made[: len(train)], made[len(train) :], strict=True))
    for trainer, held in pairs:
        if held.samples >= trainer.samples:
            raise ConfigError(
                f"the task {task.name} holds no data out: its trainer() must choose its rows with "
                "ternbus.edge.select, or interpret ';train:SHARE' and ';test:SHARE' itself"
            )
    return pairs
