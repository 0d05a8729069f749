"""What a task and a trainer are: the protocols, and what training and evaluating hand back.

Knows numpy arrays by name and nothing of any framework; PyTorch is one way to be a `Trainer`, plain numpy another.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from ternbus.broker.errors import ConfigError, FederationError
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import FloatArray, Tensors


class TrainingError(FederationError):
    """Local training gave no usable model (it diverged, say): nothing to send; the next version may do better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What local training made of a version: all tensors (not the difference), and from how many samples.

    `metrics` has `loss` and `accuracy` (means over the training batches), `seconds` and `steps`.
    Raises `TrainingError` if any tensor has a NaN or an infinity.
    """

    tensors: Tensors
    samples: int
    metrics: Mapping[str, float]

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            # The extremes, since they pass on a NaN and, unlike isfinite(), need no second array of that size.
            if tensor.size and not (math.isfinite(tensor.min()) and math.isfinite(tensor.max())):
                raise TrainingError(f"training diverged ({name} is not finite): the plan's learning_rate is too high")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a model is worth on so many samples; `values` has `accuracy` and `loss`."""

    samples: int
    values: Mapping[str, float]

    @property
    def finite(self) -> dict[str, float]:
        """What may be published: a model that diverged can have a loss that is no number."""
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
class PrivateTrainer(Protocol):
    """A trainer that knows per-sample differential privacy too; `dp = "sample"` is refused by any other."""

    def train_privately(
        self, start: Tensors, plan: Plan, *, version: int, seed: int, random_source: RandomSource
    ) -> Trained:
        """As `train`, and every step a Gaussian mechanism: a batch in which each sample is with the probability
        `batch_size` / samples, by `random_source.sampled`; each sample's gradient clipped to the L2 norm `dp_clip`;
        their sum with noise of standard deviation `dp_noise` · `dp_clip` from `random_source`.
        `plan.steps(samples)` of them at most.
        """
        ...


@runtime_checkable
class Task(Protocol):
    """A model and where its data comes from; what `--task` names."""

    @property
    def name(self) -> str: ...

    @property
    def default_plan(self) -> Mapping[str, object]:
        """The plan that suits the task, in the keys of the protocol's `plan`."""
        ...

    def initial(self, seed: int) -> dict[str, FloatArray]:
        """A fresh model: version 0."""
        ...

    def trainer(self, *, data: Path | None, partition: str) -> Trainer:
        """A device with its part of the training data. Raises `ConfigError` where there is none."""
        ...

    def evaluator(self, *, data: Path | None) -> Trainer:
        """A device with the test data."""
        ...


@runtime_checkable
class SharingTask(Protocol):
    """A task that can make many trainers cheaper than one by one; they are used one at a time."""

    def trainers(self, *, data: Path | None, partitions: Sequence[str]) -> Sequence[Trainer]: ...


def trainers_of(task: Task, data: Path | None, partitions: Sequence[str]) -> list[Trainer]:
    """A trainer for each partition. Raises `ConfigError` where there are no such data."""
    if isinstance(task, SharingTask):
        return list(task.trainers(data=data, partitions=partitions))
    return [task.trainer(data=data, partition=partition) for partition in partitions]


def halves_of(
    task: Task, data: Path | None, partitions: Sequence[str], share: float, tried_by: Task | None = None
) -> list[tuple[Trainer, Trainer]]:
    """For each partition a trainer without the share that is held out, and one that has nothing else.

    The second is `tried_by`'s, if that is another task: versions are tried whole, also where a part of them is trained.
    Raises `ConfigError` for a task that does not split as it is told to: it would be tried on what it has learned.
    """
    train, test = ([f"{partition};{half}:{share!r}" for partition in partitions] for half in ("train", "test"))
    if tried_by is None:
        made = trainers_of(task, data, [*train, *test])
    else:
        made = [*trainers_of(task, data, train), *trainers_of(tried_by, data, test)]
    pairs = list(zip(made[: len(train)], made[len(train) :], strict=True))
    for trainer, held in pairs:
        if held.samples >= trainer.samples:
            raise ConfigError(
                f"the task {task.name} holds nothing out: its trainer() must choose its rows by "
                "ternbus.edge.select, or understand ';train:SHARE' and ';test:SHARE' itself"
            )
    return pairs
