"""Tasks and trainers in PyTorch: a task has a model function, a data function, a loss, a metric, an augmentation.

`travelling_state.py` defines which tensors of the model are sent.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn import local_optimizer
from ternbus.edge.learn.class_counts import counted
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.partition import Indices, Partition, select
from ternbus.edge.learn.task import Evaluation, Trained, TrainingError
from ternbus.edge.learn.task_loader import code_errors
from ternbus.edge.plan.plan import NO_DP, Plan
from ternbus.edge.plan.tensors import FloatArray, Tensors
from ternbus.edge.torch import dp_sgd
from ternbus.edge.torch.autotune import Way, duration, fastest, ways
from ternbus.edge.torch.travelling_state import TravellingState

Split = Literal["train", "test"]
EVALUATION_BATCH = 500


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of samples whose largest output is the target."""
    return (outputs.argmax(1) == targets).float().mean()


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchTask:
    """A task in PyTorch; its functions are those of a script for a single machine.

    `model()` returns a model with random weights; its frozen tensors (`requires_grad` False) must be the same each
    time. `data(folder, split)` returns (inputs, targets), one row per sample, and raises `ConfigError` if there are
    none; uint8 inputs (images) reach `augment` and the model as float32 in 0…1. `loss` and `metric` take (outputs,
    targets) and return the batch's mean. `augment` takes a batch of inputs, in training only. `owners(folder)` returns
    the number of each training row's owner, from 0, for `--partition natural:I`. `narrow(width)` returns a model with
    this share of the channels in each hidden layer, for `--width`.
    """

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[Path | None, Split], tuple[Tensor, Tensor]]
    default_plan: Mapping[str, object] = field(default_factory=dict)
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
    metric: Callable[[Tensor, Tensor], Tensor] = accuracy
    augment: Callable[[Tensor], Tensor] | None = None
    owners: Callable[[Path | None], Indices] | None = None
    narrow: Callable[[float], nn.Module] | None = None

    def initial(self, seed: int) -> dict[str, FloatArray]:
        """Version 0 of the model. Raises `ConfigError` for a model that cannot be trained in a federation."""
        travelling = TravellingState(self._drawn(seed))
        if fixed := travelling.fixed:
            again = TravellingState(self._drawn(seed + 1)).fixed
            if differ := [name for name in fixed if fixed[name] != again.get(name)]:
                raise ConfigError(
                    f"the task {self.name}: {differ[0]} is frozen and not sent, but differs in each call of model(): "
                    "load it from a checkpoint, or draw it with a fixed seed"
                )
        return travelling.arrays()

    def _drawn(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.model()

    def narrowed(self, width: float) -> "TorchTask":
        """The same task with a narrower model. Raises `ConfigError` if it has none."""
        if (make := self.narrow) is None:
            raise ConfigError(
                f"the task {self.name} has no narrower model: add TorchTask(narrow=…), or leave out --width"
            )
        return replace(self, model=lambda: make(width), narrow=None)

    def trainer(self, *, data: Path | None, partition: str) -> "TorchTrainer":
        return self.trainers(data=data, partitions=[partition])[0]

    def trainers(self, *, data: Path | None, partitions: Sequence[str]) -> list["TorchTrainer"]:
        """Trainers for many devices in one process, used one at a time: they share a model and read the data once."""
        inputs, targets = self.data(data, "train")
        shared = _Shared(self.model())
        natural = any(Partition.parse(partition).natural for partition in partitions)
        owners = self.owners(data) if natural and self.owners is not None else None
        return [TorchTrainer(self, *self._part(inputs, targets, owners, partition), shared) for partition in partitions]

    def _part(self, inputs: Tensor, targets: Tensor, owners: Indices | None, partition: str) -> tuple[Tensor, Tensor]:
        if partition == "all":
            return inputs, targets
        classes = targets.dim() == 1 and not targets.is_floating_point()
        labels = targets.numpy() if classes else np.zeros(len(targets), np.int64)
        if owners is not None and len(owners) != len(targets):
            raise ConfigError(
                f"the task {self.name} has {len(owners)} owners of {len(targets)} samples: "
                "owners() must return one for each training row"
            )
        if not (classes or Partition.parse(partition).whole):
            raise ConfigError(f"the task {self.name} has no classes to split by: use --partition all")
        chosen = torch.from_numpy(select(partition, labels, owners))
        return inputs[chosen], targets[chosen]

    def evaluator(self, *, data: Path | None) -> "TorchTrainer":
        return TorchTrainer(self, *self.data(data, "test"), _Shared(self.model()))


class _Shared:
    """The shared parts of trainers in one process: a model, and its fastest way to train for each plan."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.travelling = TravellingState(model)
        self.ways: dict[tuple[str, str, int, bool], Way] = {}


class TorchTrainer:
    """One device's model and data. Raises `ConfigError` if there are no data."""

    def __init__(self, task: TorchTask, inputs: Tensor, targets: Tensor, shared: _Shared) -> None:
        if not len(inputs) or len(inputs) != len(targets):
            raise ConfigError(
                f"the task {task.name} has {len(inputs)} inputs and {len(targets)} targets in this part: "
                "it must have equal numbers, and at least one"
            )
        torch.set_num_threads(_threads())
        self._task = task
        self._inputs = inputs
        self._targets = targets
        self._shared = shared
        self._model = shared.model
        self._travelling = shared.travelling

    @property
    def samples(self) -> int:
        return len(self._inputs)

    @property
    def class_counts(self) -> dict[str, int]:
        """Empty unless there is a class for each sample."""
        targets = self._targets
        return {} if targets.is_floating_point() or targets.dim() != 1 else counted(targets.numpy())

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:
        began = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if plan.dp != NO_DP:
                self._travelling.load(start)  # no earlier training may be in what is measured
            way = self._way(plan)
            expected_s = 0.0 if plan.dp == NO_DP else self._expected_s(plan, way)
            self._travelling.load(start)  # after these measurements, which change the model
            torch.manual_seed(seed)  # dropout and augmentation draw from it
            started = time.perf_counter()
            try:
                metrics = self._descend(plan, plan.rate(version), way, np.random.default_rng(seed))
            except code_errors():
                time.sleep(max(0.0, started + expected_s - time.perf_counter()))
                raise
        metrics |= {"seconds": time.perf_counter() - began, **way.metrics()}
        # under differential privacy no statistic of the data travels
        return self._result(start, plan.statistics_rate if plan.dp == NO_DP else 0.0, metrics)

    def train_privately(
        self,
        start: Tensors,
        plan: Plan,
        *,
        version: int,
        seed: int,  # noqa: ARG002 - others know it
        random_source: RandomSource,
    ) -> Trained:
        """Train by DP-SGD. Buffers, such as batch norm's statistics, are sent unchanged: they depend on the samples.

        Dropout and augmentation draw from `random_source` too.
        """
        began = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_source.seed())
            self._travelling.load(start)
            self._travelling.begin_training()
            metrics = dp_sgd.descend(
                self._model,
                dp_sgd.Objective(predict=self._predict, loss=self._task.loss, zeros=self._zeros, outputs=self._outputs),
                samples=self.samples,
                plan=plan,
                rate=plan.rate(version),
                random_source=random_source,
            )
        metrics |= {"seconds": time.perf_counter() - began}
        return self._result(start, 0.0, metrics)

    def _result(self, start: Tensors, statistics_rate: float, metrics: Mapping[str, float]) -> Trained:
        """The trained model. Raises `TrainingError` if it is not finite, and says whether the data are."""
        try:
            tensors = self._travelling.arrays_since(start, statistics_rate)
            return Trained(tensors=tensors, samples=self.samples, metrics=metrics)
        except TrainingError:
            for name, tensor in (("inputs", self._inputs), ("targets", self._targets)):
                if count := _not_finite(tensor):
                    raise TrainingError(
                        f"{count} of {self.samples} samples have {name} that are not finite (NaN or infinity): correct "
                        "or remove them in the data"
                    ) from None
            raise TrainingError(
                "training diverged (the data are finite, the model is not): lower the plan's learning_rate"
            ) from None

    def _predict(self, rows: Tensor) -> tuple[Any, Tensor]:
        """The outputs for these samples, as training sees them, and their targets."""
        return self._outputs(*self._batch(rows))

    def _zeros(self, count: int) -> tuple[Tensor, Tensor]:
        """Samples that are 0, and targets."""
        inputs, targets = (one.new_zeros(count, *one.shape[1:]) for one in self._batch(slice(0, 1)))
        return inputs, targets

    def _outputs(self, inputs: Tensor, targets: Tensor) -> tuple[Any, Tensor]:
        if self._task.augment is not None:
            inputs = self._task.augment(inputs)
        return self._model(inputs), targets

    def evaluate(self, tensors: Tensors) -> Evaluation:
        self._travelling.load(tensors)
        self._model.eval()
        loss = metric = 0.0
        with torch.no_grad():
            for first in range(0, self.samples, EVALUATION_BATCH):
                inputs, targets = self._batch(slice(first, first + EVALUATION_BATCH))
                outputs = self._model(inputs)
                loss += float(self._task.loss(outputs, targets)) * len(targets)
                metric += float(self._task.metric(outputs, targets)) * len(targets)
        return Evaluation(samples=self.samples, values={"accuracy": metric / self.samples, "loss": loss / self.samples})

    def _descend(self, plan: Plan, rate: float, way: Way, rng: np.random.Generator) -> dict[str, float]:
        """Run the plan's steps on the model, in place. Returns their number, and the batches' mean loss and metric."""
        self._travelling.begin_training()
        parameters = self._trained()
        optimizer = local_optimizer.begin(plan, [parameter.detach() for parameter in parameters])
        loss_sum = metric_sum = steps = 0.0
        for chosen in plan.batches(self.samples, rng, time.perf_counter):
            inputs, targets = self._batch(torch.from_numpy(chosen))
            if self._task.augment is not None:
                inputs = self._task.augment(inputs)
            loss, outputs = self._loss(inputs, targets, way)
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
            with torch.no_grad():
                optimizer.step(gradients, rate)
            loss_sum += loss.item()
            metric_sum += self._task.metric(outputs.detach(), targets).item()
            steps += 1
        return {"loss": loss_sum / steps, "accuracy": metric_sum / steps, "steps": steps}

    def _loss(self, inputs: Tensor, targets: Tensor, way: Way) -> tuple[Tensor, Tensor]:
        with way.autocast():
            outputs = self._model(way.laid_out(inputs))
        if way.bfloat16:
            outputs = outputs.float()
        return self._task.loss(outputs, targets), outputs

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    def _expected_s(self, plan: Plan, way: Way) -> float:
        """The time that the plan's steps take with samples that are 0, in seconds; 0 if the model refuses these.

        Others see when an update is sent. So a training that fails, as it may for one sample, has to last that long.
        Nothing that was measured with the data, under this plan or another, decides how long.
        """
        step = self._measured(plan)
        self._travelling.begin_training()
        try:
            step_s = min(duration(lambda: step(way), time.perf_counter) for _ in range(2))
        except code_errors():
            return 0.0
        return min(plan.steps(self.samples) * step_s, math.inf if plan.local_seconds is None else plan.local_seconds)

    def _way(self, plan: Plan) -> Way:
        """The plan's way to train; if it leaves a choice, the fastest, measured at the first such training."""
        private = plan.dp != NO_DP
        key = (plan.precision, plan.memory_format, plan.batch_size, private)
        if key not in self._shared.ways:
            candidates = ways(plan, self._batch(slice(0, 1))[0], self._travelling.dtype)
            self._travelling.begin_training()
            try:
                found = candidates[0] if len(candidates) == 1 else fastest(candidates, self._measured(plan))
            except code_errors():
                if not private:
                    raise
                found = candidates[0]
            self._shared.ways[key] = found
        return self._shared.ways[key]

    def _measured(self, plan: Plan) -> Callable[[Way], object]:
        """A step to be measured, on the first batch; under differential privacy on samples that are 0."""
        private, size = plan.dp != NO_DP, min(plan.batch_size, self.samples)
        inputs, targets = self._zeros(size) if private else self._batch(slice(0, size))

        def step(way: Way) -> None:
            if private:
                with way.autocast():
                    outputs, _ = self._outputs(way.laid_out(inputs), targets)
                # The sum, since a loss may reject targets that are 0.
                loss = outputs.sum() if isinstance(outputs, Tensor) else self._task.loss(outputs, targets)
            else:
                loss, _ = self._loss(inputs, targets, way)
            torch.autograd.grad(loss, self._trained(), allow_unused=True)

        return step

    def _batch(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        inputs = self._inputs[rows]
        if inputs.dtype == torch.uint8:
            inputs = inputs.float() / 255
        if inputs.is_floating_point() and self._travelling.dtype is not None:
            inputs = inputs.to(self._travelling.dtype)
        return inputs, self._targets[rows]


def _not_finite(tensor: Tensor) -> int:
    """The number of rows with a NaN or an infinity."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    parts = tensor.split(EVALUATION_BATCH)  # needs less memory than all rows at once
    return sum(int((~torch.isfinite(part)).reshape(len(part), -1).any(1).sum()) for part in parts)


def _threads() -> int:
    """The number of threads: `OMP_NUM_THREADS`, or one, since OpenMP's threads wait by spinning.

    If another process uses the same processors, two spinning threads are many times slower than one, and models of this
    size gain little from the second.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else 1
