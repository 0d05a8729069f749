"""Who has what: the samples and classes of each device of a federation, as a table and a figure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from ternbus.edge.learn.task import Task
from ternbus.lab.notebook.frames import figure, frame
from ternbus.lab.report import partition_table
from ternbus.lab.scenario.resolve import Resolved, resolved


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PartitionTable:
    """The parts of the training data. `facts` are those of `ternbus lab partition --json`."""

    facts: Mapping[str, Any]

    @classmethod
    def of(cls, found: Resolved, task: Task, names: Sequence[str]) -> Self:
        facts = partition_table.describe(resolved(found.scenario, task) if found.rows is None else found, task)
        own = [str(name) for name in names]
        natural = facts["partition"] == "natural"
        for part, name in zip(facts["parts"], own, strict=True):
            if natural and name != part["device"]:
                part.pop("owner", None)  # the client's number
            part["device"] = name
        return cls(facts=facts)

    @property
    def table(self) -> Any:
        """A DataFrame: `device`, `samples`, a column for each class or quantile of the target, and who is the owner."""
        rows = []
        for part in self.facts["parts"]:
            row = {name: part[name] for name in ("device", "owner", "samples") if name in part}
            rows.append(row | dict(zip(self.facts["labels"], part.get("counts", ()), strict=False)))
        return frame(rows, ("device", "samples"))

    def plot(self) -> Any:
        """A matplotlib Figure: a bar for each device, as long as its samples, in a colour for each class."""
        return figure(
            [lambda axes: partition_table.draw(self.facts, axes)],
            width=8.0,
            height=partition_table.height_of(self.facts),
        )

    def __repr__(self) -> str:
        return partition_table.table(self.facts)

    def _repr_html_(self) -> str:
        table: str = self.table.to_html(index=False)
        return table
