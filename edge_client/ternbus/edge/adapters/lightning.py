"""Lightning's modules as tasks: Lightning's own Trainer runs each local training and evaluation.

The module's hooks, its optimizers and `self.log` work as they do without a federation.
"""

import copy
import importlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
from torch import nn

import ternbus.edge.torch.torchvision_ops  # noqa: F401 - before a library that imports torchvision
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.direction import Direction
from ternbus.edge.adapters.foreign import check_tables, seeded
from ternbus.edge.learn.task import Evaluation, Trained, TrainingError
from ternbus.edge.plan.plan import NO_DP, Plan
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.torch import device as devices
from ternbus.edge.torch.device import AUTO
from ternbus.edge.torch.finite import diverged
from ternbus.edge.torch.samples import Samples
from ternbus.edge.torch.torch_task import TorchTask
from ternbus.edge.torch.travelling_state import TravellingState
from ternbus.edge.torch.tree import Tree

RATES: Final = ("lr", "learning_rate")  # where Lightning's own search for a learning rate writes it
PREFIXES: Final = ("train_", "val_", "train/", "val/", "training_", "validation_")
ALIASES: Final = {"acc": "accuracy"}
EVALUATION_BATCH: Final = 256
QUIET: Final = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "max_epochs": 1,
}


class LightningTask(TorchTask):
    """A task of a LightningModule.

    `module()` returns a new module. `data(folder, split)` returns the samples in a form that `TorchTask` takes, such as
    a Dataset; a batch reaches `training_step` and `validation_step` as a DataLoader would give it. The plan chooses the
    samples of each step. Its learning rate is written to the module's `lr` or `learning_rate` (or that of `hparams`)
    before `configure_optimizers`, and defaults to what stands there. A module with neither keeps its own.

    Metrics are what `validation_step` logs, without the prefix `val_`: `val_loss` is `loss`, `val_acc` is `accuracy`.
    Lightning takes the mean over batches, so a metric that is no mean must be logged as a torchmetrics object. `better`
    has the direction of metrics for which higher is not better. `trainer` has further arguments of Lightning's Trainer,
    such as `gradient_clip_val`.
    """

    def __init__(
        self,
        *,
        module: Callable[[], nn.Module],
        name: str | None = None,
        data: Callable[..., Any] | None = None,
        default_plan: Mapping[str, object] | None = None,
        owners: Callable[[Path | None], Any] | None = None,
        collate: Callable[[Sequence[Any]], Any] | None = None,
        workers: int | None = None,
        better: Mapping[str, Direction] | None = None,
        trainer: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(name=name, model=module, data=data, owners=owners, collate=collate, workers=workers)
        self.better = better or {}
        self.options = trainer or {}
        check_tables(self.name, default_plan=default_plan or {}, better=self.better, trainer=self.options)
        made = module()
        for method in ("training_step", "validation_step", "configure_optimizers"):
            if not callable(getattr(made, method, None)):
                raise ConfigError(f"the task {self.name}: {type(made).__name__} has no {method}(): it must be a "
                                  "LightningModule")  # fmt: skip
        place = _rate_place(made)
        own = {} if place is None else {"learning_rate": float(getattr(*place))}
        self.default_plan = own | dict(default_plan or {})

    def trainers(self, *, data: Path | None, partitions: Sequence[str]) -> list["LightningTrainer"]:  # type: ignore[override]
        module = self.model()
        return [
            LightningTrainer(self, each.data, module) for each in super().trainers(data=data, partitions=partitions)
        ]

    def evaluator(self, *, data: Path | None) -> "LightningTrainer":  # type: ignore[override]
        return LightningTrainer(self, super().evaluator(data=data).data, self.model())


class LightningTrainer:
    """One device's module and data. Trainers of one process share the module, which stays as it was made."""

    def __init__(self, task: LightningTask, samples: Samples, module: nn.Module) -> None:
        self._task = task
        self._samples = samples
        self._module = module

    @property
    def samples(self) -> int:
        return len(self._samples)

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:
        began = time.perf_counter()
        module, state = self._loaded(start)
        if (place := _rate_place(module)) is not None:
            setattr(*place, plan.rate(version))
        numbers = plan.batches(self.samples, np.random.default_rng(seed), time.perf_counter)
        batches = _Batches(self._samples.batches(numbers))
        with seeded(seed), _quiet():
            state.begin_training()
            trainer = self._trainer(module, getattr(plan, "device", AUTO), limit_val_batches=0)
            trainer.fit(module, batches)
        rate = plan.statistics_rate if plan.dp == NO_DP else 0.0  # no statistic of the data travels under privacy
        took = {"seconds": time.perf_counter() - began, "steps": float(batches.count)}
        try:
            module.cpu()
            tensors = state.arrays_since(start, rate)
            return Trained(tensors=tensors, samples=self.samples, metrics={**_logged(trainer), **took})
        except TrainingError as error:
            raise diverged(self._samples, plan) from error

    def data_faults(self) -> str:
        """How many samples are not finite, in words; empty if none is."""
        return self._samples.faults()

    def evaluate(self, tensors: Tensors) -> Evaluation:
        module, _ = self._loaded(tensors)
        with seeded(0), _quiet():
            trainer = self._trainer(module, AUTO)
            size = min(EVALUATION_BATCH, self.samples)
            trainer.validate(module, _Batches(self._samples.in_order(size)), verbose=False)
        if not (values := _logged(trainer)):
            kind = type(module).__name__
            raise ConfigError(f'{kind}.validation_step() logged nothing: call self.log("val_loss", loss) there')
        return Evaluation(samples=self.samples, values=values, better=self._task.better)

    def _loaded(self, tensors: Tensors) -> tuple[nn.Module, TravellingState]:
        """A copy of the module, so that nothing of a training but its tensors reaches the next."""
        module = copy.deepcopy(self._module)
        state = TravellingState(module)
        state.load(tensors)
        return module, state

    def _trainer(self, module: nn.Module, asked: str, **options: object) -> Any:
        own = self._task.device
        device = devices.chosen(asked if own == AUTO else own)
        cuda = device.type == "cuda"
        place = {"accelerator": "gpu" if cuda else device.type, "devices": [device.index] if cuda else 1}
        make = _library(module).Trainer
        return make(**{**QUIET, **place, **self._task.options, **options})


class _Batches:
    """Batches for one pass, counted."""

    def __init__(self, batches: Iterator[Tree]) -> None:
        self._batches = batches
        self.count = 0

    def __iter__(self) -> Iterator[Tree]:
        for batch in self._batches:
            self.count += 1
            yield batch


def _library(module: nn.Module) -> ModuleType:
    """The library whose LightningModule it is: Lightning has two names, whose classes differ."""
    names = {kind.__module__.partition(".")[0] for kind in type(module).__mro__}
    if "pytorch_lightning" in names:
        return importlib.import_module("pytorch_lightning")
    if "lightning" in names:
        return importlib.import_module("lightning.pytorch")
    raise ConfigError(f"{type(module).__name__} is no LightningModule: derive it from lightning.LightningModule")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep from the screen what Lightning says of accelerators, and its advice on DataLoaders, at each training."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(lightning|pytorch_lightning|torch)\.")
        try:
            for logger in loggers:
                logger.setLevel(logging.WARNING)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _logged(trainer: Any) -> dict[str, float]:
    """What the module logged, by the names that Ternbus' metrics have."""
    found = {}
    for name, value in trainer.callback_metrics.items():
        short = next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)
        found[ALIASES.get(short, short)] = float(value)
    return found


def _rate_place(module: nn.Module) -> tuple[Any, str] | None:
    """The object and the attribute that hold the module's learning rate; None if it has none."""
    for place in (module, getattr(module, "hparams", None)):
        for name in RATES:
            if isinstance(getattr(place, name, None), int | float):
                return place, name
    return None
