"""The result of a simulation: tables, figures, and the models, as values of the caller's process."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from ternbus.broker.model_files import save_safetensors
from ternbus.broker.plural import counted
from ternbus.broker.protocol.direction import Direction, for_people
from ternbus.edge.plan.tensors import Tensors
from ternbus.lab.notebook.frames import figure, frame
from ternbus.lab.report import plots
from ternbus.lab.report.report import size

VERSION_COLUMNS: Final = ("version", "seconds", "updates", "staleness", "staleness_max", "bytes_up", "bytes_down")
SEARCH_COLUMNS: Final = ("version", "judged", "class", "arm", "share", "effect")
DEVICE_COLUMNS: Final = ("device", "samples", "updates", "accepted", "stale", "failures")


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What a federation reached.

    `report` is the content of a `report.json` (docs/lab.md). `ended` says why the run ended: at its "limit", "stopped"
    by a callback, or "interrupted" by Ctrl-C. `lines` are the notices of the run. `tensors` are those of the last
    version, by name, float32; `best_tensors` those of the best one, which is `best_version`, by the primary metric of
    the test data. None of them may be modified.
    """

    name: str
    report: Mapping[str, Any]
    ended: str
    settings: Mapping[str, Any]
    lines: Sequence[str]
    tensors: Tensors
    best_tensors: Tensors
    best_version: int
    metadata: Mapping[str, str]
    counted: Mapping[str, Mapping[str, int]] = field(repr=False)  # by device: what else happened
    module: Callable[[Tensors], Any] = field(repr=False)

    @property
    def version(self) -> int:
        """The last version."""
        return int(self.report["versions"][-1]["version"])

    @property
    def metric(self) -> str | None:
        """The primary metric of the test data."""
        found: str | None = self.report["metric"]
        return found

    @property
    def better(self) -> Mapping[str, Direction]:
        """The direction of each metric: "higher" or "lower"."""
        found: Mapping[str, Direction] = self.report["better"]
        return found

    @property
    def metrics(self) -> Mapping[str, float]:
        """Those of the test data, of the last version that was evaluated."""
        found: Mapping[str, float] = self.report["metrics"]
        return found

    @cached_property
    def model(self) -> Any:
        """The last version as an `nn.Module` of the federation's, in evaluation mode on the CPU.

        Raises `ConfigError` for a task without PyTorch, whose model is `tensors`.
        """
        return self.module(self.tensors)

    @cached_property
    def best(self) -> Any:
        """The best version, as `model`."""
        return self.module(self.best_tensors)

    def save(self, path: Path | str) -> None:
        """Write the last version as a safetensors file."""
        save_safetensors(Path(path), dict(self.tensors), dict(self.metadata))

    @property
    def versions(self) -> Any:
        """A DataFrame with a row for each version.

        `seconds` are virtual, since version 0; `updates` are in this version, of `staleness` versions in the mean;
        `bytes_up` (updates) and `bytes_down` (deltas and snapshots) are of all devices until then. A column for each
        metric of the test data follows, NaN where a version was not evaluated.
        """
        return frame([_version(row) for row in self.report["versions"]], VERSION_COLUMNS)

    @property
    def devices(self) -> Any:
        """A DataFrame with a row for each device.

        `samples` it trains on, of so many `classes`; trainings that it finished (`updates`), updates that were
        `accepted` and that came too late (`stale`); `failures` of its training. `epsilon` is the privacy that it has
        spent. Where data are held out, `own_NAME` is a metric on them.
        """
        return frame([self._device(name, row) for name, row in self.report["devices"].items()], DEVICE_COLUMNS)

    @property
    def search(self) -> Any:
        """A DataFrame with a row for each arm, class of devices and step of the search.

        From `version` on, the share `share` of the class drew the arm. `effect` is what the step found of the arm, in
        `judged` versions. A column for each key of the arms follows. Empty without a search.
        """
        found = self.report.get("search")
        return frame([] if found is None else _steps(found), SEARCH_COLUMNS)

    @property
    def table(self) -> Any:
        """A DataFrame of one row: what was reached, and what it cost."""
        return frame([self.row()])

    def row(self) -> dict[str, Any]:
        """The row of `table`."""
        names = for_people(self.metrics, self.metric)
        best = self.report["best"].get(self.metric, {}).get("value")
        return {
            "result": self.name,
            "versions": self.version,
            "seconds": self.report["seconds"],
            "updates": self.report["updates"],
            "bytes_up": self.report["bytes_up"],
            "bytes_down": self.report["bytes_down"],
            **{name: self.metrics[name] for name in names},
            **({} if self.metric is None else {f"best_{self.metric}": best}),
        }

    def plot(self) -> Any:
        """A matplotlib Figure: the primary metric by version and by time, and the staleness of merged updates."""
        return figure(plots.first_panels(self.report, "virtual seconds"))

    def curve(self) -> list[tuple[int, float]]:
        """(version, primary metric), where it was evaluated."""
        rows, metric = [(row["version"], _metrics(row)) for row in self.report["versions"]], self.metric or ""
        return [(version, found[metric]) for version, found in rows if metric in found]

    def __repr__(self) -> str:
        return f"<Run: {self._said()}>"

    def _repr_html_(self) -> str:
        table: str = self.table.to_html(index=False)
        return f"<p>{self._said()}</p>{table}"

    def _said(self) -> str:
        shown = ", ".join(f"{name} {self.metrics[name]:.4g}" for name in for_people(self.metrics, self.metric))
        versions, updates = counted(self.version, "version"), counted(self.report["updates"], "update")
        return (
            f"{versions} in {self.report['seconds']:.1f} virtual seconds ({self.ended}), "
            f"{shown or 'not measured'}; {updates}, {size(self.report['bytes_up'])} up"
        )

    def _device(self, name: str, row: Mapping[str, Any]) -> dict[str, Any]:
        own = (row["local"] or {}).get("metrics", {})
        return {
            "device": name,
            "samples": row["samples"],
            "classes": len(row["classes"]) if row["classes"] else None,
            "updates": self.counted[name]["trained"],
            "accepted": row["updates"],
            "stale": self.counted[name]["stale"],
            "failures": self.counted[name]["failures"],
            "epsilon": row["epsilon"] or None,
            **{f"own_{metric}": value for metric, value in own.items()},
        }


def _metrics(row: Mapping[str, Any]) -> Mapping[str, float]:
    found: Mapping[str, float] = next(iter(row["evaluations"].values()), {})
    return found


def _steps(search: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "version": step["version"],
            "judged": step["judged"],
            "class": name,
            "arm": arm,
            "share": weight / sum(weights),
            "effect": step["effects"][place][arm] if step["effects"] else None,
            **search["arms"][arm],
        }
        for step in search["steps"]
        for place, (name, weights) in enumerate(zip(search["classes"], step["weights"], strict=True))
        for arm, weight in enumerate(weights)
    ]


def _version(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "version": row["version"],
        "seconds": row["seconds"],
        "updates": row["updates"],
        "staleness": row["staleness"] if row["updates"] else None,
        "staleness_max": row["staleness_max"] if row["updates"] else None,
        "bytes_up": row["update_bytes"],
        "bytes_down": row["delta_bytes"] + row["snapshot_bytes"],
        **_metrics(row),
    }
