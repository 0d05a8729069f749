"""Experiment files: a grid of scenarios, the number of seeds, the plot and the goals, in TOML.

This module checks the keys of an experiment; ``ternbus.lab.scenario`` checks the keys of a scenario.
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ternbus.broker.errors import ConfigError
from ternbus.broker.files import load_toml
from ternbus.lab.experiment.goals import Goal
from ternbus.lab.experiment.grid import BESIDE, Grid, ScenarioTable
from ternbus.lab.experiment.measures import named
from ternbus.lab.scenario import scenario
from ternbus.lab.scenario.toml_table import Table

FOLDER: Final = Path(__file__).parent / "experiments"


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """The content of one experiment file.

    An accuracy is the mean over the ``last`` versions of a run. The measure ``accuracy_at_updates`` is taken after
    ``updates`` merged updates, ``hours_to_reach`` at the first version with the accuracy ``reach``; if these are None,
    the measures are left out. ``x`` is the axis and ``y`` the measures of the plot; none mean the primary metric of the
    task. ``columns`` are the measures of the table; none mean all but those of `measures.OF_FLEET`. ``replaced`` says
    whether the scenario is another file's.
    """

    name: str
    title: str
    about: str
    seeds: int
    last: int
    updates: int | None
    grid: Grid
    x: str
    y: tuple[str, ...]
    goals: tuple[Goal, ...]
    columns: tuple[str, ...] = ()
    reach: float | None = None
    replaced: bool = False

    def __post_init__(self) -> None:
        for key, number in {"seeds": self.seeds, "last": self.last, "updates": self.updates}.items():
            if number is not None and number < 1:
                raise ConfigError(f"{key} is {number}, but must be at least 1")
        _choose("plot.x", self.x, self.grid.axes)
        for measure in self.y:
            named(measure, "plot.y")
        for measure in self.columns:
            named(measure, "columns")
        self._check_scenarios()
        for goal in self.goals:
            self._check_labels(goal.of)
            self._check_labels(goal.than)

    def _check_scenarios(self) -> None:
        for combination in self.grid.combinations():
            if "seed" in combination.scenario:
                raise ConfigError(
                    f"{combination.title}: the scenario sets seed: remove it, as runs have seeds 0 to seeds - 1"
                )
            try:
                scenario.parse(combination.scenario)
            except ConfigError as error:
                raise ConfigError(f"{combination.title}: {error}") from error

    def _check_labels(self, labels: Mapping[str, str]) -> None:
        """Raise `ConfigError` for labels that no combination has, before hours of simulation."""
        if not any(labels.items() <= combination.labels.items() for combination in self.grid.combinations()):
            wanted = ", ".join(f'{axis} = "{label}"' for axis, label in labels.items())
            raise ConfigError(
                f"[[goal]] {{ {wanted} }}: no combination has these labels; use labels of [axes] or [beside]"
            )


def names() -> list[str]:
    """The names of the experiments that come with Ternbus."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str, own_scenario: Path | None = None) -> Experiment:
    """Load an experiment of Ternbus by name, or a file NAME.toml. Raises `ConfigError`, which names file and key.

    The scenario in the file ``own_scenario``, but for its seed, takes the place of the experiment's.
    """
    path = Path(name)
    if path.suffix != ".toml":
        if name not in names():
            raise ConfigError(_unknown(name))
        path = FOLDER / f"{name}.toml"
    table = load_toml(path)
    if own_scenario is not None:
        given = scenario.from_folder(load_toml(own_scenario), own_scenario.absolute().parent)
        table = {**table, "scenario": {key: value for key, value in given.items() if key != "seed"}}
    try:
        return replace(parse(path.stem, table, path.parent), replaced=own_scenario is not None)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse(name: str, table: Mapping[str, object], folder: Path) -> Experiment:
    """The experiment in a parsed TOML table. Relative paths of tasks and data count from `folder`.

    Raises `ConfigError`, which names the key.
    """
    top = Table(table, "")
    axes, plot = top.table("axes"), top.table("plot")
    grid = Grid(
        base=scenario.from_folder(top.table("scenario").rest(), folder),
        axes={axis: _tables(axes.table(axis), folder) for axis in axes.rest()},
        beside=_tables(top.table(BESIDE), folder),
    )
    made = Experiment(
        name=name,
        title=top.text("title") or name,
        about=(top.text("about") or "").strip(),
        seeds=_or_one(top.whole("seeds")),
        last=_or_one(top.whole("last")),
        updates=top.whole("updates"),
        grid=grid,
        x=plot.text("x") or next(iter(grid.axes)),
        y=tuple((plot.text("y") or "").split()),
        goals=tuple(_goal(row) for row in top.rows("goal")),
        columns=tuple((top.text("columns") or "").split()),
        reach=top.number("reach"),
    )
    plot.refuse_unknown()
    top.refuse_unknown()
    return made


def _goal(table: Table) -> Goal:
    measure, least, most = table.text("measure"), table.number("least"), table.number("most")
    of, than = ({axis: str(label) for axis, label in table.table(key).rest().items()} for key in ("of", "than"))
    table.refuse_unknown()
    if measure is None:
        raise ConfigError("[[goal]] lacks the key measure")
    return Goal(measure=measure, least=least, most=most, of=of, than=than)


def _tables(table: Table, folder: Path) -> dict[str, ScenarioTable]:
    return {key: scenario.from_folder(table.table(key).rest(), folder) for key in table.rest()}


def _or_one(number: int | None) -> int:
    return 1 if number is None else number


def _choose(key: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ConfigError(f"{key} is {value!r}: choose one of {', '.join(known)}")


def _unknown(name: str) -> str:
    known = names()
    close = difflib.get_close_matches(name.lower(), known, n=1)
    if close:
        return f"unknown experiment {name!r}: do you mean {close[0]}?"
    return f"unknown experiment {name!r}: choose one of {', '.join(known)}, or a file whose name ends in .toml"
