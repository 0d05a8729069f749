"""The trainer of a `TorchTask`: one device's model and data; it trains by the plan, and evaluates.

`travelling_state.py` defines which tensors of the model are sent.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.edge.learn import local_optimizer
from ternbus.edge.learn.class_counts import counted
from ternbus.edge.learn.failure import looking_at_data, note_batch
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.task import Evaluation, Trained, TrainingError
from ternbus.edge.learn.task_loader import code_errors
from ternbus.edge.plan.plan import NO_DP, Plan
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.torch import device as devices
from ternbus.edge.torch import dp_sgd, evaluation, scoring, steps
from ternbus.edge.torch.augmentation import augmentation
from ternbus.edge.torch.autotune import Way, fastest, sleep_until, typical, ways
from ternbus.edge.torch.batches import inputs_of, prepared
from ternbus.edge.torch.finite import diverged
from ternbus.edge.torch.measured_inputs import MeasuredInputs
from ternbus.edge.torch.objective import Loss, Objective, trainable
from ternbus.edge.torch.samples import Numbers, Samples
from ternbus.edge.torch.torch_task import Split, TorchTask
from ternbus.edge.torch.travelling_state import TravellingState
from ternbus.edge.torch.tree import Tree, leaves, mapped
from ternbus.edge.torch.vectorised import VectorisedTraining

__all__ = ["Shared", "Split", "TorchTask", "TorchTrainer"]

WAYS_MAX: Final = 8  # that are measured for one model: a plan may change its batch size with each version


class Shared:
    """The shared parts of trainers in one process: a model, and its fastest way to train for each plan."""

    def __init__(self, task: TorchTask) -> None:
        self._task = task
        self.ways: dict[tuple[str, str, int, torch.device, bool], Way] = {}
        self.place(torch.device("cpu"))

    def place(self, device: torch.device) -> None:
        """Have the model on this device: another one, since the first may have been trained."""
        if getattr(self, "device", None) != device:
            self.model = self._task.fresh().to(device)
            self.travelling = TravellingState(self.model, self._task.stays_local)
            self.device = device
            self.fitting = sys.maxsize  # samples that the memory suffices to evaluate at a time, as far as is known


class TorchTrainer(MeasuredInputs, VectorisedTraining):
    """One device's model and data."""

    def __init__(self, task: TorchTask, samples: Samples, shared: Shared) -> None:
        torch.set_num_threads(devices.threads())
        self._task = task
        self._samples = samples
        self._shared = shared
        self._objective = Objective(task)
        self._augmented = augmentation(task)
        self._own_step = task.has_own("train_step")
        self._metrics = task.measured()
        self._plan: Plan | None = None  # of the last training or evaluation
        self._read_at, self._step = 0.0, 0  # when the last batch was there, and its number
        self._scorer = evaluation.Scorer(task, samples, self._objective)

    @property
    def samples(self) -> int:
        return len(self._samples)

    @property
    def data(self) -> Samples:
        """This device's part of the data."""
        return self._samples

    def data_faults(self) -> str:
        """How many samples are not finite, in words; empty if none is."""
        return self._samples.faults()

    @property
    def _model(self) -> nn.Module:
        return self._shared.model

    @property
    def _travelling(self) -> TravellingState:
        return self._shared.travelling

    @property
    def statistics(self) -> frozenset[str]:
        return self._travelling.kinds.statistics

    @property
    def class_counts(self) -> dict[str, int]:
        """Empty unless there is a class for each sample."""
        labels = self._samples.labels()
        return {} if labels is None or labels.dtype.kind not in "iub" else counted(labels)

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:
        began = time.perf_counter()
        self._plan, device = plan, self._device(plan)
        with torch.random.fork_rng(devices=devices.generators(device)):
            self._shared.place(device)
            torch.manual_seed(seed)
            if plan.dp != NO_DP:
                self._travelling.load(start)  # no earlier training may be in what is measured
            measuring = time.perf_counter()
            way = Way() if self._own_step else self._way(plan)
            plan = plan.after(time.perf_counter() - measuring)
            measuring = time.perf_counter()
            step_s = 0.0 if plan.dp == NO_DP else self._step_s(plan, way)
            plan = plan.after(time.perf_counter() - measuring)
            self._travelling.load(start)  # after these measurements, which change the model
            self._travelling.begin_training()
            torch.manual_seed(seed)  # dropout and augmentation draw from it
            descend = self._step_own if self._own_step else self._descend
            self._read_at = started = time.perf_counter()
            read = self._chosen(plan, np.random.default_rng(seed))
            with looking_at_data(plan):
                try:
                    metrics = descend(plan, version, way, self._steps(read, plan, version))
                except code_errors() as error:
                    if plan.dp != NO_DP:
                        self._wait_out(read, plan, step_s, started)
                    else:
                        note_batch(error, self._step, plan.steps(self.samples))
                    raise
        metrics |= {"seconds": time.perf_counter() - began, **way.metrics()}
        return self.result(start, plan, metrics)

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
        self._travelling.check_private()
        self._plan = plan
        with torch.random.fork_rng(devices=[]):
            self._shared.place(torch.device("cpu"))
            torch.manual_seed(random_source.seed())
            self._travelling.load(start)
            self._travelling.begin_training()
            metrics = dp_sgd.descend(
                self._model,
                dp_sgd.Objective(
                    predict=self._predict, loss=self._objective.simple, zeros=self._zeros, outputs=self._outputs
                ),
                samples=self.samples,
                plan=plan,
                rate=plan.rate(version),
                random_source=random_source,
            )
        metrics |= {"seconds": time.perf_counter() - began}
        return self.result(start, plan, metrics)

    def _check_private(self) -> None:
        """Raises `ConfigError` if a sample could change more than its own gradient, by what the task's code does."""
        task = self._task.name
        if self._own_step:
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

    def result(self, start: Tensors, plan: Plan, metrics: Mapping[str, float]) -> Trained:
        """The trained model. Raises `TrainingError` if it is not finite, and says whether the data are.

        Under differential privacy it does not look, since that takes time, and no statistic of the data travels.
        """
        with looking_at_data(plan):
            tensors = self._travelling.arrays_since(start, plan.statistics_rate if plan.dp == NO_DP else 0.0)
            local = self._travelling.local_arrays()
        try:
            return Trained(tensors=tensors, samples=self.samples, metrics=metrics, local=local)
        except TrainingError:
            raise diverged(self._samples, plan) from None

    def _predict(self, numbers: Tensor) -> tuple[Tree, Tree]:
        """The outputs for these samples, as training sees them, and their targets."""
        return self._outputs(self._batch(numbers.numpy()))

    def _zeros(self, count: int) -> Tree:
        """A batch of samples that are 0."""
        return mapped(lambda one: one.new_zeros(count, *one.shape[1:]), self._batch(slice(0, 1)))

    def _outputs(self, batch: Tree) -> tuple[Tree, Tree]:
        batch = self._changed(batch)
        return self._task.predict(self._model, batch), self._task.targets(batch)

    def _changed(self, batch: Tree) -> Tree:
        return batch if self._augmented is None else self._augmented(batch)

    def evaluate(self, tensors: Tensors) -> Evaluation:
        return self.evaluate_by(tensors, None, private=False)

    def evaluate_by(self, tensors: Tensors, plan: Plan | None, *, private: bool) -> Evaluation:
        """The metrics of the whole split, and the mean loss, on as many samples at a time as the memory allows.

        Without a plan, that of the last training or evaluation counts; before one, the task's default plan.
        """
        self._plan = plan = plan or self._plan or self._default_plan()
        device = self._device(plan)
        with torch.random.fork_rng(devices=devices.generators(device)), torch.no_grad():
            self._shared.place(device)
            torch.manual_seed(0)  # a model that draws, such as a generator, draws the same for each version
            self._travelling.load(tensors)
            self._model.eval()
            return self._scorer.evaluated(self._shared, plan, private=private)

    def _default_plan(self) -> Plan:
        try:
            return Plan.from_meta(self._task.default_plan)
        except ProtocolError as error:
            raise ConfigError(f"the task {self._task.name}: default_plan: {error}") from error

    def _device(self, plan: Plan) -> torch.device:
        """The owner's device; else the plan's."""
        own = self._task.device
        return devices.chosen(plan.device if own == devices.AUTO else own)

    def _descend(self, plan: Plan, _: int, way: Way, batches: Iterator[tuple[Tree, float]]) -> dict[str, float]:
        """Run the plan's steps on the model, in place. Returns their number, the mean loss and the metrics.

        The metrics are those of all batches' outputs, each from before its step.
        """
        parameters = self._trained()
        optimizer = local_optimizer.begin(plan, [parameter.detach() for parameter in parameters])
        scores = scoring.Scores(self._metrics, scoring.TRAINING_BYTES)
        loss_sum = count = 0.0
        for batch, rate in batches:
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

    def _step_own(self, plan: Plan, version: int, _: Way, batches: Iterator[tuple[Tree, float]]) -> dict[str, float]:
        """The same by the task's own `train_step`, whose numbers are averaged."""
        task, net = self._task, self._model
        plan_now = replace(
            plan, learning_rate=plan.rate(version), schedule="constant", warmup_versions=0, schedule_versions=0
        )
        optimizers = steps.optimizers_of(task.optimizers(net, plan_now), net, plan_now)
        by_plan = steps.plan_optimizers(optimizers)
        sums: dict[str, float] = {}
        count = 0
        for batch, rate in batches:
            for each in by_plan:
                each.rate = rate
            returned = task.train_step(net, batch, plan_now, optimizers)
            for name, value in steps.reported(returned).items():
                sums[name] = sums.get(name, 0.0) + value
            count += 1
        return {**{name: value / count for name, value in sums.items()}, "steps": count}

    def _steps(self, read: Iterator[Tree], plan: Plan, version: int) -> Iterator[tuple[Tree, float]]:
        """The batch and the learning rate of each step."""
        self._step = 1
        for batch, rate in zip(read, plan.rates(version, self.samples), strict=False):
            self._read_at = time.perf_counter()
            yield self._changed(prepared(batch, self._travelling.dtype, self._shared.device)), rate
            self._step += 1

    def _chosen(self, plan: Plan, rng: np.random.Generator) -> Iterator[Tree]:
        """The batches as they are read, until the plan's steps or seconds end."""
        ahead = deepcopy(rng)
        numbers = plan.batches(self.samples, rng, time.perf_counter)
        if not self._samples.reads_ahead:
            return self._samples.batches(numbers)
        # Other processes read batches that the time may not suffice for: the clock says how many are used.
        batches = self._samples.batches(plan.batches(self.samples, ahead))
        return (batch for _, batch in zip(numbers, batches, strict=False))

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    def _step_s(self, plan: Plan, way: Way) -> float:
        """The time that a step takes with samples that are 0, in seconds; 0 if the model refuses these.

        Nothing that was measured with the data, under this plan or another, decides it.
        """
        self._travelling.begin_training()
        try:
            step = self._measured(plan)
            return typical(lambda: step(way), 1 + plan.steps(self.samples), plan.seconds, time.perf_counter)
        except ConfigError:  # a mistake in the task or the plan, whatever the data are
            raise
        except code_errors():
            return 0.0

    def _wait_out(self, read: Iterator[Tree], plan: Plan, step_s: float, started: float) -> None:
        """Make a training that failed, as it may for one sample, as long as it would have been: others see its end.

        The batches that are left are read, which may take longer than a step. After a fault in reading none is left.
        """
        sleep_until(self._read_at + step_s)
        with suppress(*code_errors()):
            for _ in read:
                sleep_until(time.perf_counter() + step_s)
        all_s = plan.steps(self.samples) * step_s
        sleep_until(started + min(all_s, plan.seconds))

    def _way(self, plan: Plan) -> Way:
        """The plan's way to train; if it leaves a choice, the fastest, measured at the first such training."""
        if (plan.precision, plan.memory_format) == ("float32", "contiguous"):
            return Way()
        device, private = self._shared.device, plan.dp != NO_DP
        key = (plan.precision, plan.memory_format, plan.batch_size, device, private)
        if key not in self._shared.ways:
            candidates = ways(plan, inputs_of(self._batch(slice(0, 1))), self._travelling.dtype, device.type)
            if len(self._shared.ways) >= WAYS_MAX:
                return candidates[0]
            self._travelling.begin_training()
            try:
                found = candidates[0]
                if len(candidates) > 1:
                    found = fastest(candidates, self._measured(plan), time.perf_counter, plan.seconds)
            except code_errors():
                if not plan.hides_failures:
                    raise
                found = candidates[0]
            self._shared.ways[key] = found
        return self._shared.ways[key]

    def _measured(self, plan: Plan) -> Callable[[Way], object]:
        """A step to be measured, on the first batch; under differential privacy a whole one on samples that are 0."""
        private, size = plan.dp != NO_DP, min(plan.batch_size, self.samples)
        batch = self._zeros(size) if private else self._batch(slice(0, size))
        if self._own_step:
            optimizers = steps.optimizers_of(self._task.optimizers(self._model, plan), self._model, plan)
            own = self._task.train_step
            return lambda _: steps.reported(own(self._model, self._changed(batch), plan, optimizers))

        trained = self._trained()
        if not private:
            return lambda way: torch.autograd.grad(
                trainable(self._objective.of(self._model, batch, plan, way).value), trained, allow_unused=True
            )
        optimizer = local_optimizer.begin(plan, [parameter.detach() for parameter in trained])
        scores = scoring.Scores(self._metrics, scoring.TRAINING_BYTES)

        def step(way: Way) -> None:
            augmented = self._changed(batch)
            found = self._of_zeros(augmented, plan, way)
            gradients = torch.autograd.grad(trainable(found.value), trained, materialize_grads=True)
            with torch.no_grad():
                optimizer.step(gradients, 0.0)
            found.value.item()
            if found.outputs is not None:
                scores.keep(found.outputs, self._task.targets(augmented))

        return step

    def _of_zeros(self, batch: Tree, plan: Plan, way: Way) -> Loss:
        """The loss of samples that are 0; the sum of the outputs if it rejects targets that are 0."""
        if self._objective.general:
            return self._objective.of(self._model, batch, plan, way)
        with way.autocast():
            outputs = self._task.predict(self._model, way.laid_out(batch))
        with suppress(*code_errors()):
            return Loss(trainable(self._objective.simple(outputs, self._task.targets(batch))), outputs)
        return Loss(sum(leaf.sum() for leaf in leaves(outputs) if leaf.requires_grad), outputs)

    def _batch(self, numbers: Numbers | slice) -> Tree:
        return prepared(self._samples.batch(numbers), self._travelling.dtype, self._shared.device)
