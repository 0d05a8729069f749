"""A narrower sub-network for a weak device: the first channels of every layer, with updates in the full schema.

This is HeteroFL (Diao et al. 2021, section 3), or FjORD's ordered dropout (Horvath et al. 2021) with a fixed width for
each device. Each tensor of the sub-network is the leading corner of the full one. The device does not compute the other
elements: its update is zero there, and the merge counts these zeros.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.arms import WIDTH_MIN
from ternbus.broker.protocol.messages import ARMS_MAX
from ternbus.edge.learn.class_counts import class_counts_of
from ternbus.edge.learn.measure import OF_DATA
from ternbus.edge.learn.task import (
    Evaluation,
    Task,
    Trained,
    Trainer,
    halves_of,
    initial_of,
    trainers_of,
    training_part,
)
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import FloatArray, Tensors

Narrowed = Callable[[float], Trainer]
"""The trainer of the sub-network of a width, made when it is first asked for."""

ROUNDING = 1e-9  # 0.1 · 30 is a little more than 3 in binary


def channels(full: int, width: float) -> int:
    """The number of channels, or units, of a layer in a sub-network of this width; at least 1."""
    return max(1, ceil(full * width - ROUNDING))


@runtime_checkable
class NarrowingTask(Protocol):
    """A task with narrower models: the same tensor names and numbers of dimensions, but fewer channels."""

    def narrowed(self, width: float) -> Task: ...


def check_width(width: float) -> None:
    if not WIDTH_MIN <= width <= 1:
        raise ConfigError(f"the width is {width:g}: it must be from {WIDTH_MIN:g} to 1")


def narrow(task: Task, width: float) -> Task:
    """The task for a device of this width; `task` itself for 1. Raises `ConfigError` if it has no such model."""
    check_width(width)
    if width == 1:
        return task
    if not isinstance(task, NarrowingTask):
        raise ConfigError(f"the task {task.name} has no narrower model: add narrowed(width), or leave out --width")
    if getattr(task, "stays_local", ()):
        raise ConfigError(
            f"the task {task.name} has stays_local, and local tensors are of the full width only: leave out --width"
        )
    inner = task.narrowed(width)
    shapes = {name: tensor.shape for name, tensor in initial_of(inner, 0).items()}
    full = {name: tensor.shape for name, tensor in initial_of(task, 0).items()}
    if shapes.keys() != full.keys():
        raise ConfigError(f"the task {task.name} of width {width:g} must have the same tensor names as the full one")
    for name, shape in shapes.items():
        if len(shape) != len(full[name]) or any(map(int.__gt__, shape, full[name])):
            raise ConfigError(
                f"the task {task.name} of width {width:g}: {name} has shape {shape}, which is not within {full[name]}"
            )
    if shapes == full:
        raise ConfigError(f"the task {task.name} of width {width:g} is as wide as the full one: choose a smaller width")
    return NarrowTask(full=task, inner=inner, shapes=shapes)


def is_narrowing(task: Task) -> bool:
    """Whether the task has narrower models at all."""
    if not isinstance(task, NarrowingTask) or getattr(task, "stays_local", None):
        return False
    try:
        task.narrowed(0.5)
    except ConfigError:
        return False
    return True


def trainers_by_width(task: Task, *, data: Path | None, partition: str, hold_out: float) -> Narrowed:
    """Trainers with a device's training data, by width; beside a trainer of the whole model."""
    part = training_part(partition, hold_out)
    return lru_cache(ARMS_MAX)(lambda width: narrow(task, width).trainer(data=data, partition=part))


def evaluators_by_width(task: Task, *, data: Path | None) -> Narrowed:
    """Trainers with the test data that evaluate sub-networks of the whole model, by a width below 1."""

    def made(width: float) -> Trainer:
        narrowed = narrow(task, width)
        assert isinstance(narrowed, NarrowTask)  # noqa: S101 - of a width below 1
        return narrowed.sub_evaluator(data)

    return lru_cache(ARMS_MAX)(made)


def trainers_of_device(
    task: Task, *, data: Path | None, partition: str, width: float, hold_out: float
) -> tuple[Trainer, Trainer | None]:
    """The trainer of a device, and one with its held-out data, if it holds any out; see `narrow` and `halves_of`."""
    trained = narrow(task, width)
    if not hold_out:
        return trained.trainer(data=data, partition=partition), None
    return halves_of(trained, data, [partition], hold_out, None if trained is task else task)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class NarrowTask:
    """A task whose trainers train the sub-network; initial model and evaluator are those of the full task."""

    full: Task
    inner: Task
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def name(self) -> str:
        return self.full.name

    @property
    def default_plan(self) -> Mapping[str, object]:
        return self.full.default_plan

    def initial(self, seed: int) -> dict[str, FloatArray]:
        return self.full.initial(seed)

    def trainer(self, *, data: Path | None, partition: str) -> Trainer:
        return self.trainers(data=data, partitions=[partition])[0]

    def trainers(self, *, data: Path | None, partitions: Sequence[str]) -> list[Trainer]:
        return [NarrowTrainer(trainer, self.shapes) for trainer in trainers_of(self.inner, data, partitions)]

    def evaluator(self, *, data: Path | None) -> Trainer:
        return self.full.evaluator(data=data)

    def sub_evaluator(self, data: Path | None) -> Trainer:
        """A trainer with the test data that evaluates the sub-network alone."""
        return NarrowTrainer(self.inner.evaluator(data=data), self.shapes)


@dataclass(frozen=True, slots=True)
class NarrowTrainer:
    """Trains the leading corner of each tensor; ``shapes`` has the shapes of the corners."""

    inner: Trainer
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def samples(self) -> int:
        return self.inner.samples

    @property
    def class_counts(self) -> Mapping[str, int]:
        return class_counts_of(self.inner)

    def __getattr__(self, name: str) -> Any:
        """What the trainer offers beside `Trainer` of its data, which are the same."""
        if name in OF_DATA:
            return getattr(self.inner, name)
        raise AttributeError(name)

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:
        """Train the corners. Batch norm's statistics are not sent: with fewer channels they differ."""
        trained = self.inner.train(self._corners(start), replace(plan, statistics_rate=0.0), version=version, seed=seed)
        tensors = {name: np.array(tensor) for name, tensor in start.items()}
        for name, tensor in tensors.items():
            tensor[self._corner(name)] = trained.tensors[name]
        return replace(trained, tensors=tensors)

    def evaluate(self, tensors: Tensors) -> Evaluation:
        """Evaluate the sub-network alone."""
        return self.inner.evaluate(self._corners(tensors))

    def _corners(self, tensors: Tensors) -> dict[str, FloatArray]:
        return {name: np.array(tensor[self._corner(name)], order="C") for name, tensor in tensors.items()}

    def _corner(self, name: str) -> tuple[slice, ...]:
        return tuple(slice(size) for size in self.shapes[name])
