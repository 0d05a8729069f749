"""Tasks in PyTorch: a model, its data, and how a device trains and evaluates.

How it is made. A `TorchTask` is given functions, or it is subclassed and has them as methods; an argument of the
constructor replaces the method of its name, so that both are one. Samples go through these, in this order:

dataset(folder, split)               all samples (`forms.py`, `samples.py`), of which a device has a part
collate(samples)                     a batch of the items of a Dataset; tensors need none
augment(inputs)                      in training, for each sample alone
predict(net, batch)                  the outputs
loss(net, batch, plan)               the loss; as loss(outputs, targets) where it needs no more
train_step(net, batch, plan, optimizers)     one step, where a loss and one optimizer are not enough (`steps.py`)
metrics                              of all outputs and targets of a split (`scoring.py`)

A batch, and what a model returns, is any tree of tensors (`tree.py`); which part of a batch are inputs and which are
targets says `batches.py`. `trainer.py` runs the steps and the evaluation.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import torch
from torch import nn

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.tensor_kinds import TensorKinds
from ternbus.edge.learn.calls import called
from ternbus.edge.learn.kinds import LOCAL, NOT_FINITE, UNSIZED
from ternbus.edge.learn.metric import Metric
from ternbus.edge.learn.partition import Rows
from ternbus.edge.learn.task import TrainingError
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import FloatArray
from ternbus.edge.torch import device as devices
from ternbus.edge.torch import objective, scoring, travelling_state
from ternbus.edge.torch.batches import targets_of
from ternbus.edge.torch.forms import samples_of, table_of
from ternbus.edge.torch.samples import Labels, Samples
from ternbus.edge.torch.travelling_state import TravellingState
from ternbus.edge.torch.tree import Tree

if TYPE_CHECKING:
    from ternbus.edge.torch.trainer import TorchTrainer

Split = Literal["train", "test"]
ARGUMENTS: Final = (
    "name", "model", "data", "default_plan", "loss", "metric", "metrics", "augment", "owners", "narrow", "collate",
    "workers", "device", "predict", "optimizers", "train_step", "plan_keys",
    "stays_local", "statistics", "nonnegative",
)  # fmt: skip
FUNCTIONS: Final = (
    "model", "data", "loss", "metric", "augment", "owners", "narrow", "collate", "predict", "optimizers", "train_step",
)  # fmt: skip
LISTS: Final = ("plan_keys", "stays_local", "statistics", "nonnegative")


class _ClassName:
    """A task's name where it has no other, also if a subclass has a constructor that does not call ours."""

    def __get__(self, _: object, owner: type) -> str:
        return owner.__name__


class TorchTask:
    """A task in PyTorch. `model` and `data` are needed; docs/tasks.md has a table of all arguments.

    Each argument of the constructor is a method or an attribute of the same name, for a subclass to define. A subclass
    without a `name` is named after its class.

    `model()` returns a model with random weights; its frozen tensors (`requires_grad` False) must be the same each
    time. `data(folder, split)`, as a method `dataset`, returns (inputs, targets) with a row for each sample, or another
    form of data, and raises `ConfigError` if there are none; uint8 inputs (images) reach the model as float32 in 0…1.
    `loss` takes (outputs, targets), or (net, batch, plan), and returns the batch's mean. `metric`, named accuracy, and
    `metrics`, a dict of name to function, take the outputs and the targets of a whole split.

    Raises `ConfigError` for metrics that are none, and for what is no function where one is needed.
    """

    name: str = cast("str", _ClassName())
    default_plan: Mapping[str, object] = {}
    plan_keys: Sequence[str] = ()
    """Names of plan keys that only this task knows, and reads from `Plan.extra`."""
    stays_local: Sequence[str] = ()
    """Glob patterns of the names of tensors that stay on each device."""
    statistics: Sequence[str] = ()
    """Patterns of tensors that are only averaged, besides the model's buffers."""
    nonnegative: Sequence[str] = ()
    """Patterns of tensors without negative elements, besides batch norm's variance."""
    workers: int = 0
    """The number of processes that read a Dataset, as DataLoader's num_workers."""
    device: str = devices.AUTO
    """The processor that trains: "auto", "cpu", "cuda", "cuda:1" or "mps"; "auto" follows the plan's."""
    metric: Callable[[Any, Any], Any] | Metric | None = None
    metrics: Any = None
    """Name -> function or `Metric`; a method may return this dict."""
    collate: Callable[[Sequence[Any]], Tree] | None = None
    """Samples of a Dataset -> a batch, as DataLoader's collate_fn."""
    narrow: Callable[[float], nn.Module] | None = None
    data: Callable[[Path | None, Split], Any]
    owners: Callable[[Path | None], Any] | None = None

    def __init__(
        self,
        *,
        name: str | None = None,
        model: Callable[[], nn.Module] | None = None,
        data: Callable[[Path | None, Split], Any] | None = None,
        default_plan: Mapping[str, object] | None = None,
        plan_keys: Sequence[str] | None = None,
        stays_local: Sequence[str] | None = None,
        statistics: Sequence[str] | None = None,
        nonnegative: Sequence[str] | None = None,
        loss: Callable[..., Any] | None = None,
        metric: Callable[[Any, Any], Any] | Metric | None = None,
        metrics: Mapping[str, Callable[[Any, Any], Any] | Metric] | None = None,
        augment: Callable[[Any], Any] | None = None,
        owners: Callable[[Path | None], Any] | None = None,
        narrow: Callable[[float], nn.Module] | None = None,
        collate: Callable[[Sequence[Any]], Any] | None = None,
        workers: int | None = None,
        device: str | None = None,
        predict: Callable[[nn.Module, Any], Any] | None = None,
        optimizers: Callable[[nn.Module, Plan], Any] | None = None,
        train_step: Callable[[nn.Module, Any, Plan, Any], Any] | None = None,
    ) -> None:
        given = {each: value for each, value in locals().items() if each in ARGUMENTS and value is not None}
        vars(self).update(given)
        for each in FUNCTIONS:
            _check_function(each, given.get(each), self.name)
        for each in LISTS:
            if isinstance(text := getattr(self, each), str):
                raise ConfigError(f"the task {self.name}: {each} is one text: give a list of them, as [{text!r}]")
        if metrics is not None:  # as an attribute a function is a method, which returns them
            scoring.checked(metrics, self.name)
        self.measured()

    # -- what a subclass may define

    def model(self) -> nn.Module:
        raise ConfigError(f"the task {self.name} has no model: give TorchTask(model=…), or a method model()")

    def dataset(self, folder: Path | None, split: Split) -> Any:
        """All samples of "train" or "test", in one of the forms of `forms.FORMS`."""
        if getattr(self, "data", None) is None:
            raise ConfigError(f"the task {self.name} has no data: give TorchTask(data=…), or a method dataset()")
        return called("data(folder, split)", self.data, folder, split)

    def owner(self, folder: Path | None) -> Any:
        """A label of the owner of each training sample, of any kind, for `--partition natural:I`; None without owners.

        The owners are numbered in the order of their labels; whole numbers from 0 are the numbers themselves. A table
        with columns of such labels serves `by:COLUMN:I`.
        """
        return None if self.owners is None else self.owners(folder)

    def augment(self, inputs: Tree) -> Tree:
        """Changed inputs of one sample, in training only, drawn from torch's random numbers.

        The constructor's argument takes the inputs of a batch instead, except for a transform of torchvision, which
        would draw once for all of them, and for `per_sample(function)`.
        """
        return inputs

    def augment_batch(self, inputs: Tree) -> Tree:
        """The same for the inputs of a batch at once, with random numbers for each sample: where that is faster."""
        return inputs

    def predict(self, net: nn.Module, batch: Tree) -> Tree:
        """The outputs: net(inputs) of a pair, net(**batch) of a dict, without the targets if it does not take them."""
        return objective.called(net, batch)

    def targets(self, batch: Tree) -> Tree:
        """What a metric compares the outputs of a batch with."""
        return targets_of(batch)

    def loss(self, net: nn.Module, batch: Tree, plan: Plan) -> Any:  # noqa: ARG002 - others need it
        """The loss of a batch, its mean; or (loss, outputs), which saves an evaluation a second forward pass.

        Cross entropy of the outputs, or of the `logits` in them, unless they have a `loss`.
        """
        outputs = self.predict(net, batch)
        return objective.default_loss(outputs, self.targets(batch)), outputs

    def optimizers(self, net: nn.Module, plan: Plan) -> Any:  # noqa: ARG002 - others need it
        """For a `train_step` of one's own: modules, lists of parameters, or optimizers; in a dict or list if several.

        A `PlanOptimizer` takes the place of each module and list. None is one for all parameters.
        """
        return None

    def train_step(self, net: nn.Module, batch: Tree, plan: Plan, optimizers: Any) -> Any:
        """One step on a batch. Returns its loss, or a dict of name to number; their means are reported.

        `plan.learning_rate` is the rate of the version. The trainer counts the steps and the seconds.
        """
        loss = objective.trainable(objective.read(self.loss(net, batch, plan)).value)
        optimizers.minimize(loss)
        return loss

    # -- what a federation uses

    def initial(self, seed: int) -> dict[str, FloatArray]:
        """Version 0 of the model. Raises `ConfigError` for a model that cannot be trained in a federation."""
        return travelling_state.initial(self._drawn, seed, self.name, self.stays_local)

    def fresh(self) -> nn.Module:
        """A model that is the same at each call, as far as it is drawn from torch's random numbers."""
        return self._drawn(0)

    def tensor_kinds(self) -> TensorKinds:
        """Which tensors are statistics, and which never negative, by the model."""
        return TravellingState(self.fresh(), self.stays_local).kinds

    def staying(self) -> dict[str, str]:
        """The tensors that do not travel though they are trained or change, and why."""
        found = TravellingState(self.fresh(), self.stays_local)
        begin_anew = dict.fromkeys(found.not_finite, NOT_FINITE) | dict.fromkeys(found.unsized, UNSIZED)
        return dict.fromkeys(found.local, LOCAL) | begin_anew

    def _drawn(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made: Any = self.model()
        if not isinstance(made, nn.Module):
            raise ConfigError(f"the task {self.name}: model() returned {type(made).__name__}: it must return a module")
        return made

    def narrowed(self, width: float) -> "TorchTask":
        """The same task with a narrower model. Raises `ConfigError` if it has none."""
        if (make := self.narrow) is None:
            raise ConfigError(
                f"the task {self.name} has no narrower model: add TorchTask(narrow=…), or leave out --width"
            )
        return self.replaced(model=lambda: make(width), narrow=None)

    def on_device(self, name: str) -> "TorchTask":
        """The same task on this processor. Raises `ConfigError` if this machine does not have it."""
        devices.chosen(name)
        return self.replaced(device=name)

    def replaced(self, **changed: Any) -> "TorchTask":
        """The same task with other arguments."""
        made = copy.copy(self)
        vars(made).update(changed)
        return made

    def trainer(self, *, data: Path | None, partition: str) -> "TorchTrainer":
        return self.trainers(data=data, partitions=[partition])[0]

    def trainers(self, *, data: Path | None, partitions: Sequence[str]) -> list["TorchTrainer"]:
        """Trainers for many devices in one process, used one at a time: they share a model and the data."""
        from ternbus.edge.torch.trainer import Shared, TorchTrainer  # noqa: PLC0415 - it imports this module

        given = self.dataset(data, "train")
        samples = self._samples(given)
        rows = Rows(partial(self._labels, samples), partial(self.owner, data), table_of(given), samples=len(samples))
        shared = Shared(self)
        parts = [rows.of(partition) for partition in partitions]
        return [
            TorchTrainer(self, samples.part(part) if len(part) < len(samples) else samples, shared) for part in parts
        ]

    def evaluator(self, *, data: Path | None) -> "TorchTrainer":
        from ternbus.edge.torch.trainer import Shared, TorchTrainer  # noqa: PLC0415 - it imports this module

        return TorchTrainer(self, self._samples(self.dataset(data, "test")), Shared(self))

    def samples(self, data: Path | None, split: Split) -> Samples:
        """All samples of a split."""
        return self._samples(self.dataset(data, split))

    def deploy(self, tensors: Mapping[str, FloatArray], out: Path, *, data: Path | None) -> None:
        """Write the model with these tensors as TorchScript (.pt) or ONNX (.onnx)."""
        from ternbus.edge.torch import deployed  # noqa: PLC0415 - it imports this module

        deployed.write(self, tensors, out, data)

    def _samples(self, given: Any) -> Samples:
        return samples_of(given, whose=f"the task {self.name}", collate=self.collate, workers=self.workers)

    def _labels(self, samples: Samples) -> Labels | None:
        """The target of each sample. Raises `ConfigError` if one cannot be read."""
        try:
            return samples.labels()
        except TrainingError as error:
            raise ConfigError(f"the task {self.name}: {error}") from error

    def measured(self) -> dict[str, Metric]:
        """The metrics by name, accuracy where there are none. Raises `ConfigError` for what is no metric."""
        return scoring.checked(self._given_metrics(), self.name)

    def _given_metrics(self) -> Any:
        given = self.metrics() if callable(self.metrics) else self.metrics
        if self.metric is not None:
            own: dict[str, Any] = {scoring.ACCURACY: self.metric}
            return own if given is None else own | given
        return {scoring.ACCURACY: scoring.accuracy_of_classes} if given is None else given

    @property
    def has_own_metrics(self) -> bool:
        return self.metric is not None or self.metrics is not None

    def has_own(self, name: str) -> bool:
        """Whether this task defines the method, as an argument or in its class."""
        return name in vars(self) or getattr(type(self), name) is not getattr(TorchTask, name)


def _needed(function: Callable[..., Any]) -> list[str]:
    """The arguments without a default; none where Python knows no signature."""
    try:
        found = inspect.signature(function).parameters.values()
    except ValueError:
        return []
    return [each.name for each in found if each.default is each.empty and "VAR_" not in each.kind.name]


def _check_function(argument: str, value: Any, task: str) -> None:
    """Raises `ConfigError` for a value that is no function, and for a model in place of a function that makes one."""
    if argument == "model" and isinstance(value, nn.Module):
        kind = type(value).__name__
        raise ConfigError(f"the task {task}: model is a {kind}: give a function that makes one, as lambda: {kind}(…)")
    if argument == "model" and callable(value) and (missing := _needed(value)):
        kind = getattr(value, "__name__", type(value).__name__)
        raise ConfigError(
            f"the task {task}: model is {kind}, which needs the arguments {', '.join(missing)}: give a function that "
            f"needs none, as lambda: {kind}(…)"
        )
    if isinstance(value, type) and issubclass(value, nn.Module) and argument != "model":
        name = value.__name__
        raise ConfigError(f"the task {task}: {argument} is the class {name}: give one that is made, as {name}()")
    if value is not None and not callable(value) and not isinstance(value, Metric):
        raise ConfigError(f"the task {task}: {argument} is {type(value).__name__}, but must be a function")
