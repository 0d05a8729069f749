"""The measures of a run, for tables, plots and goals."""

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.arms import WIDTH
from ternbus.broker.protocol.direction import ACCURACY, for_people, width_metric


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """The heading and the unit of a measure."""

    title: str
    unit: Literal["percent", "number", "decimal", "value"]


MEASURES: Final[Mapping[str, Measure]] = {
    "accuracy": Measure(title="test accuracy", unit="percent"),
    "accuracy_at_updates": Measure(title="accuracy at equal updates", unit="percent"),
    "stale": Measure(title="updates too stale", unit="percent"),
    "dropped": Measure(title="updates without company", unit="percent"),
    "staleness": Measure(title="versions behind", unit="decimal"),
    "versions": Measure(title="versions", unit="number"),
    "updates": Measure(title="updates", unit="number"),
    "most_updates": Measure(title="of one device, at most", unit="number"),
    "epsilon": Measure(title="epsilon of a device, at most", unit="decimal"),
    "up_share": Measure(title="bytes up, of float32", unit="percent"),
    "both_share": Measure(title="both ways", unit="percent"),
    "update_kb": Measure(title="kB an update", unit="number"),
    "megabytes": Measure(title="MB in all", unit="number"),
    "seconds": Measure(title="seconds a run", unit="number"),
    "staleness_p95": Measure(title="versions behind, 95 %", unit="decimal"),
    "wasted": Measure(title="trainings wasted", unit="percent"),
    "up_kb_hour": Measure(title="kB up, a device and hour", unit="number"),
    "down_kb_hour": Measure(title="kB down, a device and hour", unit="number"),
    "versions_hour": Measure(title="versions an hour", unit="decimal"),
    "hours_to_reach": Measure(title="hours until it is reached", unit="decimal"),
}
OF_FLEET: Final = ("staleness_p95", "wasted", "up_kb_hour", "down_kb_hour", "versions_hour", "hours_to_reach")
"""Measures that a table has only if its experiment names them."""
METRIC: Final = "metric."  # before the name of a metric: the measure of its values on the test data
WORST: Final = "worst."  # likewise: of the devices' own data, the mean of the worst tenth
GAIN: Final = "gain."  # likewise: how much better the devices' own models are, by the median
FOUND: Final = "found."  # before a key of a search's arms: its value in the best one, of devices without a class
OF_METRICS: Final[Mapping[str, str]] = {
    METRIC: "test {}",
    WORST: "worst tenth, {}",
    GAIN: "gain of own models, {}",
    FOUND: "{} found",
}


def named(name: str, key: str = "measure") -> Measure:
    """The measure of this name. Raises `ConfigError`, which names the key, if there is none.

    Only a run shows whether a task has a metric.
    """
    for prefix, title in OF_METRICS.items():
        if name.startswith(prefix) and name != prefix:
            return Measure(title=title.format(name.removeprefix(prefix)), unit="value")
    if name not in MEASURES:
        known = ", ".join([*MEASURES, *(f"{prefix}NAME" for prefix in OF_METRICS)])
        raise ConfigError(f"{key} is {name!r}: choose one of {known}, where NAME is a metric of the task")
    return MEASURES[name]


def ordered(names: Iterable[str]) -> list[str]:
    """Measures in the order of a table: those of metrics after the accuracies."""
    fixed = [*MEASURES]
    return sorted(names, key=lambda name: fixed.index(name) if name in MEASURES else 1.5)


def measure(
    report: Mapping[str, Any], last: int, updates: int | None, reach: float | None = None
) -> dict[str, float | None]:
    """The measures of one run's report; None for a measure without a value.

    An accuracy is the mean over the ``last`` versions. ``accuracy_at_updates`` is taken after ``updates`` merged
    updates. Shares of bytes are relative to synchronous float32 averaging with the same number of updates, which needs
    4 B a parameter down and up. ``stale`` is the share of updates that were too stale to be merged; their devices send
    the change with a later update. ``dropped`` is the share of accepted private updates that found no company, whose
    change is lost. ``staleness`` is the mean number of versions that had been made since the base of a merged one.
    ``most_updates`` and ``epsilon`` are maxima over the devices. ``metric.NAME`` is a metric of the test data, also a
    mean over the ``last`` versions; the loss is one only where there is no other. ``found.KEY`` is what a search has
    found for devices without a class, ``found.KEY@CLASS`` for a class; a search of widths also has the metric of that
    sub-network.

    ``wasted`` is the share of the trainings whose update is in no version. Bytes and versions of an hour are those of
    virtual time; a device's hours are those that it is online. ``hours_to_reach`` is the time of the first version
    whose accuracy is at least ``reach``.
    """
    devices = report["devices"].values()
    rows, accepted, stale = report["versions"], report["updates"], report["counts"]["stale"]
    float32 = 4 * report["parameters"] * accepted
    down = rows[-1]["delta_bytes"] + rows[-1]["snapshot_bytes"]
    merged = list(itertools.accumulate(row["updates"] for row in rows))
    until = [row for row, count in zip(rows, merged, strict=True) if updates is not None and count <= updates]
    enough = updates is not None and merged[-1] >= updates
    return {
        "accuracy": _accuracy(rows[-last:]),
        "accuracy_at_updates": _accuracy(until[-last:]) if enough else None,
        "stale": stale / (accepted + stale) if accepted + stale else None,
        "dropped": report.get("private", {}).get("dropped_share"),
        "staleness": sum(row["staleness"] * row["updates"] for row in rows if row["updates"]) / merged[-1]
        if merged[-1]
        else None,
        "versions": rows[-1]["version"],
        "updates": accepted,
        "most_updates": max(device["updates"] for device in devices),
        "epsilon": max(device["epsilon"] for device in devices) or None,
        "up_share": report["bytes_up"] / float32 if float32 else None,
        "both_share": (report["bytes_up"] + down) / (2 * float32) if float32 else None,
        "update_kb": report["bytes_up"] / (accepted + stale) / 1e3 if accepted + stale else None,
        "megabytes": (report["bytes_up"] + down) / 1e6,
        "seconds": report["wall_seconds"],
        **_of_fleet(report, merged[-1], down, reach),
        **_of_metrics(report, rows[-last:]),
        **_found(report, rows[-last:]),
    }


def _found(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The best arm of each class of devices, and the primary metric of its sub-network; behind the key, the class."""
    search, metric = report.get("search"), report["metric"]
    found: dict[str, float | None] = {}
    if search is None:
        return found
    for name, best in zip(search["classes"], search["best"], strict=True):
        if best is None:
            continue
        arm = search["arms"][best]
        values = {**arm, metric: _mean(rows, width_metric(metric, arm[WIDTH]))} if WIDTH in arm else arm
        found |= {f"{FOUND}{key}{f'@{name}' if name else ''}": value for key, value in values.items()}
    return found


def _of_fleet(report: Mapping[str, Any], merged: int, down_bytes: int, reach: float | None) -> dict[str, float | None]:
    """The measures of `OF_FLEET`; None for those that the report of an earlier version lacks."""
    devices, rows = report["devices"].values(), report["versions"]
    trainings = sum(device.get("trainings", 0) for device in devices)
    online_h = sum(device.get("online_s", 0.0) for device in devices) / 3600
    hours = rows[-1].get("seconds", 0.0) / 3600
    reached = (row["seconds"] for row in rows if reach is not None and (row["accuracy"] or 0.0) >= reach)
    first = next(reached, None)
    return {
        "staleness_p95": (report.get("staleness") or {}).get("p95"),
        "wasted": 1 - merged / trainings if trainings else None,
        "up_kb_hour": report["bytes_up"] / online_h / 1e3 if online_h else None,
        "down_kb_hour": down_bytes / online_h / 1e3 if online_h else None,
        "versions_hour": rows[-1]["version"] / hours if hours else None,
        "hours_to_reach": None if first is None else first / 3600,
    }


def of_seeds(row: Mapping[str, Any], name: str) -> list[float]:
    """The values of a measure in one combination, one for each seed.

    Empty if a value is missing, since a mean of the others would be biased, or if the result lacks the measure.
    """
    values: Sequence[float | None] = row["measures"].get(name, ())
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else []


def _of_metrics(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    shown = [name for name in for_people(report["metrics"], report["metric"]) if name != ACCURACY]
    found: dict[str, float | None] = {METRIC + name: _mean(rows, name) for name in shown}
    local = report["local"] or {"metrics": {}, "fine_tuned": None}
    found |= {WORST + name: local["metrics"][name]["worst_decile"] for name in for_people(local["metrics"], None)}
    tuned = (local["fine_tuned"] or {"metrics": {}})["metrics"]
    return found | {GAIN + name: tuned[name]["gain"]["median"] for name in for_people(tuned, None)}


def _mean(rows: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    """The mean over the versions that have the metric of the run's only evaluator."""
    known = [values[metric] for row in rows for values in row["evaluations"].values() if metric in values]
    return statistics.mean(known) if known else None


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> float | None:
    known = [row["accuracy"] for row in rows if row["accuracy"] is not None]
    return statistics.mean(known) if known else None
