"""The grid of an experiment: all combinations of the labels of its axes, and runs outside the grid."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ternbus.broker.errors import ConfigError

BESIDE: Final = "beside"  # the axis name of runs outside the grid

ScenarioTable = Mapping[str, Any]
"""A scenario, or changes to one, as a TOML table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """One label for each axis, and the resulting scenario, without a seed."""

    labels: Mapping[str, str]
    scenario: ScenarioTable

    @property
    def title(self) -> str:
        return ", ".join(self.labels.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """``base`` is the scenario of all runs. ``axes`` has, for each axis and label, the changes to ``base``.

    ``beside`` has the changes for each run outside the grid.
    """

    base: ScenarioTable
    axes: Mapping[str, Mapping[str, ScenarioTable]]
    beside: Mapping[str, ScenarioTable]

    def __post_init__(self) -> None:
        if not self.axes:
            raise ConfigError("[axes] has no axis: write [axes.NAME] with a line LABEL = { CHANGES } for each label")
        if BESIDE in self.axes:
            raise ConfigError(f"[axes.{BESIDE}]: this name is reserved for runs outside the grid; rename the axis")
        for axis, labels in self.axes.items():
            if not labels:
                raise ConfigError(f"[axes.{axis}] has no label: write LABEL = {{ CHANGES }}")

    def combinations(self) -> Iterator[Combination]:
        for labels in itertools.product(*self.axes.values()):
            table = self.base
            for axis, label in zip(self.axes, labels, strict=True):
                table = _merged(table, self.axes[axis][label])
            yield Combination(labels=dict(zip(self.axes, labels, strict=True)), scenario=table)
        for label, changes in self.beside.items():
            yield Combination(labels={BESIDE: label}, scenario=_merged(self.base, changes))


def _merged(table: ScenarioTable, changes: ScenarioTable) -> dict[str, Any]:
    """The table with the changes; nested tables are merged in the same way."""
    made = dict(table)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(made.get(key), Mapping)
        made[key] = _merged(made[key], value) if both else value
    return made
