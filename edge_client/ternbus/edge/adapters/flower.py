"""Flower's NumPyClient as a task: a client's `get_parameters`, `fit` and `evaluate` without Flower's server.

Flower itself need not be installed: any object with these three methods is a client.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.direction import Direction
from ternbus.edge.adapters.foreign import check_functions, check_lists, check_tables, seeded
from ternbus.edge.learn.calls import called, place_of
from ternbus.edge.learn.failure import looking_at_data
from ternbus.edge.learn.partition_spec import Partition, PartitionError
from ternbus.edge.learn.task import Evaluation, Trained
from ternbus.edge.plan.plan import NO_DP, Plan
from ternbus.edge.plan.tensors import FloatArray, Tensors

Array = npt.NDArray[Any]
Scalar = bool | bytes | float | int | str
STATISTICS: Final = ("running_mean", "running_var")  # batch norm's, by the ends of their names
SCALARS: Final = (bool, bytes, float, int, str)
METHODS: Final = ("get_parameters", "fit", "evaluate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What `client_fn` is called with, after Flower's `Context`.

    `node_config` has `partition-id` and `num-partitions`, and `data`, the path of the folder of `--data`, if one was
    named. `run_config` is the task's.
    """

    node_config: Mapping[str, Scalar]
    run_config: Mapping[str, Scalar]
    run_id: int = 0
    node_id: int = 0
    state: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowerTask:
    """A task of a Flower client.

    `client_fn(context)` returns a NumPyClient, or what its `to_client()` returns. `run_config` is passed on in the
    context. `plan_keys` are keys of the plan that only `fit` knows; they reach its config. `names` are the names of the
    arrays of `get_parameters`, in their order, such as `list(net.state_dict())`; without them they are "0", "1", ….
    `on_fit_config_fn(server_round)` adds to the config of `fit`, as that of Flower's strategies does.
    `evaluate_fn(server_round, parameters, config)` is Flower's centralized evaluation on test data, for an evaluator;
    without it the evaluator's client evaluates, as part 0 of 1. `better` has the direction of metrics for which higher
    is not better.

    Floating-point arrays travel as float32 and come back in their own dtype. Whole-number and boolean arrays, such as
    batch norm's counters, stay on the device, and start each training as the client made them. A client whose arrays
    cannot be sent, or change their number or shapes, raises `ConfigError`.
    """

    name: str
    client_fn: Callable[[Any], Any]
    run_config: Mapping[str, Scalar] = field(default_factory=dict)
    default_plan: Mapping[str, object] = field(default_factory=dict)
    plan_keys: Sequence[str] = ()
    names: Sequence[str] | None = None
    on_fit_config_fn: Callable[[int], Mapping[str, Scalar]] | None = None
    evaluate_fn: Callable[[int, list[Array], dict[str, Scalar]], Any] | None = None
    better: Mapping[str, Direction] = field(default_factory=dict)

    def __post_init__(self) -> None:
        functions = {"client_fn": self.client_fn, "on_fit_config_fn": self.on_fit_config_fn}
        check_functions(self.name, **functions, evaluate_fn=self.evaluate_fn)
        check_tables(self.name, run_config=self.run_config, default_plan=self.default_plan, better=self.better)
        check_lists(self.name, plan_keys=self.plan_keys, names=self.names)

    def initial(self, seed: int) -> dict[str, FloatArray]:
        """The arrays of a new client, part 0 of 1, which is made with this seed."""
        with seeded(seed):
            client = self._client(None, 0, 1)
            return _Layout.of(client, self.names).tensors()

    def trainer(self, *, data: Path | None, partition: str) -> "FlowerTrainer":
        """A client with its part. Raises `PartitionError` for a part that a number does not name, as Dirichlet's."""
        part = Partition.parse(partition)
        if part.kind not in ("iid", "all"):
            problem = "a Flower client divides its data itself, as part I of N"
            raise PartitionError(partition, problem, ["iid", "all"])
        with seeded(0):
            client = self._client(data, part.index, part.parts)
            return FlowerTrainer(self, client, _Layout.of(client, self.names), held=part.half == "test")

    def evaluator(self, *, data: Path | None) -> "FlowerTrainer":
        with seeded(0):
            client = self._client(data, 0, 1)
            return FlowerTrainer(self, client, _Layout.of(client, self.names), held=True, central=self.evaluate_fn)

    def _client(self, data: Path | None, index: int, parts: int) -> Any:
        node: dict[str, Scalar] = {"partition-id": index, "num-partitions": parts}
        if data is not None:
            node["data"] = str(data)
        context = Context(node_config=node, run_config=self.run_config)
        made = called("client_fn(context)", self.client_fn, context)
        client = getattr(made, "numpy_client", made)  # which `to_client()` wraps
        if missing := [name for name in METHODS if not callable(getattr(client, name, None))]:
            raise ConfigError(
                f"{place_of(self.client_fn)}client_fn returned {type(made).__name__}, which has no {missing[0]}(): "
                "return a NumPyClient"
            )
        return client


class _Layout:
    """Names, shapes and dtypes of a client's arrays; the ones that stay on the device with their first values."""

    def __init__(self, names: Sequence[str], arrays: Sequence[Array], place: str) -> None:
        self._shapes = [array.shape for array in arrays]
        self._dtypes = [array.dtype for array in arrays]
        self.names = names
        self._place = place
        self._first = arrays
        self._stays = [not np.issubdtype(array.dtype, np.floating) for array in arrays]

    @classmethod
    def of(cls, client: Any, names: Sequence[str] | None) -> "_Layout":
        """Ask a client for its arrays. Raises `ConfigError` if they cannot be sent."""
        place = place_of(client.get_parameters)
        arrays = _arrays(client.get_parameters({}), "get_parameters()", place)
        if not arrays:
            raise ConfigError(f"{place}get_parameters() returned no arrays: return the model's, as a list")
        names = [str(number) for number in range(len(arrays))] if names is None else list(names)
        if len(names) != len(arrays) or len(set(names)) != len(names):
            raise ConfigError(
                f"{place}get_parameters() returned {len(arrays)} arrays, and the task has {len(set(names))} different "
                "names: give one for each array"
            )
        layout = cls(names, [array.copy() for array in arrays], place)
        if all(layout._stays):
            raise ConfigError(f"{place}get_parameters() returned no floating-point array: there is nothing to send")
        return layout

    def tensors(self) -> dict[str, FloatArray]:
        return self._sent(self._first)

    def arrays(self, tensors: Tensors) -> list[Array]:
        """Copies for the client, in its order and its dtypes."""
        return [
            first.copy() if stays else tensors[name].astype(first.dtype)
            for name, first, stays in zip(self.names, self._first, self._stays, strict=True)
        ]

    def read(self, found: Any, start: Tensors, statistics_rate: float, place: str) -> dict[str, FloatArray]:
        """The tensors of `fit`'s arrays, with the share `statistics_rate` of the change of batch norm's statistics.

        If a dtype cannot represent `start` exactly, the rounding error is not part of the change.
        """
        arrays = _arrays(found, "fit()", place)
        if len(arrays) != len(self._shapes):
            _fail(f"{place}fit() returned {len(arrays)} arrays, and get_parameters() {len(self._shapes)}")
        for name, array, shape, stays in zip(self.names, arrays, self._shapes, self._stays, strict=True):
            if array.shape != shape:
                _fail(f"{place}fit() returned array {name!r} with shape {array.shape}, and get_parameters() {shape}")
            if not stays and not np.issubdtype(array.dtype, np.floating):
                _fail(f"{place}fit() returned array {name!r} as {array.dtype}, and get_parameters() floating-point")
        tensors = self._sent(arrays)
        for name, dtype in zip(self.names, self._dtypes, strict=True):
            statistics = name.endswith(STATISTICS)
            if name not in tensors or not (statistics or dtype != np.float32):
                continue
            if statistics and not statistics_rate:  # whatever the change is: 0 times infinity is NaN
                tensors[name] = np.array(start[name], np.float32)
                continue
            share = statistics_rate if statistics else 1.0
            change = tensors[name].astype(np.float64) - start[name].astype(dtype).astype(np.float64)
            tensors[name] = (start[name] + share * change).astype(np.float32)
        return tensors

    def _sent(self, arrays: Sequence[Array]) -> dict[str, FloatArray]:
        with np.errstate(over="ignore"):  # of float64 beyond float32: `Trained` refuses what is not finite
            return {
                name: array.astype(np.float32)
                for name, array, stays in zip(self.names, arrays, self._stays, strict=True)
                if not stays
            }


class FlowerTrainer:
    """One client. `held` tells whether its samples are those of `evaluate`, which it does not train on."""

    def __init__(
        self,
        task: FlowerTask,
        client: Any,
        layout: _Layout,
        *,
        held: bool = False,
        central: Callable[[int, list[Array], dict[str, Scalar]], Any] | None = None,
    ) -> None:
        self._task = task
        self._client = client
        self._layout = layout
        self._held = held
        self._central = central
        self._samples: int | None = None

    @property
    def samples(self) -> int:
        """The client's `num_examples`. A client states them with a result only, so the first question has it work."""
        if self._samples is None:
            start = self._layout.tensors()
            if self._held:
                self._samples = self.evaluate(start).samples
            else:
                plan = Plan.from_meta({**self._task.default_plan, "local_steps": 1, "dp": NO_DP})
                self._samples = self.train(start, plan, version=0, seed=0).samples
        return self._samples

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:
        began = time.perf_counter()
        config = _config(plan, version, seed)
        if (more := self._task.on_fit_config_fn) is not None:
            added: Any = called("on_fit_config_fn(server_round)", more, version + 1)
            if not isinstance(added, Mapping):
                _fail(f"{place_of(more)}on_fit_config_fn() returned {_kind(added)}: return a dict")
            config |= added
        place = place_of(self._client.fit)
        with seeded(seed):
            found = self._client.fit(self._layout.arrays(start), config)
        rate = plan.statistics_rate if plan.dp == NO_DP else 0.0  # no statistic of the data travels under privacy
        with looking_at_data(plan):
            arrays, samples, metrics = _three(found, f"{place}fit()", "parameters, num_examples, metrics")
            self._samples = _count(samples, f"{place}fit()")
            tensors = self._layout.read(arrays, start, rate, place)
            values = {"seconds": time.perf_counter() - began, **_numbers(metrics, f"{place}fit()")}
        return Trained(tensors=tensors, samples=self._samples, metrics=values)

    def evaluate(self, tensors: Tensors) -> Evaluation:
        arrays = self._layout.arrays(tensors)
        if self._central is not None:
            return self._centrally(self._central, arrays)
        what = f"{place_of(self._client.evaluate)}evaluate()"
        with seeded(0):
            found = self._client.evaluate(arrays, {})
        loss, samples, metrics = _three(found, what, "loss, num_examples, metrics")
        count = _count(samples, what)
        values = {**_numbers(metrics, what), "loss": _number(loss, f"{what} returned a loss")}
        return Evaluation(samples=count, values=values, better=self._task.better)

    def _centrally(self, evaluate: Callable[..., Any], arrays: list[Array]) -> Evaluation:
        """Evaluate by `evaluate_fn`. Flower's returns no number of samples: its metrics may have `num_examples`."""
        what = f"{place_of(evaluate)}evaluate_fn()"
        with seeded(0):
            found: Any = evaluate(0, arrays, {})
        if not isinstance(found, tuple) or len(found) != 2:
            _fail(f"{what} returned {_kind(found)}: return a tuple of loss, metrics")
        loss, metrics = found
        values = {**_numbers(metrics, what), "loss": _number(loss, f"{what} returned a loss")}
        samples = int(values.pop("num_examples", 0))
        return Evaluation(samples=samples, values=values, better=self._task.better)


def _config(plan: Plan, version: int, seed: int) -> dict[str, Scalar]:
    """The config of `fit`: the plan as scalars. Flower counts its rounds from 1, so version 0 is round 1."""
    config: dict[str, Scalar] = {
        "server_round": version + 1,
        "lr": plan.rate(version),
        "local_epochs": plan.local_epochs,
        "batch_size": plan.batch_size,
        "momentum": plan.momentum,
        "weight_decay": plan.weight_decay,
        "proximal_mu": plan.proximal_mu,
        "seed": seed % 2**32,
    }
    limits = {"local_steps": plan.local_steps, "local_seconds": plan.local_seconds, "max_steps": plan.steps_max}
    config |= {name: value for name, value in limits.items() if value is not None}
    # The aggregator chooses the extra keys: none of them may take the place of the owner's limits.
    return {name: value for name, value in plan.extra.items() if isinstance(value, SCALARS)} | config


def _arrays(found: Any, what: str, place: str) -> list[Array]:
    """The arrays of a list, checked: annotations guarantee nothing."""
    if not isinstance(found, list | tuple):
        _fail(f"{place}{what} returned {_kind(found)}: return a list of numpy arrays")
    arrays = []
    for number, one in enumerate(found):
        if not isinstance(one, np.ndarray | np.generic | float | int):
            _fail(
                f"{place}{what} returned {_kind(one)} as array {number}: return numpy arrays (of torch: "
                "tensor.detach().cpu().numpy())"
            )
        array = np.asarray(one)
        if array.dtype.kind not in "fiub":
            _fail(f"{place}{what} returned array {number} of dtype {array.dtype}, which cannot be sent: return floats")
        if not array.size:
            _fail(f"{place}{what} returned array {number} without elements, of shape {array.shape}: leave it out")
        arrays.append(array)
    return arrays


def _three(found: Any, what: str, names: str) -> tuple[Any, Any, Any]:
    if not isinstance(found, tuple) or len(found) != 3:
        _fail(f"{what} returned {_kind(found)}: return a tuple of {names}")
    return found


def _count(found: Any, what: str) -> int:
    if isinstance(found, bool) or not isinstance(found, int | np.integer) or found < 1:
        _fail(f"{what} returned {found!r:.80} as num_examples: return the number of samples, at least 1")
    return int(found)


def _number(found: Any, what: str) -> float:
    if not isinstance(found, Real | np.generic) and not (isinstance(found, np.ndarray) and found.size == 1):
        _fail(f"{what} of type {type(found).__name__}: return a number")
    return float(found)  # an array of one element too


def _numbers(found: Any, what: str) -> dict[str, float]:
    """The metrics that are finite numbers; a client may return texts and bytes beside them."""
    if not isinstance(found, Mapping):
        _fail(f"{what} returned {_kind(found)} as metrics: return a dict")
    numbers = {str(name): float(value) for name, value in found.items() if isinstance(value, Real)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _kind(found: Any) -> str:
    return f"a {type(found).__name__} of {len(found)}" if isinstance(found, list | tuple) else type(found).__name__


def _fail(text: str) -> NoReturn:
    raise ConfigError(text)
