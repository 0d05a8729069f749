"""Trainings of several devices at once, vectorised by `torch.func`: their models are stacked, a step is one for all.

Of a small model a step's calls cost more than its arithmetic, and there are no more of them for many models than for
one. Each device has the batches, the learning rates and the dropout of its training alone (`trainer.py`); a product of
stacked matrices adds up in another order, so the models agree to rounding.
"""

import inspect
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn import local_optimizer
from ternbus.edge.learn.task import Start, Trained, TrainingError
from ternbus.edge.plan.plan import NO_DP, Plan
from ternbus.edge.torch import device as devices
from ternbus.edge.torch import scoring
from ternbus.edge.torch.autotune import Way
from ternbus.edge.torch.batches import prepared
from ternbus.edge.torch.objective import Objective, trainable
from ternbus.edge.torch.samples import Numbers, Samples, TensorSamples
from ternbus.edge.torch.torch_task import TorchTask
from ternbus.edge.torch.tree import Tree, mapped, some_rows

if TYPE_CHECKING:
    from ternbus.edge.torch.trainer import Shared, TorchTrainer

Asked = tuple[torch.Size, float]
"""The shape of a tensor that dropout is applied to, and the share of it that becomes 0."""

DROPOUT: Final = inspect.signature(functional.dropout)


class VectorisedTraining:
    """What a trainer with a task and samples offers of `ternbus.edge.learn.task.VectorisedTrainer`."""

    _task: TorchTask
    _samples: Samples
    _shared: "Shared"
    _objective: Objective
    _augmented: Callable[[Tree], Tree] | None
    _own_step: bool
    _metrics: Mapping[str, Any]

    def _device(self, plan: Plan) -> torch.device:
        raise NotImplementedError

    def alone(self, plan: Plan) -> str:
        """Why a training by the plan must be computed alone; empty if it need not be."""
        model = self._shared.model
        reasons = {
            f'the plan has dp = "{plan.dp}"': plan.dp != NO_DP,
            "the plan has grad_clip, which is of one device's gradient": plan.grad_clip > 0,
            "the plan has local_seconds, which are of one device": plan.local_seconds is not None,
            "the plan's precision or memory_format is another than float32 and contiguous": (
                (plan.precision, plan.memory_format) != ("float32", "contiguous")
            ),
            "the task has a train_step of its own": self._own_step,
            "the task augments its inputs": self._augmented is not None,
            "the data are no tensors or arrays": not isinstance(self._samples, TensorSamples),
            "the model has buffers, such as batch norm's": any(True for _ in model.buffers()),
            "the model's parameters are not float32": self._shared.travelling.dtype != torch.float32,
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    def likeness(self, plan: Plan) -> object:
        """What is equal of trainers whose trainings by the plan can be computed at once."""
        data = self._samples.tree if isinstance(self._samples, TensorSamples) else self._samples
        return id(self._shared), id(data), min(plan.batch_size, len(self._samples))

    def train_at_once(self, plan: Plan, starts: Sequence[Start]) -> list[Trained | TrainingError]:
        """The result of each, or why it has none. Any other exception is raised, and concerns all of them."""
        began = time.perf_counter()
        processor = self._device(plan)
        # Those with fewer steps end first: what is left is always the first rows of the stack.
        order = sorted(range(len(starts)), key=lambda number: -plan.steps(starts[number].trainer.samples))
        chosen = [starts[number] for number in order]
        with torch.random.fork_rng(devices=devices.generators(processor)):
            self._shared.place(processor)
            stack = _Stack(self._shared.model, map(self._shared.travelling.load, [each.tensors for each in chosen]))
            self._shared.travelling.begin_training()
            metrics = self._descend_at_once(plan, chosen, stack)
            shared = {"seconds": (time.perf_counter() - began) / len(starts)}
            results: dict[int, Trained | TrainingError] = {}
            for row, (number, start) in enumerate(zip(order, chosen, strict=True)):
                stack.unstack(row)
                try:
                    results[number] = _trainer(start).result(start.tensors, plan, metrics[row] | shared)
                except TrainingError as error:
                    results[number] = error
        return [results[number] for number in range(len(starts))]

    def _descend_at_once(self, plan: Plan, starts: Sequence[Start], stack: "_Stack") -> list[dict[str, float]]:
        """Run the plan's steps on all models, in place. Returns the steps, the mean loss and the metrics of each."""
        batches = [_numbers(start, plan) for start in starts]
        rates = [list(plan.rates(start.version, start.trainer.samples)) for start in starts]
        optimizer = local_optimizer.begin(plan, list(stack.parameters.values()))
        scores = [scoring.Scores(self._metrics, scoring.TRAINING_BYTES) for _ in starts]
        losses = [0.0] * len(starts)
        objective = _Objective(self._shared.model, self._task, self._objective, plan)
        dropout: _Dropout | None = None
        left = len(starts)
        for step in range(len(batches[0])):
            count = sum(len(each) > step for each in batches)
            if count < left:
                optimizer.keep_first(left := count)
            batch = self._stacked([each[step] for each in batches[:count]])
            if dropout is None:
                one = mapped(Tensor.clone, _row(batch, 0))  # a model may change its inputs in place
                dropout = _Dropout(objective, one, [start.seed for start in starts])
            parameters = stack.first(count)
            found, outputs = objective.of_all(parameters, batch, dropout.masks(count))
            # A loss depends on its own model alone, so the gradients of their sum are those of each.
            gradients = torch.autograd.grad(found.sum(), list(parameters.values()), materialize_grads=True)
            with torch.no_grad():
                optimizer.step(gradients, _rates([each[step] for each in rates[:count]], gradients))
            for row, loss in enumerate(found.tolist()):
                losses[row] += loss
            if outputs and self._metrics:
                targets = _rows(self._task.targets(batch), count)
                for score, *kept in zip(scores, _rows(outputs[0], count), targets, strict=False):
                    score.keep(*kept)
        return [
            {"loss": loss / len(each), **score.values_if_any(), "steps": len(each)}
            for loss, score, each in zip(losses, scores, batches, strict=True)
        ]

    def _stacked(self, numbers: Sequence[Numbers]) -> Tree:
        """A batch of each device, with a new first dimension: [devices, samples of a batch, …]."""
        tree = cast("TensorSamples", self._samples).tree  # that of all devices
        ready = prepared(some_rows(tree, torch.from_numpy(np.concatenate(numbers))), torch.float32, self._shared.device)
        return mapped(lambda tensor: tensor.reshape(len(numbers), -1, *tensor.shape[1:]), ready)


class _Stack:
    """The trained parameters of a model many times, by name: [models, *shape]."""

    def __init__(self, model: nn.Module, loads: Iterable[None]) -> None:
        """`loads` loads the next values into the model each time that it is asked for one."""
        self._trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        copies = [[each.detach().clone() for each in self._trained.values()] for _ in loads]
        self.parameters = dict(zip(self._trained, map(torch.stack, zip(*copies, strict=True)), strict=True))

    def first(self, count: int) -> dict[str, Tensor]:
        """The parameters of the first models, of which gradients can be computed; they share the memory."""
        return {name: each[:count].detach().requires_grad_() for name, each in self.parameters.items()}

    def unstack(self, row: int) -> None:
        """Load one of them into the model."""
        with torch.no_grad():
            for name, each in self.parameters.items():
                self._trained[name].copy_(each[row])


class _Objective(nn.Module):
    """The loss of a batch as a module, so that `functional_call` evaluates it with other parameters of the model."""

    def __init__(self, net: nn.Module, task: TorchTask, objective: Objective, plan: Plan) -> None:
        super().__init__()
        self.net = net
        self.of_classes = False  # whether outputs are enough: the cross entropy of all follows without `vmap`
        self._task, self._objective, self._plan = task, objective, plan

    def forward(self, batch: Tree) -> tuple[Tensor | None, tuple[Tree, ...]]:
        """The loss, and in a tuple the outputs if they are known."""
        if self.of_classes:
            return None, (self._task.predict(self.net, batch),)
        found = self._objective.of(self.net, batch, self._plan, Way())
        return found.value, () if found.outputs is None else (found.outputs,)

    def tried(self, batch: Tree) -> list[Asked]:
        """Evaluate it once on a batch of one device; the shapes and the shares of its dropout."""
        seen = _Masks()
        with seen:
            found, outputs = self(batch)
        processor = trainable(found).device.type
        if seen.asked and processor != "cpu":
            raise ConfigError(f"dropout on {processor} draws other numbers for several devices than for one")
        self.of_classes = bool(outputs) and self._objective.of_classes(outputs[0], self._task.targets(batch))
        return seen.asked

    def of_all(
        self, parameters: Mapping[str, Tensor], batch: Tree, masks: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tree, ...]]:
        """The loss of each device, [devices], and the outputs, of stacked parameters, batches and masks of dropout."""
        found, outputs = vmap(self._with_parameters)(parameters, batch, masks)
        if self.of_classes:
            targets = self._task.targets(batch)
            each = functional.cross_entropy(outputs[0].flatten(0, 1), targets.flatten(), reduction="none")
            found = each.view(targets.shape).mean(1)
        return found, outputs

    def _with_parameters(self, parameters: Mapping[str, Tensor], batch: Tree, masks: Sequence[Tensor]) -> Any:
        with _Masks(masks) if masks else nullcontext():
            value, outputs = functional_call(self, {f"net.{name}": each for name, each in parameters.items()}, (batch,))
        return () if value is None else value.reshape(()), outputs


class _Masks(TorchFunctionMode):
    """Has dropout use these masks, in order; without any it notes what shapes and shares are asked for."""

    def __init__(self, masks: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self._masks = None if masks is None else iter(masks)
        self.asked: list[Asked] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.dropout:
            call = DROPOUT.bind(*args, **kwargs)
            call.apply_defaults()
            given, share = call.arguments["input"], call.arguments["p"]
            if call.arguments["training"] and 0 < share < 1:
                if self._masks is not None:
                    return given * next(self._masks)
                self.asked.append((given.shape, share))
        return func(*args, **kwargs)


class _Dropout:
    """The masks of dropout, for each device as in its training alone: drawn by its seed, in the order of the calls.

    As in `torch.nn.functional.dropout`: 0 with the probability p, else 1 / (1 - p).
    """

    def __init__(self, objective: _Objective, batch: Tree, seeds: Sequence[int]) -> None:
        self._asked = objective.tried(batch)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds] if self._asked else []

    def masks(self, count: int) -> list[Tensor]:
        """Those of the next step of the first `count` devices, [count, *shape]."""
        made = [torch.empty(count, *shape) for shape, _ in self._asked]
        for row, generator in enumerate(self._generators[:count]):
            for mask, (_, share) in zip(made, self._asked, strict=True):
                mask[row].bernoulli_(1 - share, generator=generator)
        return [mask.div_(1 - share) for mask, (_, share) in zip(made, self._asked, strict=True)]


def _trainer(start: Start) -> "TorchTrainer":
    return cast("TorchTrainer", start.trainer)  # by its likeness


def _numbers(start: Start, plan: Plan) -> Numbers:
    """The samples of each batch of a training, by their numbers in the data of all devices: [steps, samples]."""
    found = np.stack(list(plan.batches(start.trainer.samples, np.random.default_rng(start.seed))))
    own = cast("TensorSamples", _trainer(start).data).numbers
    return found if own is None else own[found]


def _row(tree: Tree, row: int) -> Tree:
    return mapped(lambda tensor: tensor[row], tree)


def _rows(tree: Tree, count: int) -> Sequence[Tree]:
    return tree.unbind() if isinstance(tree, Tensor) else [_row(tree, row) for row in range(count)]


def _rates(rates: Sequence[float], like: Sequence[Tensor]) -> float | list[Tensor]:
    """One rate for all models; where they differ, for each parameter a tensor that broadcasts with it."""
    if len(set(rates)) == 1:
        return rates[0]
    return [each.new_tensor(rates).view(-1, *[1] * (each.dim() - 1)) for each in like]
