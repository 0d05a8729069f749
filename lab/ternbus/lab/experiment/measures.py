"""The measures of a run, for tables, plots and goals."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """The heading and the unit of a measure."""

    title: str
    unit: Literal["percent", "number", "decimal"]


MEASURES: Final[Mapping[str, Measure]] = {
    "accuracy": Measure(title="test accuracy", unit="percent"),
    "accuracy_at_updates": Measure(title="accuracy at equal updates", unit="percent"),
    "stale": Measure(title="updates too stale", unit="percent"),
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
}


def measure(report: Mapping[str, Any], last: int, updates: int | None) -> dict[str, float | None]:
    """The measures of one run's report; None for a measure without a value.

    An accuracy is the mean over the ``last`` versions. ``accuracy_at_updates`` is taken after ``updates`` merged
    updates. Shares of bytes are relative to synchronous float32 averaging with the same number of updates, which needs
    4 B a parameter down and up. ``stale`` is the share of updates that were too stale to be merged; their devices send
    the change with a later update, and ``staleness`` the mean number of versions that had been made since the base of a
    merged one. ``most_updates`` and ``epsilon`` are maxima over the devices.
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
        "staleness": sum(row["staleness"] * row["updates"] for row in rows if row["updates"]) / accepted
        if accepted
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
    }


def of_seeds(row: Mapping[str, Any], name: str) -> list[float]:
    """The values of a measure in one combination, one for each seed.

    Empty if a value is missing, since a mean of the others would be biased, or if the result lacks the measure.
    """
    values: Sequence[float | None] = row["measures"].get(name, ())
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else []


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> float | None:
    known = [row["accuracy"] for row in rows if row["accuracy"] is not None]
    return statistics.mean(known) if known else None
