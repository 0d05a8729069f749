"""Callbacks: what a run calls after each version that it evaluates. The user's own are functions or objects like these.

A callback is a function of a `State`, or an object with a method `on_version(state)`. It returns None, or True to end
the run after this version. An object may also have `on_end(run)`, called once with the `Run`, or with None if an
exception ended it, and `say(line)`, called with each notice of the run. Version 0 is the initial model: an object that
is used for a second run begins anew there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from ternbus.broker.errors import ConfigError
from ternbus.broker.model_files import save_safetensors
from ternbus.broker.protocol.direction import direction_of, primary_of, sign_of
from ternbus.broker.spelling import meant
from ternbus.edge.plan.tensors import Tensors


@dataclass(frozen=True, kw_only=True)
class State:
    """The federation at one version.

    `seconds` are virtual, since version 0. `updates` of this version have the mean `staleness`, in versions; None for
    version 0. `accepted` counts all updates so far, `bytes_up` and `bytes_down` their messages and the devices' deltas.
    `metrics` are those of the test data. `versions` is the last version of the run, or None if it ends otherwise.
    """

    version: int
    versions: int | None
    seconds: float
    updates: int
    staleness: float | None
    accepted: int
    bytes_up: int
    bytes_down: int
    metrics: Mapping[str, float]
    better: Mapping[str, Any]
    read: Callable[[], Tensors] = field(repr=False)
    module: Callable[[Tensors], Any] = field(repr=False)
    metadata: Callable[[], Mapping[str, str]] = field(repr=False)

    @cached_property
    def tensors(self) -> Tensors:
        """The version's tensors by name, float32. They must not be modified."""
        return self.read()

    def model(self) -> Any:
        """The version as a new `nn.Module`, in evaluation mode."""
        return self.module(self.tensors)

    def save(self, path: Path | str) -> None:
        """Write the version as a safetensors file."""
        save_safetensors(Path(path), dict(self.tensors), dict(self.metadata()))

    def value(self, metric: str | None = None) -> float:
        """The value of a metric, by default of the primary one. Raises `ConfigError` if there is none."""
        return self.metrics[self.named(metric)]

    def named(self, metric: str | None = None) -> str:
        """The name of the metric, by default of the primary one. Raises `ConfigError` if there is none."""
        return named(self.metrics, metric, f"version {self.version}")

    def sign(self, metric: str | None = None) -> int:
        """1 for a metric of which more is better, else -1."""
        return sign_of(direction_of(self.named(metric), self.better))


def named(metrics: Mapping[str, float], metric: str | None, what: str) -> str:
    """The name of the metric, by default of the primary one. Raises `ConfigError` if ``what`` does not have it."""
    name = primary_of(metrics) if metric is None else metric
    if name is None or name not in metrics:
        have = f"it has {', '.join(metrics)}" if metrics else "it has none that is finite"
        raise ConfigError(f"{what} has no metric {name!r}{meant(str(name), metrics)}: {have}")
    return name


class Callback(Protocol):
    """An object that is called after each version that is evaluated."""

    def on_version(self, state: State) -> bool | None:
        """True ends the run after this version."""
        ...


AnyCallback = Callback | Callable[[State], bool | None]


class EarlyStopping:
    """End a run when a metric of the test data has not become better for `patience` evaluations.

    `metric` is by default the primary one, and becomes better by its own direction, by more than `min_delta` in its
    unit. The run keeps its last version; `run.best` has the best one.
    """

    def __init__(self, metric: str | None = None, *, patience: int = 5, min_delta: float = 0.0) -> None:
        if type(patience) is not int or patience < 1:
            raise ConfigError(f"EarlyStopping: patience is {patience!r}, but must be a whole number from 1")
        self.metric, self.patience, self.min_delta = metric, patience, min_delta
        self.best: float | None = None
        self.waited = 0

    def on_version(self, state: State) -> bool | None:
        if state.version == 0:
            self.best, self.waited = None, 0
        value = state.sign(self.metric) * state.value(self.metric)
        if self.best is None or value > self.best + self.min_delta:
            self.best, self.waited = value, 0
            return None
        self.waited += 1
        return True if self.waited >= self.patience else None


class BestModel:
    """Write each version that is better than all before it to a safetensors file, which replaces the one before."""

    def __init__(self, path: Path | str, metric: str | None = None) -> None:
        self.path, self.metric = Path(path), metric
        self.best: float | None = None

    def on_version(self, state: State) -> None:
        if state.version == 0:
            self.best = None
        value = state.sign(self.metric) * state.value(self.metric)
        if self.best is None or value > self.best:
            self.best = value
            state.save(self.path)


def checked(callbacks: Sequence[Any]) -> list[AnyCallback]:
    """The callbacks. Raises `ConfigError` for what is none."""
    if not isinstance(callbacks, list | tuple):
        raise ConfigError(f"callbacks is {callbacks!r}: give a list, as callbacks=[Progress()]")
    for each in callbacks:
        if isinstance(each, type):
            raise ConfigError(f"callbacks has the class {each.__name__}: make one, as {each.__name__}()")
        if not callable(getattr(each, "on_version", each)):
            raise ConfigError(
                f"callbacks has {each!r}: give a function of a State, or an object with on_version(state)"
            )
    return list(callbacks)


def asked_to_stop(callback: AnyCallback, state: State) -> bool:
    """Call it. Raises `ConfigError` if it returned neither None nor a truth value."""
    call: Any = getattr(callback, "on_version", callback)
    answer = call(state)
    if answer not in (None, True, False):
        raise ConfigError(f"the callback {callback!r} returned {answer!r}: return True to end the run, else None")
    return answer is True
