"""What a federation is compared with: all data in one place, and each client alone; and the comparison."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ternbus.broker.errors import ConfigError
from ternbus.broker.plural import counted
from ternbus.broker.protocol.direction import LOWER, Direction, direction_of, for_people, primary_of
from ternbus.edge.learn.failure import explained
from ternbus.edge.learn.task import Evaluation, Task, Trainer, evaluated_by, initial_of, trainers_of
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import Tensors
from ternbus.lab.notebook.frames import figure, frame
from ternbus.lab.notebook.run import Run
from ternbus.lab.notebook.surroundings import Interrupt
from ternbus.lab.scenario import plan_check
from ternbus.lab.scenario.scenario import Scenario


@dataclass(frozen=True, kw_only=True, eq=False)
class Baseline:
    """What training without a federation reached.

    `rows` has the metrics of the test data after each epoch, the first before any; of several models it is their mean.
    `parts` has those of each device at the end. `tensors` are those of the one model; None if there are several.
    """

    name: str
    rows: Sequence[Mapping[str, float]]
    parts: Sequence[Mapping[str, Any]]
    better: Mapping[str, Direction]
    tensors: Tensors | None
    module: Callable[[Tensors], Any] = field(repr=False)

    @property
    def metrics(self) -> Mapping[str, float]:
        """Those of the last epoch."""
        return self.rows[-1]

    @property
    def metric(self) -> str | None:
        """The primary metric."""
        return primary_of(self.rows[-1])

    @cached_property
    def model(self) -> Any:
        """The model as an `nn.Module`, in evaluation mode. Raises `ConfigError` if each device has its own."""
        if self.tensors is None:
            raise ConfigError(f"{self.name}: each device has a model of its own, and none is that of all")
        return self.module(self.tensors)

    @property
    def epochs(self) -> Any:
        """A DataFrame: `epoch`, and a column for each metric of the test data."""
        return frame([{"epoch": epoch, **row} for epoch, row in enumerate(self.rows)], ("epoch",))

    @property
    def devices(self) -> Any:
        """A DataFrame: `device`, `samples`, and the metrics of its own model on the test data."""
        return frame(self.parts, ("device", "samples"))

    @property
    def table(self) -> Any:
        """A DataFrame of one row: what was reached."""
        return frame([self.row()])

    def row(self) -> dict[str, Any]:
        """The row of `table`."""
        names = for_people(self.metrics, self.metric)
        return {"result": self.name, "epochs": len(self.rows) - 1, **{name: self.metrics[name] for name in names}}

    def plot(self) -> Any:
        """A matplotlib Figure: the primary metric by epoch."""
        return figure([self._draw])

    def _draw(self, axes: Any) -> None:
        metric = self.metric or ""
        known = [(epoch, row[metric]) for epoch, row in enumerate(self.rows) if metric in row]
        axes.plot(*zip(*known, strict=True), marker=".")
        axes.set(xlabel="epoch", ylabel=_labelled(metric, self.better), title=self.name)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {self.metrics[name]:.4g}" for name in for_people(self.metrics, self.metric))
        return f"<{self.name}: {counted(len(self.rows) - 1, 'epoch')}, {shown}>"

    def _repr_html_(self) -> str:
        table: str = self.table.to_html(index=False)
        return table


@dataclass(slots=True)
class _Course:
    """One model that trains epoch by epoch."""

    trainer: Trainer
    tensors: Tensors
    plan: Plan

    def train(self, epoch: int, seed: int) -> None:
        """One epoch: the optimizer begins anew with each, as in a training of a device."""
        trained = self.trainer.train(self.tensors, self.plan, version=epoch, seed=seed + epoch)
        self.tensors = {**trained.local, **trained.tensors}


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a baseline trains, and how long."""

    task: Task
    scenario: Scenario
    epochs: int
    plan: Mapping[str, object]
    interrupt: Interrupt
    module: Callable[[Tensors], Any]

    def __post_init__(self) -> None:
        if type(self.epochs) is not int or self.epochs < 1:
            raise ConfigError(f"epochs is {self.epochs!r}, but must be a whole number from 1")


def centralized(training: Training) -> Baseline:
    """One model, of all training data."""
    found = _trained(training, ["all"])
    tensors = found.courses[0].tensors
    return Baseline(name="centralized", parts=(), tensors=tensors, module=training.module, **found.result())


def local_only(training: Training, names: Sequence[str]) -> Baseline:
    """A model for each device, of its own data."""
    scenario = training.scenario
    found = _trained(training, [scenario.partition_of(index) for index in range(scenario.devices)])
    rows = [
        {"device": name, "samples": course.trainer.samples, **last.values}
        for name, course, last in zip(names, found.courses, found.evaluations[-1], strict=True)
    ]
    return Baseline(name="local only", parts=rows, tensors=None, module=training.module, **found.result())


@dataclass(slots=True)
class _Found:
    courses: list[_Course]
    evaluations: list[list[Evaluation]]  # by epoch, of each model

    def result(self) -> dict[str, Any]:
        first = self.evaluations[0][0]
        rows = [
            {name: statistics.fmean(each.values[name] for each in found) for name in found[0].values}
            for found in self.evaluations
        ]
        return {"rows": rows, "better": first.better}


def _trained(training: Training, parts: Sequence[str]) -> _Found:
    """Train on each of the parts. An interrupt ends all after the training that is going on."""
    task, scenario = training.task, training.scenario
    chosen = plan_check.settings(replace(scenario, plan=dict(training.plan)), task)
    keys = {name.removeprefix("plan."): value for name, value in chosen.items() if name.startswith("plan.")}
    # One place has all statistics itself: nothing of their change need be held back.
    asked = Plan.from_meta({"statistics_rate": 1, **keys, "local_epochs": 1, "local_steps": None})
    with explained(task.name):
        start = initial_of(task, scenario.seed)
        evaluator = task.evaluator(data=scenario.data)
        courses = [_Course(each, start, asked) for each in trainers_of(task, scenario.data, parts)]
        found = _Found(courses, [[evaluated_by(evaluator, start, asked)] * len(courses)])
        for epoch in range(training.epochs):
            for course in courses:
                if training.interrupt.came:
                    return found
                course.train(epoch, scenario.seed)
            found.evaluations.append([evaluated_by(evaluator, each.tensors, asked) for each in courses])
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """Several results beside each other."""

    results: Sequence[Run | Baseline]

    @property
    def table(self) -> Any:
        """A DataFrame with a row for each result."""
        return frame([each.row() for each in self.results], ("result",))

    def plot(self) -> Any:
        """A matplotlib Figure: runs by version, and baselines as lines at what they reached; of clients alone also
        the range from the worst to the best.
        """
        return figure([self._draw], width=7.0, height=4.2)

    def _draw(self, axes: Any) -> None:
        metric = self.results[0].metric or ""
        for number, result in enumerate(self.results):
            colour = f"C{number}"
            if isinstance(result, Run):
                known = [(version, value) for version, value in result.curve()]
                axes.plot(*zip(*known, strict=True), marker=".", color=colour, label=result.name)
                continue
            axes.axhline(result.metrics[metric], linestyle="--", color=colour, label=result.name)
            values = [row[metric] for row in result.parts if metric in row]
            if values:
                axes.axhspan(min(values), max(values), color=colour, alpha=0.12)
        better = self.results[0].better
        axes.set(xlabel="version", ylabel=_labelled(metric, better), title="test data")
        axes.legend(loc="best")

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.results))

    def _repr_html_(self) -> str:
        table: str = self.table.to_html(index=False)
        return table


def compare(*results: Run | Baseline) -> Comparison:
    """Runs and baselines in one table and one figure. Raises `ConfigError` for none, and for what is none."""
    if not results or not all(isinstance(each, Run | Baseline) for each in results):
        raise ConfigError("compare() needs results: compare(run, fed.centralized(epochs=20))")
    return Comparison(results=results)


def _labelled(metric: str, better: Mapping[str, Direction]) -> str:
    return f"test {metric}{', lower is better' if direction_of(metric, better) == LOWER else ''}"
