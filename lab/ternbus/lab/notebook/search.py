"""Sweeps over settings with several seeds, and tuning by Optuna, which prunes by the metrics of versions."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from ternbus.broker.errors import ConfigError
from ternbus.broker.plural import counted
from ternbus.broker.protocol.direction import LOWER, direction_of
from ternbus.lab.notebook.callbacks import State, named
from ternbus.lab.notebook.federation import Federation
from ternbus.lab.notebook.frames import figure, frame, library
from ternbus.lab.notebook.run import Run

GROUPS: Final = ("plan", "merge")
MEASURES: Final = ("seconds", "updates", "bytes_up", "bytes_down")


def arguments_with(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `simulate` with changes: "plan.K" and "merge.K", other settings with a dot, or an argument."""
    found = dict(base)
    for name, value in values.items():
        group, dot, key = name.partition(".")
        if not dot:
            found[name] = value
        elif group in GROUPS:
            found[group] = {**(found.get(group) or {}), key: value}
        else:
            found["settings"] = {**(found.get("settings") or {}), name: value}
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sweep:
    """The runs of a sweep: for each combination of values, a run for each seed."""

    axes: tuple[str, ...]
    rows: Sequence[tuple[Mapping[str, Any], Sequence[Run]]]

    @property
    def metric(self) -> str:
        """The primary metric."""
        return self.rows[0][1][0].metric or "loss"

    @property
    def table(self) -> Any:
        """A DataFrame with a row for each combination: its values, and over its seeds the mean of each metric.

        `NAME_std` is the standard deviation of the primary metric; seconds, updates and bytes are means.
        """
        return frame([self._row(values, runs) for values, runs in self.rows], self.axes)

    def _row(self, values: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
        metric = self.metric
        found = [run.metrics[metric] for run in runs if metric in run.metrics]
        row = {**values, "seeds": len(runs)}
        if found:
            row |= {metric: statistics.fmean(found), f"{metric}_std": statistics.pstdev(found)}
        for name in runs[0].metrics:
            others = [run.metrics[name] for run in runs if name in run.metrics]
            row.setdefault(name, statistics.fmean(others) if others else None)
        return row | {name: statistics.fmean(run.report[name] for run in runs) for name in MEASURES}

    def best(self) -> Mapping[str, Any]:
        """The values with the best mean of the primary metric."""
        known = [(row, values) for values, runs in self.rows if self.metric in (row := self._row(values, runs))]
        lower = direction_of(self.metric, self.rows[0][1][0].report["better"]) == LOWER
        return (min if lower else max)(known, key=lambda each: each[0][self.metric])[1]

    def plot(self) -> Any:
        """A matplotlib Figure: the primary metric by the first axis, a line for each combination of the others."""
        return figure([self._draw], width=7.0, height=4.2)

    def _draw(self, axes: Any) -> None:
        first, *others = self.axes
        places = list(dict.fromkeys(str(values[first]) for values, _ in self.rows))
        lines: dict[str, list[tuple[int, list[float]]]] = {}
        for values, runs in self.rows:
            label = ", ".join(f"{name} {values[name]}" for name in others)
            found = [run.metrics[self.metric] for run in runs if self.metric in run.metrics]
            if found:
                lines.setdefault(label, []).append((places.index(str(values[first])), found))
        for label, points in lines.items():
            means = [statistics.fmean(found) for _, found in points]
            spread = [statistics.pstdev(found) for _, found in points]
            axes.errorbar([place for place, _ in points], means, yerr=spread, marker="o", capsize=3, label=label)
        axes.set_xticks(range(len(places)), places)
        axes.set(xlabel=first, ylabel=f"test {self.metric}")
        if others:
            axes.legend(loc="best", fontsize="small")

    def __repr__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        table: str = self.table.to_html(index=False)
        return table


def sweep(fed: Federation, space: Mapping[str, Any], *, seeds: int = 1, **arguments: Any) -> Sweep:
    """Simulate all combinations of the values, each with the seeds 0 to `seeds` - 1.

    A name is "plan.K", "merge.K", another setting of aggregator.toml as "optimizer.name", or an argument of `simulate`,
    to which `arguments` go, too. Ctrl-C ends the sweep, and what is finished is returned; `KeyboardInterrupt` if that
    is nothing. Raises `ConfigError` for a name that is none, before anything is simulated a second time.
    """
    _check(fed, space, "sweep")
    space = {name: values.tolist() if isinstance(values, np.ndarray) else values for name, values in space.items()}
    if not space or not all(isinstance(values, list | tuple) and values for values in space.values()):
        raise ConfigError('sweep() needs a list of values for each name, as {"plan.learning_rate": [0.01, 0.1]}')
    if type(seeds) is not int or seeds < 1:
        raise ConfigError(f"seeds is {seeds!r}, but must be a whole number from 1")
    rows: list[tuple[Mapping[str, Any], list[Run]]] = []
    for combination in itertools.product(*space.values()):
        values, runs = dict(zip(space, combination, strict=True)), list[Run]()
        for seed in range(seeds):
            run = fed.simulate(**arguments_with({"callbacks": [], **arguments, "seed": seed}, values))
            if run.ended == "interrupted":
                break
            runs.append(run)
        rows += [(values, runs)] if runs else []
        if len(runs) < seeds:
            break
    if not rows:
        raise KeyboardInterrupt
    return Sweep(axes=tuple(space), rows=rows)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tuning:
    """The trials of `tune`, by Optuna's `study`."""

    metric: str
    study: Any = field(repr=False)

    @property
    def best(self) -> Mapping[str, Any]:
        """The values of the best finished trial."""
        found: Mapping[str, Any] = self.study.best_params
        return found

    @property
    def value(self) -> float:
        """The metric of the best finished trial."""
        return float(self.study.best_value)

    @property
    def table(self) -> Any:
        """A DataFrame with a row for each trial: its values, the metric, how many versions it had, and its state."""
        rows = []
        for trial in self.study.trials:
            last = max(trial.intermediate_values, default=0)
            reached = trial.intermediate_values.get(last)
            rows.append({"trial": trial.number, **trial.params, self.metric: reached, "versions": last,
                         "state": trial.state.name.lower()})  # fmt: skip
        return frame(rows, ("trial",))

    def __repr__(self) -> str:
        trials = counted(len(self.study.trials), "trial")
        return f"<Tuning: {trials}, best {self.metric} {self.value:.4g} with {dict(self.best)}>"

    def _repr_html_(self) -> str:
        table: str = self.table.to_html(index=False)
        return table


def tune(
    fed: Federation,
    space: Mapping[str, Any],
    *,
    trials: int = 50,
    metric: str | None = None,
    seed: int = 0,
    **arguments: Any,
) -> Tuning:
    """Search for the values with the best metric of the test data, by Optuna (extra `tune`).

    A name is one as of `sweep`. Its value is (low, high), of whole numbers or of numbers with a fraction; the same with
    "log" as a third; or a list of choices. `metric` is by default the primary one. A trial that is worse than the
    median of those before it, at the same version, is pruned. `seed` is that of the search and of each run; `arguments`
    go to `simulate`. Ctrl-C ends the search, and what was tried is returned; `KeyboardInterrupt` if no trial is
    finished. Raises `ConfigError` if optuna is missing, or for a space that is none.
    """
    _check(fed, space, "tune")
    optuna = library("optuna", "'ternbus[tune]'")
    if not space:
        raise ConfigError('tune() needs a range for each name, as {"plan.learning_rate": (0.01, 0.5, "log")}')
    if type(trials) is not int or trials < 1:
        raise ConfigError(f"trials is {trials!r}, but must be a whole number from 1")
    space = {name: _range(name, about) for name, about in space.items()}
    first = fed.initial_evaluation(seed)
    name = named(first.values, metric, "the evaluation")
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            direction="minimize" if direction_of(name, first.better) == LOWER else "maximize",
            sampler=optuna.samplers.TPESampler(seed=seed),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
        )
        study.optimize(lambda trial: _tried(fed, trial, space, name, {**arguments, "seed": seed}), n_trials=trials)
    finally:
        optuna.logging.set_verbosity(level)
    if not any(trial.state.name == "COMPLETE" for trial in study.trials):
        raise KeyboardInterrupt
    return Tuning(metric=name, study=study)


def _check(fed: object, space: object, what: str) -> None:
    """Raise `ConfigError` for the arguments of a search that are of another type."""
    if not isinstance(fed, Federation):
        raise ConfigError(f"{what}() searches with a Federation, and not with {fed!r}: {what}(fed, {{name: values}})")
    if not isinstance(space, Mapping):
        raise ConfigError(f"{what}(): space is {space!r}, but must be a dict of name to values")


def _tried(fed: Federation, trial: Any, space: Mapping[str, Any], metric: str, arguments: Mapping[str, Any]) -> float:
    """The metric of the last version of one trial. Raises optuna's `TrialPruned` for one that was ended early."""
    pruned = library("optuna", "'ternbus[tune]'").TrialPruned
    ended_early = False

    def watch(state: State) -> bool | None:
        nonlocal ended_early
        if metric in state.metrics:
            trial.report(state.metrics[metric], state.version)
            ended_early = trial.should_prune()
        return True if ended_early else None

    values = {name: _suggested(trial, name, about) for name, about in space.items()}
    callbacks = [*(arguments.get("callbacks") or ()), watch]
    run = fed.simulate(**arguments_with({**arguments, "callbacks": callbacks}, values))
    if run.ended == "interrupted":
        trial.study.stop()
    if ended_early or run.ended == "interrupted" or metric not in run.metrics:
        raise pruned
    return run.metrics[metric]


def _range(name: str, about: Any) -> Any:
    """The range or the choices, with Python's numbers in place of numpy's. Raises `ConfigError` for what is none."""
    if isinstance(about, np.ndarray | list) and len(about):
        return about.tolist() if isinstance(about, np.ndarray) else about
    ends = about[:2] if isinstance(about, tuple) and len(about) in (2, 3) else ()
    ends = tuple(each.item() if isinstance(each, np.generic) else each for each in ends)
    numbers = len(ends) == 2 and all(isinstance(each, int | float) for each in ends)
    if not numbers or not ends[0] < ends[1] or about[2:] not in ((), ("log",)):
        raise ConfigError(f'{name} is {about!r}: write (low, high), (low, high, "log") or a list of choices')
    if about[2:] and ends[0] <= 0:
        raise ConfigError(f'{name} is {about!r}: the low end of a range with "log" must be above 0')
    return (*ends, *about[2:])


def _suggested(trial: Any, name: str, about: Any) -> Any:
    if isinstance(about, list):
        return trial.suggest_categorical(name, about)
    low, high, *log = about
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, log=bool(log))
    return trial.suggest_float(name, low, high, log=bool(log))
