"""The measures of a run, as tables, plots and goals name them."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """The heading of a measure, and how its values are written."""

    title: str
    unit: Literal["percent", "number", "decimal"]


MEASURES: Final[Mapping[str, Measure]] = {
    "accuracy": Measure(title="test accuracy", unit="percent"),
    "accuracy_at_updates": Measure(title="accuracy at equal updates", unit="percent"),
    "stale": Measure(title="updates too stale", unit="percent"),
    "versions": Measure(title="versions", unit="number"),
    "updates": Measure(title="updates", unit="number"),
    "most_updates": Measure(title="of one device, at most", unit="number"),
    "epsilon": Measure(title="epsilon of a device, at most", unit="decimal"),
    "up_share": Measure(title="bytes up, of float32", unit="percent"),
    "both_share": Measure(title="both ways", unit="percent"),
    "megabytes": Measure(title="MB in all", unit="number"),
    "seconds": Measure(title="seconds a run", unit="number"),
}


def measure(report: Mapping[str, Any], last: int, updates: int | None) -> dict[str, float | None]:
    """Each measure of one run's report; None where there is none.

    An accuracy is the mean over the ``last`` versions. ``accuracy_at_updates`` is read once ``updates`` had been
    merged. Shares of bytes are of what synchronous float32 averaging moves for as many updates: 4 B a parameter down
    and up. ``stale`` is the share of updates that came too late to be merged; their devices send it with a later one.
    ``most_updates`` and ``epsilon`` are those of the device that has sent, or spent, most.
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
        "versions": rows[-1]["version"],
        "updates": accepted,
        "most_updates": max(device["updates"] for device in devices),
        "epsilon": max(device["epsilon"] for device in devices) or None,
        "up_share": report["bytes_up"] / float32 if float32 else None,
        "both_share": (report["bytes_up"] + down) / (2 * float32) if float32 else None,
        "megabytes": (report["bytes_up"] + down) / 1e6,
        "seconds": report["wall_seconds"],
    }


def of_seeds(row: Mapping[str, Any], name: str) -> list[float]:
    """A combination's values of a measure, one a seed; empty where one is missing: a mean of the others would flatter.

    Empty too where the result is older than the measure.
    """
    values: Sequence[float | None] = row["measures"].get(name, ())
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else []


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> float | None:
    known = [row["accuracy"] for row in rows if row["accuracy"] is not None]
    return statistics.mean(known) if known else None
