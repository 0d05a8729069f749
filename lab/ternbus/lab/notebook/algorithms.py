"""Algorithms of the user's own, each a pair of functions `init` and `apply`, in place of a part of a simulation.

merge_rule        init(model) -> state;  apply(state, updates, model) -> (state, change)
server_optimizer  init(model) -> state;  apply(state, model, change) -> (state, model)
client            init(model) -> state;  apply(state, job) -> (state, tensors, extra)

A model, a change and tensors are dicts of name to float32 array, the names and shapes being the model's. `updates` are
`Update`s, `job` is a `Job`. A state is whatever the functions make of it: one of the server, and one of each client.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from ternbus.aggregator.merge import optimizer, statistics
from ternbus.aggregator.merge.accepted import AcceptedUpdate
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.merge.optimizer import ServerState
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.arms import WIDTH
from ternbus.broker.protocol.schema import Schema, Vector, to_tensors, to_vector
from ternbus.broker.protocol.ternary import Block
from ternbus.broker.spelling import refuse_unknown
from ternbus.edge.learn.task import Evaluation, Task, Trained, Trainer
from ternbus.edge.plan.plan import NO_DP, Plan
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.torch.torch_task import TorchTask
from ternbus.lab.notebook.correction import Correction, corrected
from ternbus.lab.scenario.scenario import Scenario
from ternbus.lab.virtual.computation import Computation
from ternbus.lab.virtual.training import Pair as Trainers

Pair = tuple[Callable[..., Any], Callable[..., Any]]
"""(init, apply)."""

EXTRAS_MAX: Final = 16  # of one device
NOT_COVERED: Final = (
    "an algorithm of your own decides what a version is: what Ternbus promises of robust merging, of updates that are "
    "merged exactly once after a crash, and of differential privacy does not cover it, and no real device runs it"
)
EXTRA: Final = (
    "what a client sends beside its update (`extra`) is no message of the protocol, and no byte of it is counted"
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Update:
    """An accepted update, as a merge rule sees it.

    `change` is what it changes of its base `version`, after the plan's codec; the model has made `staleness` versions
    since. `samples` and `discount` (of staleness, and of an update that is too long) are what the built-in rule weighs
    by. `steps` is the number of local steps that the plan asks of the samples that the device states. `extra` is what a
    `client` algorithm gave with it.
    """

    device: str
    version: int
    staleness: int
    samples: int
    discount: float
    steps: int
    change: Tensors
    extra: Any = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """One training of one client.

    `start` is the model of `version`, `shared` the state of the merge rule that made it. `rate` is the learning rate of
    this version, `steps` the number of local steps.
    """

    device: str
    version: int
    samples: int
    start: Tensors
    plan: Plan
    rate: float
    steps: int
    shared: Any
    run: Callable[[Tensors, Tensors | None], Trained] = field(repr=False)

    def train(self, start: Tensors | None = None, *, correction: Tensors | None = None) -> Tensors:
        """The tensors that local training by the plan comes to, from `start`, by default the version's.

        `correction`, a dict of parameter to array, is added to the gradient of each step, before clipping, momentum and
        weight decay. Raises `ConfigError` for a correction of a task without PyTorch, or with its own `train_step`.
        """
        return self.run(self.start if start is None else start, correction).tensors


@dataclass(slots=True, kw_only=True, eq=False)
class Hooks:
    """The pairs of one run, and their states."""

    merge_rule: Pair | None = None
    server_optimizer: Pair | None = None
    client: Pair | None = None
    shared: dict[int, Any] = field(default_factory=dict)  # states of the merge rule, by version
    extras: dict[tuple[str, int], Any] = field(default_factory=dict)  # by device and base
    correction: Correction = field(default_factory=Correction)

    @classmethod
    def of(cls, merge_rule: Any, server_optimizer: Any, client: Any) -> "Hooks":
        """Raises `ConfigError` for what is no pair of functions."""
        pairs = {"merge_rule": merge_rule, "server_optimizer": server_optimizer, "client": client}
        for name, pair in pairs.items():
            if pair is None:
                continue
            if not _is_pair(pair):
                kinds = ", ".join(type(each).__name__ for each in pair) if isinstance(pair, tuple | list) else ""
                found = f"a {type(pair).__name__}{f' of {kinds}' if kinds else ''}"
                several = isinstance(pair, tuple | list) and all(map(_is_pair, pair))
                hint = "; give each of these pairs to its own argument, as in merge_rule, server_optimizer = fadas()"
                raise ConfigError(
                    f"{name} is {found}: give a pair of functions, (init, apply){hint if several else ''}"
                )
        return cls(**pairs)

    @property
    def any(self) -> bool:
        return any(each is not None for each in (self.merge_rule, self.server_optimizer, self.client))

    def notices(self) -> list[str]:
        """What is to be said of these algorithms."""
        return [NOT_COVERED, *([EXTRA] if self.client is not None else [])] if self.any else []

    def check(self, scenario: Scenario, task: Task, how: Computation) -> None:
        """Raises `ConfigError` for what these algorithms cannot be run with."""
        if self.any and scenario.private is not None:
            raise ConfigError("private sums hide the updates that an algorithm of your own needs: remove private")
        if self.client is None:
            return
        if how.elsewhere:
            raise ConfigError("a client algorithm of your own keeps its states in this process: use jobs=1")
        if {**task.default_plan, **scenario.plan}.get("dp", NO_DP) != NO_DP:
            raise ConfigError("dp in the plan does not cover a client algorithm of your own: remove one of them")
        arms: Any = scenario.aggregator.get("search.arms") or ()
        if any(WIDTH in arm for arm in arms):
            raise ConfigError("a client algorithm of your own trains no sub-network: remove it, or the arms of width")

    def task(self, task: Task) -> Task:
        """The task whose steps can be corrected."""
        return corrected(task, self.correction) if self.client is not None and isinstance(task, TorchTask) else task

    def pairs(self, pairs: Sequence[Trainers], names: Sequence[str]) -> Sequence[Trainers]:
        if self.client is None:
            return pairs
        return [(_OwnTrainer(trainer, name, self), held) for (trainer, held), name in zip(pairs, names, strict=True)]

    def model(self, **about: Any) -> Model:
        """The aggregator's model."""
        if self.merge_rule is None and self.server_optimizer is None:
            return Model(**about)
        made = OwnModel(**about)
        made.begin(self)
        return made

    def shared_at(self, version: int) -> Any:
        """The state of the merge rule that made this version, or the oldest that is kept."""
        known = [each for each in self.shared if each <= version]
        return self.shared[max(known, default=min(self.shared))] if self.shared else None

    def keep(self, device: str, base: int, extra: Any) -> None:
        """Keep what goes with an update until it is merged; of updates that were refused, the newest few."""
        self.extras[device, base] = extra
        mine = [key for key in self.extras if key[0] == device]
        for key in mine[:-EXTRAS_MAX]:
            del self.extras[key]


class OwnModel(Model):
    """A `Model` whose merges are decided by the user's functions."""

    hooks: Hooks

    def begin(self, hooks: Hooks) -> None:
        self.hooks, self._kept = hooks, list[tuple[AcceptedUpdate, Block]]()
        first = to_tensors(self.schema, _readonly(self.published))
        if hooks.merge_rule is not None:
            hooks.shared = {self.version: hooks.merge_rule[0](first)}
        self._optimizer_state = None if hooks.server_optimizer is None else hooks.server_optimizer[0](first)

    def accept(self, update: AcceptedUpdate, block: Block) -> None:
        super().accept(update, block)
        self._kept.append((update, block))

    def empty(self) -> None:
        super().empty()
        self._kept = []

    def step_server(self) -> tuple[float, ...]:
        change, before = self._gathered.result(), self.server.target
        delta, weights = change.delta, change.weights
        if self.hooks.merge_rule is not None:
            delta, weights = self._ruled(self.hooks.merge_rule[1]), (1 / len(self._kept),) * len(self._kept)
        if self.hooks.server_optimizer is None:
            self.server = optimizer.apply(self.settings.optimizer, self.server, delta)
        else:
            target = self._stepped(self.hooks.server_optimizer[1], delta)
            self.server = ServerState(target, self.server.momentum, self.server.squares)
        statistics.average(self.schema, self.kinds, before, delta, self.server)
        return weights

    def _ruled(self, apply: Callable[..., Any]) -> Vector:
        hooks = self.hooks
        model = to_tensors(self.schema, _readonly(self.server.target))
        updates = [self._update(update, block) for update, block in self._kept]
        state, change = _parts(apply(hooks.shared_at(self.version), updates, model), 2, "merge_rule")
        hooks.shared[self.version + 1] = state
        oldest = self.version - (0 if hooks.client is None else self.settings.staleness.max)  # what a `Job` may ask for
        hooks.shared = {version: kept for version, kept in hooks.shared.items() if version >= oldest}
        return _vector(self.schema, change, "merge_rule")

    def _update(self, update: AcceptedUpdate, block: Block) -> Update:
        plan = Plan.from_meta({**dict(self.settings.plan_check.default_plan if self.settings.plan_check else {}),
                               **self.settings.plan})  # fmt: skip
        return Update(
            device=update.device,
            version=update.base,
            staleness=update.staleness,
            samples=update.samples,
            discount=update.discount,
            steps=plan.steps(update.samples if update.stated is None else update.stated),
            change=to_tensors(self.schema, _readonly(block.value())),
            extra=self.hooks.extras.pop((update.device, update.base), None),
        )

    def _stepped(self, apply: Callable[..., Any], delta: Vector) -> Vector:
        model, change = (to_tensors(self.schema, _readonly(each)) for each in (self.server.target, delta))
        self._optimizer_state, found = _parts(apply(self._optimizer_state, model, change), 2, "server_optimizer")
        return _vector(self.schema, found, "server_optimizer")


class _OwnTrainer:
    """A client's trainer, around which its algorithm is run."""

    def __init__(self, trainer: Trainer, device: str, hooks: Hooks) -> None:
        self._trainer, self._device, self._hooks = trainer, device, hooks
        self._state: Any = None
        self._began = False

    @property
    def samples(self) -> int:
        return self._trainer.samples

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:
        init, apply = self._hooks.client or (None, None)
        assert init is not None and apply is not None  # noqa: S101, PT018 - else it would not be wrapped
        if not self._began:
            self._state, self._began = init(start), True
        made: list[Trained] = []

        def run(first: Tensors, correction: Tensors | None) -> Trained:
            refuse_unknown(correction or {}, start, "correction: the model has no tensor")
            with self._hooks.correction.set(correction):
                made.append(self._trainer.train(first, plan, version=version, seed=seed))
            return made[-1]

        job = Job(
            device=self._device, version=version, samples=self.samples, start=start, plan=plan,
            rate=plan.rate(version), steps=plan.steps(self.samples), shared=self._hooks.shared_at(version), run=run,
        )  # fmt: skip
        self._state, tensors, extra = _parts(apply(self._state, job), 3, "client")
        self._hooks.keep(self._device, version, extra)
        _check_names(start, tensors, "client")
        metrics = made[-1].metrics if made else {}
        return Trained(tensors=tensors, samples=self.samples, metrics=metrics, local=made[-1].local if made else {})

    def evaluate(self, tensors: Tensors) -> Evaluation:
        return self._trainer.evaluate(tensors)


def _is_pair(given: Any) -> bool:
    return isinstance(given, tuple | list) and len(given) == 2 and all(map(callable, given))


def _parts(found: Any, count: int, hook: str) -> Any:
    if not isinstance(found, tuple) or len(found) != count:
        what = {2: "(state, tensors)", 3: "(state, tensors, extra)"}[count]
        raise ConfigError(f"{hook}: apply() returned {type(found).__name__}: it must return {what}")
    return found


def _check_names(wanted: Mapping[str, Any], found: Any, hook: str) -> None:
    if not isinstance(found, Mapping):
        raise ConfigError(f"{hook}: apply() returned {type(found).__name__} as tensors: it must be a dict of arrays")
    for name, tensor in wanted.items():
        if name not in found or np.shape(found[name]) != np.shape(tensor):
            have = f"with shape {np.shape(found[name])}" if name in found else "no"
            raise ConfigError(f"{hook}: apply() returned {have} {name!r}: it must have shape {np.shape(tensor)}")


def _vector(schema: Schema, found: Any, hook: str) -> Vector:
    _check_names({each.name: np.empty(each.shape) for each in schema.tensors}, found, hook)
    arrays = {each.name: np.asarray(found[each.name], np.float32) for each in schema.tensors}
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ConfigError(f"{hook}: apply() returned a NaN or an infinity: all elements must be finite")
    return to_vector(schema, arrays)


def _readonly(vector: Vector) -> Vector:
    view = vector.view()
    view.flags.writeable = False
    return view
