"""What a trainer is: the plan it follows, what it hands back, and how a task is found by its name.

Knows numpy arrays by name and nothing of any framework; PyTorch is one way to be a `Trainer`, plain numpy another.
"""

import importlib
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from broker.errors import ConfigError, FederationError, ProtocolError

FloatArray = npt.NDArray[np.float32]
Tensors = Mapping[str, FloatArray]
"""Name -> float32 array in the model's own shape; the order is the model's own."""

BUILT_IN_TASKS: Mapping[str, str] = {
    "digits": "edge_client.tasks.digits:TASK",
    "digits-numpy": "edge_client.tasks.digits_numpy:TASK",
    "fashion-mnist": "edge_client.tasks.fashion_mnist:TASK",
}

CODECS = ("ternary", "float32")

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
}
_SWITCHES = ("seal", "error_feedback")


class TrainingError(FederationError):
    """Local training gave no usable model (it diverged, say): nothing to send; the next version may do better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the federation asks of local training: the keys of the protocol's `plan`, with their defaults.

    `local_steps`, where given, counts instead of `local_epochs`. `proximal_mu` is FedProx's µ (Li et al. 2020,
    eq. 2), `clip_sigma` TernGrad's c (Wen et al. 2017; 0 = no clipping). Keys that the protocol
    does not know are in `extra`, as they came. Raises `ProtocolError` ("bad-plan") for a value out of range.
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
    extra: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = (self.local_epochs, self.local_steps, self.batch_size, self.learning_rate, self.momentum,
                   self.weight_decay, self.proximal_mu, self.clip_sigma, self.seed)  # fmt: skip
        for name, value in zip(_NUMBERS, numbers, strict=True):
            if not (name == "local_steps" and value is None):
                _check_number(name, value)
        for name, switch in zip(_SWITCHES, (self.seal, self.error_feedback), strict=True):
            if not isinstance(switch, bool):
                raise ProtocolError("bad-plan", f"{name} is {switch!r}, not true or false")
        if self.codec not in CODECS:
            raise ProtocolError("bad-plan", f"codec is {self.codec!r}, not one of {', '.join(CODECS)}")

    @classmethod
    def from_meta(cls, meta: Mapping[str, object]) -> "Plan":
        """The plan in a head's `plan`, or in a task's `default_plan`. Raises `ProtocolError` on nonsense."""
        known = {"codec", *_NUMBERS, *_SWITCHES}
        extra = {name: value for name, value in meta.items() if name not in known}
        given = {name: value for name, value in meta.items() if name in known}
        return cls(**given, extra=extra)  # type: ignore[arg-type]  # __post_init__ checks every one

    def steps(self, samples: int) -> int:
        """How many steps of SGD the plan asks of a device with so many samples; at least 1."""
        if self.local_steps is not None:
            return self.local_steps
        return max(1, round(self.local_epochs * samples / min(self.batch_size, samples)))

    def batches(self, samples: int, rng: np.random.Generator) -> Iterator[npt.NDArray[np.int64]]:
        """The sample indices of each step: every sample once before any comes twice, and no batch is smaller."""
        size = min(self.batch_size, samples)
        order = np.empty(0, np.int64)
        for _ in range(self.steps(samples)):
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

    `metrics` has `loss` and `accuracy` (means over the training batches) and `seconds`.
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
