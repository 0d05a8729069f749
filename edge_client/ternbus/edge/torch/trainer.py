"""The trainer of a `TorchTask`: one device's model and data; it trains by the plan, and evaluates.

`travelling_state.py` defines which tensors of the model are sent.
"""

import os
import time
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.edge.learn import local_optimizer
from ternbus.edge.learn.failure import is_memory
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.task import Evaluation, Trained, TrainingError
from ternbus.edge.learn.task_loader import code_errors
from ternbus.edge.plan.plan import NO_DP, Plan
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.torch import device as devices
from ternbus.edge.torch import dp_sgd, scoring, steps
from ternbus.edge.torch.augmentation import augmentation
from ternbus.edge.torch.autotune import Way, fastest, ways
from ternbus.edge.torch.batches import inputs_of, prepared
from ternbus.edge.torch.objective import Objective, number, trainable
from ternbus.edge.torch.samples import Samples
from ternbus.edge.torch.torch_task import Split, TorchTask
from ternbus.edge.torch.travelling_state import TravellingState
from ternbus.edge.torch.tree import Tree, leaves, mapped, row_count, some_rows

__all__ = ["Shared", "Split", "TorchTask", "TorchTrainer"]

EVALUATION_BATCH: Final = 500  # samples at most
EVALUATION_BYTES: Final = 2**20  # of inputs, up to which a batch may be larger than the plan's


class Shared:
    """The shared parts of trainers in one process: a model, and its fastest way to train for each plan."""

    def __init__(self, task: TorchTask) -> None:
        self._task = task
        self.ways: dict[tuple[str, str, int, torch.device], Way] = {}
        self.place(torch.device("cpu"))

    def place(self, device: torch.device) -> None:
        """Have the model on this device: another one, since the first may have been trained."""
        if getattr(self, "device", None) != device:
            self.model = self._task.model().to(device)
            self.travelling = TravellingState(self.model)
            self.device = device
            self.fitting = EVALUATION_BATCH  # samples that the memory suffices to evaluate at a time


class TorchTrainer:
    """One device's model and data."""

    def __init__(self, task: TorchTask, samples: Samples, shared: Shared) -> None:
        torch.set_num_threads(_threads())
        self._task = task
        self._samples = samples
        self._shared = shared
        self._objective = Objective(task)
        self._augmented = augmentation(task)
        self._metrics = task.measured()
        self._plan: Plan | None = None  # of the last training

    @property
    def samples(self) -> int:
        return len(self._samples)

    @property
    def data(self) -> Samples:
        """This device's part of the data."""
        return self._samples

    @property
    def _model(self) -> nn.Module:
        return self._shared.model

    @property
    def _travelling(self) -> TravellingState:
        return self._shared.travelling

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:
        began = time.perf_counter()
        self._plan, device = plan, self._device(plan)
        with torch.random.fork_rng(devices=devices.generators(device)):
            self._shared.place(device)
            torch.manual_seed(seed)
            own_step = self._task.has_own("train_step")
            way = Way() if own_step else self._way(plan)
            self._travelling.load(start)  # after `_way`, whose measurements change the model
            self._travelling.begin_training()
            torch.manual_seed(seed)  # dropout and augmentation draw from it
            rng = np.random.default_rng(seed)
            metrics = self._step_own(plan, version, rng) if own_step else self._descend(plan, version, way, rng)
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
        """Train by DP-SGD, on the CPU. Buffers, such as batch norm's statistics, are sent unchanged.

        They depend on the samples. Dropout and augmentation draw from `random_source` too.
        """
        began = time.perf_counter()
        self._check_private()
        self._plan = plan
        with torch.random.fork_rng(devices=[]):
            self._shared.place(torch.device("cpu"))
            torch.manual_seed(random_source.seed())
            self._travelling.load(start)
            self._travelling.begin_training()
            metrics = dp_sgd.descend(
                self._model,
                dp_sgd.Objective(predict=self._predict, loss=self._objective.simple, probe=self._probe),
                samples=self.samples,
                plan=plan,
                rate=plan.rate(version),
                random_source=random_source,
            )
        metrics |= {"seconds": time.perf_counter() - began}
        return self._result(start, 0.0, metrics)

    def _check_private(self) -> None:
        """Raises `ConfigError` if a sample could change more than its own gradient, by what the task's code does."""
        task = self._task.name
        if self._task.has_own("train_step"):
            raise ConfigError(f'dp = "sample" cannot train the task {task}: it has a train_step of its own')
        if self._objective.general:
            raise ConfigError(
                f'dp = "sample" cannot train the task {task}: its loss takes (net, batch, plan); write '
                "loss(outputs, targets) and predict(net, batch)"
            )
        if not self._samples.at_random:
            raise ConfigError(
                f'dp = "sample" cannot train the task {task}: its data must be tensors or arrays, with a row for each '
                "sample, and not a Dataset or a stream"
            )

    def _result(self, start: Tensors, statistics_rate: float, metrics: Mapping[str, float]) -> Trained:
        """The trained model. Raises `TrainingError` if it is not finite, and says whether the data are."""
        try:
            tensors = self._travelling.arrays_since(start, statistics_rate)
            return Trained(tensors=tensors, samples=self.samples, metrics=metrics)
        except TrainingError:
            if faults := self._samples.faults():
                raise TrainingError(f"{faults}: correct or remove them in the data") from None
            raise TrainingError(
                "training diverged (the data are finite, the model is not): lower the plan's learning_rate"
                if self._samples.at_random
                else "training diverged (the model is not finite): lower the plan's learning_rate, or remove NaN from "
                "the data"
            ) from None

    def _predict(self, numbers: Tensor) -> tuple[Tree, Tree]:
        """The outputs for these samples, as training sees them, and their targets."""
        return self._outputs(self._batch(numbers))

    def _probe(self, count: int) -> tuple[Tree, Tree]:
        """As `_predict`, for samples that are 0."""
        return self._outputs(mapped(lambda one: one.new_zeros(count, *one.shape[1:]), self._batch(slice(0, 1))))

    def _outputs(self, batch: Tree) -> tuple[Tree, Tree]:
        if self._augmented is not None:
            batch = self._augmented(batch)
        return self._task.predict(self._model, batch), self._task.targets(batch)

    def evaluate(self, tensors: Tensors) -> Evaluation:
        """The metrics of the whole split, and the mean loss, on as many samples at a time as the memory allows."""
        plan = self._plan or self._default_plan()
        device = self._device(plan)
        scores, loss = scoring.Scores(self._metrics), 0.0
        with torch.random.fork_rng(devices=devices.generators(device)), torch.no_grad():
            self._shared.place(device)
            self._travelling.load(tensors)
            self._model.eval()
            for batch in self._samples.in_order(min(self._shared.fitting, self._evaluation_batch(plan))):
                loss += self._scored(batch, plan, scores)
        values = scores.values()
        return Evaluation(
            samples=self.samples,
            values={**values, "loss": loss / self.samples},
            better=scoring.directions(self._metrics),
        )

    def _scored(self, batch: Tree, plan: Plan, scores: scoring.Scores) -> float:
        """The sum of the samples' losses; what is too much for the memory is evaluated by halves."""
        count = row_count(batch)
        fits = count is None or count <= self._shared.fitting
        try:
            if fits:
                ready = prepared(batch, self._travelling.dtype, self._shared.device)
                found = self._objective.of(self._model, ready, plan, Way())
                if (outputs := self._objective.outputs(self._model, ready, found)) is not None:
                    scores.keep(outputs, self._task.targets(ready))
                return number(found.value, "loss()") * (count or _count(batch))
        except code_errors() as error:
            if count is None or count < 2 or not is_memory(error):
                raise
            self._shared.fitting = count // 2
        assert count is not None  # noqa: S101 - see above
        devices.free(self._shared.device)
        half = self._shared.fitting
        parts = [some_rows(batch, slice(first, first + half)) for first in range(0, count, half)]
        return sum(self._scored(part, plan, scores) for part in parts)

    def _evaluation_batch(self, plan: Plan) -> int:
        """The plan's batch size, so that an evaluation needs no more memory than a training; more of small inputs."""
        asked: int | None = getattr(plan, "evaluation_batch_size", None)
        if asked is not None:
            return asked
        found = list(leaves(inputs_of(self._samples.batch(slice(0, 1)))))
        size = sum(leaf.numel() * max(4, leaf.element_size()) for leaf in found)
        numbers = all(leaf.is_floating_point() or leaf.dtype == torch.uint8 for leaf in found)  # no words to embed
        small = EVALUATION_BYTES // max(1, size) if numbers else 0
        return min(EVALUATION_BATCH, max(plan.batch_size, small))

    def _default_plan(self) -> Plan:
        try:
            return Plan.from_meta(self._task.default_plan)
        except ProtocolError as error:
            raise ConfigError(f"the task {self._task.name}: default_plan: {error}") from error

    def _device(self, plan: Plan) -> torch.device:
        """The owner's device; else the plan's."""
        own = self._task.device
        return devices.chosen(getattr(plan, "device", devices.AUTO) if own == devices.AUTO else own)

    def _descend(self, plan: Plan, version: int, way: Way, rng: np.random.Generator) -> dict[str, float]:
        """Run the plan's steps on the model, in place. Returns their number, the mean loss and the metrics.

        The metrics are those of all batches' outputs, each from before its step.
        """
        parameters = self._trained()
        optimizer = local_optimizer.begin(plan, [parameter.detach() for parameter in parameters])
        scores = scoring.Scores(self._metrics, scoring.TRAINING_BYTES)
        loss_sum = count = 0.0
        for batch, rate in self._steps(plan, version, rng):
            found = self._objective.of(self._model, batch, plan, way)
            loss = trainable(found.value)
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
            with torch.no_grad():
                optimizer.step(gradients, rate)
            loss_sum += loss.item()
            if found.outputs is not None:
                scores.keep(found.outputs, self._task.targets(batch))
            count += 1
        return {"loss": loss_sum / count, **scores.values_if_any(), "steps": count}

    def _step_own(self, plan: Plan, version: int, rng: np.random.Generator) -> dict[str, float]:
        """The same by the task's own `train_step`, whose numbers are averaged."""
        task, net = self._task, self._model
        plan_now = replace(
            plan, learning_rate=plan.rate(version), schedule="constant", warmup_versions=0, schedule_versions=0
        )
        optimizers = steps.optimizers_of(task.optimizers(net, plan_now), net, plan_now)
        by_plan = steps.plan_optimizers(optimizers)
        sums: dict[str, float] = {}
        count = 0
        for batch, rate in self._steps(plan, version, rng):
            for each in by_plan:
                each.rate = rate
            returned = task.train_step(net, batch, plan_now, optimizers)
            for name, value in steps.reported(returned).items():
                sums[name] = sums.get(name, 0.0) + value
            count += 1
        return {**{name: value / count for name, value in sums.items()}, "steps": count}

    def _steps(self, plan: Plan, version: int, rng: np.random.Generator) -> Iterator[tuple[Tree, float]]:
        """The batch and the learning rate of each step, until the plan's steps or seconds end."""
        rate = plan.rate(version)
        for batch in self._chosen(plan, rng):
            ready = prepared(batch, self._travelling.dtype, self._shared.device)
            yield ready if self._augmented is None else self._augmented(ready), rate

    def _chosen(self, plan: Plan, rng: np.random.Generator) -> Iterator[Tree]:
        ahead = deepcopy(rng)
        numbers = plan.batches(self.samples, rng, time.perf_counter)
        if not self._samples.reads_ahead:
            return self._samples.batches(numbers)
        # Other processes read batches that the time may not suffice for: the clock says how many are used.
        batches = self._samples.batches(plan.batches(self.samples, ahead))
        return (batch for _, batch in zip(numbers, batches, strict=False))

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    def _way(self, plan: Plan) -> Way:
        """The plan's way to train; if it leaves a choice, the fastest, measured at the first such training."""
        if (plan.precision, plan.memory_format) == ("float32", "contiguous"):
            return Way()
        device = self._shared.device
        key = (plan.precision, plan.memory_format, plan.batch_size, device)
        if key not in self._shared.ways:
            batch = self._batch(slice(0, plan.batch_size))
            candidates = ways(plan, inputs_of(batch), self._travelling.dtype, device.type)
            parameters = self._trained()
            self._travelling.begin_training()

            def step(way: Way) -> None:
                loss = trainable(self._objective.of(self._model, batch, plan, way).value)
                torch.autograd.grad(loss, parameters, allow_unused=True)

            self._shared.ways[key] = candidates[0] if len(candidates) == 1 else fastest(candidates, step)
        return self._shared.ways[key]

    def _batch(self, numbers: Tensor | slice) -> Tree:
        return prepared(self._samples.batch(numbers), self._travelling.dtype, self._shared.device)


def _count(batch: Any) -> int:
    """The number of samples of a batch whose tensors differ in length: that of the first."""
    return next((len(leaf) for leaf in leaves(batch) if leaf.dim()), 1)


def _threads() -> int:
    """The number of threads: `OMP_NUM_THREADS`, or one, since OpenMP's threads wait by spinning.

    If another process uses the same processors, two spinning threads are many times slower than one, and models of this
    size gain little from the second.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else 1
