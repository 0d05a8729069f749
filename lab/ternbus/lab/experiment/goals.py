"""The goals of an experiment: bounds on measures, and whether a result meets them."""

import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ternbus.broker.errors import ConfigError
from ternbus.lab.experiment.measures import named, of_seeds


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A bound on a measure in all combinations with the labels ``of``.

    With ``than``, the bound is on the difference to the combinations with the labels ``than``.
    """

    measure: str
    least: float | None = None
    most: float | None = None
    of: Mapping[str, str] = field(default_factory=dict)
    than: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named(self.measure, "[[goal]] measure")
        if (self.least is None) == (self.most is None):
            raise ConfigError("[[goal]] needs exactly one of the keys least and most")

    def judge(self, rows: Collection[Mapping[str, Any]]) -> dict[str, Any]:
        """The goal as JSON, with the worst value in the rows of a result as ``found``, and ``met``."""
        compared = self._means(rows, self.than) if self.than else [0.0]
        values = [value - other for value in self._means(rows, self.of) for other in compared]
        worst = (min if self.least is not None else max)(values, default=None)
        return {
            "measure": self.measure,
            "of": dict(self.of),
            "than": dict(self.than),
            "goal": f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}",
            "found": worst,
            "met": worst is not None and self._allows(worst),
        }

    def _allows(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def _means(self, rows: Collection[Mapping[str, Any]], labels: Mapping[str, str]) -> list[float]:
        """The mean over seeds for each combination with these labels."""
        chosen = [row for row in rows if labels.items() <= row["labels"].items()]
        return [statistics.mean(values) for row in chosen if (values := of_seeds(row, self.measure))]
