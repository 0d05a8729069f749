"""What a trainer is: the plan it follows, what it hands back, and how a task is found by its name.

Knows numpy arrays by name and nothing of any framework; PyTorch is one way to be a `Trainer`, plain numpy another.
"""

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ternbus.broker.errors import ConfigError, FederationError, ProtocolError
from ternbus.edge.learn.noise import Chance
from ternbus.edge.plan.schedule import SCHEDULES, share

FloatArray = npt.NDArray[np.float32]
Tensors = Mapping[str, FloatArray]
"""Name -> float32 array in the model's own shape; the order is the model's own."""

BUILT_IN_TASKS: Mapping[str, str] = {
    "digits": "ternbus.edge.tasks.digits:TASK",
    "digits-numpy": "ternbus.edge.tasks.digits_numpy:TASK",
    "fashion-mnist": "ternbus.edge.tasks.fashion_mnist:TASK",
    "mnist-by-writer": "ternbus.edge.tasks.mnist_by_writer:TASK",
    "emnist-62": "ternbus.edge.tasks.emnist_62:TASK",
    "hapt": "ternbus.edge.tasks.hapt:TASK",
    "hapt-unseen": "ternbus.edge.tasks.hapt:UNSEEN_TASK",
    "cifar10-cnn": "ternbus.edge.tasks.cifar10_cnn:TASK",
    "cifar10-resnet": "ternbus.edge.tasks.cifar10_resnet:TASK",
    "cifar10-finetune": "ternbus.edge.tasks.cifar10_finetune:TASK",
    "cifar10-features": "ternbus.edge.tasks.cifar10_features:TASK",
}

CODECS = ("ternary", "float32")
NO_DP = "none"

# What a plan's numbers may be: (whole number?, least, most). Whatever is outside is a mistake, not a plan.
_NUMBERS: Mapping[str, tuple[bool, float, float]] = {
    "local_epochs": (False, 0.0, 1e4),
    "local_steps": (True, 1, 1e9),
    "batch_size": (True, 1, 1e6),
    "learning_rate": (False, 0.0, 1e3),
    "momentum": (False, 0.0, 1.0),
    "weight_decay": (False, 0.0, 1e3),
    "proximal_mu": (False, 0.0, 1e6),
    "clip_sigma": (False, 0.0, 1e6),
    "seed": (True, -(2**63), 2**64 - 1),
    "local_seconds": (False, 0.0, 1e7),
    "beta1": (False, 0.0, 1 - 1e-9),
    "beta2": (False, 0.0, 1 - 1e-9),
    "warmup_versions": (True, 0, 1e9),
    "schedule_versions": (True, 0, 1e9),
    "final_rate": (False, 0.0, 1.0),
    "statistics_rate": (False, 0.0, 1.0),
    "dp_clip": (False, 0.0, 1e6),
    "dp_noise": (False, 0.0, 1e6),
    "dp_epsilon": (False, 0.0, 1e6),
    "dp_delta": (False, 1e-30, 0.1),
    "participation": (False, 1e-6, 1.0),
    "turn_s": (False, 1e-3, 1e7),
}
_OPTIONAL = ("local_steps", "local_seconds")
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "codec": CODECS,
    "optimizer": ("sgd", "adam", "adamw"),
    "schedule": SCHEDULES,
    "precision": ("float32", "bfloat16", "auto"),
    "memory_format": ("contiguous", "channels-last", "auto"),
    "dp": (NO_DP, "device", "sample"),
}
_SWITCHES = ("seal", "error_feedback")


class TrainingError(FederationError):
    """Local training gave no usable model (it diverged, say): nothing to send; the next version may do better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the federation asks of local training: the keys of the protocol's `plan`, and Ternbus' own.

    `local_steps`, where given, counts instead of `local_epochs`; `local_seconds` ends either early, so that a slow
    device does less. The learning rate follows `schedule` (see `ternbus.edge.plan.schedule`), which ends at
    `schedule_versions` with the share `final_rate`. `statistics_rate` is how much of the change of batch norm's
    statistics is sent. `beta1` and `beta2` are Adam's, `momentum` SGD's.
    `precision` and `memory_format` are for trainers that know them; "auto" measures which is faster. `proximal_mu` is
    FedProx's µ (Li et al. 2020, eq. 2), `clip_sigma` TernGrad's c (Wen et al. 2017; 0 = no clipping). `dp` is a kind of
    differential privacy (docs/privacy.md), by `dp_clip` and `dp_noise`, until `dp_epsilon` at `dp_delta` is spent. A
    device trains on the share `participation` of the versions, in turns; each `turn_s` seconds without a new version
    count as one more. Keys that neither knows are in `extra`, as they came. Raises `ProtocolError` ("bad-plan") for a
    value out of range.
    """

    local_epochs: float = 1.0
    local_steps: int | None = None
    batch_size: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0
    proximal_mu: float = 0.0
    clip_sigma: float = 2.5
    codec: str = "ternary"
    seal: bool = False
    seed: int = 0
    error_feedback: bool = False
    local_seconds: float | None = None
    optimizer: str = "sgd"
    beta1: float = 0.9
    beta2: float = 0.999
    schedule: str = "constant"
    warmup_versions: int = 0
    schedule_versions: int = 0
    final_rate: float = 0.0
    statistics_rate: float = 0.25
    precision: str = "float32"
    memory_format: str = "contiguous"
    dp: str = NO_DP
    dp_clip: float = 0.0
    dp_noise: float = 0.0
    dp_epsilon: float = 0.0
    dp_delta: float = 1e-5
    participation: float = 1.0
    turn_s: float = 600.0
    extra: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = (self.local_epochs, self.local_steps, self.batch_size, self.learning_rate, self.momentum,
                   self.weight_decay, self.proximal_mu, self.clip_sigma, self.seed, self.local_seconds,
                   self.beta1, self.beta2, self.warmup_versions, self.schedule_versions, self.final_rate,
                   self.statistics_rate, self.dp_clip, self.dp_noise, self.dp_epsilon, self.dp_delta,
                   self.participation, self.turn_s)  # fmt: skip
        for name, value in zip(_NUMBERS, numbers, strict=True):
            if not (name in _OPTIONAL and value is None):
                _check_number(name, value)
        choices = (self.codec, self.optimizer, self.schedule, self.precision, self.memory_format, self.dp)
        for name, choice in zip(_CHOICES, choices, strict=True):
            if choice not in _CHOICES[name]:
                raise ProtocolError("bad-plan", f"{name} is {choice!r}, not one of {', '.join(_CHOICES[name])}")
        if self.schedule != "constant" and self.schedule_versions <= self.warmup_versions:
            raise ProtocolError(
                "bad-plan", f"schedule_versions is {self.schedule_versions}: {self.schedule} must end after the warm-up"
            )
        if self.dp != NO_DP and not (self.dp_clip and self.dp_noise and self.dp_epsilon):
            raise ProtocolError("bad-plan", f"dp is {self.dp!r}: dp_clip, dp_noise and dp_epsilon must be above 0")
        for name, switch in zip(_SWITCHES, (self.seal, self.error_feedback), strict=True):
            if not isinstance(switch, bool):
                raise ProtocolError("bad-plan", f"{name} is {switch!r}, not true or false")

    @classmethod
    def from_meta(cls, meta: Mapping[str, object]) -> "Plan":
        """The plan in a head's `plan`, or in a task's `default_plan`. Raises `ProtocolError` on nonsense."""
        known = {*_CHOICES, *_NUMBERS, *_SWITCHES}
        extra = {name: value for name, value in meta.items() if name not in known}
        given = {name: value for name, value in meta.items() if name in known}
        return cls(**given, extra=extra)  # type: ignore[arg-type]  # __post_init__ checks every one

    def steps(self, samples: int) -> int:
        """How many steps of SGD the plan asks of a device with so many samples; at least 1."""
        if self.local_steps is not None:
            return self.local_steps
        return max(1, round(self.local_epochs * samples / min(self.batch_size, samples)))

    def rate(self, version: int) -> float:
        """The learning rate for training on a version."""
        factor = share(
            self.schedule,
            version,
            warmup=self.warmup_versions,
            total=self.schedule_versions,
            final=self.final_rate,
        )
        return self.learning_rate * factor

    def batches(
        self, samples: int, rng: np.random.Generator, clock: Callable[[], float] | None = None
    ) -> Iterator[npt.NDArray[np.int64]]:
        """The sample indices of each step: every sample once before any comes twice, and no batch is smaller.

        At least one; after it none that would begin when `local_seconds` are over on the `clock`, which is in seconds.
        """
        size = min(self.batch_size, samples)
        order = np.empty(0, np.int64)
        ends = math.inf if clock is None or self.local_seconds is None else clock() + self.local_seconds
        for step in range(self.steps(samples)):
            if step and clock is not None and clock() >= ends:
                return
            if len(order) < size:
                order = np.concatenate([order, rng.permutation(samples)])
            yield order[:size]
            order = order[size:]


def _check_number(name: str, value: object) -> None:
    whole, least, most = _NUMBERS[name]
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ProtocolError("bad-plan", f"{name} is {value!r}, not a {'whole ' if whole else ''}number")
    if not (math.isfinite(value) and least <= value <= most):
        raise ProtocolError("bad-plan", f"{name} is {value!r}, not within {least:g} and {most:g}")


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

    def train_privately(self, start: Tensors, plan: Plan, *, version: int, seed: int, chance: Chance) -> Trained:
        """As `train`, and every step a Gaussian mechanism: a batch in which each sample is with the probability
        `batch_size` / samples, by `chance.sampled`; each sample's gradient clipped to the L2 norm `dp_clip`; their sum
        with noise of standard deviation `dp_noise` · `dp_clip` from `chance`. `plan.steps(samples)` of them at most.
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
                "ternbus.edge.learn.partition.select, or understand ';train:SHARE' and ';test:SHARE' itself"
            )
    return pairs


def load_task(spec: str) -> Task:
    """The task of that name, or the user's own as `module:attribute`. Raises `ConfigError`, which says the names."""
    own = ":" in spec
    if not own and spec not in BUILT_IN_TASKS:
        raise ConfigError(f"no task {spec!r}: choose {', '.join(BUILT_IN_TASKS)}, or your own as MODULE:ATTRIBUTE")
    module_name, _, attribute = (spec if own else BUILT_IN_TASKS[spec]).partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"{spec!r} names no task: write MODULE:ATTRIBUTE")
    if own and "" not in sys.path:
        sys.path.insert(0, "")  # an installed command does not look in the folder that it is started in; people do
    task = getattr(_module(spec, module_name), attribute, None)
    if isinstance(task, type) or not isinstance(task, Task):
        raise ConfigError(f"{spec} is no task: it needs name, default_plan, initial(), trainer() and evaluator()")
    return task


def _module(spec: str, name: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name in ("torch", "torchvision"):
            raise ConfigError(
                f"the task {spec} needs {error.name}: pip install torch torchvision (or take --task digits-numpy)"
            ) from error
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigError(f"no module {error.name!r} for the task {spec}: is it here, or installed?") from error
        raise
