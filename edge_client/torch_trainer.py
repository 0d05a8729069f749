"""Training with PyTorch: a task is a model function, a data function, a loss, a metric and perhaps an augmentation.

What travels is the model's floating-point state: parameters and buffers (batch norm's statistics), not its counters.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from broker.errors import ConfigError
from edge_client.partition import select
from edge_client.trainer import Evaluation, FloatArray, Plan, Tensors, Trained

Split = Literal["train", "test"]
EVALUATION_BATCH = 500


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of samples whose largest output is the target."""
    return (outputs.argmax(1) == targets).float().mean()


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchTask:
    """A task in PyTorch; every function is the plain one of a single-machine script.

    `data(folder, split)` gives (inputs, targets), one row a sample, and raises `ConfigError` where they are missing;
    inputs kept as uint8 (images) reach `augment` and the model as float32 in 0…1. `loss` and `metric` take
    (outputs, targets) and give the batch's mean. `augment` takes a batch of inputs, in training only.
    """

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[Path | None, Split], tuple[Tensor, Tensor]]
    default_plan: Mapping[str, object] = field(default_factory=dict)
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
    metric: Callable[[Tensor, Tensor], Tensor] = accuracy
    augment: Callable[[Tensor], Tensor] | None = None

    def initial(self, seed: int) -> dict[str, FloatArray]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _to_arrays(_state(self.model()))

    def trainer(self, *, data: Path | None, partition: str) -> "TorchTrainer":
        return self.trainers(data=data, partitions=[partition])[0]

    def trainers(self, *, data: Path | None, partitions: Sequence[str]) -> list["TorchTrainer"]:
        """Many devices in one process, of which one trains at a time: one model for all, the data read once."""
        inputs, targets = self.data(data, "train")
        model = self.model()
        return [TorchTrainer(self, *self._part(inputs, targets, partition), model) for partition in partitions]

    def _part(self, inputs: Tensor, targets: Tensor, partition: str) -> tuple[Tensor, Tensor]:
        if partition == "all":
            return inputs, targets
        if targets.dim() != 1 or targets.is_floating_point():
            raise ConfigError(f"the task {self.name} has no classes to split by: only --partition all")
        chosen = torch.from_numpy(select(partition, targets.numpy()))
        return inputs[chosen], targets[chosen]

    def evaluator(self, *, data: Path | None) -> "TorchTrainer":
        return TorchTrainer(self, *self.data(data, "test"), self.model())


class TorchTrainer:
    """One device's model and data. Raises `ConfigError` if there is no data."""

    def __init__(self, task: TorchTask, inputs: Tensor, targets: Tensor, model: nn.Module) -> None:
        if not len(inputs) or len(inputs) != len(targets):
            raise ConfigError(f"the task {task.name} has {len(inputs)} inputs and {len(targets)} targets here")
        torch.set_num_threads(_threads())
        self._task = task
        self._inputs = inputs
        self._targets = targets
        self._model = model
        self._state = _state(self._model)

    @property
    def samples(self) -> int:
        return len(self._inputs)

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:  # noqa: ARG002  # its plan is the same for every version
        began = time.perf_counter()
        self._load(start)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # dropout and augmentation draw from it
            loss, metric = self._descend(plan, np.random.default_rng(seed))
        seconds = time.perf_counter() - began
        metrics = {"loss": loss, "accuracy": metric, "seconds": seconds}
        return Trained(tensors=_to_arrays(self._state), samples=self.samples, metrics=metrics)

    def evaluate(self, tensors: Tensors) -> Evaluation:
        self._load(tensors)
        self._model.eval()
        loss = metric = 0.0
        with torch.no_grad():
            for first in range(0, self.samples, EVALUATION_BATCH):
                inputs, targets = self._batch(slice(first, first + EVALUATION_BATCH))
                outputs = self._model(inputs)
                loss += float(self._task.loss(outputs, targets)) * len(targets)
                metric += float(self._task.metric(outputs, targets)) * len(targets)
        return Evaluation(samples=self.samples, values={"accuracy": metric / self.samples, "loss": loss / self.samples})

    def _descend(self, plan: Plan, rng: np.random.Generator) -> tuple[float, float]:
        """The plan's steps of SGD on the model in place; the mean loss and metric of its batches."""
        self._model.train()
        step = _Sgd(self._model, plan)
        loss_sum = metric_sum = 0.0
        for chosen in plan.batches(self.samples, rng):
            inputs, targets = self._batch(torch.from_numpy(chosen))
            if self._task.augment is not None:
                inputs = self._task.augment(inputs)
            outputs = self._model(inputs)
            loss = self._task.loss(outputs, targets)
            step(loss)
            loss_sum += loss.item()
            metric_sum += self._task.metric(outputs.detach(), targets).item()
        steps = plan.steps(self.samples)
        return loss_sum / steps, metric_sum / steps

    def _batch(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        inputs = self._inputs[rows]
        if inputs.dtype == torch.uint8:
            inputs = inputs.float() / 255
        return inputs, self._targets[rows]

    def _load(self, tensors: Tensors) -> None:
        with torch.no_grad():
            for name, tensor in self._state.items():
                # torch.tensor() copies: `tensors` may be views of a read-only vector, and must stay as they are.
                tensor.copy_(torch.tensor(tensors[name]))


class _Sgd:
    """SGD with momentum, as `torch.optim.SGD` does it, and FedProx's pull towards where it began.

    g = grad(loss) + wd·w + mu·(w - w0);  m = beta·m + g;  w = w - lr·m   (mu: Li et al. 2020, eq. 2)

    Written out since torch.optim loads the compiler at its first step: 80 MB and a second for every device.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._plan = plan
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._began = [parameter.detach().clone() for parameter in self._parameters]
        self._velocity = [torch.zeros_like(parameter) for parameter in self._parameters]

    def __call__(self, loss: Tensor) -> None:
        plan = self._plan
        gradients = torch.autograd.grad(loss, self._parameters, materialize_grads=True)
        with torch.no_grad():
            for w, w0, m, g in zip(self._parameters, self._began, self._velocity, gradients, strict=True):
                m.mul_(plan.momentum).add_(g)
                if plan.weight_decay:
                    m.add_(w, alpha=plan.weight_decay)
                if plan.proximal_mu:
                    m.add_(w - w0, alpha=plan.proximal_mu)
                w.sub_(m, alpha=plan.learning_rate)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The model's floating-point parameters and buffers, not copied; tied ones once, under their first name."""
    seen: set[int] = set()
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor
    return state


def _to_arrays(state: Mapping[str, Tensor]) -> dict[str, FloatArray]:
    return {name: tensor.detach().to(torch.float32, copy=True).contiguous().numpy() for name, tensor in state.items()}


def _threads() -> int:
    """As many as `OMP_NUM_THREADS` says, else one: OpenMP's threads wait by spinning.

    Where another process wants the same processors, two threads are then many times slower than one; and models of this
    size gain little from the second.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else 1
