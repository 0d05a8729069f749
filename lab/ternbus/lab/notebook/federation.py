"""A federation on arrays, and its simulation in this process by the cores of the real services."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ternbus.broker.errors import ConfigError
from ternbus.broker.plural import counted
from ternbus.broker.protocol import plan_keys
from ternbus.broker.protocol.schema import to_tensors, vector_digest
from ternbus.broker.protocol.tensor_kinds import version_metadata
from ternbus.broker.spelling import refuse_unknown
from ternbus.edge.learn.failure import explained
from ternbus.edge.learn.task import Evaluation, Task, Trainer, initial_of, placed, trainers_of
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.torch.torch_task import TorchTask
from ternbus.edge.torch.travelling_state import TravellingState
from ternbus.lab.notebook import algorithms, array_task, objectives, task_file
from ternbus.lab.notebook.algorithms import Pair
from ternbus.lab.notebook.array_task import Testing
from ternbus.lab.notebook.bar import Progress
from ternbus.lab.notebook.baselines import Baseline, Training, centralized, local_only
from ternbus.lab.notebook.callbacks import AnyCallback, checked
from ternbus.lab.notebook.clients import NamedPlace
from ternbus.lab.notebook.partition import PartitionTable
from ternbus.lab.notebook.parts import Parts, parts_of
from ternbus.lab.notebook.run import Run
from ternbus.lab.notebook.simulated import Choices, plain, scenario_of
from ternbus.lab.notebook.statistics import DEFAULT_KINDS, facts_of, request_of, table_of
from ternbus.lab.notebook.surroundings import Interrupt, untouched
from ternbus.lab.notebook.watch import Watch
from ternbus.lab.notebook.workers import place_of
from ternbus.lab.scenario.partitions import DEVICES_OF_DATA
from ternbus.lab.scenario.resolve import resolved, settled
from ternbus.lab.scenario.scenario import Scenario
from ternbus.lab.virtual.computation import Computation
from ternbus.lab.virtual.simulate import Simulation
from ternbus.lab.virtual.training import InProcess, Place, Widths
from ternbus.lab.virtual.training import Pair as Trainers

OWN_ARGUMENTS: Final = ("clients", "data", "partition", "owners", "test", "task", "plan", "name")
FORM_ARGUMENTS: Final = ("collate", "workers")


class Federation:
    """A model and the data of several clients.

    `model()` makes the model. `loss` is "mse", "mae", "huber", "bce" (logits), "cross_entropy" or a function of
    (outputs, targets) that returns the batch's mean; by default cross entropy. `metrics` is a dict of name to function
    of (outputs, targets), or to `higher(function)` or `lower(function)`; by default accuracy, or for a regression mae
    and r2. `plan` has the keys of local training (docs/tasks.md), which a run may override.

    The data are `clients`, a dict of name to data, or `data` with a `partition` (`iid`, `dirichlet`, `shards`,
    `quantity`, `by`, `natural`). Data are (X, y) of numpy arrays, tensors or DataFrames with a row for each sample, or
    a Dataset with a length. `owners` has the owner of each row, or a table with columns for `by`. `test` are further
    data of that kind, or the share of each client's samples that is set aside. `task` is a task, or the name of one,
    in place of all of these; `data` is then its folder.

    `more` are further arguments of `TorchTask`, such as `augment`. Raises `ConfigError` for what does not fit together.
    """

    def __init__(
        self,
        model: Any = None,
        *,
        loss: Any = None,
        metrics: Mapping[str, Any] | None = None,
        clients: Mapping[str, Any] | None = None,
        data: Any = None,
        partition: Parts | str | None = None,
        owners: Any = None,
        test: Any = None,
        task: Task | str | None = None,
        plan: Mapping[str, object] | None = None,
        name: str = "federation",
        **more: Any,
    ) -> None:
        self.name = name
        self.loss = loss
        self._folder: Path | None = None
        self._clients: tuple[str, ...] = ()
        if task is not None:
            given = {"model": model, "loss": loss, "metrics": metrics, "clients": clients, "owners": owners,
                     "test": test, "plan": plan, **more}  # fmt: skip
            if extra := [key for key, value in given.items() if value is not None]:
                raise ConfigError(f"a federation of a task has no argument {extra[0]!r}: the task has it")
            self._of_task(task, data, partition)
        else:
            refuse_unknown(more, (*OWN_ARGUMENTS, *array_task.TASK_ARGUMENTS), "Federation() has no argument")
            form: dict[str, Any] = {key: more.pop(key) for key in FORM_ARGUMENTS if key in more}
            arrays = self._arrays(clients, data, partition, owners, Testing(test, form))
            self.task: Task = arrays.task(
                name=name,
                model=model,
                default_plan=plain("plan", plan),
                **form,
                **{**objectives.arguments_of(loss, metrics), **more},
            )
            _check_plan(self.task.default_plan, self.task.plan_keys)
        self._scenario = self._base()

    def _of_task(self, task: Task | str, data: Any, partition: Parts | str | None) -> None:
        given: Any = load_task(task) if isinstance(task, str) else task
        if isinstance(given, type) or not isinstance(given, Task):
            what = f"the class {given.__name__}" if isinstance(given, type) else repr(given)
            raise ConfigError(f'task is {what}: give the name of a task, as "digits", or a task that is made')
        self.task = given
        if data is not None and not isinstance(data, str | Path):
            raise ConfigError("data of a federation of a task is the task's folder of data, or None")
        self._folder = None if data is None else Path(data)
        self._parts = parts_of("auto" if partition is None else partition)

    def _arrays(
        self, clients: Any, data: Any, partition: Parts | str | None, owners: Any, testing: Testing
    ) -> array_task.Arrays:
        if (clients is None) == (data is None):
            raise ConfigError("give a federation either clients={name: data}, or data=(X, y) with a partition")
        if clients is not None:
            if partition is not None or owners is not None:
                raise ConfigError("clients have their own data already: leave out partition and owners, or give data=")
            arrays = array_task.of_clients(clients, testing)
            self._clients, self._parts = tuple(clients), Parts(partition="natural", devices=len(clients))
            return arrays
        self._parts = parts_of(("natural" if owners is not None else "auto") if partition is None else partition)
        return array_task.of_table(data, owners, self._parts, testing)

    def _base(self) -> Scenario:
        """The scenario of all runs, whose partition and number of devices the data have decided."""
        devices = DEVICES_OF_DATA if self._parts.devices is None else self._parts.devices
        with untouched(0):
            found = resolved(
                Scenario(task=self.task.name, data=self._folder, partition=self._parts.partition, devices=devices),
                self.task,
            )
        self.lines = tuple(found.lines)
        return found.scenario

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the devices."""
        return self._clients or tuple(f"device-{number}" for number in range(self._scenario.devices))

    def partition(self, seed: int = 0) -> PartitionTable:
        """Who has what, with this seed of the partition. `.table` is a DataFrame of device, samples and classes."""
        with untouched(seed):
            return PartitionTable.of(settled(replace(self._scenario, seed=seed), self.task), self.task, self.devices)

    def statistics(
        self,
        *kinds: str,
        features: Sequence[str | int] = (),
        bounds: tuple[float, float] | None = None,
        bins: int = 32,
        seed: int = 0,
    ) -> Any:
        """Statistics of the devices' training data, as `ternbus aggregator statistics` shows them: a DataFrame.

        `kinds` are "moments" (count, mean, variance), "labels" and "histogram", by default the first two. A histogram
        needs `bounds`, and gives quantiles with an error of at most `q_error`. `features` names some, else it is all of
        them. A row is a feature or a label; `.attrs["facts"]` has the histograms, and which devices refused and why.
        Raises `ConfigError` where no device can answer.
        """
        request = request_of(kinds or DEFAULT_KINDS, features, bounds, bins)
        wanted = replace(self._scenario, seed=seed)
        with untouched(seed):
            parts = [wanted.partition_of(number) for number in range(len(self.devices))]
            trainers = trainers_of(self.task, self._folder, parts)
            return table_of(facts_of(dict(zip(self.devices, trainers, strict=True)), request))

    def simulate(
        self,
        *,
        versions: int | None = 20,
        seed: int = 0,
        plan: Mapping[str, object] | None = None,
        merge: Mapping[str, object] | None = None,
        settings: Mapping[str, object] | None = None,
        speeds: Any = None,
        device: str = "auto",
        jobs: int | str = 1,
        vectorise: int = 1,
        callbacks: Sequence[AnyCallback] | None = None,
        merge_rule: Pair | None = None,
        server_optimizer: Pair | None = None,
        client: Pair | None = None,
        **scenario: Any,
    ) -> Run:
        """Simulate the federation in virtual time until `versions`, and return what was reached.

        `seed` decides the initial model, the partition, the speeds and the batches: the same call gives the same
        versions, bit for bit. `plan` has keys of local training, `merge` those of `[merge]` in aggregator.toml, and
        `settings` those of its other sections, as "optimizer.name". `speeds` are the seconds of a training: a `Speeds`,
        one number, or one for each device. `device` is the processor that trains, as "cpu" or "cuda". With `jobs` so
        many processes train at a time, or the Ray cluster at ray://HOST:PORT. With `vectorise` each process trains so
        many devices of a small model at once, and the versions agree to rounding. `callbacks` (docs/notebook.md) are by
        default one `Progress()`. `merge_rule`, `server_optimizer` and `client` are algorithms of one's own, each a pair
        of functions (docs/notebook.md), which no real federation runs. `scenario` has further fields of `Scenario`, as
        `sync=True` or `local=Local(...)`.

        Ctrl-C ends the run after the training that is going on, and what was reached is returned. Raises `ConfigError`
        for arguments that do not fit, `ClientError` if the task's code raises an exception in a client's training, and
        `FederationError` if no version is made.
        """
        watching = [Progress()] if callbacks is None else checked(callbacks)
        given = Choices(versions=versions, seed=seed, plan=plan, merge=merge, settings=settings, speeds=speeds,
                        more=scenario)  # fmt: skip
        wanted = scenario_of(self._scenario, given, self.devices, self.simulate)
        task = placed(self.task, device)
        hooks = algorithms.Hooks.of(merge_rule, server_optimizer, client)
        how = Computation(jobs=jobs, vectorise=vectorise)
        hooks.check(wanted, task, how)
        watch = Watch(watching, wanted.end.versions, self.module)
        for line in self.lines:
            watch.say(line)
        for line in hooks.notices():
            watch.say_once(line)
        run: Run | None = None
        try:
            run = self._simulated(wanted, hooks.task(task), hooks, how, watch)
            run = replace(run, settings=given.flat())
        finally:
            watch.end(run)
        return run

    def _simulated(self, wanted: Scenario, task: Task, hooks: algorithms.Hooks, how: Computation, watch: Watch) -> Run:
        names, began = self.devices, time.monotonic()
        with (
            untouched(wanted.seed),
            place_of(how, wanted, task, watch.say) as given,
            Interrupt() as interrupt,
        ):

            def place(pairs: Sequence[Trainers], widths: Widths) -> Place:
                own = hooks.pairs(pairs, names)
                return NamedPlace(given(own, widths) if callable(given) else given or InProcess(own, widths), names)

            simulation = Simulation(wanted, task, watch, place=place, names=names, model=hooks.model)
            watch.simulation = simulation
            simulation.run(lambda: simulation.stop() if interrupt.came else None)
            watch.finish()
        watch.ended = "interrupted" if interrupt.came else watch.ended
        return self._run(simulation, watch, time.monotonic() - began)

    def _run(self, simulation: Simulation, watch: Watch, wall_s: float) -> Run:
        model, schema = simulation.aggregator.core.model, simulation.schema
        version, vector = watch.best or (model.version, model.published)
        return Run(
            name=self.name,
            report=simulation.report(wall_s),
            ended=watch.ended,
            settings={},
            lines=tuple(watch.lines),
            tensors=to_tensors(schema, model.published),
            best_tensors=to_tensors(schema, vector),
            best_version=version,
            metadata=simulation.kinds.metadata() | version_metadata(model.version, vector_digest(model.published)),
            counted={
                each.name: {**each.happened, "trained": each.happened["trained"], "stale": each.happened["stale"],
                            "failures": each.failures}
                for each in simulation.devices
            },
            module=self.module,
        )  # fmt: skip

    def module(self, tensors: Tensors) -> Any:
        """A new `nn.Module` of the federation with these tensors, in evaluation mode on the CPU.

        Raises `ConfigError` for a task without PyTorch.
        """
        if not isinstance(self.task, TorchTask):
            raise ConfigError(f"the task {self.task.name} makes no PyTorch model: its model is `tensors`, by name")
        made = self.task.fresh()
        TravellingState(made, self.task.stays_local).load(tensors)
        return made.eval()

    def centralized(
        self, *, epochs: int = 20, seed: int = 0, plan: Mapping[str, object] | None = None, device: str = "auto"
    ) -> Baseline:
        """Train the model on all clients' data in one place: what the federation is compared with.

        By the same plan, without updates and aggregator. It is evaluated on the test data after each epoch.
        """
        with untouched(seed), Interrupt() as interrupt:
            return centralized(self._training(epochs, seed, plan, device, interrupt))

    def local_only(
        self, *, epochs: int = 20, seed: int = 0, plan: Mapping[str, object] | None = None, device: str = "auto"
    ) -> Baseline:
        """Train a model for each client on its own data alone: what a client has without the federation.

        Each is evaluated on the test data after each epoch; the result is their mean.
        """
        with untouched(seed), Interrupt() as interrupt:
            return local_only(self._training(epochs, seed, plan, device, interrupt), self.devices)

    def _training(
        self, epochs: int, seed: int, plan: Mapping[str, object] | None, device: str, interrupt: Interrupt
    ) -> Training:
        return Training(
            task=placed(self.task, device),
            scenario=replace(self._scenario, seed=seed),
            epochs=epochs,
            plan=plain("plan", plan),
            interrupt=interrupt,
            module=self.module,
        )

    def initial_evaluation(self, seed: int = 0) -> Evaluation:
        """The metrics of the initial model on the test data."""
        with untouched(seed), explained(self.task.name):
            return self.task.evaluator(data=self._folder).evaluate(initial_of(self.task, seed))

    def trainer(self, number: int, seed: int = 0) -> Trainer:
        """The trainer of one device, by its number, with its part of the data."""
        wanted = replace(self._scenario, seed=seed)
        with untouched(seed):
            return self.task.trainer(data=self._folder, partition=wanted.partition_of(number))

    def to_task(self, path: Path | str, *, data: Path | str | None = None) -> Path:
        """Write the same as a task's file for real devices: `ternbus edge join … --task my_task:TASK --data FOLDER`.

        Functions of the notebook are written to the file, with the names that they need; those of a module are
        imported. A device's FOLDER has train.npz with `inputs` and `targets`, an evaluator's has test.npz. With `data`
        the arrays of each device are written, to `data`/NAME. Returns the path. Raises `ConfigError` for what has no
        source, for a file that is not of this function, and for data that are no pair of arrays.
        """
        return task_file.write(self, Path(path), None if data is None else Path(data))

    def __repr__(self) -> str:
        names = self.devices
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return f"<Federation of {counted(len(names), 'device')} ({shown}), task {self.task.name}>"

    def _repr_html_(self) -> str:
        return self.partition()._repr_html_()


def _check_plan(plan: Mapping[str, object], own: Collection[str]) -> None:
    """Raise `ConfigError` for a key that nobody knows, or its value; what goes together a run may yet complete."""
    if found := plan_keys.unknown(plan, own):
        raise ConfigError(f"plan: {found[0]} Keys of your own are named by plan_keys")
    for name, value in plan.items():
        if name in plan_keys.KEYS and (fault := plan_keys.KEYS[name].fault(value)):
            raise ConfigError(f"plan: {name} is {value!r}, {fault}")
